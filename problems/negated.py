"""A loss to be made large, as one to be made small."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dvi.problems.derivatives.protocol import Part, reinstate


@dataclass(frozen=True)
class Negated:
    """Minus a part of a loss.

    Args:
        part: the part.
    """

    part: Part

    def __call__(self, w: Tensor) -> Tensor:
        """−L(w) []."""
        return -self.part(w)

    def install(self, w: Tensor) -> None:
        """Put w [d] back where the part keeps it."""
        reinstate(self.part, w)
