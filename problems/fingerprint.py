"""A short string that identifies the contents of a pytree of tensors, the same in every session."""

from __future__ import annotations

from hashlib import sha256
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dvi.problems.distributed.ranks import ALONE, Ranks


def fingerprint(tree: Any, ranks: Ranks = ALONE) -> str:
    """The sha256 of a pytree's structure and of its leaves: bytes, dtype and shape of tensors, the ``repr`` of others.

    The device does not matter: the same numbers on another device are the same data.  Nor does the number of ranks: if
    each has some of the examples, the result is that of all examples, in the order of ranks.
    """
    digest = sha256()
    for path, leaf in pytree.tree_flatten_with_path(tree)[0]:
        digest.update(pytree.keystr(path).encode())
        if isinstance(leaf, Tensor):
            shape = tuple(leaf.shape)
            if shape:
                shape = (sum(ranks.gather(shape[0])), *shape[1:])
            digest.update(f"{leaf.dtype}{shape}".encode())
            # seen as bytes by torch: numpy knows no bfloat16
            flat = leaf.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
            ranks.in_turn(digest.update, flat.view(torch.uint8))
        else:
            digest.update(repr(leaf).encode())
    return digest.hexdigest()


__all__ = ["fingerprint"]
