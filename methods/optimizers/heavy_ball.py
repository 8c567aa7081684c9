"""Heavy ball: gradient descent with a momentum buffer (Polyak 1964; ``torch.optim.SGD(momentum=β)``)."""

from __future__ import annotations

from dvi.methods.filter import Filter
from dvi.methods.preconditioners.diagonal import Scalar
from dvi.methods.spec import Hyperparameter, Method, Nu


class HeavyBall(Method):
    """m_t = β m_{t−1} + g_t,  w_{t+1} = w_t − η m_t:  Q = 1/(1 − βx), threshold c = 2(1+β).

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
        """1/(1 − βx)."""
        return Filter([1.0], [1.0, -self.momentum])
