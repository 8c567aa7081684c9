"""Errors of wrong devices on a machine that has one device only.

Inside ``TwoDevices()`` each tensor counts as one of the host or of a card.  Of the host are what a factory makes that
is told no device or "cpu" in words, what ``.cpu()`` gives, and what is computed from such tensors alone.  All others
are of the card: the user's tensors, what follows from them, and what is made on "the device of that tensor".

What CUDA refuses raises RuntimeError: an operation on tensors of both, and ``.numpy()`` of one on the card.  CUDA
allows host tensors without dimensions, as indices, and in copies.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten
from torch.utils.weak import WeakIdKeyDictionary

ALLOWED = ("to", "copy_", "cpu", "type_as", "__getitem__", "__setitem__", "__get__", "__set__", "set_", "is_same_size")
READS = ("item", "tolist", "cpu", "__float__", "__bool__", "__int__", "__index__")


class TwoDevices(TorchFunctionMode):
    """See the module; ``made`` counts the tensors on each side, ``reads`` the waits for the card."""

    def __init__(self):
        super().__init__()
        self.host = WeakIdKeyDictionary()
        self.made = Counter()
        self.reads = Counter()

    def on_host(self, x):
        return x in self.host

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        given = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
        on_host = [self.on_host(x) for x in given]
        if name not in ALLOWED and not all(on_host):
            for x, here in zip(given, on_host, strict=True):
                if here and x.dim():
                    raise RuntimeError(f"{name}: tensors of both devices; that of the host has shape {list(x.shape)}")
            if name in ("numpy", "__array__"):
                raise RuntimeError(f"{name} of a tensor on the card")
            if name in READS:
                self.reads[name] += 1
        out = func(*args, **kwargs)
        here = self._place(name, args, kwargs, given, on_host)
        if name in ("cpu", "to") and out is args[0] and here is not on_host[0]:
            out = out.view_as(out)  # here there is one device only, and nothing was copied
        for x in tree_flatten(out)[0]:
            if isinstance(x, torch.Tensor) and not any(x is other for other in given):
                self.made["host" if here else "card"] += 1
                if here:
                    self.host[x] = True
        return out

    def _place(self, name, args, kwargs, given, on_host):
        """Whether a result is on the host."""
        if name == "cpu":
            return True
        named = kwargs.get("device")
        if name == "to":
            target = next((x for x in args[1:] if isinstance(x, (torch.Tensor, torch.device, str))), named)
            if isinstance(target, torch.Tensor):
                return self.on_host(target)
            named = target
        if named is not None:
            return not isinstance(named, torch.device)  # in words, or as a tensor has it
        return all(on_host)  # also where none is given: a factory
