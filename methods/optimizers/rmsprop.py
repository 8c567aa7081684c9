"""RMSProp: step sizes η/√ν for each coordinate, where ν is an EMA of ∇L⊙² (paper, §5)."""

from __future__ import annotations

import torch
from torch import Tensor

from dvi.methods.preconditioners.diagonal import Diagonal
from dvi.methods.spec import Hyperparameter, Method, Nu


class RMSProp(Method):
    """RMSProp (paper, §5 and C.7): f = (1−β₂)(g⊙² − v), P = diag(√v̂ + ε)/η.

    Args:
        lr: η > 0, or a schedule.
        beta2: β₂ in [0, 1), or a schedule (with bias correction: a number).
        eps: ε ≥ 0, added to √v̂.
        bias_correction: divide v by 1 − β₂ᵗ, where t is the number of updates made; t is then part of ν.
    """

    lr: Hyperparameter
    beta2: Hyperparameter
    eps: Hyperparameter = 0.0
    bias_correction: bool = False

    def init(self, w: Tensor) -> Nu:
        """Zero v [d] and, with bias correction, t = 0."""
        v = torch.zeros_like(w)
        return {"v": v, "t": w.new_zeros(())} if self.bias_correction else {"v": v}

    def f(self, nu: Nu, g: Tensor) -> Nu:
        """(1−β₂)(g⊙² − v)."""
        change = {"v": (1 - self.beta2) * (g**2 - nu["v"])}
        return change | {"t": torch.ones_like(nu["t"])} if self.bias_correction else change

    def P(self, nu: Nu) -> Diagonal:
        """diag(√v̂ + ε)/η."""
        v = nu["v"] / (1 - self.beta2 ** nu["t"]) if self.bias_correction else nu["v"]
        return Diagonal((v**0.5 + self.eps) / self.lr)
