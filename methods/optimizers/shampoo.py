"""Shampoo: a Kronecker product of second-moment matrices, one for each dimension (Gupta, Koren and Singer, 2018)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from torch import Tensor

from dvi.methods.preconditioners.base import Preconditioner, Scaled
from dvi.methods.preconditioners.blocks import Blocks
from dvi.methods.preconditioners.kronecker import Kronecker
from dvi.methods.shapes import Shapes, sizes, tensors
from dvi.methods.spec import RANGES, Hyperparameter, Method, Nu


class Shampoo(Method):
    """Shampoo (Gupta, Koren and Singer, ICML 2018, Algorithms 1 and 2), and its one-sided variant.

    For a matrix G = ∇L [m, n]: L = Σ GGᵀ, R = Σ GᵀG, and the step is −η (L+εI)^{−1/4} G (R+εI)^{−1/4}.  A tensor with k
    dimensions has one matrix for each, with the power −1/(2k).  A vector has the full matrix with the power −½.

    Args:
        lr: η > 0, or a schedule.
        shapes: of the parameter tensors: ``problem.shapes``.
        beta2: 1 for sums, as published.  β₂ in (0, 1), or a schedule, for the averages β₂L + (1−β₂)GGᵀ of later
            versions (Anil et al. 2020; the convention is that of Shi et al. 2023).
        eps: ε > 0.  The published state starts at εI instead, which is the same for sums.
        one_sided: keep only L, with the power −½ (ASGO, An et al. 2025; one-sided Shampoo, Xie et al. 2025).
    """

    ranges: ClassVar[Mapping[str, tuple[Callable[[float], bool], str]]] = {
        **RANGES,
        "beta2": (lambda x: 0 <= x <= 1, "in [0, 1]"),
    }

    lr: Hyperparameter
    shapes: Shapes
    beta2: Hyperparameter = 1.0
    eps: Hyperparameter = 1e-6
    one_sided: bool = False

    def _matrices(self, g: Tensor) -> list[list[Tensor]]:
        """The matrix GGᵀ for each tensor and each of its dimensions that has a factor."""
        return [[_gram(G, i) for i in range(1 if self.one_sided else G.ndim)] for G in tensors(g, self.shapes)]

    def init(self, w: Tensor) -> Nu:
        """Zeros [nᵢ, nᵢ]."""
        parts = tensors(w, self.shapes)
        return [[w.new_zeros(n, n) for n in (G.shape[:1] if self.one_sided else G.shape)] for G in parts]

    def f(self, nu: Nu, g: Tensor) -> Nu:
        """GGᵀ and GᵀG; with β₂ < 1, (1−β₂)(GGᵀ − L) and (1−β₂)(GᵀG − R)."""
        new = self._matrices(g)
        if self.beta2 == 1:
            return new
        return [
            [(1 - self.beta2) * (now - old) for now, old in zip(some, olds, strict=True)]
            for some, olds in zip(new, nu, strict=True)
        ]

    def P(self, nu: Nu) -> Preconditioner:
        """(L+εI)^{1/4} ⊗ (R+εI)^{1/4} / η for each matrix."""
        blocks = []
        for shape, matrices in zip(self.shapes, nu, strict=True):
            damped = [A + self.eps * torch.eye(len(A), dtype=A.dtype, device=A.device) for A in matrices]
            rest = [int(n) for n in shape[1:]] if self.one_sided else []
            blocks.append(Kronecker([*damped, *rest], [1 / (2 * len(damped))] * (len(damped) + len(rest))))
        return Scaled(Blocks(blocks, sizes(self.shapes)), 1 / self.lr)


def _gram(G: Tensor, i: int) -> Tensor:
    """The product of G with itself, summed over all dimensions but the i-th: [nᵢ, nᵢ]."""
    flat = G.movedim(i, 0).reshape(G.shape[i], -1)
    return flat @ flat.mT
