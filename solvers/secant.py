"""How the force of oscillations bends, learned from the last step or two: a matrix of low rank.

The force −½P⁻¹∇³L(w)[Σ] changes with w, too.  As a rule so slowly that a macro step may keep ∇³L and correct it at its
end.  But −½P⁻¹∇⁴L[Σ] may have an eigenvalue far below those of −P⁻¹H, which are above −2 (a transformer with
cross-entropy: −15 to −34 with RMSProp), and then every correction overshoots and the next one reverses it.  As a rule
there is one such direction, and the change of the force over a step points along it: with s the displacement and y the
change of the force times h, the symmetric secant matrix of rank one is y ⟨y, ·⟩_P / ⟨y, s⟩_P.  Where a correction
reverses the last one all the same, there is another direction, and the step before knows of it: with the displacements
of both in S and the changes in Y it is Y (SᵀPY)⁻¹ YᵀP, of rank two.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from dvi.solvers.protocol import Array, host

_STIFF = 0.5  # h times the rate of decay up to which extrapolation and trapezoid rule are stable by themselves
_ALIKE = 1e-8  # changes of the force whose Gram matrix has a smaller eigenvalue, in parts of the largest, are one


@dataclass(frozen=True)
class Secant:
    """The model of how the force changes.

    Attributes:
        PY: P y of each change of the force, [d, m].
        rates: h times the rates of growth, below zero, along the stiff ones of its eigenvectors [r].
        modes: coefficients of y in those eigenvectors, which have length one in the norm of P, [m, r].
    """

    PY: Tensor
    rates: Array
    modes: Array

    @classmethod
    def of(cls, S: Tensor, Y: Tensor, PY: Tensor) -> Secant:
        """From displacements S and the changes of the force Y over them, [d, m] each."""
        YS, YY = host(PY.T @ S, PY.T @ Y)
        squares, Q = np.linalg.eigh(0.5 * (YY + YY.T))
        good = squares > _ALIKE * max(squares[-1], 1e-300)
        basis = Q[:, good] / np.sqrt(squares[good])
        times, V = np.linalg.eigh(basis.T @ (0.5 * (YS + YS.T)) @ basis)
        stiff = (times < 0) & (times > -1 / _STIFF)
        return cls(PY, 1 / times[stiff], basis @ V[:, stiff])

    @property
    def stiff(self) -> bool:
        """Does the force pull back so strongly that it matters?"""
        return len(self.rates) > 0

    def parts(self, d: Tensor) -> Array:
        """Coefficients a [m] such that a displacement d changes the force by Σ a y; 0 where nothing is stiff."""
        return self._coefficients(d, self.rates)

    def implicit(self, c: Tensor) -> Array:
        """Coefficients a [m] of the displacement δ = c + ½Σ a y: the trapezoid rule with the force where it leads."""
        return self._coefficients(c, self.rates / (1 - 0.5 * self.rates))

    def _coefficients(self, d: Tensor, rates: Array) -> Array:
        if not self.stiff:
            return np.zeros(len(self.modes))
        (along,) = host((self.PY.T @ d)[None])
        a: Array = self.modes @ (rates * (self.modes.T @ along[0]))
        return a / max(1.0, float(np.abs(a).max()))  # no further than the steps it was learned from
