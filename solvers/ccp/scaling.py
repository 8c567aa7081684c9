"""A cone complementarity problem scaled for floating point, and the linear algebra its solvers share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import frexp, inf, ldexp, sqrt

import numpy as np
from scipy.linalg import lapack

from dvi.solvers.svec import Array, triu

# LAPACK is called directly: for matrices this small the checks of numpy.linalg cost more than the factorisation.


def eigh(M: Array) -> tuple[Array, Array]:
    """Return eigenvalues [k] (ascending) and eigenvectors [k,k] (columns) of a symmetric M [k,k]."""
    eigenvalues, eigenvectors, info = lapack.dsyevd(M)
    if info != 0:  # divide and conquer did not converge
        eigenvalues, eigenvectors, info = lapack.dsyev(M)
    return (eigenvalues, eigenvectors) if info == 0 else (np.full(len(M), np.nan), eigenvectors)


def least_eigenvalue(M: Array) -> float:
    """Return the least eigenvalue of a symmetric M [k,k]."""
    eigenvalues, _, info = lapack.dsyevd(M, compute_v=0)
    return float(eigenvalues[0]) if info == 0 else float(eigh(M)[0][0])


def cholesky(M: Array) -> Array | None:
    """Return the lower Cholesky factor of a symmetric M [n,n], or None if M is not positive definite."""
    factor, info = lapack.dpotrf(M, lower=1, clean=1)
    return factor if info == 0 else None


def factorise(M: Array, symmetric: bool) -> Callable[[Array], Array] | None:
    """Return b ↦ M⁻¹ b with M [n,n] factorised once, by Cholesky if possible, else by LU; None if M is singular."""
    if symmetric:
        factor = cholesky(M)
        if factor is not None:
            return lambda b: np.asarray(lapack.dpotrs(factor, b, lower=1)[0])
    lu, pivots, info = lapack.dgetrf(M)
    return (lambda b: np.asarray(lapack.dgetrs(lu, pivots, b)[0])) if info == 0 else None


def norm(v: Array) -> float:
    """Return the Euclidean norm of v [n]."""
    return sqrt(v @ v)


def project(v: Array, k: int) -> Array:
    """Return the svec of the positive part of smat(v), v [n], n = k(k+1)/2."""
    index = triu(k)
    eigenvalues, vectors = eigh(index.matrix(v))
    return index.vector((vectors * np.maximum(eigenvalues, 0.0)) @ vectors.T)


def power_of_two(value: float) -> float:
    """Return the power of two at or just below a positive value, and 1 for zero or a non-finite one.

    Scaling by powers of two does not round.
    """
    return ldexp(1.0, frexp(value)[1] - 1) if 0.0 < value < inf else 1.0


@dataclass(frozen=True, slots=True, eq=False)
class Problem:
    """Find x [n] with smat(x) ⪰ 0, s = b x − a with smat(s) ⪰ 0, x·s = 0, where |a| and |b| are near 1.

    The caller's solution is X = x_unit · C smat(x) C, where C is a diagonal matrix of powers of two. This congruence
    maps the cone onto itself. C makes the diagonal of b even if α and β are graded (the eigenvalues of H change at
    very different rates).
    """

    k: int
    a: Array  # [n]
    b: Array  # [n,n]
    congruence: Array  # [n], C_i C_j at entry (i, j)
    x_unit: float
    s_unit: float
    norm_a: float
    norm_b: float  # a bound of the spectral norm of b, at most the Frobenius norm
    symmetric: bool  # b symmetric up to rounding (and then exactly)

    @classmethod
    def scaled(cls, alpha: Array, beta: Array, equilibrate: bool) -> Problem:
        """Return CCP(alpha [k,k], beta [n,n]) scaled by powers of two, with the congruence if `equilibrate`."""
        k = len(alpha)
        index = triu(k)
        # scale first by the largest entry, so that no square below under- or overflows
        a_scale, b_scale = power_of_two(float(np.abs(alpha).max())), power_of_two(float(np.abs(beta).max()))
        a, b = index.vector(alpha) / a_scale, beta / b_scale
        congruence = np.ones(index.n)
        if equilibrate:
            diagonal = np.abs(b[index.diagonal, index.diagonal])
            seen = diagonal > 1e-16 * diagonal.max()
            if seen.any():  # rows without curvature are scaled like the weakest row that has some
                diagonal[~seen] = diagonal[seen].min()
                c = np.exp2(np.round(-0.25 * np.log2(diagonal / diagonal.max())))
                congruence = c[index.rows] * c[index.columns]
                a, b = a * congruence, b * congruence[:, None] * congruence
        a_norm, b_norm = power_of_two(norm(a)), power_of_two(norm(b.ravel()) / sqrt(index.n))
        a, b = a / a_norm, b / b_norm
        magnitude = np.abs(b)
        norm_b = min(norm(b.ravel()), sqrt(magnitude.sum(0).max() * magnitude.sum(1).max()))
        symmetric = bool(np.abs(b - b.T).max() <= 1e-13 * norm_b)
        if symmetric:
            b = 0.5 * (b + b.T)
        x_unit, s_unit = (a_norm / b_norm) * (a_scale / b_scale), a_norm * a_scale
        return cls(k, a, b, congruence, x_unit, s_unit, norm(a), norm_b, symmetric)

    def to_caller(self, x: Array) -> Array:
        """Return the caller's X [k,k] of x [n]."""
        return triu(self.k).matrix(x * self.congruence * self.x_unit)

    def from_caller(self, X: Array) -> Array:
        """Return x [n] of the caller's X [k,k]."""
        return triu(self.k).vector(X) / self.congruence / self.x_unit

    @property
    def least_x(self) -> float:
        """The size |a|/|b| that a solution with S = 0 has at least: the scale of "small" for x."""
        return self.norm_a / self.norm_b

    def size_s(self, x: Array) -> float:
        """Return |a| + |b||x|, the size of the terms whose difference is s: the scale of "small" for s."""
        return self.norm_a + self.norm_b * max(norm(x), self.least_x)


@dataclass(frozen=True, slots=True, eq=False)
class Iterate:
    """The last point of a solver: a candidate x [n], its slack s [n], and its distance from a solution."""

    x: Array
    s: Array
    residual: float  # backward relative: the defect of b x − a = s, and of x·s = 0, over the size of their terms
    iterations: int
