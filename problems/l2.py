"""L2 regularisation: ½ Σ λᵢwᵢ² added to a part of a loss."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dvi.problems.derivatives.protocol import Part, reinstate


@dataclass(frozen=True)
class Penalised:
    """A part of a loss with ½ Σ λᵢwᵢ² added.

    Args:
        part: the part.
        weights: λ, [] or [d].
    """

    part: Part
    weights: Tensor

    def __call__(self, w: Tensor) -> Tensor:
        """The sum of both []."""
        return self.part(w) + 0.5 * (self.weights * w.square()).sum()

    def install(self, w: Tensor) -> None:
        """Put w [d] back where the part keeps it."""
        reinstate(self.part, w)
