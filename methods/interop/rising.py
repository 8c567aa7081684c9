"""The first steps of ``torch.optim.NAdam`` and ``torch.optim.RAdam``, as methods with schedules."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dvi.methods.filter import Filter
from dvi.methods.moments import averaged, corrected, zero_average
from dvi.methods.preconditioners.diagonal import Diagonal, Scalar
from dvi.methods.spec import Hyperparameter, Method, Nu


class ScheduledNesterov(Method):
    """Nesterov's method with a momentum β that changes from step to step, as in ``torch.optim.SGD``.

    The buffer is b_t = β_t b_{t−1} + g_t and the step is η(g_t + β_t b_t).  So the filter on past steps is
    Q = (1 + β_t − qx)/(1 − qx), q = β_t²/β_{t−1}.

    Args:
        lr: η > 0, or a schedule.
        momentum: the schedule of β.
        before: the schedule of β one step earlier.
    """

    lr: Hyperparameter
    momentum: Hyperparameter
    before: Hyperparameter

    def P(self, nu: Nu) -> Scalar:
        """I/η."""
        return Scalar(1 / self.lr)

    def Q(self) -> Filter:
        """(1 + β − qx)/(1 − qx)."""
        q = self.momentum**2 / self.before
        return Filter([1.0 + self.momentum, -q], [1.0, -q])


class RisingNAdam(Method):
    """NAdam with bias correction and with its slow rise of the momentum (Dozat 2016), as in ``torch.optim.NAdam``.

    The step is P⁻¹(aₜgₜ + bₜmₜ), where m is an average of g and P = diag(√v̂ + ε)/η.  The coefficients are
    aₜ = (1−μₜ)/(1−Πμ) and bₜ = μₜ₊₁/(1−μₜ₊₁Πμ), where Πμ = μ₁⋯μₜ.  Both depend only on the number of the step, so they
    are schedules.

    Args:
        lr, beta1, beta2, eps: as in :class:`~dvi.methods.NAdam`.
        direct, average: the schedules a and b.
        direct_before, average_before: the same, one step earlier.
        weight_decay: λ of the decoupled weight decay ηλ.
    """

    lr: Hyperparameter
    beta1: Hyperparameter
    beta2: Hyperparameter
    eps: Hyperparameter
    direct: Hyperparameter
    average: Hyperparameter
    direct_before: Hyperparameter
    average_before: Hyperparameter
    weight_decay: Hyperparameter = 0.0

    def init(self, w: Tensor) -> Nu:
        """Zero v [d], and t = 0."""
        return zero_average(torch.zeros_like(w), counted=True)

    def f(self, nu: Nu, g: Tensor) -> Nu:
        """(1−β₂)(g⊙² − v), and one more step."""
        return averaged(nu, g**2, self.beta2)

    def P(self, nu: Nu) -> Diagonal:
        """diag(√v̂ + ε)/η."""
        return Diagonal((corrected(nu, self.beta2) ** 0.5 + self.eps) / self.lr)

    def Q(self) -> Filter:
        """Q = a + b(1−β₁)/(1−β₁x), with the output of the step before in place of the average."""
        if isinstance(self.average, float) and self.average == 0:
            return Filter()
        kept = self.beta1 * self.average / self.average_before
        return Filter([self.direct + self.average * (1 - self.beta1), -kept * self.direct_before], [1.0, -kept])

    def decay(self) -> Any:
        """ηλ; None if λ is the number 0."""
        return _decoupled(self.lr, self.weight_decay)


class RectifiedAdam(Method):
    """RAdam (Liu et al. 2020), as in ``torch.optim.RAdam``: Adam whose step is rectified by r, at first without P.

    Args:
        lr, beta1, beta2, eps: as in :class:`~dvi.methods.Adam`.
        rectified: 0 in the first steps, which are w − ηm̂, and 1 afterwards: a schedule that jumps, or 1.
        rectification: r in (0, 1], a schedule that tends to 1.
        weight_decay: λ of the decoupled weight decay ηλ.
    """

    lr: Hyperparameter
    beta1: Hyperparameter
    beta2: Hyperparameter
    eps: Hyperparameter
    rectified: Hyperparameter
    rectification: Hyperparameter
    weight_decay: Hyperparameter = 0.0

    def init(self, w: Tensor) -> Nu:
        """Zero v [d], and t = 0."""
        return zero_average(torch.zeros_like(w), counted=True)

    def f(self, nu: Nu, g: Tensor) -> Nu:
        """(1−β₂)(g⊙² − v), and one more step."""
        return averaged(nu, g**2, self.beta2)

    def P(self, nu: Nu) -> Diagonal:
        """diag(√v + ε)/(ηr√(1−β₂ᵗ)) once rectified, I/η before, times 1 − β₁ᵗ."""
        adaptive = (nu["v"] ** 0.5 + self.eps) / (self.rectification * (1 - self.beta2 ** nu["t"]) ** 0.5)
        P = self.rectified * adaptive + (1 - self.rectified)
        return Diagonal((1 - self.beta1 ** nu["t"]) * P / self.lr)

    def Q(self) -> Filter:
        """(1−β₁)/(1−β₁x)."""
        return Filter([1.0 - self.beta1], [1.0, -self.beta1])

    def decay(self) -> Any:
        """ηλ; None if λ is the number 0."""
        return _decoupled(self.lr, self.weight_decay)


def _decoupled(lr: Hyperparameter, weight_decay: Hyperparameter) -> Any:
    """The decoupled weight decay ηλ; None if λ is the number 0."""
    none = isinstance(weight_decay, (int, float)) and weight_decay == 0
    return None if none else lr * weight_decay
