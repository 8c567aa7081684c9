"""Adafactor's factored second moment: row and column means of ∇L⊙² instead of all of it (Shazeer and Stern, 2018)."""

from __future__ import annotations

import torch
from torch import Tensor

from dvi.methods.preconditioners.diagonal import Diagonal
from dvi.methods.shapes import Shapes, tensors
from dvi.methods.spec import Hyperparameter, Method, Nu


class Adafactor(Method):
    """Adafactor (Shazeer and Stern, ICML 2018, Algorithm 4) without update clipping and relative step sizes.

    For a matrix, the EMAs r and c of the row and column means of g⊙² + ε₁ give the second moment V = r cᵀ/mean(r).  A
    tensor of more dimensions is a stack of matrices in its last two.  For a vector or a number V is kept in full.
    P = diag(√V)/η.  Clipping depends on the present gradient, and relative step sizes depend on ‖w‖; P(ν) can depend on
    neither.

    Args:
        lr: η > 0, or a schedule.
        shapes: of the parameter tensors: ``problem.shapes``.
        beta2: β₂ in (0, 1), or a schedule.  The source uses 1 − (t+1)^−0.8, which is 0 at t = 0; for a flow start
            it later, 1 − (t+2)^−0.8.
        eps: ε₁ ≥ 0, added to g⊙².
    """

    lr: Hyperparameter
    shapes: Shapes
    beta2: Hyperparameter = 0.99
    eps: Hyperparameter = 1e-30

    def init(self, w: Tensor) -> Nu:
        """Zeros: row and column means for each matrix, V in full for a vector."""
        parts = tensors(w, self.shapes)
        return [[torch.zeros_like(mean) for mean in _means(part)] for part in parts]

    def f(self, nu: Nu, g: Tensor) -> Nu:
        """(1−β₂)(means of g⊙² + ε₁ − ν)."""
        means = [_means(part) for part in tensors(g**2 + self.eps, self.shapes)]
        return [
            [(1 - self.beta2) * (new - old) for new, old in zip(some, olds, strict=True)]
            for some, olds in zip(means, nu, strict=True)
        ]

    def P(self, nu: Nu) -> Diagonal:
        """diag(√V)/η."""
        return Diagonal(torch.cat([_moment(part).reshape(-1) for part in nu]) ** 0.5 / self.lr)


def _means(square: Tensor) -> list[Tensor]:
    return [square] if square.ndim < 2 else [square.mean(dim=-1), square.mean(dim=-2)]


def _moment(means: list[Tensor]) -> Tensor:
    if len(means) == 1:
        return means[0]
    rows, columns = means
    total = rows.mean(dim=-1)[..., None, None]
    # a matrix without any gradient (0/0) has a second moment of zero, and is dead
    return torch.where(total > 0, rows[..., :, None] * columns[..., None, :] / total, torch.zeros_like(total))
