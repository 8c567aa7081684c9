"""The error of a run that could not continue."""

from __future__ import annotations

from typing import Any

from dvi.results.comparison import Comparison
from dvi.results.solution import Solution
from dvi.results.status import Status


class RunError(RuntimeError):
    """A run could not continue.

    Attributes:
        status: a :class:`Status`, the kind of failure with its remedy.
        result: the result until then, a :class:`dvi.Solution` or :class:`dvi.Comparison` (None if there is none).
    """

    def __init__(self, status: Status, detail: str, result: Solution | Comparison | None = None) -> None:
        super().__init__(f"{status}\n{detail}" if detail else str(status))
        self.status = status
        self.detail = detail
        self.result = result

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the three arguments; by default, an exception keeps only its message."""
        return type(self), (self.status, self.detail, self.result), self.__dict__


__all__ = ["RunError"]
