"""Semismooth Newton on the normal map of a cone complementarity problem.

X and S are the positive and negative part of one symmetric matrix, Z = X − γS. So X ⪰ 0, S ⪰ 0 and XS = 0 hold exactly
for every Z. One equation remains (Robinson's normal map):

    F(Z) = γ(β[Z₊] − α) − Z₋ = 0,        Z₊ = X, Z₋ = γS.

In the eigenbasis of Z, with p and y its positive and negative parts, the derivative of Z₊ multiplies entry (i, j) of
the change H of Z by ω_ij = (p_i + p_j)/(p_i + p_j + y_i + y_j). The Newton equation is solved for v = ω∘H. On the
entries with ω > 0 its matrix is γβ + diag((1−ω)/ω), which is positive definite if β is. The other entries follow
without a solve.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dvi.solvers.ccp.scaling import Iterate, Problem, eigh, factorise, norm, power_of_two
from dvi.solvers.svec import Array, skron, triu

_ARMIJO = 1e-3
_FLOOR = 1e-12  # relative |F| below which rounding, not the step, decides whether |F| falls


@dataclass(frozen=True, slots=True, eq=False)
class _Point:
    z: Array  # [n]
    eigenvalues: Array  # [k]
    Q: Array  # [k,k]
    x: Array  # [n]
    F: Array  # [n]
    size: float  # |F|


def newton(problem: Problem, x: Array, s: Array, max_iterations: int, tolerance: float, halvings: int = 12) -> Iterate:
    """Solve the problem from the guess x, s [n], both positive semidefinite, with an Armijo line search on |F|.

    It converges quadratically near a strictly complementary solution. Elsewhere it may stall, which shows in the
    residual. A step is tried in `halvings` lengths, each half of the one before; then the method gives up.
    """
    gamma = _balance(problem, x, s)
    b, a = gamma * problem.b, gamma * problem.a
    point = _evaluate(b, a, x - gamma * s, problem.k)
    iterations = 0
    while iterations < max_iterations and point.size > tolerance * gamma * problem.size_s(point.x):
        step = _newton_step(b, point, problem.symmetric)
        if step is None:
            break
        following = _line_search(b, a, point, step, _FLOOR * gamma * problem.size_s(point.x), halvings)
        if following is None:
            break
        point, iterations = following, iterations + 1
    residual = point.size / (gamma * problem.size_s(point.x))
    return Iterate(point.x, (point.x - point.z) / gamma, residual, iterations)


def _balance(problem: Problem, x: Array, s: Array) -> float:
    """Return the γ that makes X and γS equal in size: an ill-conditioned β makes X large.

    A slack below |α|, as when S is nearly zero, is ignored: it would magnify rounding.
    """
    return power_of_two(max(norm(x), problem.least_x) / max(norm(s), problem.norm_a))


def _evaluate(b: Array, a: Array, z: Array, k: int) -> _Point:
    index = triu(k)
    eigenvalues, Q = eigh(index.matrix(z))
    x = index.vector((Q * np.maximum(eigenvalues, 0.0)) @ Q.T)
    F = b @ x - a + z - x
    return _Point(z, eigenvalues, Q, x, F, norm(F))


def _newton_step(b: Array, point: _Point, symmetric: bool) -> Array | None:
    """Return the step [n] of Z, or None if the Newton matrix is singular."""
    index = triu(len(point.eigenvalues))
    p, y = np.maximum(point.eigenvalues, 0.0), np.maximum(-point.eigenvalues, 0.0)
    p_pair, y_pair = p[index.rows] + p[index.columns], y[index.rows] + y[index.columns]
    moves_x = p_pair > 0.0  # ω > 0
    rotation = skron(point.Q)
    rhs = -(rotation.T @ point.F)
    if not moves_x.any():
        return rotation @ rhs
    p_pair, y_pair = p_pair[moves_x], y_pair[moves_x]
    into_x = rotation[:, moves_x]
    b_into_x = b @ into_x
    matrix = into_x.T @ b_into_x
    matrix.ravel()[:: len(p_pair) + 1] += y_pair / p_pair
    solve = factorise(matrix, symmetric)
    if solve is None:
        return None
    v = solve(rhs[moves_x])
    h = np.empty(index.n)
    h[moves_x] = v * (p_pair + y_pair) / p_pair
    h[~moves_x] = rhs[~moves_x] - rotation[:, ~moves_x].T @ (b_into_x @ v)
    return rotation @ h if np.isfinite(h).all() else None


def _line_search(b: Array, a: Array, point: _Point, step: Array, floor: float, halvings: int) -> _Point | None:
    """Return the first point along the step, halved as needed, at which |F| falls enough; None if there is none."""
    t = 1.0
    for _ in range(halvings):
        tried = _evaluate(b, a, point.z + t * step, len(point.Q))
        if tried.size <= (1.0 - _ARMIJO * t) * point.size:
            return tried
        if point.size <= floor:
            return tried if tried.size < point.size else None
        t *= 0.5
    return None
