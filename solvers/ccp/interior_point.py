"""Primal–dual interior point method for a cone complementarity problem: slow, but the most robust.

It uses Nesterov–Todd scaling and Mehrotra's predictor–corrector. Let X = LLᵀ, S = RRᵀ and d the singular values of RᵀL.
Then there is a G with X = G diag(d) Gᵀ and S = G⁻ᵀ diag(d) G⁻¹. In its coordinates X and S are the same diagonal
matrix, and a step solves

    dx + ds = rhs,    ds = Gᵀ(β[G dx Gᵀ] + r)G,    r = β[X] − α − S,

so (I + TᵀβT) dx = rhs − Tᵀr with T = skron(G). This matrix is positive definite even if X and S are close to the
boundary. The change of S is computed as β[dX] + r, not as rhs − dx. Then r falls to the level of rounding and stays
there.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

import numpy as np
from scipy.linalg import lapack

from dvi.solvers.ccp.scaling import Iterate, Problem, cholesky, factorise, least_eigenvalue, norm
from dvi.solvers.svec import Array, skron, triu

_PATIENCE = 5  # iterations without any progress before giving up
_RUNAWAY = 1e16  # growth of X that no bounded solution has
_TINY = 1e-300


@dataclass(frozen=True, slots=True, eq=False)
class Inside:
    """A pair x, s [n] strictly inside the cone, with the Cholesky factors [k,k] that prove it."""

    x: Array
    s: Array
    of_x: Array
    of_s: Array


def centre(k: int) -> Inside:
    """Return X = S = I, the start of the method if nothing is known."""
    one, unit = triu(k).identity, np.eye(k)
    return Inside(one, one, unit, unit)


def interior_point(
    problem: Problem, at: Inside, max_iterations: int, tolerance: float, strict: float = 0.0
) -> tuple[Iterate, Inside | None]:
    """Solve the problem from a point inside the cone.

    Returns the best iterate and the point to continue from. The residual of the iterate says whether it is a solution.
    The point is None if going on would gain nothing. The method stops at a residual of `tolerance`. It stops earlier if
    the defects of the last iterate fall below `strict` times |α|, also for a large X: that is close enough for
    Newton's method.
    """
    best = Iterate(at.x, at.s, inf, 0)
    least_gap = least_defect = inf
    idle = 0
    for iteration in range(max_iterations + 1):
        x, s = at.x, at.s
        defect = problem.b @ x - problem.a - s
        gap = float(x @ s)
        size_x, size_defect = max(norm(x), problem.least_x), norm(defect)
        size_s = problem.norm_a + problem.norm_b * size_x
        worst = max(size_defect, gap / size_x)
        residual = worst / size_s
        progress = residual < 0.5 * best.residual or gap < 0.7 * least_gap or size_defect < 0.7 * least_defect
        idle = 0 if progress else idle + 1
        least_gap, least_defect = min(least_gap, gap), min(least_defect, size_defect)
        if residual < best.residual:
            best = Iterate(x, s, residual, iteration)
        if worst <= strict * problem.norm_a and residual > tolerance:
            return best, at
        done = residual <= tolerance or size_x > _RUNAWAY * problem.least_x
        if done or idle >= _PATIENCE or iteration == max_iterations:
            break
        following = _step(problem, at, defect, gap)
        if following is None:
            break
        at = following
    return best, None


@dataclass(frozen=True, slots=True, eq=False)
class _Direction:
    dx: Array  # [n], of X in scaled coordinates
    ds: Array  # [n], of S in scaled coordinates
    of_x: Array  # [n]
    of_s: Array  # [n]
    inverse_length: float  # X or S leaves the cone at 1/inverse_length times the direction


def _step(problem: Problem, at: Inside, defect: Array, gap: float) -> Inside | None:
    """Return the next x, s [n], strictly inside the cone; None if rounding no longer allows a step."""
    k, index = problem.k, triu(problem.k)
    _, d, Vt, info = lapack.dgesdd(at.of_s.T @ at.of_x)
    if info != 0 or not d[-1] > 0.0:
        return None
    root = np.sqrt(d)
    T = skron((at.of_x @ Vt.T) / root)
    matrix = T.T @ (problem.b @ T)
    matrix.ravel()[:: index.n + 1] += 1.0
    solve = factorise(matrix, problem.symmetric)
    if solve is None:
        return None
    shift = T.T @ defect
    to_unit = 1.0 / (root[index.rows] * root[index.columns])  # scaled X = S = I instead of diag(d)

    def direction(rhs: Array) -> _Direction:
        dx = solve(rhs - shift)
        of_x = T @ dx
        of_s = problem.b @ of_x + defect
        ds = T.T @ of_s
        least = min(least_eigenvalue(index.matrix(dx * to_unit)), least_eigenvalue(index.matrix(ds * to_unit)))
        return _Direction(dx, ds, of_x, of_s, max(-least, _TINY))

    diagonal = np.zeros(index.n)
    diagonal[index.diagonal] = d
    predictor = direction(-diagonal)
    length = min(1.0, 1.0 / predictor.inverse_length)
    mean_gap = gap / k
    predicted_gap = float((diagonal + length * predictor.dx) @ (diagonal + length * predictor.ds)) / k
    # a predictor that leaves the cone at once carries no information: then mostly recentre
    centering = min(1.0, max(predicted_gap / mean_gap, 0.0) ** 3) if length > 1e-2 else 0.8
    target = index.matrix(predictor.dx) @ index.matrix(predictor.ds)
    target = -target - target.T
    target.ravel()[:: k + 1] += 2.0 * centering * mean_gap
    corrector = direction(index.vector(target / (d[:, None] + d)) - diagonal)
    length = min(1.0, (0.9 + 0.0995 * length) / corrector.inverse_length)
    return _stay_inside(at, corrector, length, k)


def _stay_inside(at: Inside, direction: _Direction, length: float, k: int) -> Inside | None:
    """Shorten the step until x and s are positive definite in spite of rounding."""
    index = triu(k)
    for _ in range(8):
        x, s = at.x + length * direction.of_x, at.s + length * direction.of_s
        of_x, of_s = cholesky(index.matrix(x)), cholesky(index.matrix(s))
        if of_x is not None and of_s is not None:
            return Inside(x, s, of_x, of_s)
        length *= 0.7
    return None
