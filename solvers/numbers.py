"""Numbers from NumPy and torch as settings of an integrator."""

from __future__ import annotations

from dataclasses import fields
from functools import wraps
from typing import Any, TypeVar

import numpy as np
from torch import Tensor


def number(x: Any, what: str) -> Any:
    """The Python number in a NumPy scalar, or in an array or a tensor of shape [].

    Raises:
        ValueError: if x is not a number; ``what`` names the argument.
    """
    if isinstance(x, np.generic) or (isinstance(x, (np.ndarray, Tensor)) and x.ndim == 0):
        x = x.item()
    if isinstance(x, bool) or not isinstance(x, (int, float)):
        raise ValueError(f"{what}={x!r}: it must be a number.")
    return x


def with_numbers(config: Any) -> None:
    """Convert the numeric fields of a frozen dataclass to Python numbers."""
    for field in fields(config):
        value = getattr(config, field.name)
        if isinstance(field.default, (int, float)) and not isinstance(field.default, bool):
            value = number(value, f"{type(config).__name__}: {field.name}")
        elif isinstance(value, (np.generic, np.ndarray, Tensor)) and value.ndim == 0:  # where None is the default
            value = value.item()
        object.__setattr__(config, field.name, value)


Config = TypeVar("Config")


def named_only(config: type[Config]) -> type[Config]:
    """A dataclass whose keyword-only fields cannot be mistaken: for numbers without names, an error that says so."""
    kind: Any = config
    made = kind.__init__

    @wraps(made)
    def __init__(self: Config, *unnamed: Any, **named: Any) -> None:
        if unnamed:
            name, first = config.__name__, repr(unnamed[0])
            some, other, *_ = (f"{name}({field.name}={first})" for field in fields(config))  # type: ignore[arg-type]
            given = ", ".join(map(repr, unnamed))
            raise TypeError(f"{name}({given}): give its arguments by name, such as {some} or {other}.")
        made(self, **named)

    kind.__init__ = __init__
    return config


__all__ = ["named_only", "number", "with_numbers"]
