"""Exact second derivatives, third ones from differences of gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from dvi.problems.derivatives.autodiff import Autodiff
from dvi.problems.derivatives.finite_difference import FiniteDifference
from dvi.problems.derivatives.protocol import Part
from dvi.problems.ledger import Ledger


class Mixed:
    """Derivatives of a sum of parts: H by automatic differentiation, T by differences.

    Where several directions are critical, third derivatives are most of a central flow's cost.  By differences a
    contraction is two gradients, and needs no third backward pass; eigenvectors keep products without noise.
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
        """Of a product as by automatic differentiation; two gradients a contraction."""
        return {**self._second.weights, "third_derivatives": self._third.weights["third_derivatives"]}

    def uncertainty(self, w: Tensor) -> dict[str, float]:
        """Of the third derivatives alone: products with H are exact."""
        return {"third_derivatives": self._third.third_uncertainty(w)}
