"""Are the derivatives right?  They are compared with differences of what lies one order below.

Along a direction u the loss is known at w ± hu, with its gradient.  Those two points check all three orders:

    ⟨∇L, u⟩    against   (L₊ − L₋) / 2h
    H u        against   (g₊ − g₋) / 2h
    T[u, u]    against   (g₊ − 2g + g₋) / h²

At each step h the differences have an uncertainty: what they changed by since the last step (truncation), and rounding.
A derivative is judged at the step where that is the smallest part of it, and is wrong if it is off by more.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dvi.problems.derivatives import Derivatives

# In units of max(1, root mean square of w).
STEPS = (1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5)
# Rounding of an evaluation, in units of the machine epsilon: sums over examples and layers.
ROUNDING = 10
TOLERANCE = {torch.float64: 1e-3, torch.float32: 3e-2}

ORDERS = ("gradient", "second derivative", "third derivative")


@dataclass(frozen=True)
class Discrepancy:
    """A derivative of which order (1, 2, 3) is off by how much, relative to itself."""

    order: int
    relative: float

    def __str__(self) -> str:
        return f"the {ORDERS[self.order - 1]} is off by {self.relative:.1%}"


def find_discrepancy(
    evaluate: Callable[[Tensor], tuple[Tensor, Tensor]], derivatives: Derivatives, w: Tensor
) -> Discrepancy | None:
    """Return the lowest order whose derivative at w disagrees with differences, or None if all agree.

    Args:
        evaluate: loss [] and gradient [d] at weights [d].
        derivatives: the second and third derivatives under test.
        w: where to look [d].

    """
    value, gradient = evaluate(w)
    probe, *others = _directions(w, gradient)
    # w itself is rounded, by ε|w| in directions at random: that moves the loss by its slope, and the gradient by about
    # as much as the same length of another random direction.
    eps = ROUNDING * torch.finfo(w.dtype).eps
    moved = _norm(w) * _norm(derivatives.hvp(w, probe[None]))
    rounding = (eps * (abs(value.item()) + _norm(w) * _norm(gradient)), eps * (_norm(gradient) + moved))
    errors = [0.0] * 3
    for u in (probe, *others):
        along_u = _certain_errors(evaluate, derivatives, w, gradient, u, rounding)
        errors = [max(pair) for pair in zip(errors, along_u, strict=True)]
    for order, error in enumerate(errors, start=1):
        if error > TOLERANCE[w.dtype]:
            return Discrepancy(order, error)
    return None


def _certain_errors(
    evaluate: Callable[[Tensor], tuple[Tensor, Tensor]],
    derivatives: Derivatives,
    w: Tensor,
    gradient: Tensor,
    u: Tensor,
    rounding: tuple[float, float],
) -> list[float]:
    """Return by how much, for each order, the derivative along u is certainly off, relative to itself.

    Args:
        evaluate: as in :func:`find_discrepancy`.
        derivatives: as in :func:`find_discrepancy`.
        w: as in :func:`find_discrepancy`.
        gradient: ∇L(w) [d].
        u: a unit vector [d].
        rounding: absolute uncertainty of a loss and of a gradient.

    """
    exact = [
        torch.dot(gradient, u),
        derivatives.hvp(w, u[None])[0],
        derivatives.squares(w, u[None])[0],
    ]
    if not all(math.isfinite(_norm(derivative)) for derivative in exact):
        return [0.0 if math.isfinite(_norm(derivative)) else math.inf for derivative in exact]
    unit = max(1.0, _norm(w) / math.sqrt(len(w)))
    before: list[Tensor] | None = None
    least = [math.inf] * 3
    errors = [math.inf] * 3
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
                errors[i] = max(off - uncertainty, 0.0) / max(_norm(exact[i]), size)
            settled &= off + uncertainty <= TOLERANCE[w.dtype] * size
        if settled:
            break
        before = differences
    return errors


def _directions(w: Tensor, gradient: Tensor) -> list[Tensor]:
    """Return unit vectors: a random one, which no coordinate escapes, and the gradient's, where much happens."""
    generator = torch.Generator("cpu").manual_seed(0)
    random = torch.randn(w.shape, generator=generator, dtype=torch.float64, device="cpu").to(w.device, w.dtype)
    candidates = [random, gradient]
    return [u / torch.linalg.vector_norm(u) for u in candidates if _norm(u) > 0]


def _norm(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x))
