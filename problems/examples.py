"""Data as tensors, or tuples of tensors, that share their first dimension: the examples."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dvi.problems.errors import ProblemError

Examples = Tensor | tuple[Tensor, ...]


def count(examples: Examples, name: str, like: Tensor, any_dtype: bool = False) -> int:
    """Return number of examples.

    Args:
        examples: the data.
        name: what to call them in an error.
        like: a tensor of the model's dtype and device.
        any_dtype: whether floating-point data may have another dtype than the model.

    Raises:
        ProblemError: if they are no tensors, empty, of different lengths, or do not fit the model.

    """
    tensors = examples if isinstance(examples, tuple) else (examples,)
    for tensor in tensors:
        if not isinstance(tensor, Tensor) or tensor.ndim == 0:
            raise ProblemError(f"{name} are a tensor [n, ...] or a tuple of them; got {type(tensor).__name__}")
        if tensor.device != like.device:
            raise ProblemError(f"{name} are on {tensor.device}, the model on {like.device}: move one of them")
        if tensor.is_floating_point() and tensor.dtype != like.dtype and not any_dtype:
            raise ProblemError(f"{name} are {tensor.dtype}, the model {like.dtype}: convert one of them")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ProblemError(f"{name} have entries that are NaN or infinite")
    lengths = {len(tensor) for tensor in tensors}
    if len(lengths) != 1 or 0 in lengths:
        raise ProblemError(f"{name} share a first dimension, the examples, of at least 1; got {sorted(lengths)}")
    return lengths.pop()


def take(examples: Examples, which: slice) -> Examples:
    """Return some of the examples, as a view."""
    return tuple(tensor[which] for tensor in examples) if isinstance(examples, tuple) else examples[which]


def find_reduction(loss_of: Callable[[slice], float], n: int) -> int:
    """Return 1 if the loss is a mean over examples, 0 if a sum: chunks weigh (their share of examples) to this power.

    Tried on two or three examples, split unevenly where there are three.

    Raises:
        ProblemError: if it is neither.

    """
    size = min(n, 3)
    whole, first, rest = (loss_of(slice(*ends)) for ends in ((0, size), (0, 1), (1, size)))
    mean = (first + (size - 1) * rest) / size
    # Losses of a few examples, in float32 at worst, with kernels that may round differently for each size.
    tolerance = 1e-4 * (abs(whole) + abs(first) + abs(rest))
    if abs(whole - mean) <= tolerance:
        return 1
    if abs(whole - (first + rest)) <= tolerance:
        return 0
    raise ProblemError(
        f"to be taken in chunks, a criterion is a mean or a sum over examples, and the model treats them one by one; "
        f"here examples 1 to {size} give {whole:.6g}, the first {first:.6g} and the others {rest:.6g}, "
        f"which makes neither a mean ({mean:.6g}) nor a sum ({first + rest:.6g}).  "
        "Without chunk_size any criterion will do"
    )


def refuse_different(in_chunks: float, whole: float) -> None:
    """Raise :class:`ProblemError` if the loss of all examples is not what its chunks add up to."""
    if abs(in_chunks - whole) > 1e-4 * abs(whole):
        raise ProblemError(
            f"taken in chunks the loss is {in_chunks:.6g}, at once {whole:.6g}: some examples count for more than "
            "others (padding, class weights).  Without chunk_size any criterion will do"
        )
