"""AdaGrad: step sizes η/√s for each coordinate, where s is the sum of all ∇L⊙² (Duchi, Hazan and Singer, 2011)."""

from __future__ import annotations

import torch
from torch import Tensor

from dvi.methods.preconditioners.diagonal import Diagonal
from dvi.methods.spec import Hyperparameter, Method, Nu


class AdaGrad(Method):
    """AdaGrad with a diagonal matrix (Duchi, Hazan and Singer, JMLR 12, 2011, Fig. 1): f = g⊙², P = diag(√s + ε)/η.

    The step sizes only shrink, so every oscillating direction leaves the edge of stability sooner or later.

    Args:
        lr: η > 0, or a schedule.
        eps: ε ≥ 0, added to √s.
    """

    lr: Hyperparameter
    eps: Hyperparameter = 1e-10

    def init(self, w: Tensor) -> Nu:
        """Zero s [d]."""
        return {"s": torch.zeros_like(w)}

    def f(self, nu: Nu, g: Tensor) -> Nu:
        """g⊙²."""
        return {"s": g**2}

    def P(self, nu: Nu) -> Diagonal:
        """diag(√s + ε)/η."""
        return Diagonal((nu["s"] ** 0.5 + self.eps) / self.lr)
