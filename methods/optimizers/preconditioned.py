"""Gradient descent in a fixed metric: w_{t+1} = w_t − η P⁻¹∇L(w_t)."""

from __future__ import annotations

from dvi.methods.preconditioners.base import Preconditioner, Scaled
from dvi.methods.spec import Hyperparameter, Method, Nu


class Preconditioned(Method):
    """Preconditioned gradient descent with a constant matrix: P(ν) = P/η, no state.

    Use it for a natural gradient or K-FAC with a frozen Fisher matrix, a Gauss–Newton matrix at the start, or the P
    that another optimizer has reached.

    Args:
        preconditioner: P: a :class:`~dvi.Kronecker`, :class:`~dvi.Dense`, :class:`~dvi.Diagonal`, :class:`~dvi.Blocks`.
        lr: η > 0, or a schedule.
    """

    preconditioner: Preconditioner
    lr: Hyperparameter = 1.0

    def P(self, nu: Nu) -> Preconditioner:
        """P/η."""
        return Scaled(self.preconditioner, 1 / self.lr)
