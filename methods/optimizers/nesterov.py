"""Nesterov's accelerated gradient with constant momentum (``torch.optim.SGD(nesterov=True)``)."""

from __future__ import annotations

from dvi.methods.filter import Filter
from dvi.methods.preconditioners.diagonal import Scalar
from dvi.methods.spec import Hyperparameter, Method, Nu


class Nesterov(Method):
    """m_t = β m_{t−1} + g_t,  w_{t+1} = w_t − η (g_t + β m_t):  Q = (1+β−βx)/(1−βx), c = 2(1+β)/(1+2β).

    The variables are torch's: the gradient is taken at the point from which the next step starts.

    Args:
        lr: η > 0, or a schedule.
        momentum: β in [0, 1), or a schedule.
    """

    lr: Hyperparameter
    momentum: Hyperparameter = 0.9

    def P(self, nu: Nu) -> Scalar:
        """I/η."""
        return Scalar(1 / self.lr)

    def Q(self) -> Filter:
        """(1 + β − βx)/(1 − βx)."""
        return Filter([1.0 + self.momentum, -self.momentum], [1.0, -self.momentum])
