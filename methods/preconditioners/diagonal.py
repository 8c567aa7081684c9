"""Scalar and diagonal preconditioners: p·I and diag(p)."""

from __future__ import annotations

import torch
from torch import Tensor

from dvi.methods.errors import NotPositiveDefiniteError
from dvi.methods.per_weight import PerWeight
from dvi.methods.preconditioners.base import Preconditioner


class Scalar(Preconditioner):
    """P = p I with a scalar p (a number or a tensor [])."""

    def __init__(self, p: Tensor | float) -> None:
        self.p = p

    def __repr__(self) -> str:
        return f"Scalar({self.p!r})"

    def apply(self, V: Tensor) -> Tensor:
        """P V."""
        return self.p * V

    def solve(self, V: Tensor) -> Tensor:
        """P⁻¹ V."""
        return V / self.p

    def scaled(self, factor: Tensor | float) -> Scalar:
        """The multiple factor·P."""
        return Scalar(self.p * factor)

    def weighted(self, share: PerWeight) -> Preconditioner:
        """P·diag(share)."""
        return self.scaled(share.number) if share.uniform else Diagonal(self.p * share.vector)

    def inv_sqrt(self, V: Tensor) -> Tensor:
        """P^{−1/2} V."""
        return V / self.p**0.5

    def sqrt(self, V: Tensor) -> Tensor:
        """P^{1/2} V."""
        return V * self.p**0.5

    def effective_lr(self) -> Tensor:
        """1/p."""
        if isinstance(self.p, Tensor):
            return 1.0 / self.p
        return torch.tensor(1.0 / self.p, dtype=torch.float64, device="cpu")

    def sound(self, g: Tensor | None = None) -> Tensor | None:
        """True if p is finite and positive; None for a number, which needs no transfer."""
        if not isinstance(self.p, Tensor) or self.p.ndim:
            return None
        return (self.p > 0) & (self.p < float("inf"))

    def check(self, g: Tensor | None = None) -> None:
        """Raise unless p is finite and positive."""
        if isinstance(self.p, Tensor) and self.p.ndim:
            raise NotPositiveDefiniteError(
                f"Scalar(p) takes a number or a tensor of shape [], not of shape {list(self.p.shape)}; "
                "for a vector p write Diagonal(p)."
            )
        p = float(self.p)
        if not 0 < p < float("inf"):
            raise NotPositiveDefiniteError(
                f"P(ν) = {p:g}·I is not positive definite. If ν can be zero (a gradient that vanishes), "
                "give the method an eps > 0."
            )


class Diagonal(Preconditioner):
    """P = diag(p), p [d].

    A zero of p marks a *dead* coordinate.  Weights on which no example depends have zero gradient, so with ε = 0 their
    second moment stays zero.  Such weights do not move: P⁻¹ is defined as zero on them.  So they drop out of the
    P-metric, of the critical subspace and of the flow, and nothing is divided by zero.  :meth:`check` distinguishes a
    dead coordinate from a wrong P.
    """

    def __init__(self, p: Tensor) -> None:
        if not hasattr(p, "__torch_function__") or p.ndim != 1:  # a tensor, or its substitute in dvi.derive
            what = f"shape {list(p.shape)}" if isinstance(p, Tensor) else f"a {type(p).__name__}"
            raise NotPositiveDefiniteError(
                f"Diagonal(p) takes a tensor p of shape [d], not {what}; for p·I write Scalar(p)."
            )
        self.p = p

    def __repr__(self) -> str:
        return f"Diagonal({self.p!r})"

    def _times(self, factor: Tensor, V: Tensor) -> Tensor:
        # `where`, not a product with a mask: the derivative of √ν is infinite at a dead coordinate, and 0·∞ is not 0.
        live = torch.where(self.p > 0, factor, torch.zeros_like(factor))
        return live * V if V.ndim == 1 else live[:, None] * V

    def apply(self, V: Tensor) -> Tensor:
        """P V."""
        return self._times(self.p, V)

    def solve(self, V: Tensor) -> Tensor:
        """P⁻¹ V, zero on dead coordinates."""
        return self._times(1.0 / self.p, V)

    def scaled(self, factor: Tensor | float) -> Diagonal:
        """The multiple factor·P."""
        return Diagonal(self.p * factor)

    def weighted(self, share: PerWeight) -> Diagonal:
        """P·diag(share)."""
        return self.scaled(share.number) if share.uniform else Diagonal(self.p * share.vector)

    def inv_sqrt(self, V: Tensor) -> Tensor:
        """P^{−1/2} V, zero on dead coordinates."""
        return self._times(self.p**-0.5, V)

    def sqrt(self, V: Tensor) -> Tensor:
        """P^{1/2} V."""
        return self._times(self.p**0.5, V)

    def effective_lr(self) -> Tensor:
        """1/mean(p) over the coordinates that move."""
        return (self.p > 0).sum() / self.p.sum()

    def dead(self) -> Tensor | None:
        """The mask of p = 0."""
        return self.p == 0

    def sound(self, g: Tensor | None = None) -> Tensor | None:
        """True if p is finite and positive, or zero only at coordinates where the gradient g [d] is zero."""
        if g is not None and len(self.p) != len(g):
            return None
        low, high = torch.aminmax(self.p)
        positive = (low >= 0) & (high > 0) & (high < float("inf"))  # false for NaN, too
        return positive if g is None else positive & ~((self.p == 0) & (g != 0)).any()

    def check(self, g: Tensor | None = None) -> None:
        """Raise NotPositiveDefiniteError unless p is finite and positive, or zero only where the gradient is zero."""
        if g is not None and len(self.p) != len(g):
            raise NotPositiveDefiniteError(
                f"Diagonal(p) with {len(self.p)} entries cannot act on vectors of {len(g)} weights."
            )
        low, high = (float(x) for x in torch.aminmax(self.p))
        if not (low >= 0 and high < float("inf")):  # also false for NaN
            bad = int((~(self.p >= 0) | self.p.isinf()).sum())
            raise NotPositiveDefiniteError(
                f"P(ν) = diag(p) is not positive definite: {bad} of {len(self.p)} entries are negative, infinite or "
                f"NaN (smallest {low:g}, largest {high:g}). Check the formula of P, or give the method an eps > 0."
            )
        if high == 0:
            raise NotPositiveDefiniteError("P(ν) = 0: the gradient has been zero everywhere; there is nothing to move.")
        if low == 0 and g is not None and bool(((self.p == 0) & (g != 0)).any()):
            raise NotPositiveDefiniteError(
                "P(ν) is zero at coordinates whose gradient is not zero, so the step there would be infinite. "
                "Give the method an eps > 0, or start ν after one update of the optimizer."
            )


__all__ = ["Diagonal", "Scalar"]
