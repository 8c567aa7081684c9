"""Gradient descent: w_{t+1} = w_t − η ∇L(w_t)."""

from __future__ import annotations

from dvi.methods.preconditioners.diagonal import Scalar
from dvi.methods.spec import Hyperparameter, Method, Nu


class GradientDescent(Method):
    """Gradient descent (paper, §3).  P = I/η, no state.

    Args:
        lr: the learning rate η > 0, or a schedule t ↦ η.
    """

    lr: Hyperparameter

    def P(self, nu: Nu) -> Scalar:
        """I/η."""
        return Scalar(1 / self.lr)
