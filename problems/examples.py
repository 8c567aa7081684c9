"""Data: tensors, or tuples and dictionaries of tensors; their first dimension may count the examples."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dvi.problems.errors import ProblemError

#: A tensor; or a tuple (arguments by position), a mapping (arguments by name) or another structure of tensors.
Examples = Any


#: Values that are settings, not data.
_PLAIN = (bool, int, float, str, type(None))


def own(data: Examples) -> Examples:
    """Return a copy of the data, independent of the original; mappings become dictionaries."""
    if isinstance(data, Mapping):
        return {key: own(value) for key, value in data.items()}
    return pytree.tree_map(_own_leaf, data)


def _own_leaf(leaf: Any) -> Any:
    if isinstance(leaf, Mapping):
        return own(leaf)
    if isinstance(leaf, Tensor):  # a model that differentiates by its inputs may ask for their gradients
        return leaf.detach().clone().requires_grad_(leaf.requires_grad)
    return copy.deepcopy(leaf)


def arguments(data: Examples) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the positional arguments and the keyword arguments of a call of the model."""
    if isinstance(data, Mapping):
        return (), dict(data)
    return (data if isinstance(data, tuple) else (data,)), {}


def refuse_unusable(data: Examples, name: str, like: Tensor, any_dtype: bool = False) -> None:
    """Refuse data that do not fit a model.

    Args:
        data: the data.
        name: their name in errors.
        like: a tensor of the model's dtype and device.
        any_dtype: True if floating-point data may have another dtype than the model.

    Raises:
        ProblemError: if they are not made of tensors, are empty or not finite, or do not fit the model.

    """
    if isinstance(data, Mapping):
        data = dict(data)
    expected = f"{name} are a tensor [n, ...], a tuple of them (arguments by position) or a dict (by name)"
    if isinstance(data, list):
        raise ProblemError(
            f"{expected}; got a list: write tuple(…) for several arguments, torch.tensor(…) for numbers, "
            "([…],) for one argument that is a list"
        )
    leaves = pytree.tree_leaves(data)
    if all(isinstance(leaf, (*_PLAIN, np.ndarray)) for leaf in leaves):
        hint = ": torch.from_numpy(…)" if any(isinstance(leaf, np.ndarray) for leaf in leaves) else ""
        raise ProblemError(f"{expected}; got {type(data).__name__}{hint}")
    for tensor in leaves:
        if isinstance(tensor, np.ndarray):
            raise ProblemError(f"{expected}; got an ndarray among them: torch.from_numpy(…)")
        if not isinstance(tensor, Tensor):
            continue
        if tensor.device != like.device:
            raise ProblemError(f"{name} are on {tensor.device}, the model on {like.device}: move one of them")
        if tensor.is_floating_point() and tensor.dtype != like.dtype and not any_dtype:
            raise ProblemError(f"{name} are {tensor.dtype}, the model {like.dtype}: convert one of them")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ProblemError(f"{name} have entries that are NaN or infinite")
        if tensor.ndim and len(tensor) == 0:
            raise ProblemError(f"{name} are empty: at least 1 example is needed")


def count(data: Examples) -> int | None:
    """Return the first dimension that all tensors share, the number of examples; None if they do not share one."""
    leaves = [leaf for leaf in pytree.tree_leaves(data) if not isinstance(leaf, _PLAIN)]
    if not leaves or not all(isinstance(leaf, Tensor) and leaf.ndim for leaf in leaves):
        return None
    lengths = {len(leaf) for leaf in leaves}
    return lengths.pop() if len(lengths) == 1 else None


def take(data: Examples, which: slice | Tensor) -> Examples:
    """Return some of the examples, as views for a slice; numbers, strings and None are settings for all examples."""
    return pytree.tree_map(lambda leaf: leaf if isinstance(leaf, _PLAIN) else leaf[which], data)


#: How examples are divided, and the remedy if that is not possible.
CHUNKED = ("taken in chunks", "Without chunk_size")
SHARED = ("shared among ranks", "On one rank")


def find_reduction(loss_of: Callable[[slice], float], n: int, words: tuple[str, str] = CHUNKED) -> int:
    """Return 1 if the loss is a mean over examples, 0 if it is a sum: a chunk weighs its share to this power.

    This is tried on two or three examples; three are split unevenly.

    Raises:
        ProblemError: if it is neither.

    """
    size, (divided, otherwise) = min(n, 3), words
    try:
        whole, first, rest = (loss_of(slice(*ends)) for ends in ((0, size), (0, 1), (1, size)))
    except (RuntimeError, ValueError, IndexError) as error:
        if isinstance(error, ProblemError):
            raise
        raise ProblemError(
            f"to be {divided}, the model must treat examples one by one, but it fails on a few of them: {error}.  "
            f"{otherwise} it gets all at once"
        ) from error
    mean = (first + (size - 1) * rest) / size
    # For losses of a few examples, at worst in float32, with kernels that may round differently for each size.
    tolerance = 1e-4 * (abs(whole) + abs(first) + abs(rest))
    if abs(whole - mean) <= tolerance:
        return 1
    if abs(whole - (first + rest)) <= tolerance:
        return 0
    raise ProblemError(
        f"to be {divided}, a criterion must be a mean or a sum over examples, and the model must treat them one by "
        f"one. Here examples 1 to {size} give {whole:.6g}, the first {first:.6g} and the others {rest:.6g}, "
        f"which is neither a mean ({mean:.6g}) nor a sum ({first + rest:.6g}).  "
        f"{otherwise} any criterion will do"
    )


def refuse_different(in_chunks: float, whole: float, words: tuple[str, str] = CHUNKED) -> None:
    """Raise :class:`ProblemError` if the loss of all examples differs from the total of its chunks."""
    if abs(in_chunks - whole) > 1e-4 * abs(whole):
        raise ProblemError(
            f"{words[0]} the loss is {in_chunks:.6g}, at once {whole:.6g}: some examples count for more than "
            f"others (padding, class weights).  {words[1]} any criterion will do"
        )
