"""NAdam (Dozat 2016): Adam with Nesterov's look-ahead."""

from __future__ import annotations

import torch
from torch import Tensor

from dvi.methods.filter import Filter
from dvi.methods.preconditioners.diagonal import Diagonal
from dvi.methods.spec import Hyperparameter, Method, Nu


class NAdam(Method):
    """NAdam: Q = (1−β₁)(1+β₁−β₁x)/(1−β₁x), P = diag(√v + ε)/η; c = 2(1+β₁)/((1−β₁)(1+2β₁)), 13.57 at β₁ = 0.9.

    It has neither bias correction nor the slow warm-up of β₁.  ``torch.optim.NAdam`` behaves like this once these have
    faded.

    Args:
        lr: η > 0, or a schedule.
        beta1: β₁ in [0, 1), or a schedule.
        beta2: β₂ in [0, 1), or a schedule.
        eps: ε ≥ 0, added to √v.
    """

    lr: Hyperparameter
    beta1: Hyperparameter = 0.9
    beta2: Hyperparameter = 0.999
    eps: Hyperparameter = 1e-8

    def init(self, w: Tensor) -> Nu:
        """Zero v [d]."""
        return {"v": torch.zeros_like(w)}

    def f(self, nu: Nu, g: Tensor) -> Nu:
        """(1−β₂)(g⊙² − v)."""
        return {"v": (1 - self.beta2) * (g**2 - nu["v"])}

    def P(self, nu: Nu) -> Diagonal:
        """diag(√v + ε)/η."""
        return Diagonal((nu["v"] ** 0.5 + self.eps) / self.lr)

    def Q(self) -> Filter:
        """(1−β₁)(1+β₁−β₁x)/(1−β₁x)."""
        b = self.beta1
        return Filter([(1 - b) * (1 + b), -(1 - b) * b], [1.0, -b])
