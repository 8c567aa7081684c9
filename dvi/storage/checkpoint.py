"""Converts the state of a run to plain data and back, so that a checkpoint contains no pickled code.

Containers, numbers, strings and tensors stay as they are.  An array becomes a tensor.  A dataclass of this package is
written with its qualified name and its fields.
"""

from __future__ import annotations

import dataclasses
import importlib
import io
from typing import Any

import numpy as np
import torch
from torch import Tensor


def freeze(x: Any) -> Any:
    """Convert x to plain data.

    Raises:
        TypeError: if x contains something that a checkpoint cannot hold.
    """
    if isinstance(x, np.generic):  # tested first, because a numpy float64 is also a float
        return x.item()
    if x is None or isinstance(x, (bool, int, float, str, Tensor)):
        return x.detach() if isinstance(x, Tensor) else x
    if isinstance(x, np.ndarray):
        return {"__array__": torch.from_numpy(np.array(x))}
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        if type(x).__module__.split(".")[0] != "dvi":  # reading it would import and call code that a file names
            raise TypeError(
                f"a checkpoint cannot hold a {type(x).__name__} of {type(x).__module__}, only dataclasses of dvi. Make "
                "an integrator's memory of tuples, dicts, tensors, arrays and numbers, or leave path out."
            )
        fields = {f.name: freeze(getattr(x, f.name)) for f in dataclasses.fields(x)}
        return {"__class__": f"{type(x).__module__}:{type(x).__qualname__}", "fields": fields}
    if isinstance(x, dict):
        return {"__dict__": [[freeze(k), freeze(v)] for k, v in x.items()]}
    if isinstance(x, (list, tuple)):
        return {"__list__": [freeze(v) for v in x], "tuple": isinstance(x, tuple)}
    raise TypeError(
        f"a checkpoint cannot hold a {type(x).__name__}. Make an integrator's memory of tuples, dicts, tensors, arrays "
        "and numbers, or leave path out."
    )


def thaw(x: Any, device: torch.device | None = None) -> Any:
    """The inverse of :func:`freeze`, with tensors on ``device``.

    Raises:
        ValueError: if the data name a class that is not part of dvi.
    """
    if isinstance(x, Tensor):
        return x if device is None else x.to(device)
    if not isinstance(x, dict):
        return x
    if "__array__" in x:
        return x["__array__"].cpu().numpy()
    if "__class__" in x:
        module, _, name = x["__class__"].partition(":")
        if module.split(".")[0] != "dvi":
            raise ValueError(f"this checkpoint names {module}, which is not part of dvi, so dvi did not write it.")
        cls = getattr(importlib.import_module(module), name)
        return cls(**{key: thaw(value, device) for key, value in x["fields"].items()})
    if "__dict__" in x:
        return {thaw(k, device): thaw(v, device) for k, v in x["__dict__"]}
    items = [thaw(v, device) for v in x["__list__"]]
    return tuple(items) if x["tuple"] else items


def to_bytes(x: Any) -> bytes:
    """Serialise a frozen object."""
    buffer = io.BytesIO()
    torch.save(freeze(x), buffer)
    return buffer.getvalue()


def from_bytes(data: bytes, device: torch.device | None = None) -> Any:
    """Read the result of :func:`to_bytes`; only data are loaded, never pickled code."""
    return thaw(torch.load(io.BytesIO(data), weights_only=True, map_location="cpu"), device)
