"""Compares the library's solver of the cone complementarity problem with CVXPY, on usual and on hard instances."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from dvi.solvers import ccp
from dvi.solvers.protocol import Array
from dvi.solvers.svec import smat, svec

Instance = tuple[Array, Array]
RESIDUAL = 1e-4  # a residual above this counts as a failure; the library's own promise is 1e-10


def solve_with_cvxpy(alpha: Array, beta: Array, solver: str) -> Array:
    """X ⪰ 0 minimising ½⟨X, β[X]⟩ − ⟨α, X⟩; like the paper's code, it builds the problem anew at every call."""
    import cvxpy as cp

    k = len(alpha)
    X = cp.Variable((k, k), symmetric=True)
    rows, columns = np.triu_indices(k)
    weight = np.where(rows == columns, 1.0, np.sqrt(2.0))
    x = cp.multiply(weight, cp.hstack([X[i, j] for i, j in zip(rows, columns, strict=True)]))
    objective = 0.5 * cp.quad_form(x, cp.psd_wrap(0.5 * (beta + beta.T))) - svec(alpha) @ x
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cp.Problem(cp.Minimize(objective), [X >> 0]).solve(solver=solver)
    if X.value is None:
        raise ArithmeticError(f"{solver} found no solution")
    found: Array = np.asarray(X.value, dtype=np.float64)
    return 0.5 * (found + found.T)


def residual(alpha: Array, beta: Array, X: Array) -> float:
    """The natural residual |X − Π(X − S/|β|)| relative to |α|/|β|: zero at a solution, and small for a tiny X ≈ 0."""
    size = np.linalg.norm(beta, 2)
    eigenvalues, Q = np.linalg.eigh(X - (smat(beta @ svec(X)) - alpha) / size)
    projected = (Q * np.maximum(eigenvalues, 0.0)) @ Q.T
    return float(np.linalg.norm(X - projected) * size / np.linalg.norm(alpha))


# ---- instances ----------------------------------------------------------------------------------------


def usual(rng: np.random.Generator, k: int) -> Instance:
    """Between breakpoints: α = β[X] for a positive definite X, so X is interior."""
    _, beta = generic(rng, k)
    G = rng.normal(size=(k, 2 * k))
    return smat(beta @ svec(G @ G.T / k)), beta


def generic(rng: np.random.Generator, k: int) -> Instance:
    """Some directions oscillate, some do not."""
    n = k * (k + 1) // 2
    J = rng.normal(size=(n, 2 * n))
    alpha = _symmetric(rng, k) + rng.uniform(-1, 1) * np.sqrt(k) * np.eye(k)
    return alpha, J @ J.T / (2 * n)


def ill_conditioned(rng: np.random.Generator, k: int) -> Instance:
    """β of condition 1e8."""
    n = k * (k + 1) // 2
    Q = np.linalg.qr(rng.normal(size=(n, n)))[0]
    beta = (Q * np.logspace(0, -8, n)) @ Q.T if n > 1 else np.ones((1, 1))
    return _symmetric(rng, k), 0.5 * (beta + beta.T)


def graded(rng: np.random.Generator, k: int) -> Instance:
    """Critical directions whose rates differ by factors up to 10⁴."""
    alpha, beta = generic(rng, k)
    g = 10 ** rng.uniform(-2, 2, k)
    n = k * (k + 1) // 2
    C = np.array([svec(np.diag(g) @ smat(e) @ np.diag(g)) for e in np.eye(n)]).T
    return g[:, None] * alpha * g, C @ beta @ C.T


def degenerate(rng: np.random.Generator, k: int) -> Instance:
    """A direction just about to enter: X and S share a null vector."""
    _, beta = generic(rng, k)
    Q = np.linalg.qr(rng.normal(size=(k, k)))[0]
    x, s = np.abs(rng.normal(size=k)), np.abs(rng.normal(size=k))
    half = (k + 1) // 2
    x[half:], s[: half + 1] = 0.0, 0.0
    X, S = (Q * x) @ Q.T, (Q * s) @ Q.T
    return smat(beta @ svec(X)) - S, beta


FAMILIES: dict[str, Callable[[np.random.Generator, int], Instance]] = {
    "usual": usual,
    "generic": generic,
    "ill-conditioned": ill_conditioned,
    "graded": graded,
    "degenerate": degenerate,
}


def _symmetric(rng: np.random.Generator, k: int) -> Array:
    M = rng.normal(size=(k, k))
    return 0.5 * (M + M.T)


# ---- timing -------------------------------------------------------------------------------------------

SOLVERS: dict[str, Callable[[Array, Array], Array]] = {
    "dvi": lambda alpha, beta: ccp.solve(alpha, beta).X,
    "CVXOPT": lambda alpha, beta: solve_with_cvxpy(alpha, beta, "CVXOPT"),
    "CLARABEL": lambda alpha, beta: solve_with_cvxpy(alpha, beta, "CLARABEL"),
}


@dataclass
class Timing:
    """One solver on the instances of one family and size: median CPU milliseconds, share solved, worst residual."""

    family: str
    k: int
    solver: str
    milliseconds: float
    solved: float
    worst: float


def time_solvers(ks: tuple[int, ...], instances: int) -> Iterator[Timing]:
    """Time the solvers in turn on every instance, so that a slow phase of the machine affects all of them."""
    for family, make in FAMILIES.items():
        for k in ks:
            rng = np.random.default_rng([k, len(family)])
            count = instances if k < 20 else max(3, instances // 5)
            spent: dict[str, list[float]] = {name: [] for name in SOLVERS}
            found: dict[str, list[float]] = {name: [] for name in SOLVERS}
            for turn in range(count + 1):
                alpha, beta = make(rng, k)
                for name, solve in SOLVERS.items():
                    start = time.process_time()
                    off = _attempt(solve, alpha, beta)
                    if turn:  # the first call is not timed
                        spent[name].append(time.process_time() - start)
                        found[name].append(off(alpha, beta))
            for name in SOLVERS:
                good = [r for r in found[name] if r <= RESIDUAL]
                yield Timing(
                    family, k, name, 1e3 * float(np.median(spent[name])), len(good) / count, max(good, default=np.nan)
                )


def _attempt(solve: Callable[[Array, Array], Array], alpha: Array, beta: Array) -> Callable[[Any, Any], float]:
    try:
        X = solve(alpha, beta)
    except Exception:  # a solver that raises has not solved this instance
        return lambda alpha, beta: float("inf")
    return lambda alpha, beta: residual(alpha, beta, X)
