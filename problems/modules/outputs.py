"""Second directional derivatives of a vector-valued function: the mean change of outputs under oscillation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dvi.problems.derivatives.autodiff import explained
from dvi.problems.derivatives.finite_difference import unit
from dvi.problems.derivatives.protocol import pull
from dvi.problems.errors import ProblemError


def curvature(f: Callable[[Tensor], Tensor], w: Tensor, V: Tensor, x: Tensor, derivatives: str = "autodiff") -> Tensor:
    """Return the sum ½ Σᵢ xᵢ d²f(w + εvᵢ)/dε², in the shape of f(w), over the rows vᵢ of V [k, d].

    Args:
        f: from weights [d] to any tensor.
        w: weights [d].
        V: directions [k, d].
        x: their weights [k].
        derivatives: "autodiff", or "finite-difference" for second differences of f.

    """
    if derivatives == "finite-difference":
        with torch.enable_grad():  # not needed here, but a network may differentiate with respect to its inputs
            return _second_differences(f, w.detach(), V, x)
    with explained("second"), torch.enable_grad():
        leaf = w.detach().clone().requires_grad_()
        outputs = f(leaf)
        if not isinstance(outputs, Tensor):
            raise ProblemError(f"outputs are one tensor here; this model gives a {type(outputs).__name__}")
        total = torch.zeros_like(outputs).detach()
        for v, weight in zip(V, x, strict=True):
            total += weight / 2 * _push(_push(outputs, leaf, v), leaf, v).detach()
        return total


def _push(y: Tensor, x: Tensor, v: Tensor) -> Tensor:
    """Return (∂y/∂x) v, differentiable in x, in reverse mode only: as the derivative of cᵀ(∂y/∂x) v in c."""
    c = torch.zeros_like(y).requires_grad_()
    if not y.requires_grad:
        return torch.zeros_like(y)
    pulled = pull(y, x, c, again=True)
    if not pulled.requires_grad:
        return torch.zeros_like(y)
    pushed = pull(pulled, c, v, again=True)
    return pushed


def _second_differences(f: Callable[[Tensor], Tensor], w: Tensor, V: Tensor, x: Tensor) -> Tensor:
    length = torch.finfo(w.dtype).eps ** (1 / 4) * unit(w)
    here = f(w).detach()
    total = torch.zeros_like(here)
    for v, weight in zip(V, x, strict=True):
        step = length / torch.linalg.vector_norm(v)
        total += weight / 2 * (f(w + step * v).detach() - here + (f(w - step * v).detach() - here)) / step**2
    return total
