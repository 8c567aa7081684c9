"""The parameters of the user's own module from which a problem was made."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class Originals:
    """The user's parameters by name, as long as they exist.  A pickle or a deep copy of it holds none.

    Args:
        model: the user's module.
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        self._known: dict[str, Callable[[], Any]] = (
            {} if model is None else {path: weakref.ref(p) for path, p in model.named_parameters()}
        )

    def name_of(self, parameter: Tensor) -> str | None:
        """The name of a parameter that is one of them: the same object, not an equal one."""
        return next((path for path, known in self._known.items() if known() is parameter), None)

    def __reduce__(self) -> tuple[Any, ...]:
        return (Originals, ())
