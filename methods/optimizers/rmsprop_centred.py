"""Centred RMSProp: step sizes η/√(v − m²), with the running variance of the gradient for its square (Graves, 2013)."""

from __future__ import annotations

import torch
from torch import Tensor

from dvi.methods.preconditioners.diagonal import Diagonal
from dvi.methods.spec import Hyperparameter, Method, Nu


class CentredRMSProp(Method):
    """Centred RMSProp (Graves 2013, eqs. 38–41, without momentum): EMAs v of g⊙² and m of g, P = diag(√(v − m²) + ε)/η.

    v − m² is the variance of the gradient about its mean.  At the edge of stability it measures oscillation, elsewhere
    drift.  The flow takes m² as the square of the mean.  It neglects the oscillation of m itself, which is
    (1−β₂)²/(1+β₂)² of HΣH.

    Args:
        lr: η > 0, or a schedule.
        beta2: β₂ in (0, 1), or a schedule.
        eps: ε ≥ 0, added to the root.
    """

    lr: Hyperparameter
    beta2: Hyperparameter = 0.99
    eps: Hyperparameter = 1e-8

    def init(self, w: Tensor) -> Nu:
        """Zero v [d] and m [d]."""
        return {"v": torch.zeros_like(w), "m": torch.zeros_like(w)}

    def f(self, nu: Nu, g: Tensor) -> Nu:
        """(1−β₂)(g⊙² − v) and (1−β₂)(g − m)."""
        return {"v": (1 - self.beta2) * (g**2 - nu["v"]), "m": (1 - self.beta2) * (g - nu["m"])}

    def P(self, nu: Nu) -> Diagonal:
        """diag(√(v − m²) + ε)/η."""
        return Diagonal(((nu["v"] - nu["m"] ** 2) ** 0.5 + self.eps) / self.lr)
