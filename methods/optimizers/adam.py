"""Adam (Kingma & Ba 2015): an average of gradients over the root of an average of their squares."""

from __future__ import annotations

import torch
from torch import Tensor

from dvi.methods.filter import Filter
from dvi.methods.moments import averaged, corrected, zero_average
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
        return zero_average(torch.zeros_like(w), counted=self.bias_correction)

    def f(self, nu: Nu, g: Tensor) -> Nu:
        """(1−β₂)(g⊙² − v)."""
        return averaged(nu, g**2, self.beta2)

    def P(self, nu: Nu) -> Diagonal:
        """diag(√v̂ + ε)/η, times 1 − β₁ᵗ with bias correction."""
        root = corrected(nu, self.beta2) ** 0.5 + self.eps
        return Diagonal((1 - self.beta1 ** nu["t"]) * root / self.lr if self.bias_correction else root / self.lr)

    def Q(self) -> Filter:
        """(1−β₁)/(1−β₁x)."""
        return Filter([1.0 - self.beta1], [1.0, -self.beta1])
