"""The convex program that RMSProp solves: the cheapest diagonal p with H ⪯ 2 diag(p) (paper, eq. 12 and App. B).

    primal    min_p  Σ pᵢ + cᵢ²/pᵢ                    s.t.  H ⪯ 2 diag(p)
    dual      max_Σ̂  ⟨Σ̂, H⟩ + 2 Σ cᵢ √(1 − 2Σ̂ᵢᵢ)     s.t.  Σ̂ ⪰ 0,  diag Σ̂ ≤ ½

With c = |g|/η the minimiser is RMSProp's stationary preconditioner; with c = 0 it is the alternative one of Fig. 9.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np

from dvi.solvers.errors import ConvergenceError, MemoryLimitError
from dvi.solvers.protocol import Array

LARGEST = 120  # the interior point method factorises matrices of order d²/2: seconds at 60, minutes at 120


@dataclass(frozen=True)
class Bounds:
    """A primal and a dual value, each at a feasible point; the optimum lies between them."""

    primal: float
    dual: float

    @property
    def gap(self) -> float:
        """(primal − dual)/|primal|: a bound on the relative error of both values."""
        return (self.primal - self.dual) / max(abs(self.primal), np.finfo(np.float64).tiny)


@dataclass(frozen=True)
class StableDiagonal:
    """The minimiser p [d], the multiplier Σ̂ [d, d] of the constraint, and the bounds that follow from them."""

    p: Array
    multiplier: Array
    bounds: Bounds


def bounds(p: Array, c: Array, top: float, multiplier_diagonal: Array, multiplier_on_H: float) -> Bounds:
    """Primal and dual values of a pair (p, Σ̂), both first scaled into their feasible sets.

    Args:
        p: [d], positive where c or H is not zero.
        c: [d].
        top: the largest eigenvalue of diag(p)⁻¹H; above 2, p is scaled up by top/2.
        multiplier_diagonal: diag Σ̂ [d], Σ̂ ⪰ 0; if an entry exceeds ½, Σ̂ is scaled down.
        multiplier_on_H: ⟨Σ̂, H⟩.
    """
    p = p * max(1.0, top / 2)
    scale = min(1.0, 0.5 / max(float(multiplier_diagonal.max(initial=0.0)), np.finfo(np.float64).tiny))
    moving = p > 0
    primal = p.sum() + (c[moving] ** 2 / p[moving]).sum()
    dual = scale * multiplier_on_H + 2 * (c * np.sqrt(np.maximum(1 - 2 * scale * multiplier_diagonal, 0.0))).sum()
    return Bounds(float(primal), float(dual))


def require_small(d: int) -> None:
    """Refuse a semidefinite program that is too large.

    Raises:
        MemoryLimitError: if d is larger than :data:`LARGEST`.
    """
    if d > LARGEST:
        raise MemoryLimitError(
            f"The semidefinite program of d = {d} weights needs about d⁴ numbers and d⁶ operations; the limit is "
            f'd = {LARGEST}. Use the fixed point (by="fixed point"), which needs only Hessian–vector products.'
        )


def stable_diagonal(H: Array, c: Array) -> StableDiagonal:
    """Solve the program for a dense H as a semidefinite program (CVXPY, Clarabel): the independent reference.

    Args:
        H: symmetric [d, d].
        c: [d].

    Returns:
        p, Σ̂, and their bounds; the gap shows the accuracy reached.  The error of p is of order √gap.

    Raises:
        MemoryLimitError: if d is larger than :data:`LARGEST`.
        ConvergenceError: if Clarabel finds no solution.
        ValueError: if shapes do not fit or H is not symmetric.
    """
    import cvxpy

    cp: Any = cvxpy
    tol = 1e-13  # more than rounding allows, which gives a gap of 1e-10 or less

    H, c = np.asarray(H, dtype=np.float64), np.abs(np.asarray(c, dtype=np.float64))
    d = len(c)
    if H.shape != (d, d) or not np.allclose(H, H.T, rtol=0, atol=1e-9 * max(np.abs(H).max(initial=0.0), 1e-300)):
        raise ValueError(f"H must be a symmetric matrix [{d}, {d}] for c [{d}], but has shape {H.shape}.")
    require_small(d)
    scale = max(np.abs(H).max(initial=0.0), c.max(initial=0.0)) or 1.0
    p = cp.Variable(d)
    slack = cp.Variable(d, nonneg=True)  # cᵢ²/pᵢ ≤ slackᵢ; left out where c is zero, because p may be zero there
    pulled = np.flatnonzero(c > 0)
    above = 2 * cp.diag(p) - H / scale >> 0
    constraints = [above, p >= 0]
    constraints += [cp.quad_over_lin(c[i] / scale, p[i]) <= slack[i] for i in pulled]
    problem = cp.Problem(cp.Minimize(cp.sum(p) + cp.sum(slack)), constraints)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # "may be inaccurate": the gap measures it
        problem.solve(solver="CLARABEL", tol_gap_abs=tol, tol_gap_rel=tol, tol_feas=tol)
    if p.value is None:
        raise ConvergenceError(f"Clarabel found no stable diagonal ({problem.status}): is H finite and well scaled?")
    best = np.maximum(p.value, 0.0)
    values, Q = np.linalg.eigh(0.5 * (above.dual_value + above.dual_value.T))
    multiplier = (Q * np.maximum(values, 0.0)) @ Q.T
    lowest = float(np.linalg.eigvalsh(2 * np.diag(best) - H / scale)[0])
    lifted = best + max(0.0, -lowest) / 2  # feasible to rounding
    found = bounds(lifted, c / scale, 2.0, np.diag(multiplier), float((multiplier * H / scale).sum()))
    return StableDiagonal(scale * best, multiplier, Bounds(scale * found.primal, scale * found.dual))
