"""Primal–dual interior point method for a cone complementarity problem: slow, and the one that always arrives.

Nesterov–Todd scaling and Mehrotra's predictor–corrector. With X = LLᵀ, S = RRᵀ and d the singular values of RᵀL, some
G has X = G diag(d) Gᵀ and S = G⁻ᵀ diag(d) G⁻¹: in its coordinates X and S are one diagonal matrix, and a step solves

    dx + ds = rhs,    ds = Gᵀ(β[G dx Gᵀ] + r)G,    r = β[X] − α − S,

so (I + TᵀβT) dx = rhs − Tᵀr with T = skron(G), which is positive definite however close X and S are to the boundary.
The change of S is computed as β[dX] + r, not as rhs − dx: r then falls to the level of rounding and stays there.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

import numpy as np

from dvi.solvers.ccp_problem import Iterate, Problem, cholesky, eigh, factorise, norm
from dvi.solvers.svec import Array, skron, smat, svec, triu

_PATIENCE = 5  # iterations without any progress before giving up
_RUNAWAY = 1e16  # growth of X that no bounded solution has
_TINY = 1e-300


def interior_point(problem: Problem, max_iterations: int, tolerance: float) -> Iterate:
    """Solve the problem from X = S = I; return the best iterate, whose residual says whether it is a solution."""
    index = triu(problem.k)
    x, s = index.identity.copy(), index.identity.copy()
    best = Iterate(x, s, inf, 0)
    least_gap = least_defect = inf
    idle = 0
    for iteration in range(max_iterations + 1):
        defect = problem.b @ x - problem.a - s
        gap = float(x @ s)
        size_x, size_defect = max(norm(x), problem.least_x), norm(defect)
        residual = max(size_defect, gap / size_x) / problem.size_s(x)
        progress = residual < 0.5 * best.residual or gap < 0.7 * least_gap or size_defect < 0.7 * least_defect
        idle = 0 if progress else idle + 1
        least_gap, least_defect = min(least_gap, gap), min(least_defect, size_defect)
        if residual < best.residual:
            best = Iterate(x, s, residual, iteration)
        done = residual <= tolerance or size_x > _RUNAWAY * problem.least_x
        if done or idle >= _PATIENCE or iteration == max_iterations:
            break
        following = _step(problem, x, s, defect)
        if following is None:
            break
        x, s = following
    return best


@dataclass(frozen=True, slots=True, eq=False)
class _Direction:
    dx: Array  # [n], of X in scaled coordinates
    ds: Array  # [n], of S in scaled coordinates
    of_x: Array  # [n]
    of_s: Array  # [n]
    inverse_length: float  # X or S leaves the cone at 1/inverse_length times the direction


def _step(problem: Problem, x: Array, s: Array, defect: Array) -> tuple[Array, Array] | None:
    """Return the next x, s [n], strictly inside the cone; None where the numbers no longer allow one."""
    k, index = problem.k, triu(problem.k)
    L, R = cholesky(smat(x)), cholesky(smat(s))
    if L is None or R is None:
        return None
    _, d, Vt = np.linalg.svd(R.T @ L)
    root = np.sqrt(d)
    T = skron((L @ Vt.T) / root)
    matrix = T.T @ (problem.b @ T)
    matrix.ravel()[:: index.n + 1] += 1.0
    solve = factorise(matrix, problem.symmetric)
    if solve is None or not d[-1] > 0.0:
        return None
    shift = T.T @ defect
    to_unit = 1.0 / (root[index.rows] * root[index.columns])  # scaled X = S = I instead of diag(d)

    def direction(rhs: Array) -> _Direction:
        dx = solve(rhs - shift)
        of_x = T @ dx
        of_s = problem.b @ of_x + defect
        ds = T.T @ of_s
        least = min(eigh(smat(dx * to_unit))[0][0], eigh(smat(ds * to_unit))[0][0])
        return _Direction(dx, ds, of_x, of_s, max(-float(least), _TINY))

    diagonal = np.zeros(index.n)
    diagonal[index.diagonal] = d
    predictor = direction(-diagonal)
    length = min(1.0, 1.0 / predictor.inverse_length)
    mean_gap = float(x @ s) / k
    predicted_gap = float((diagonal + length * predictor.dx) @ (diagonal + length * predictor.ds)) / k
    # a predictor that leaves the cone at once has nothing to say: then mostly recentre
    centering = min(1.0, max(predicted_gap / mean_gap, 0.0) ** 3) if length > 1e-2 else 0.8
    second_order = smat(predictor.dx) @ smat(predictor.ds)
    target = 2.0 * centering * mean_gap * np.eye(k) - second_order - second_order.T
    corrector = direction(svec(target / (d[:, None] + d)) - diagonal)
    length = min(1.0, (0.9 + 0.0995 * length) / corrector.inverse_length)
    return _stay_inside(x, s, corrector, length)


def _stay_inside(x: Array, s: Array, direction: _Direction, length: float) -> tuple[Array, Array] | None:
    """Shorten the step until rounding, too, leaves x and s positive definite."""
    for _ in range(8):
        new_x, new_s = x + length * direction.of_x, s + length * direction.of_s
        if cholesky(smat(new_x)) is not None and cholesky(smat(new_s)) is not None:
            return new_x, new_s
        length *= 0.7
    return None
