"""AdaGrad-Norm: one global step size η/b, where b² is the sum of all ‖∇L‖² (Ward, Wu and Bottou, 2019)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

from torch import Tensor

from dvi.methods.preconditioners.diagonal import Scalar
from dvi.methods.spec import RANGES, Hyperparameter, Method, Nu


class AdaGradNorm(Method):
    """AdaGrad-Norm (Ward, Wu and Bottou, ICML 2019, Algorithm 1): f = ‖g‖², P = √s/η · I, s = b².

    Args:
        lr: η > 0, or a schedule.
        b0: b before the first update, ≥ 0.
    """

    ranges: ClassVar[Mapping[str, tuple[Callable[[float], bool], str]]] = {
        **RANGES,
        "b0": (lambda x: x >= 0, "zero or positive"),
    }

    lr: Hyperparameter
    b0: float = 0.0

    def init(self, w: Tensor) -> Nu:
        """The sum s [] = b₀²."""
        return {"s": w.new_full((), self.b0**2)}

    def f(self, nu: Nu, g: Tensor) -> Nu:
        """‖g‖²."""
        return {"s": (g**2).sum()}

    def P(self, nu: Nu) -> Scalar:
        """√s/η · I."""
        return Scalar(nu["s"] ** 0.5 / self.lr)
