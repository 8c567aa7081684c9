"""Adam (Kingma & Ba 2015): an average of gradients over the root of an average of their squares."""

from __future__ import annotations

import torch
from torch import Tensor

from dvi.methods.filter import Filter
from dvi.methods.preconditioners.diagonal import Diagonal
from dvi.methods.spec import Hyperparameter, Method, Nu


class Adam(Method):
    """Adam: Q = (1−β₁)/(1−β₁x), P = diag(√v̂ + ε)/η with v an EMA of g⊙²; c = 2(1+β₁)/(1−β₁), 38 at β₁ = 0.9.

    Bias correction divides v by 1 − β₂ᵗ and the average of gradients by 1 − β₁ᵗ, where t is the number of updates made.
    Here 1 − β₁ᵗ is a factor of P, which gives the same steps.

    Args:
        lr: η > 0, or a schedule.
        beta1: β₁ in [0, 1) (a number, with bias correction).
        beta2: β₂ in [0, 1) (a number, with bias correction).
        eps: ε ≥ 0, added to √v̂.
        bias_correction: divide as above, as published.
    """

    lr: Hyperparameter
    beta1: Hyperparameter = 0.9
    beta2: Hyperparameter = 0.999
    eps: Hyperparameter = 1e-8
    bias_correction: bool = True

    def init(self, w: Tensor) -> Nu:
        """Zero v [d] and, with bias correction, t = 0."""
        v = torch.zeros_like(w)
        return {"v": v, "t": w.new_zeros(())} if self.bias_correction else {"v": v}

    def f(self, nu: Nu, g: Tensor) -> Nu:
        """(1−β₂)(g⊙² − v)."""
        change = {"v": (1 - self.beta2) * (g**2 - nu["v"])}
        return change | {"t": torch.ones_like(nu["t"])} if self.bias_correction else change

    def P(self, nu: Nu) -> Diagonal:
        """diag(√v̂ + ε)/η, times 1 − β₁ᵗ."""
        if not self.bias_correction:
            return Diagonal((nu["v"] ** 0.5 + self.eps) / self.lr)
        v = nu["v"] / (1 - self.beta2 ** nu["t"])
        return Diagonal((1 - self.beta1 ** nu["t"]) * (v**0.5 + self.eps) / self.lr)

    def Q(self) -> Filter:
        """(1−β₁)/(1−β₁x)."""
        return Filter([1.0 - self.beta1], [1.0, -self.beta1])
