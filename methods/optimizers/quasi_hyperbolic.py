"""Quasi-hyperbolic momentum (Ma & Yarats 2019): a mixture of the plain gradient and its average."""

from __future__ import annotations

from dvi.methods.filter import Filter
from dvi.methods.preconditioners.diagonal import Scalar
from dvi.methods.spec import Hyperparameter, Method, Nu


class QuasiHyperbolic(Method):
    """m_t = β m_{t−1} + (1−β) g_t,  w_{t+1} = w_t − η ((1−n) g_t + n m_t):  Q = (1−n) + n(1−β)/(1−βx).

    Args:
        lr: η > 0, or a schedule.
        momentum: β in [0, 1), or a schedule.
        share: n in [0, 1], the share of the average (ν in the source); 0 is gradient descent.
    """

    lr: Hyperparameter
    momentum: Hyperparameter = 0.999
    share: float = 0.7

    def P(self, nu: Nu) -> Scalar:
        """I/η."""
        return Scalar(1 / self.lr)

    def Q(self) -> Filter:
        """((1−n)(1−βx) + n(1−β))/(1−βx)."""
        b, n = self.momentum, self.share
        return Filter([1 - n + n * (1 - b), -(1 - n) * b], [1.0, -b])
