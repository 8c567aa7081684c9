"""Directional derivatives in which an entry with a zero tangent contributes zero, even where the slope is infinite.

A weight that never gets a gradient keeps a second moment of exactly zero, where a square root has an infinite slope.
Its tangent is exactly zero, too, so its derivative is zero.  Automatic differentiation computes 0·∞ = NaN instead,
which spoils every sum that contains it.  Here every product with a tangent that is exactly zero is zero.

This applies to tangents only.  If the zero is a value of the function (√v·√v where v = 0 starts to move), 0·∞ is NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
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
    """d/ds function(at + s·along) at s = 0, with zero in place of 0·∞ for zeros of ``along``.

    Args:
        function: maps a pytree of tensors to another.
        at, along: pytrees of one structure, shapes and dtypes.
    """
    with _StillIsZero(along):
        return torch.func.jvp(function, (at,), (along,))[1]


def still(tangent: Tensor, product: Tensor) -> Tensor:
    """``product`` (of a tangent and a slope), set to zero where the tangent is exactly zero."""
    return product.masked_fill(tangent == 0, 0.0)


class _StillIsZero(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Tracks tangents through the operations below all transforms, and sets 0·∞ and 0/0 of tangents to zero."""

    def __init__(self, tangents: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._tangents: Any = WeakTensorKeyDictionary()
        for x in pytree.tree_leaves(tangents):
            self._tangents[_plain(x)] = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Carry out one operation; its result is a tangent if an argument is one."""
        moved = [x for x in _tensors((*args, *(kwargs or {}).values())) if x in self._tangents]
        # only the numerator of a quotient is a factor
        factors = [x for x in moved if func in _PRODUCTS or (func in _QUOTIENTS and x is args[0])]
        zeros = [x == 0 for x in factors]  # computed first, because the operation may be in place
        out = func(*args, **(kwargs or {}))
        for zero in zeros:
            out = out.masked_fill_(zero, 0.0) if out is args[0] else out.masked_fill(zero, 0.0)
        if moved:
            for x in _tensors((out,)):
                self._tangents[x] = True
        return out


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among the arguments or results of an operation, which may be lists of tensors."""
    for x in values:
        if isinstance(x, Tensor):
            yield x
        elif isinstance(x, (list, tuple)):
            yield from _tensors(x)


def _plain(x: Tensor) -> Tensor:
    """The tensor below the wrappers of ``torch.func``, which torch has no public way to take off."""
    while torch._C._functorch.is_functorch_wrapped_tensor(x):
        x = torch._C._functorch.get_unwrapped(x)
    return x


__all__ = ["derivative", "still"]
