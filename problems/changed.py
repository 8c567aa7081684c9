"""Changes of a loss that do not depend on examples: a penalty is added, or the sign is reversed.

The same change applies to the whole loss, to a part of it, and to the loss of a mini-batch.
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
    """L2 regularisation: adds ½ Σ λᵢwᵢ².

    Args:
        weights: λ, [] or [d].
    """

    weights: Tensor

    def __call__(self, loss: Tensor, w: Tensor) -> Tensor:
        """The sum of both []."""
        return loss + 0.5 * (self.weights * w.square()).sum()


@dataclass(frozen=True)
class Negation:
    """Reverses the sign of a loss, so that minimising the result maximises the loss."""

    def __call__(self, loss: Tensor, w: Tensor) -> Tensor:
        """−L []."""
        return -loss


@dataclass(frozen=True)
class Changed:
    """A part of a loss with a change applied.

    Args:
        part: the part.
        change: the change of its value.
    """

    part: Part
    change: Change

    def __call__(self, w: Tensor) -> Tensor:
        """The changed value []."""
        return self.change(self.part(w), w)

    def install(self, w: Tensor) -> None:
        """Put w [d] back into the part, if the part stores its weights."""
        reinstate(self.part, w)


__all__ = ["Change", "Changed", "Negation", "Penalty"]
