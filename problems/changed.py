"""A loss changed by what does not ask for examples: a penalty added, or the sign turned.

The same change is made of the whole loss, of a part of it, and of the loss of a mini-batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from dvi.problems.derivatives.protocol import Part, reinstate

#: The loss [] after a change, given the loss [] before it and the weights w [d].
Change = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Penalty:
    """L2 regularisation: ½ Σ λᵢwᵢ² is added.

    Args:
        weights: λ, [] or [d].
    """

    weights: Tensor

    def __call__(self, loss: Tensor, w: Tensor) -> Tensor:
        """The sum of both []."""
        return loss + 0.5 * (self.weights * w.square()).sum()


@dataclass(frozen=True)
class Negation:
    """A loss to be made large, as one to be made small."""

    def __call__(self, loss: Tensor, w: Tensor) -> Tensor:
        """−L []."""
        return -loss


@dataclass(frozen=True)
class Changed:
    """A part of a loss with a change made.

    Args:
        part: the part.
        change: of its value.
    """

    part: Part
    change: Change

    def __call__(self, w: Tensor) -> Tensor:
        """The changed value []."""
        return self.change(self.part(w), w)

    def install(self, w: Tensor) -> None:
        """Put w [d] back where the part keeps it."""
        reinstate(self.part, w)


__all__ = ["Change", "Changed", "Negation", "Penalty"]
