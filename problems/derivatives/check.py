"""Compares derivatives with differences of the derivatives one order lower.

Along a direction u, the loss and its gradient are computed at w ± hu.  These two points check all three orders:

    ⟨∇L, u⟩    against   (L₊ − L₋) / 2h
    H u        against   (g₊ − g₋) / 2h
    T[u, u]    against   (g₊ − 2g + g₋) / h²

At each step h, the differences have an uncertainty: their change since the last step (truncation), plus rounding.  A
derivative is judged at the step with the smallest relative uncertainty.  It is wrong if its error exceeds that.

The check is made at w and at a second point nearby.  There, a gradient that was right at w by accident (an old copy of
the weights, a cached value) is wrong.  A loss with kinks is compared piece by piece (``kinks.py``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dvi.problems.derivatives.kinks import SAME, Piece, Undecided
from dvi.problems.derivatives.protocol import Derivatives, Part, value_and_gradient
from dvi.problems.derivatives.safe import differentiable_layers

# In units of max(1, root mean square of w).
STEPS = (1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5)
# Rounding of an evaluation, in units of the machine epsilon: sums over examples and layers.
ROUNDING = 10
# By order.  A slope needs one division by h, so in single precision it is more accurate than a value divided twice.
TOLERANCE = {torch.float64: (1e-3, 1e-3, 1e-3), torch.float32: (5e-3, 3e-2, 3e-2)}

# Distances from w to the second point, in units of max(1, |w|): about as far as an optimizer moves.  The shorter ones
# are for losses that are not defined so far away.
DISTANCES = (0.1, 0.01, 0.001)
# A loss with kinks changes by the integral of its gradient.  With this many points on the way, the kinks leave an error
# of about one per cent.  A loss that jumps, or a wrong gradient, has a much larger error.
INTEGRAL_POINTS = 8
INTEGRAL_TOLERANCE = 0.1

ORDERS = ("loss", "gradient", "second derivative", "third derivative")

Evaluate = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Discrepancy:
    """A derivative that disagrees with differences.

    Attributes:
        order: its order (1, 2, 3).
        relative: its error, relative to itself.
        derivative: its value; for a vector, the entry with the largest error.
        difference: the value from differences there.
        entry: the index of that entry in w; None for the slope along a direction.

    """

    order: int
    relative: float
    derivative: float
    difference: float
    entry: int | None = None

    def __str__(self) -> str:
        what = f"the {ORDERS[self.order]}"
        if math.isinf(self.relative):
            return f"{what} cannot be compared with differences: the loss is not finite at any distance tried"
        numbers = f"{self.derivative:.4g}, but differences give {self.difference:.4g}"
        where = "along a direction it is" if self.entry is None else f"its entry {self.entry} along a direction is"
        return f"{what} is off by {self.relative:.1%}: {where} {numbers}"


@dataclass(frozen=True)
class NotFinite:
    """A loss or a derivative that is NaN or infinite.

    Attributes:
        order: its order (0: the loss itself).
        nan: number of entries that are NaN.
        infinite: number of entries that are infinite.
        of: number of all entries.
        entries: the indices of those that are not finite.

    """

    order: int
    nan: int
    infinite: int
    of: int
    entries: tuple[int, ...]

    def __str__(self) -> str:
        kinds = [f"{word} in {n}" for word, n in (("NaN", self.nan), ("infinite", self.infinite)) if n]
        if self.order == 0:
            return f"the loss is not finite ({'NaN' if self.nan else 'infinite'})"
        return (
            f"the {ORDERS[self.order]} is not finite, although the loss is: "
            f"{' and '.join(kinds)} of {self.of} {'entry' if self.of == 1 else 'entries'}"
        )


@dataclass(frozen=True)
class Jump:
    """A loss whose change is not the integral of its gradient: it jumps, or the gradient is not that of the loss.

    Attributes:
        change: the change of the loss from one point to another.
        integral: the integral of the gradient between them.
    """

    change: float
    integral: float
    order = 1

    def __str__(self) -> str:
        return (
            f"the gradient is not that of the loss: over a short way the loss changes by {self.change:.4g}, but the "
            f"integral of its gradient is {self.integral:.4g} (the loss jumps, or the gradient is wrong off w0)"
        )


@dataclass(frozen=True)
class Nested:
    """A loss that itself takes derivatives of a layer which torch differentiates wrongly in that nesting.

    Attributes:
        order: 0 if the loss itself is wrong, 1 if only its gradient is.
        value: of the loss, or of the entry of the gradient with the largest error.
        right: the same value with such layers composed of elementary operations.
    """

    order: int
    value: float
    right: float

    def __str__(self) -> str:
        what = "it" if self.order == 0 else "an entry of its gradient"
        return (
            f"the loss takes derivatives of its own, and torch gets those of a layer in it wrong: {what} is "
            f"{self.value:.4g}, but {self.right:.4g} where layers are composed of elementary operations. Compute the "
            "loss inside `with dvi.problems.differentiable_layers():`"
        )


Finding = Discrepancy | NotFinite | Jump | Nested


@dataclass(frozen=True)
class Verdict:
    """The result of an examination.

    Attributes:
        finding: the lowest order that is wrong, None if all are right.
        at: the weights [d] where that was.
        kinks: True if the loss has kinks between the two points.

    """

    finding: Finding | None
    at: Tensor
    kinks: bool


def examine(parts: Sequence[Part], derivatives: Derivatives, w: Tensor) -> Verdict:
    """Compare all derivatives with differences, at w and at a second point nearby.

    Args:
        parts: the loss, as a sum.
        derivatives: its second and third derivatives, which are tested.
        w: the weights [d] at which they are tested.

    """

    def loss(x: Tensor) -> tuple[Tensor, Tensor]:
        return value_and_gradient(parts, x)

    found, piece = compare(parts, derivatives, w)
    if found:
        return Verdict(found, w, False)
    near = _second_point(loss, w)
    if near is None:
        return Verdict(None, w, False)
    found, _ = compare(parts, derivatives, near, directions=1)
    if found:
        return Verdict(found, near, False)
    try:
        kinks = piece is not None and piece.ends_before(near)
    except Undecided:
        kinks = True
    return Verdict(_integrate(loss, w, near) if kinks else None, w, kinks)


def examine_gradient(parts: Sequence[Part], w: Tensor) -> NotFinite | Jump | None:
    """Compare the gradient alone with the loss, on the way from w to a second point nearby: 10 gradients."""

    def loss(x: Tensor) -> tuple[Tensor, Tensor]:
        return value_and_gradient(parts, x)

    gradient = loss(w)[1]
    near = _second_point(loss, w)
    return _not_finite(1, gradient) or (None if near is None else _integrate(loss, w, near))


def compare(
    parts: Sequence[Part], derivatives: Derivatives, w: Tensor, directions: int = 2
) -> tuple[Finding | None, Piece | None]:
    """Compare all derivatives at w with differences: of the loss or, if it has pieces, of the piece that contains w.

    Returns:
        the error, if any, and the piece; None for the piece if there is only one.

    """

    def loss(x: Tensor) -> tuple[Tensor, Tensor]:
        return value_and_gradient(parts, x)

    try:
        piece = Piece(parts, w)
        if piece.only:
            return find_discrepancy(loss, derivatives, w, directions), None
        return find_discrepancy(piece, derivatives, w, directions), piece
    except Undecided:
        return find_discrepancy(loss, derivatives, w, directions), None


def find_discrepancy(
    evaluate: Evaluate, derivatives: Derivatives, w: Tensor, directions: int = 2
) -> Discrepancy | NotFinite | Nested | None:
    """Return the lowest order whose derivative at w disagrees with differences, or None if all agree.

    Args:
        evaluate: loss [] and gradient [d] at weights [d].
        derivatives: the second and third derivatives under test.
        w: the weights [d] at which they are tested.
        directions: 2 for a random direction and the gradient's, 1 for the random one alone.

    """
    value, gradient = evaluate(w)
    if found := _not_finite(0, value) or _not_finite(1, gradient):
        return found
    probes = _directions(w, gradient, directions)
    products = derivatives.hvp(w, torch.stack(probes))
    if found := _not_finite(2, *products):
        return found
    squares = derivatives.squares(w, torch.stack(probes))
    if found := _not_finite(3, *squares):
        return found
    # w itself is rounded, by ε|w| in random directions.  That changes the loss by its slope, and the gradient by about
    # as much as a displacement of the same length in another random direction.
    eps = ROUNDING * torch.finfo(w.dtype).eps
    moved = _norm(w) * _norm(products[0])
    rounding = (eps * (abs(value.item()) + _norm(w) * _norm(gradient)), eps * (_norm(gradient) + moved))
    with differentiable_layers():
        right_value, right_gradient = evaluate(w)
    same = SAME[w.dtype]
    if abs(right_value - value) > same * abs(value) + rounding[0]:
        return Nested(0, value.item(), right_value.item())
    off = right_gradient - gradient
    if _norm(off) > same * _norm(gradient) + rounding[1]:
        entry = int(off.abs().argmax())
        return Nested(1, gradient[entry].item(), right_gradient[entry].item())
    worst: dict[int, Discrepancy] = {}
    for u, product, square in zip(probes, products, squares, strict=True):
        exact = [torch.dot(gradient, u), product, square]
        for error in _certain_errors(evaluate, exact, w, gradient, u, rounding):
            if error.order not in worst or error.relative > worst[error.order].relative:
                worst[error.order] = error
    return next((worst[i] for i in (1, 2, 3) if worst[i].relative > TOLERANCE[w.dtype][i - 1]), None)


def _certain_errors(
    evaluate: Evaluate,
    exact: list[Tensor],
    w: Tensor,
    gradient: Tensor,
    u: Tensor,
    rounding: tuple[float, float],
) -> list[Discrepancy]:
    """Return, for each order, the error of the derivative along u that exceeds its uncertainty, relative to itself.

    Args:
        evaluate: as in :func:`find_discrepancy`.
        exact: the derivatives under test along u: [], [d], [d].
        w: as in :func:`find_discrepancy`.
        gradient: ∇L(w) [d].
        u: a unit vector [d].
        rounding: absolute uncertainty of a loss and of a gradient.

    """
    unit = max(1.0, _norm(w) / math.sqrt(len(w)))
    before: list[Tensor] | None = None
    least = [math.inf] * 3
    errors = [Discrepancy(order, math.inf, math.nan, math.nan) for order in (1, 2, 3)]
    for step in STEPS:
        h = step * unit
        (above, g_above), (below, g_below) = evaluate(w + h * u), evaluate(w - h * u)
        differences = [
            (above - below) / (2 * h),
            (g_above - g_below) / (2 * h),
            (g_above - gradient + (g_below - gradient)) / h**2,
        ]
        noise = [rounding[0] / h, rounding[1] / h, rounding[1] / h**2]
        settled = before is not None
        for i in range(3):
            off, size = _norm(exact[i] - differences[i]), max(_norm(differences[i]), torch.finfo(w.dtype).tiny)
            uncertainty = noise[i] + (_norm(differences[i] - before[i]) if before else math.inf)
            if uncertainty / size < least[i]:
                least[i] = uncertainty / size
                relative = max(off - uncertainty, 0.0) / max(_norm(exact[i]), size)
                errors[i] = _described(i + 1, relative, exact[i], differences[i])
            settled &= off + uncertainty <= TOLERANCE[w.dtype][i] * size
        if settled:
            break
        before = differences
    return errors


def _described(order: int, relative: float, exact: Tensor, differences: Tensor) -> Discrepancy:
    if exact.ndim == 0:
        return Discrepancy(order, relative, exact.item(), differences.item())
    entry = int((exact - differences).abs().argmax())
    return Discrepancy(order, relative, exact[entry].item(), differences[entry].item(), entry)


def _not_finite(order: int, *derivatives: Tensor) -> NotFinite | None:
    """The first of these tensors, [] or [d], that is not finite."""
    nan = torch.stack([x.isnan() for x in derivatives]).any(0).reshape(-1)
    bad = ~torch.stack([x.isfinite() for x in derivatives]).all(0).reshape(-1)
    if not bool(bad.any()):
        return None
    entries = tuple(bad.nonzero()[:, 0].tolist())
    return NotFinite(order, int(nan.sum()), len(entries) - int(nan.sum()), bad.numel(), entries)


def _second_point(evaluate: Evaluate, w: Tensor) -> Tensor | None:
    """A point at some distance from w at which the loss is defined, if there is one."""
    u = _random_direction(w, seed=1)
    for distance in DISTANCES:
        x = w + distance * max(1.0, _norm(w)) * u
        if math.isfinite(evaluate(x)[0].item()):
            return x
    return None


def _integrate(evaluate: Evaluate, a: Tensor, b: Tensor) -> Jump | None:
    """Compare the change of the loss from a to b with the integral of its gradient."""
    (start, g_start), (end, g_end) = evaluate(a), evaluate(b)
    way = b - a
    slopes = [float(torch.dot(g_start, way)), float(torch.dot(g_end, way))]
    inside = [float(torch.dot(evaluate(a + way * (i / INTEGRAL_POINTS))[1], way)) for i in range(1, INTEGRAL_POINTS)]
    integral = (sum(slopes) / 2 + sum(inside)) / INTEGRAL_POINTS
    # Again with half as many points, to estimate the error.
    coarse = (sum(slopes) / 2 + sum(inside[1::2])) / (INTEGRAL_POINTS // 2)
    change = float(end - start)
    size = max(abs(slope) for slope in [*slopes, *inside])
    rounding = ROUNDING * torch.finfo(a.dtype).eps * (abs(float(start)) + _norm(a) * _norm(g_start))
    if (
        not math.isfinite(integral)
        or abs(change - integral) <= INTEGRAL_TOLERANCE * size + abs(integral - coarse) + rounding
    ):
        return None
    return Jump(change, integral)


def _directions(w: Tensor, gradient: Tensor, count: int) -> list[Tensor]:
    """Return unit vectors: a random one, which has a part in every coordinate, and that of the gradient."""
    units = [_random_direction(w, seed=0)]
    if _norm(gradient) > 0:
        units.append(gradient / torch.linalg.vector_norm(gradient))
    return units[:count]


def _random_direction(w: Tensor, seed: int) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    u = torch.randn(w.shape, generator=generator, dtype=torch.float64, device="cpu").to(w.device, w.dtype)
    unit: Tensor = u / torch.linalg.vector_norm(u)
    return unit


def _norm(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x))
