"""AdamW (Loshchilov & Hutter 2019): Adam with decoupled weight decay."""

from __future__ import annotations

from typing import Any

from dvi.methods.optimizers.adam import Adam
from dvi.methods.shapes import Shapes, sizes
from dvi.methods.spec import Hyperparameter


class AdamW(Adam):
    """AdamW: Adam with w_{t+1} = (1 − ηλ)w_t − …; c = (2 − ηλ)(1+β₁)/(1−β₁).  It is ``torch.optim.AdamW``.

    The decay acts on w directly, not through the gradient, so it does not enter v.  L2 regularisation, as by
    ``weight_decay`` of ``torch.optim.Adam``, belongs in the loss: ``problem.penalised(λ)``.

    Args:
        lr, beta1, beta2, eps, bias_correction: as for :class:`Adam`.
        weight_decay: λ ≥ 0, or a schedule.
        shapes: of the parameter tensors, ``problem.shapes``.  Then tensors of fewer than two dimensions (biases, gains
            of norms) do not decay, as is usual.  None: all weights decay.
    """

    weight_decay: Hyperparameter = 1e-2
    shapes: Shapes | None = None

    def decay(self) -> Any:
        """ηλ; if ``shapes`` are given, 0 for biases."""
        gamma = self.lr * self.weight_decay
        if self.shapes is None:
            return gamma
        return [(gamma if len(shape) > 1 else 0.0, n) for shape, n in zip(self.shapes, sizes(self.shapes), strict=True)]
