"""RMSProp-Norm: one global adaptive step size η/√ν, where ν is an EMA of ‖∇L‖² (paper, §4)."""

from __future__ import annotations

from torch import Tensor

from dvi.methods.moments import averaged, corrected, zero_average
from dvi.methods.preconditioners.diagonal import Scalar
from dvi.methods.spec import Hyperparameter, Method, Nu


class RMSPropNorm(Method):
    """RMSProp-Norm (paper, §4): f = (1−β₂)(‖g‖² − v), P = (√v̂ + ε)/η · I.

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
        """Zero v [] and, with bias correction, t = 0."""
        return zero_average(w.new_zeros(()), counted=self.bias_correction)

    def f(self, nu: Nu, g: Tensor) -> Nu:
        """(1−β₂)(‖g‖² − v)."""
        return averaged(nu, (g**2).sum(), self.beta2)

    def P(self, nu: Nu) -> Scalar:
        """(√v̂ + ε)/η · I."""
        return Scalar((corrected(nu, self.beta2) ** 0.5 + self.eps) / self.lr)
