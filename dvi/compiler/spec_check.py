"""Compares the derivatives of f and P that the compiler uses with finite differences.

Automatic differentiation gives no warning when it loses a part: results of ``.item()``, ``.detach()`` and
``torch.no_grad()`` count as constants.  The compiler therefore differentiates a method in both ways, at one state that
its own f can reach.  It does so in float64 if the method runs in float64.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap
from torch.utils import _pytree as pytree

from dvi.compiler.jacobian_structure import curvature, diagonal_curvature, diagonal_slope, generic, random_like, typical
from dvi.compiler.leaks import likely_cause
from dvi.compiler.tangents import derivative
from dvi.methods import Method, Nu, SpecError
from dvi.methods.per_weight import PerWeight
from dvi.methods.validation import leaves

_ATTEMPTS = 3  # a kink may be near one state by chance, but a wrong derivative is wrong everywhere
_SEPARATELY = 6  # up to this many parts of ν are tested one by one, more of them together


class SpecCheck:
    """Checks the derivatives of a method's f and P at a state in general position.

    Args:
        method: the declaration.
        nu: ν after a first update.
        g: the gradient [d] of that update.

    Raises:
        SpecError: from ``forward`` and ``reverse``, if a derivative cannot be taken or is wrong.  The message names f
            or P, the part of ν, the likely cause and what to write instead.
    """

    def __init__(self, method: Method, nu: Nu, g: Tensor) -> None:
        self.name, self.method = type(method).__name__, method.at(0.0)
        self.scheduled = method.scheduled
        self.example = nu, g

    def forward(self) -> None:
        """Check forward derivatives of f (in ν, in g, twice in g) and of P (in ν, in scheduled hyperparameters)."""
        self._attempts(self._forward_once)

    def reverse(self, elementwise: bool, local: bool) -> None:
        """Check the cheaper formulas for the same derivatives, which are used if f acts entry by entry."""
        self._attempts(lambda at: self._reverse_once(at, elementwise, local))

    # ---- inside ---------------------------------------------------------------------------------------

    def _attempts(self, look: Callable[[_State], _Finding | None]) -> None:
        for seed in range(_ATTEMPTS):
            found = look(_State(self.method, *self.example, seed))
            if found is None:
                return
        assert found is not None
        raise self._error(found)

    def _forward_once(self, at: _State) -> _Finding | None:
        return (self._of_f(at) if leaves(at.nu) else None) or self._of_P(at)

    def _of_f(self, at: _State) -> _Finding | None:
        f, nu, g, h = self.method.f, at.nu, at.g, at.step
        for names, dnu in at.directions():
            with _Named(self, "f", f"in ν{names}"):
                slope = derivative(lambda nu: f(nu, g), nu, dnu)
            found = _compared(slope, _difference(lambda nu: f(nu, g), nu, dnu, h), f(nu, g), at.tol, at.eps / h)
            if found:
                return _Finding("f", f"in ν{names}", *found)
        v = at.gradient_direction()
        with _Named(self, "f", "in g"):
            slope = derivative(lambda g: f(nu, g), g, v)
            bend = curvature(self.method, nu, g, v, v)
        found = _compared(slope, _difference(lambda g: f(nu, g), g, v, h), f(nu, g), at.tol, at.eps / h)
        if found:
            return _Finding("f", "in g", *found)
        h = at.second_step
        middle, ends = f(nu, g), [f(nu, g + s * h * v) for s in (1, -1)]
        shown = pytree.tree_map(lambda a, b, m: ((a - m) + (b - m)) / h**2, *ends, middle)
        found = _compared(bend, shown, middle, at.tol, at.eps / h**2)
        return _Finding("f", "twice in g", *found) if found else None

    def _of_P(self, at: _State) -> _Finding | None:
        U, h = at.columns(), at.step

        def applied(nu: Nu, method: Method = self.method) -> Tensor:
            P, declared = method.P(nu), method.decay()
            if declared is not None:
                P = P.weighted(PerWeight.of(declared, at.g).map(lambda x: 1 - x / 2))
            return P.apply(U)

        for names, dnu in at.directions():
            with _Named(self, "P", f"in ν{names}"):
                slope = vmap(lambda d: derivative(applied, at.nu, d))(pytree.tree_map(lambda x: x[None], dnu))[0]
            found = _compared(slope, _difference(applied, at.nu, dnu, h), applied(at.nu), at.tol, at.eps / h)
            if found:
                return _Finding("P", f"in ν{names}", *found)
        for name in self.scheduled:
            value = float(getattr(self.method, name)) or 1e-3

            def moved(s: Any, name: str = name, value: float = value) -> Tensor:
                now = copy.copy(self.method)
                object.__setattr__(now, name, value * (1 + s))
                return applied(at.nu, now)

            with _Named(self, "P", f"in the schedule self.{name}"):
                slope = derivative(moved, U.new_zeros(()), U.new_ones(()))
            found = _compared(slope, (moved(h) - moved(-h)) / (2 * h), moved(0.0), at.tol, at.eps / h)
            if found:
                return _Finding("P", f"in the schedule self.{name}", *found)
        return None

    def _reverse_once(self, at: _State, elementwise: bool, local: bool) -> _Finding | None:
        nu, g, v = at.nu, at.g, at.gradient_direction()
        if elementwise:
            with _Named(self, "f", "in ν, backwards"):
                slope = diagonal_slope(self.method, nu, g)
            shown = derivative(lambda nu: self.method.f(nu, g), nu, pytree.tree_map(torch.ones_like, nu))
            found = _compared(slope, shown, self.method.f(nu, g), at.tol, at.eps)
            if found:
                return _Finding("f", "in ν, backwards", *found)
        with _Named(self, "f", "twice in g"):
            if local:
                bend = diagonal_curvature(self.method, nu, g)
                bend = pytree.tree_map(lambda c: c * v**2 if c.shape == v.shape else c, bend)
            else:
                bend = vmap(lambda h: curvature(self.method, nu, g, h, h))(v[None])
                bend = pytree.tree_map(lambda x: x[0], bend)
        found = _compared(bend, curvature(self.method, nu, g, v, v), self.method.f(nu, g), at.tol, at.eps)
        return _Finding("f", "twice in g", *found) if found else None

    def _call(self, which: str) -> Any:
        """One call of f or P at the method's first state."""
        nu, g = self.example
        return self.method.f(nu, g) if which == "f" else self.method.P(nu).apply(g)

    def unable(self, which: str, along: str, error: Exception) -> SpecError:
        """The error that says that a derivative of f or P cannot be taken, with the likely cause."""
        first = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        cause = likely_cause(lambda: self._call(which), error)
        return SpecError(f"{self.name}.{_signature(which)}: its derivative {along} cannot be taken. {cause} ({first})")

    def _error(self, found: _Finding) -> SpecError:
        cause = likely_cause(lambda: self._call(found.which))
        part = f", of ν{found.leaf}" if found.which == "f" else ""
        return SpecError(
            f"{self.name}.{_signature(found.which)}: its derivative {found.along}{part} is {found.size:.3g} by "
            f"automatic differentiation, but {found.shown:.3g} by differences of {found.which} itself (norms). {cause}"
        )


def _signature(which: str) -> str:
    """F or P with its arguments."""
    return "f(nu, g)" if which == "f" else "P(nu)"


class _Finding:
    """A wrong derivative: of f or P, its direction, the leaf, and the norms of the derivative and the difference."""

    def __init__(self, which: str, along: str, leaf: str, size: float, shown: float) -> None:
        self.which, self.along, self.leaf, self.size, self.shown = which, along, leaf, size, shown


class _Named:
    """A context that adds the names of the method, the function and the direction to exceptions raised inside."""

    def __init__(self, check: SpecCheck, which: str, along: str) -> None:
        self.check, self.which, self.along = check, which, along

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, Exception) and not isinstance(error, SpecError):
            raise self.check.unable(self.which, self.along, error) from error


class _State:
    """A state in general position that f can reach, and the step lengths of differences there.

    It is in float64, unless the method does not run in float64 (a constant of another dtype, a device without it).
    """

    def __init__(self, method: Method, nu: Nu, g: Tensor, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        try:
            at = pytree.tree_map(lambda x: x.double(), nu), g.double()
            change = pytree.tree_leaves(method.f(*at))
            method.P(at[0]).apply(at[1])
            exact = all(x.dtype == torch.float64 for x in change)
        except Exception:  # f may raise anything for a dtype that it was not written for
            exact = False
        self.nu, self.g = at if exact else (nu, g)
        self.nu = generic(method, self.nu, self.g, self.generator)
        # counters are whole numbers, at which functions of them may jump
        self.nu = pytree.tree_map(lambda x: x * (1 + 0.01 / (seed + 1)) if x.numel() == 1 else x, self.nu)
        self.g = typical(self.g) * self._away_from_zero(self.g)
        self.eps = float(torch.finfo(self.g.dtype).eps)
        fine = self.g.dtype == torch.float64
        #: relative lengths of differences: the errors are step² and eps/step of first, and eps/step² of second ones
        self.step = 10.0 ** -(5 + seed) if fine else 1e-2 / 2**seed
        self.second_step = 10.0 ** -(4 + 0.5 * seed) if fine else 5e-2
        self.tol = 1e-3 if fine else 3e-2

    def _away_from_zero(self, x: Tensor) -> Tensor:
        """Random numbers like x, of size ½ to 1½ and either sign."""
        r = random_like(x, self.generator)
        return torch.where(r > 0, 1.0, -1.0).to(x) * (0.5 + random_like(x, self.generator).abs().clamp(max=1.0))

    def gradient_direction(self) -> Tensor:
        """A change of g [d], each entry in proportion to that of g."""
        return self.g * self._away_from_zero(self.g)

    def columns(self) -> Tensor:
        """Vectors [d, 1] for P to act on."""
        return self._away_from_zero(self.g)[:, None]

    def directions(self) -> list[tuple[str, Nu]]:
        """Changes of ν, in proportion to its entries: one for each leaf if the leaves are few, else one for all."""
        flat, spec = pytree.tree_flatten(self.nu)
        moved = [x * self._away_from_zero(x) for x in flat]
        if len(flat) > _SEPARATELY:
            return [("", pytree.tree_unflatten(moved, spec))]
        paths = [path for path, _ in leaves(self.nu)]
        still = [torch.zeros_like(x) for x in flat]
        return [
            (path, pytree.tree_unflatten([*still[:i], moved[i], *still[i + 1 :]], spec)) for i, path in enumerate(paths)
        ]


def _difference(function: Callable[[Any], Any], at: Any, along: Any, h: float) -> Any:
    ends = [function(pytree.tree_map(lambda x, d, s=s: x + s * h * d, at, along)) for s in (1, -1)]
    return pytree.tree_map(lambda a, b: (a - b) / (2 * h), *ends)


def _compared(found: Any, shown: Any, value: Any, tol: float, rounding: float) -> tuple[str, float, float] | None:
    """The first leaf on which a derivative and a difference disagree, with both norms; None if they agree.

    A thousandth of the entries may disagree, because some of many entries are near a kink.

    Args:
        found, shown: pytrees of derivatives and of differences.
        value: what was differentiated.
        tol: relative.
        rounding: of a difference, relative to value.
    """
    for (path, a), b, x in zip(leaves(found), pytree.tree_leaves(shown), pytree.tree_leaves(value), strict=True):
        a, b, x = a.reshape(-1), b.reshape(-1), x.reshape(-1)
        kept = (a - b).abs().sort().values[: a.numel() - a.numel() // 1000]
        size, other = (float(torch.linalg.vector_norm(y)) for y in (a, b))
        allowed = tol * max(size, other) + 100 * rounding * float(torch.linalg.vector_norm(x))
        if b.isfinite().all() and not float(torch.linalg.vector_norm(kept)) <= allowed:
            return path, size, other
    return None


__all__ = ["SpecCheck"]
