"""Reads a ``torch.utils.data.Dataset`` or ``DataLoader`` once, in order, into tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, SequentialSampler

from dvi.problems.errors import ProblemError
from dvi.problems.examples import own

BATCH = 1024  # examples at a time; the result does not depend on it


def is_source(data: object) -> bool:
    """Return True for a data set or a loader."""
    return isinstance(data, (Dataset, DataLoader))


def read(source: Any) -> tuple[Any, Any]:
    """Return the inputs and targets of all examples, in the order of the data set; targets are None if it has none.

    A batch is (inputs, targets), inputs alone, or a mapping: inputs by name.  The data are not shuffled, and the state
    of the global random generators is restored.

    Raises:
        ProblemError: if the batches have another form, or cannot be joined to one tensor.

    """
    with torch.random.fork_rng(devices=[]):
        batches = [_split(own(batch)) for batch in _in_order(source)]
    if not batches:
        raise ProblemError("the data set is empty")
    try:
        inputs, targets = (pytree.tree_map(_join, *parts) for parts in zip(*batches, strict=True))
    except (RuntimeError, TypeError, ValueError) as error:
        raise ProblemError(
            f"the batches of the {type(source).__name__} do not fit together in one tensor each ({error}): "
            "pad them to one shape, or hand over inputs and targets as tensors"
        ) from error
    return inputs, targets


def _in_order(source: Any) -> Iterable[Any]:
    generator = torch.Generator("cpu").manual_seed(0)
    if not isinstance(source, DataLoader):
        return DataLoader(source, batch_size=BATCH, generator=generator)
    if isinstance(source.dataset, IterableDataset):
        return source
    sampler = getattr(source, "sampler", None)
    plain = isinstance(sampler, SequentialSampler) or (isinstance(sampler, RandomSampler) and not sampler.replacement)
    if not plain or source.batch_size is None:
        raise ProblemError(
            f"this DataLoader draws its examples with a {type(sampler).__name__} of its own: "
            "hand over its data set, or the examples meant as tensors"
        )
    return DataLoader(source.dataset, batch_size=source.batch_size, collate_fn=source.collate_fn, generator=generator)


def _split(batch: Any) -> tuple[Any, Any]:
    if isinstance(batch, (tuple, list)):
        if len(batch) == 2:
            return batch[0], batch[1]
        if len(batch) == 1:
            return batch[0], None
        raise ProblemError(
            f"a batch is (inputs, targets); these have {len(batch)} parts: hand over inputs and targets as tensors"
        )
    if isinstance(batch, (Tensor, Mapping)):
        return batch, None
    raise ProblemError(
        f"a batch is (inputs, targets), a tensor or a mapping, not {type(batch).__name__}: "
        "hand over the model's arguments as tensors"
    )


def _join(*parts: Any) -> Any:
    if isinstance(parts[0], Tensor):
        return torch.cat(parts)
    if all(part == parts[0] for part in parts):
        return parts[0]
    raise ValueError(f"{type(parts[0]).__name__} differs from batch to batch")
