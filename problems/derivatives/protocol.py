"""The interface of a backend of derivatives, and the first derivative, which all backends share.

A loss is the sum of a sequence of *parts*, which are scalar functions of the flat weights.  Parts are differentiated
one after the other and their derivatives are added.  So the memory is that of the largest part, and the sums are exact.
Directions are rows here; in the public interface of :class:`~dvi.problems.problem.Problem` they are columns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

Part = Callable[[Tensor], Tensor]


class Derivatives(Protocol):
    """Second and third derivatives of a sum of parts."""

    @property
    def weights(self) -> Mapping[str, float]:
        """Typical cost of one of each kind of derivative, in gradients (keys as in the ledger)."""

    def remember(self, w: Tensor, gradient: Tensor) -> None:
        """Receive the gradient [d] at w [d], so that a backend that needs it there need not compute it."""

    def uncertainty(self, w: Tensor) -> dict[str, float]:
        """Estimated relative errors, along the gradient, of the inexact derivatives (keys as in the ledger)."""

    def hvp(self, w: Tensor, V: Tensor) -> Tensor:
        """Rows H(w) vᵢ [k, d] for the rows vᵢ of V [k, d]."""

    def pairs(self, w: Tensor, U: Tensor) -> Tensor:
        """Rows T[uᵢ, uⱼ] = ∇_w uᵢᵀH(w)uⱼ [k(k+1)/2, d] for i ≤ j, row by row, unscaled."""

    def squares(self, w: Tensor, U: Tensor) -> Tensor:
        """Rows T[uᵢ, uᵢ] [k, d]."""

    def along(self, w: Tensor, U: Tensor, V: Tensor) -> Tensor:
        """Return the matrices uᵢᵀ T[v] uⱼ [m, k, k] for the rows v of V [m, d]."""


def reinstate(part: Part, x: Tensor) -> None:
    """Put the weights x back into a part before differentiating a graph of it that was made earlier.

    A part made from a module leaves its weights in the module.  A recomputation in the backward pass (activation
    checkpointing) reads them there.
    """
    install = getattr(part, "install", None)
    if install is not None:
        install(x)


def value_and_gradient(parts: Sequence[Part], w: Tensor) -> tuple[Tensor, Tensor]:
    """Loss [] and gradient [d] of the sum of the parts at w [d]."""
    total = w.new_zeros(())
    gradient = torch.zeros_like(w)
    with torch.enable_grad():
        for part in parts:
            x = w.detach().clone().requires_grad_()  # a loss may write into its argument
            value = part(x)
            total += value.detach()
            gradient += pull(value, x)
    return total, gradient


def pull(y: Tensor, x: Tensor, v: Tensor | None = None, *, again: bool = False, keep: bool = False) -> Tensor:
    """Return the product vᵀ ∂y/∂x, zero where y does not depend on x.

    Args:
        y: the tensor that is differentiated.
        x: the leaf with respect to which it is differentiated.
        v: the cotangent; None for a scalar y.
        again: True if the result will be differentiated once more.
        keep: True if y will be differentiated once more, with another v.

    """
    if not y.requires_grad:
        return torch.zeros_like(x)
    # By edges, since torch.autograd.grad of tensors disables an active TorchFunctionMode: a recomputation in the
    # backward pass (activation checkpointing) has to find the composed layers that the forward pass found.
    (product,) = torch.autograd.grad(
        get_gradient_edge(y),
        get_gradient_edge(x),
        torch.ones_like(y) if v is None else v,
        create_graph=again,
        retain_graph=again or keep,
        allow_unused=True,
    )
    return torch.zeros_like(x) if product is None else product


def matrix_from_pairs(values: Tensor, k: int) -> Tensor:
    """Symmetric matrices [..., k, k] from their upper triangles [..., k(k+1)/2], row by row."""
    i, j = torch.triu_indices(k, k, device=values.device)
    full = values.new_empty(*values.shape[:-1], k, k)
    full[..., i, j] = values
    full[..., j, i] = values
    return full
