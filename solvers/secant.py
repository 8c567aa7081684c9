"""How the force of oscillations bends, learned from one step: a matrix of rank one.

The force −½P⁻¹∇³L(w)[Σ] changes with w, too.  As a rule so slowly that a macro step may keep ∇³L and correct it at its
end.  But −½P⁻¹∇⁴L[Σ] may have an eigenvalue far below those of −P⁻¹H, which are above −2 (a transformer with
cross-entropy: −15 to −34 with RMSProp), and then every correction overshoots and the next one reverses it.  As a rule
there is one such direction, and the change of the force over a step points along it: with s the displacement and y the
change of the force times h, the symmetric secant matrix of rank one is y ⟨y, ·⟩_P / ⟨y, s⟩_P.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from dvi.solvers.protocol import host

_STIFF = 0.5  # h times the rate of decay up to which extrapolation and trapezoid rule are stable by themselves


@dataclass(frozen=True)
class Secant:
    """The rank-one model of how the force changes.

    Attributes:
        Py: P y [d].
        ys, yy: ⟨y, s⟩ and ⟨y, y⟩ in the P-metric; −yy/ys is h times the rate of decay.
    """

    Py: Tensor
    ys: float
    yy: float

    @classmethod
    def of(cls, s: Tensor, y: Tensor, Py: Tensor) -> Secant:
        """From a displacement s [d] and the change of the force y [d] over it."""
        ys, yy = host((Py @ s)[None], (Py @ y)[None])
        return cls(Py, float(ys[0]), float(yy[0]))

    @property
    def stiff(self) -> bool:
        """Does the force pull back so strongly that it matters?"""
        return self.ys < 0 and self.yy > -_STIFF * self.ys

    def part(self, d: Tensor) -> float:
        """τ such that a displacement d changes the force by τ y; 0 where nothing is stiff."""
        return float(np.clip(float(self.Py @ d) / self.ys, -1.0, 1.0)) if self.stiff else 0.0

    def implicit(self, c: Tensor) -> float:
        """τ of the displacement δ = c + ½τ y: the trapezoid rule with the force where it leads, not where it starts."""
        return float(np.clip(float(self.Py @ c) / (self.ys - 0.5 * self.yy), -1.0, 1.0)) if self.stiff else 0.0
