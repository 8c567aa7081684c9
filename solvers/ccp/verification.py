"""Check that a candidate solves a cone complementarity problem in the caller's units, and the errors if none does."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import Final

import numpy as np

from dvi.solvers.ccp.scaling import Problem, cholesky, eigh, least_eigenvalue, norm
from dvi.solvers.svec import Array, smat, svec, triu

ACCEPTED_RESIDUAL: Final = 1e-10
ACCEPTED_STRICT: Final = 1e-6  # of the defects of S against |α| alone
ACCEPTED_GROWTH: Final = 1e10  # of |X||β|/|α|; beyond it the digits of β do not determine X
ROUNDING: Final = 1e-11  # curvature of β, relative to |β|, that cannot be distinguished from zero


class CCPError(ValueError):
    """There is no solution, or none that can be trusted; the message says why and what to do.

    `direction` [k,k], if known, is the symmetric matrix D that proves it: either ⟨D, β[D]⟩ < 0, or X grows without
    bound along D.
    """

    def __init__(self, message: str, direction: Array | None = None) -> None:
        super().__init__(message)
        self.direction = direction


@dataclass(frozen=True, slots=True, eq=False)
class Verdict:
    """A candidate X with its slack S, and three measures of how well it solves the problem.

    A small backward residual alone proves little: on a problem without a solution it falls to zero as |X| → ∞.
    """

    X: Array  # [k,k]
    S: Array  # [k,k]
    residual: float  # backward relative, see CCPResult
    strict: float  # the defects of S relative to |α| instead of |α| + |β||X|
    growth: float  # |X||β|/|α|

    @classmethod
    def of(cls, plain: Problem, X: Array) -> Verdict:
        """Judge X [k,k] by the problem without a congruence and without regularisation.

        That problem is the caller's, up to powers of two and an asymmetry of β at the level of rounding. Neither
        changes any of the three measures.
        """
        x = plain.from_caller(X)
        s = plain.b @ x - plain.a
        index = triu(plain.k)
        S = index.matrix(s * plain.s_unit)
        if not (np.isfinite(X).all() and np.isfinite(S).all()):
            return cls(X, S, np.inf, np.inf, np.inf)
        size_x = max(norm(x), 1e-300)
        size_s = plain.norm_a + plain.norm_b * size_x
        outside_x, outside_s = -least_eigenvalue(index.matrix(x)), -least_eigenvalue(index.matrix(s))
        defect_s = max(outside_s, abs(float(x @ s)) / size_x, 0.0)
        residual = max(outside_x / size_x, defect_s / size_s)
        return cls(X, S, float(residual), float(defect_s / plain.norm_a), size_x / plain.least_x)

    @property
    def accepted(self) -> bool:
        """Whether X may be handed to the caller."""
        return self.residual <= ACCEPTED_RESIDUAL and self.strict <= ACCEPTED_STRICT and self.growth <= ACCEPTED_GROWTH


def require_monotone(problem: Problem) -> None:
    """Raise CCPError with a direction if the symmetric part of β has a negative eigenvalue beyond rounding."""
    shifted = 0.5 * (problem.b + problem.b.T)
    shifted.ravel()[:: len(shifted) + 1] += ROUNDING * problem.norm_b
    if cholesky(shifted) is not None:
        return
    eigenvalues, vectors = eigh(shifted)
    D = smat(vectors[:, 0] * problem.congruence)
    raise CCPError(
        f"β is not monotone: ⟨D, β[D]⟩ < 0 along D =\n{_shown(D)}\n"
        f"(its curvature is {eigenvalues[0] / problem.norm_b:.1e} |β|). More oscillation along D would raise the "
        "effective sharpness instead of lowering it, so nothing keeps it at the edge of stability. The part of β "
        "that comes from the loss, ½TP⁻¹Tᵀ, is never negative: check how P(ν) responds, through f, to a larger "
        "gradient covariance, and the signs in (f, P). If the curvature is as small as rounding, compute α and β in "
        "float64.",
        D / np.abs(D).max(),
    )


def unbounded(plain: Problem, D: Array) -> CCPError:
    """Return the error for a problem whose X grows without bound along D [k,k]."""
    D = D / sqrt(float(np.vdot(D, D)))
    d = svec(D)
    push = float(plain.a @ d) / plain.norm_a
    answer = norm(plain.b @ d) / plain.norm_b if plain.norm_b > 0.0 else 0.0
    return CCPError(
        "no bounded solution, or one too large for double precision to determine: α pushes along a direction on which "
        f"β hardly acts, and X grows without bound along D =\n{_shown(D)}\n"
        f"(⟨α, D⟩ = {push:.1e} |α|, |β[D]| = {answer:.1e} |β|). The effective sharpness along D rises and oscillation "
        "does not lower it, as on a quadratic loss: no central flow stays at the edge of stability there. Check "
        "that the loss has a third derivative along D and that the run starts below the edge, or lower the learning "
        "rate.",
        D,
    )


def failure(plain: Problem, best: Verdict) -> CCPError:
    """Return the error for a monotone problem without an accepted candidate; `best` is the best one."""
    if best.growth > 1e6 and np.isfinite(best.X).all():
        return unbounded(plain, smat(plain.from_caller(best.X)))
    return CCPError(
        f"the cone complementarity problem could not be solved to {ACCEPTED_RESIDUAL:.0e}: residual "
        f"{best.residual:.1e} ({best.strict:.1e} relative to |α|), |X||β|/|α| = {best.growth:.1e}. α and β are finite "
        "and β is monotone, so they are badly scaled or nearly singular: compute them in float64, and leave out "
        "eigenvectors below the edge."
    )


def _shown(D: Array) -> str:
    return np.array2string(D / np.abs(D).max(), precision=3, suppress_small=True, threshold=100)
