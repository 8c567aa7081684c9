"""The cone complementarity problem of a central flow: X ⪰ 0, S = β[X] − α ⪰ 0, ⟨X, S⟩ = 0 (Definition 8 of the paper).

α holds the rates at which the critical eigenvalues would rise past the edge of stability. β says how strongly
oscillation along the critical eigenvectors pushes them back. X is the covariance of that oscillation in the critical
basis. For symmetric β ⪰ 0 this is the optimality condition of min ½⟨X, β[X]⟩ − ⟨α, X⟩ over X ⪰ 0.

Lemma 5: for β ≻ 0 there is exactly one solution; for a singular β ⪰ 0 solutions differ by matrices in ker β.
(The lemma claims existence for every symmetric β ⪰ 0, but the minimum must also be attained: β = 0, α = 1 has no
solution. Such a problem is refused with an error that names the direction along which X would grow.) β need not be
symmetric, and for some methods it is not. It must be monotone: ⟨D, β[D]⟩ ≥ 0 for symmetric D.

A cascade of solvers is tried, the cheapest first. Each result is verified in the caller's own units before it is
accepted:

    empty, scalar, zero    closed forms: k = 0; k = 1; α ⪯ 0
    interior               β[X] = α, the solution if X comes out positive: usual between breakpoints
    newton                 semismooth Newton from the projection of that X, or from a warm start ("newton, warm")
    interior point         primal–dual interior point method, then Newton as soon as Newton converges
    newton, again          either of the two, polished by Newton in the caller's scaling
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import isfinite, sqrt
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import ArrayLike

from dvi.solvers.ccp.interior_point import centre, interior_point
from dvi.solvers.ccp.newton import newton
from dvi.solvers.ccp.scaling import Iterate, Problem, cholesky, eigh, factorise, least_eigenvalue, norm, project
from dvi.solvers.ccp.verification import (
    ACCEPTED_RESIDUAL,
    ACCEPTED_STRICT,
    ROUNDING,
    CCPError,
    Verdict,
    failure,
    require_monotone,
    unbounded,
)
from dvi.solvers.svec import Array, dimension, triu

__all__ = ["CCPError", "CCPResult", "solve"]

_TOLERANCE = 1e-13  # asked of the solvers
_POLISHED = 1e-15  # of Newton's method after the interior point method: X is as ill-conditioned as β
_TRUSTED = 1e-12  # the residual that they usually reach; above it the next rung may do better
# defects, in |α|, at which the interior point method hands over to Newton's method. From 0.03 Newton's method nearly
# always converges; if it does not, the interior point method goes on.
_HANDOVERS = (3e-2, 1e-5, 0.0)
_REGULARISATION = 1e-12  # of a β that is singular to working precision: 100 times below what is accepted

Matrix: TypeAlias = ArrayLike | torch.Tensor


@dataclass(frozen=True, slots=True, eq=False)
class CCPResult:
    """A verified solution, in the units of the caller.

    The residual is a relative backward error, the largest of

        −λ_min(X)/|X|,    −λ_min(S)/(|α| + |β||X|),    |⟨X, S⟩|/(|X|(|α| + |β||X|)),

    with Frobenius norms of X and α, and a bound of the spectral norm of β.
    """

    X: Array  # [k,k]
    S: Array  # [k,k], β[X] − α as computed, rounding included
    residual: float
    path: str  # the rung that solved it, as in the table above
    iterations: int  # of that rung


def solve(alpha: Matrix, beta: Matrix, warm: CCPResult | Matrix | None = None) -> CCPResult:
    """Solve CCP(α, β), Definition 8 of the paper: X ⪰ 0, S = β[X] − α ⪰ 0, ⟨X, S⟩ = 0.

    alpha [k,k] is symmetric and beta [n,n], n = k(k+1)/2, acts on svec (`dvi.solvers.svec`): arrays, or tensors of
    any device and dtype, copied once to float64 on the host. `warm`, an earlier result or its X, saves time if the
    problem has changed little. It never changes the answer beyond rounding (for a singular β: beyond ker β). A warm
    start of another size, or with entries that are not finite, is ignored, since k changes along a flow.

    Raises CCPError if the input is not finite or has the wrong shape, if α is not symmetric, if β is not monotone, or
    if there is no bounded solution.
    """
    a, b = _validated(alpha, beta)
    k = len(a)
    if k == 0:
        return CCPResult(np.zeros((0, 0)), np.zeros((0, 0)), 0.0, "empty", 0)
    # An overflow in a trial step makes an iterate that is not finite. Every rung tests for that, so no warning is
    # needed.
    with np.errstate(all="ignore"):
        largest = a[0, 0] if k == 1 else eigh(a)[0][-1]
        if largest <= 0.0:
            return CCPResult(np.zeros((k, k)), -a, 0.0, "zero", 0)
        return _solve_positive(a, b, _warm_X(warm, k))


class _Attempt(NamedTuple):
    verdict: Verdict
    path: str
    iterations: int


def _solve_positive(alpha: Array, beta: Array, warm: Array | None) -> CCPResult:
    """Solve for an α [k,k] with a positive eigenvalue, so that X ≠ 0."""
    plain = Problem.scaled(alpha, beta, equilibrate=False)
    if plain.norm_b == 0.0:
        top = eigh(alpha)[1][:, -1]
        raise unbounded(plain, np.outer(top, top))
    if plain.k == 1 and plain.b[0, 0] > 0.0:
        best = _Attempt(Verdict.of(plain, alpha / beta), "scalar", 0)
    else:
        even = Problem.scaled(alpha, beta, equilibrate=True)
        require_monotone(even)
        best = _attempt(even, plain, warm, "warm")
        # The congruence helps if α and β are graded, and hurts in a few cases: polish or solve those without it.
        if not best.verdict.residual <= _TRUSTED and (even.congruence != 1.0).any():
            again = _attempt(plain, plain, best.verdict.X if isfinite(best.verdict.residual) else None, "again")
            best = min(best, again, key=lambda attempt: attempt.verdict.residual)
    verdict, path, iterations = best
    if not verdict.accepted:
        raise failure(plain, verdict)
    return CCPResult(verdict.X, verdict.S, verdict.residual, path, iterations)


def _attempt(problem: Problem, plain: Problem, start: Array | None, label: str) -> _Attempt:
    """Solve in the coordinates of `problem`, from the caller's X [k,k] if there is one, and judge by `plain`."""
    regular = _regularised(problem)
    found, path = _cascade(regular, None if start is None else regular.from_caller(start))
    path = f"{path}, {label}" if start is not None and path == "newton" else path
    return _Attempt(Verdict.of(plain, problem.to_caller(found.x)), path, found.iterations)


def _cascade(problem: Problem, start: Array | None) -> tuple[Iterate, str]:
    """Return the iterate of the first rung that solves the problem, else that of the last rung, and the rung's name."""
    free = _unconstrained(problem)
    if free is not None:
        if least_eigenvalue(triu(problem.k).matrix(free.x)) >= 0.0 and _good(problem, free, ACCEPTED_RESIDUAL):
            return free, "interior"
        start = free.x if start is None else start
    if start is not None and np.isfinite(start).all():
        x = project(start, problem.k)
        s = project(problem.b @ x - problem.a, problem.k)
        # if short steps are needed, Newton's method seldom converges, and the next rung costs less
        found = newton(problem, x, s, max_iterations=12, tolerance=_TOLERANCE, halvings=4)
        if _good(problem, found, _TRUSTED):
            return found, "newton"
    return _interior_point(problem), "interior point"


def _interior_point(problem: Problem) -> Iterate:
    """Solve by the interior point method until Newton's method converges from its iterate: half the iterations."""
    at, iterations = centre(problem.k), 0
    for strict in _HANDOVERS:
        found, further = interior_point(problem, at, 60 - iterations, _TOLERANCE, strict)
        iterations += found.iterations
        if further is None:
            break
        at = further
        polished = newton(problem, at.x, at.s, max_iterations=8, tolerance=_POLISHED, halvings=4)
        if _good(problem, polished, _TRUSTED):
            return replace(polished, iterations=iterations + polished.iterations)
    if found.residual <= 1e-4:
        polished = newton(problem, found.x, found.s, max_iterations=6, tolerance=_POLISHED)
        if polished.residual < found.residual:
            return replace(polished, iterations=iterations + polished.iterations)
    return replace(found, iterations=iterations)


def _unconstrained(problem: Problem) -> Iterate | None:
    """Solve β[X] = α, S = 0; None if β is singular."""
    apply_inverse = factorise(problem.b, problem.symmetric)
    if apply_inverse is None:
        return None
    x = apply_inverse(problem.a)
    x = x + apply_inverse(problem.a - problem.b @ x)  # one step of refinement
    return Iterate(x, np.zeros_like(x), norm(problem.b @ x - problem.a) / problem.size_s(x), 0)


def _good(problem: Problem, found: Iterate, residual: float) -> bool:
    """Whether an iterate has a residual of at most `residual` and would pass the verification."""
    return found.residual <= residual and found.residual * problem.size_s(found.x) <= ACCEPTED_STRICT * problem.norm_a


def _regularised(problem: Problem) -> Problem:
    """Return the problem; if β is singular to working precision, it is made invertible."""
    factor = cholesky(problem.b if problem.symmetric else 0.5 * (problem.b + problem.b.T))
    if factor is not None and factor.diagonal().min() ** 2 >= ROUNDING * problem.norm_b:
        return problem
    return replace(problem, b=problem.b + _REGULARISATION * problem.norm_b * np.eye(len(problem.b)))


def _validated(alpha: Matrix, beta: Matrix) -> tuple[Array, Array]:
    """Return α [k,k], symmetrised, and β [n,n] as float64 on the host."""
    a, b = _host(alpha, "α"), _host(beta, "β")
    if a.ndim != 2 or a.shape[0] != a.shape[1]:
        raise CCPError(f"α must be a square matrix [k, k], and has shape {a.shape}")
    n = dimension(len(a))
    if b.shape != (n, n):
        raise CCPError(f"β must be [{n}, {n}], k(k+1)/2 (svec) for an α of k = {len(a)}, and has shape {b.shape}")
    for name, M in (("α", a), ("β", b)):
        if not np.isfinite(M).all():
            raise CCPError(f"{name} is not finite: the loss, a derivative of it or P⁻¹ overflows or is undefined here")
    skew = np.abs(a - a.T).max(initial=0.0)
    if skew > _rounding(alpha) * np.abs(a).max(initial=0.0):
        raise CCPError(f"α must be symmetric: |α − αᵀ| reaches {skew:.1e}, more than rounding explains")
    return 0.5 * a + 0.5 * a.T, b


def _host(M: Matrix, name: str) -> Array:
    if isinstance(M, torch.Tensor):
        M = M.detach().cpu()
        M = M.numpy() if M.is_complex() else M.to(torch.float64).numpy()  # numpy knows no bfloat16
    M = np.asarray(M)
    if M.dtype.kind not in "fiu":
        raise CCPError(f"{name} must hold real numbers, and holds {M.dtype}")
    return M.astype(np.float64, order="C")  # the order of summation must not depend on the layout


def _rounding(M: Matrix) -> float:
    """Return the relative asymmetry that rounding explains in the caller's precision: half its digits."""
    if isinstance(M, torch.Tensor):
        return sqrt(torch.finfo(M.dtype).eps) if M.dtype.is_floating_point else 0.0
    dtype = np.asarray(M).dtype
    return sqrt(np.finfo(dtype).eps) if dtype.kind == "f" else 0.0


def _warm_X(warm: CCPResult | Matrix | None, k: int) -> Array | None:
    """Return the X [k,k] of a warm start, or None if it cannot be used."""
    if warm is None:
        return None
    X = warm.X if isinstance(warm, CCPResult) else _host(warm, "the warm start")
    return 0.5 * (X + X.T) if X.shape == (k, k) and np.isfinite(X).all() else None
