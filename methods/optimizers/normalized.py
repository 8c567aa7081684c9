"""Normalised gradient descent: w_{t+1} = w_t − η ∇L/‖∇L‖, RMSProp-Norm with β₂ = 0 (paper, §4)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

from torch import Tensor

from dvi.methods.preconditioners.diagonal import Scalar
from dvi.methods.spec import RANGES, Hyperparameter, Method, Nu


class NormalizedGD(Method):
    """Normalised gradient descent: f = ‖g‖² − v, P = (√v + ε)/η · I.

    v has no memory: v_t is ‖∇L(w_t)‖² itself, and in the central flow it is ‖∇L‖² + ⟨H², Σ⟩.  Such a v has no
    differential equation.  In the flows it therefore relaxes towards its value within ``memory`` unit times, as in
    RMSProp-Norm with a small β₂ (whose flow converges as β₂ → 0; eq. 10 stays finite).  The optimizer itself is exact.

    Args:
        lr: η > 0, or a schedule: the length of a step.
        eps: ε ≥ 0, added to ‖g‖.
        memory: relaxation time of v in the flows, unit times, in (0, 1); smaller is more accurate and stiffer.
    """

    ranges: ClassVar[Mapping[str, tuple[Callable[[float], bool], str]]] = {
        **RANGES,
        "memory": (lambda x: 0 < x < 1, "in (0, 1)"),
    }

    lr: Hyperparameter
    eps: Hyperparameter = 0.0
    memory: float = 1 / 32

    def init(self, w: Tensor) -> Nu:
        """Zero v []."""
        return {"v": w.new_zeros(())}

    def f(self, nu: Nu, g: Tensor) -> Nu:
        """‖g‖² − v."""
        return {"v": (g**2).sum() - nu["v"]}

    def P(self, nu: Nu) -> Scalar:
        """(√v + ε)/η · I."""
        return Scalar((nu["v"] ** 0.5 + self.eps) / self.lr)
