"""Directional derivatives in which what does not move contributes nothing, however steep the function is there.

A weight that never gets a gradient keeps a second moment of exactly zero, where a root has an infinite slope.  Its
direction is exactly zero, too, and the derivative along zero is zero.  Automatic differentiation forms 0·∞ = NaN
instead, and every sum that the NaN enters is lost.  Here the product of a tangent that is exactly zero is zero.

Only tangents count: 0·∞ with a zero that is a value of the function (√v·√v where v = 0 begins to move) stays NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

_aten = torch.ops.aten
_PRODUCTS = {_aten.mul.Tensor, _aten.mul_.Tensor}
_QUOTIENTS = {_aten.div.Tensor, _aten.div_.Tensor}


def derivative(function: Callable[[Any], Any], at: Any, along: Any) -> Any:
    """d/ds function(at + s·along) at s = 0, zero wherever it would be 0·∞ with a zero of ``along``.

    Args:
        function: of a pytree of tensors; gives another.
        at, along: pytrees of one structure, shapes and dtypes.
    """
    with _StillIsZero(along):
        return torch.func.jvp(function, (at,), (along,))[1]


def still(tangent: Tensor, product: Tensor) -> Tensor:
    """The product of a tangent and a slope, zero where the tangent is exactly zero."""
    return product.masked_fill(tangent == 0, 0.0)


class _StillIsZero(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows tangents through the operations below all transforms, and keeps 0·∞ and 0/0 of them zero."""

    def __init__(self, tangents: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._tangents: Any = WeakTensorKeyDictionary()
        for x in pytree.tree_leaves(tangents):
            self._tangents[_plain(x)] = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Carry out one operation; what is made of a tangent is one."""
        moved = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x in self._tangents]
        # of a quotient only the numerator is a factor
        factors = [x for x in moved if func in _PRODUCTS or (func in _QUOTIENTS and x is args[0])]
        zeros = [x == 0 for x in factors]  # before, as the operation may be in place
        out = func(*args, **(kwargs or {}))
        for zero in zeros:
            out = out.masked_fill_(zero, 0.0) if out is args[0] else out.masked_fill(zero, 0.0)
        if moved:
            for x in pytree.tree_leaves(out):
                if isinstance(x, Tensor):
                    self._tangents[x] = True
        return out


def _plain(x: Tensor) -> Tensor:
    """The tensor below the wrappers of ``torch.func``."""
    while torch._C._functorch.is_functorch_wrapped_tensor(x):
        x = torch._C._functorch.get_unwrapped(x)
    return x


__all__ = ["derivative", "still"]
