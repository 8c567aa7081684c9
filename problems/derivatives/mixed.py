"""Exact second derivatives, and third derivatives from differences of gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from dvi.problems.derivatives.autodiff import Autodiff
from dvi.problems.derivatives.finite_difference import FiniteDifference
from dvi.problems.derivatives.protocol import Part
from dvi.problems.ledger import Ledger


class Mixed:
    """Derivatives of a sum of parts: H by automatic differentiation, T by differences.

    If several directions are critical, third derivatives dominate the cost of a central flow.  By differences, a
    contraction costs two gradients and needs no third backward pass.  The products for eigenvectors stay free of noise.
    """

    def __init__(self, parts: Sequence[Part], ledger: Ledger, max_directions: int = 1) -> None:
        self._second = Autodiff(parts, ledger, max_directions)
        self._third = FiniteDifference(parts, ledger, central=True)
        self.remember = self._third.remember
        self.hvp = self._second.hvp
        self.pairs = self._third.pairs
        self.squares = self._third.squares
        self.along = self._third.along

    @property
    def weights(self) -> Mapping[str, float]:
        """A product costs as much as by automatic differentiation, a contraction two gradients."""
        return {**self._second.weights, "third_derivatives": self._third.weights["third_derivatives"]}

    def uncertainty(self, w: Tensor) -> dict[str, float]:
        """The uncertainty of third derivatives alone: products with H are exact."""
        return {"third_derivatives": self._third.third_uncertainty(w)}
