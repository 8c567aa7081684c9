"""The interface of P(ν): a symmetric positive definite matrix, given by its action on vectors.

All operations take V [d] or [d, k] and return the same shape, column by column.  They are made of torch operations,
so that the compiler can differentiate ``P(nu).apply(U)`` in ν.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from dvi.methods.errors import NotPositiveDefiniteError, SpecError
from dvi.methods.per_weight import PerWeight


class Preconditioner(ABC):
    """A symmetric positive definite matrix P [d, d] that includes the learning rate (P = I/η for gradient descent)."""

    @abstractmethod
    def apply(self, V: Tensor) -> Tensor:
        """P V."""

    @abstractmethod
    def solve(self, V: Tensor) -> Tensor:
        """P⁻¹ V."""

    @abstractmethod
    def inv_sqrt(self, V: Tensor) -> Tensor:
        """P^{−1/2} V."""

    @abstractmethod
    def sqrt(self, V: Tensor) -> Tensor:
        """P^{1/2} V."""

    @abstractmethod
    def effective_lr(self) -> Tensor:
        """The harmonic mean of the effective learning rates, the eigenvalues of P⁻¹ (paper, Fig. 11)."""

    @abstractmethod
    def check(self, g: Tensor | None = None) -> None:
        """Raise unless P is finite and positive definite (on the coordinates that move, see :class:`Diagonal`).

        Args:
            g: the gradient [d], if known.  Then a zero of P at a coordinate with a gradient is also an error.

        Raises:
            NotPositiveDefiniteError: if it is not; the message names the coordinates or the value.
        """

    def sound(self, g: Tensor | None = None) -> Tensor | None:
        """The result of :meth:`check` as a bool [] on the device, so that callers can transfer it with other data.

        None if only ``check`` itself can tell.
        """
        return None

    def scaled(self, factor: Tensor | float) -> Preconditioner:
        """The multiple factor·P, factor > 0 a number or a tensor []."""
        return Scaled(self, factor)

    def weighted(self, share: PerWeight) -> Preconditioner:
        """The product P·diag(share), which is symmetric only if both commute.

        Raises:
            SpecError: if this class cannot tell that they commute.
        """
        if share.uniform:
            return self.scaled(share.number)
        raise SpecError(
            f"decay() differs between weights that {self!r} mixes, so that no threshold H ⪯ cP exists. Make it one "
            "number for each part of Blocks that is neither Scalar nor Diagonal: a list of pairs (γ, how many weights)."
        )

    def dead(self) -> Tensor | None:
        """A mask [d] of the coordinates that never move because P and the gradient are zero there, or None."""
        return None

    def __truediv__(self, lr: Tensor | float) -> Scaled:
        """P/η, which includes the learning rate η."""
        return Scaled(self, 1 / lr)


class Scaled(Preconditioner):
    """A multiple s·P of a preconditioner, s > 0 a number or a tensor []."""

    def __init__(self, base: Preconditioner, factor: Tensor | float) -> None:
        self.base, self.factor = base, factor

    def __repr__(self) -> str:
        return f"Scaled({self.base!r}, {self.factor!r})"

    def apply(self, V: Tensor) -> Tensor:
        """P V."""
        return self.factor * self.base.apply(V)

    def solve(self, V: Tensor) -> Tensor:
        """P⁻¹ V."""
        return self.base.solve(V) / self.factor

    def weighted(self, share: PerWeight) -> Preconditioner:
        """P·diag(share)."""
        return Scaled(self.base.weighted(share), self.factor)

    def inv_sqrt(self, V: Tensor) -> Tensor:
        """P^{−1/2} V."""
        return self.base.inv_sqrt(V) / self.factor**0.5

    def sqrt(self, V: Tensor) -> Tensor:
        """P^{1/2} V."""
        return self.base.sqrt(V) * self.factor**0.5

    def effective_lr(self) -> Tensor:
        """Of P, divided by the factor."""
        return self.base.effective_lr() / self.factor

    def dead(self) -> Tensor | None:
        """The coordinates that never move."""
        return self.base.dead()

    def check(self, g: Tensor | None = None) -> None:
        """Raise unless the factor is finite and positive and the base is positive definite."""
        if not 0 < float(self.factor) < float("inf"):
            raise NotPositiveDefiniteError(f"P(ν) = s·P with s = {float(self.factor):g} is not positive definite.")
        self.base.check(g)


__all__ = ["Preconditioner", "Scaled"]
