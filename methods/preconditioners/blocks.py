"""One preconditioner for each parameter tensor."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dvi.methods.errors import NotPositiveDefiniteError
from dvi.methods.per_weight import PerWeight
from dvi.methods.preconditioners.base import Preconditioner


class Blocks(Preconditioner):
    """P = blockdiag(P₁, P₂, …), each acting on its own stretch of the flat weights, in order.

    Args:
        parts: the preconditioners.
        sizes: the number of weights of each part.
        order: the entries of w that belong to the parts, one part after the other: a permutation [d] of 0 … d − 1.
            None: in order.

    Raises:
        NotPositiveDefiniteError: if there are no parts, or not as many sizes as parts.
    """

    def __init__(self, parts: Sequence[Preconditioner], sizes: Sequence[int], order: Tensor | None = None) -> None:
        self.parts, self.sizes = tuple(parts), tuple(sizes)
        self.order = order
        if not self.parts or len(self.parts) != len(self.sizes):
            raise NotPositiveDefiniteError(
                f"Blocks takes one size for each part: {len(self.sizes)} sizes for {len(self.parts)} parts."
            )

    def __repr__(self) -> str:
        return "Blocks(" + ", ".join(f"{n}: {P!r}" for P, n in zip(self.parts, self.sizes, strict=True)) + ")"

    def _each(self, operation: Callable[[Preconditioner, Tensor], Tensor], V: Tensor) -> Tensor:
        pieces = zip(self.parts, self._split(V), strict=True)
        return self._joined([operation(P, piece) for P, piece in pieces])

    def _split(self, V: Tensor) -> Sequence[Tensor]:
        return torch.split(V if self.order is None else V[self.order], list(self.sizes))

    def _joined(self, pieces: Sequence[Tensor]) -> Tensor:
        whole = torch.cat(list(pieces))
        return whole if self.order is None else whole[torch.argsort(self.order)]

    def apply(self, V: Tensor) -> Tensor:
        """P V."""
        return self._each(lambda P, piece: P.apply(piece), V)

    def solve(self, V: Tensor) -> Tensor:
        """P⁻¹ V."""
        return self._each(lambda P, piece: P.solve(piece), V)

    def inv_sqrt(self, V: Tensor) -> Tensor:
        """P^{−1/2} V."""
        return self._each(lambda P, piece: P.inv_sqrt(piece), V)

    def sqrt(self, V: Tensor) -> Tensor:
        """P^{1/2} V."""
        return self._each(lambda P, piece: P.sqrt(piece), V)

    def weighted(self, share: PerWeight) -> Blocks:
        """P·diag(share), part by part."""
        if self.order is not None and not share.uniform:
            share = PerWeight.of(share.vector[self.order], share.like)
        pieces = zip(self.parts, share.split(self.sizes), strict=True)
        return Blocks([P.weighted(piece) for P, piece in pieces], self.sizes, self.order)

    def effective_lr(self) -> Tensor:
        """The harmonic mean over all weights that move."""
        live = [n if dead is None else n - int(dead.sum()) for n, dead in self._dead()]
        lrs = [P.effective_lr() for P in self.parts]
        resistance = sum(n / lr.to(lrs[0]) for n, lr in zip(live, lrs, strict=True) if n)
        return sum(live) / torch.as_tensor(resistance).to(lrs[0])

    def _dead(self) -> list[tuple[int, Tensor | None]]:
        return [(n, P.dead()) for P, n in zip(self.parts, self.sizes, strict=True)]

    def dead(self) -> Tensor | None:
        """The mask [d] of dead coordinates of all parts, or None."""
        found = self._dead()
        known = [mask for _, mask in found if mask is not None]
        if not known:
            return None
        return self._joined([known[0].new_zeros(n) if mask is None else mask for n, mask in found])

    def check(self, g: Tensor | None = None) -> None:
        """Raise NotPositiveDefiniteError, with the number of the part, unless every part is positive definite.

        A diagonal part may be zero throughout if its gradient is zero (a layer without any input).
        """
        if g is not None and sum(self.sizes) != len(g):
            raise NotPositiveDefiniteError(
                f"Blocks of {' + '.join(map(str, self.sizes))} = {sum(self.sizes)} weights cannot act on {len(g)}."
            )
        pieces = [None] * len(self.parts) if g is None else list(self._split(g))
        for i, (P, piece, (n, dead)) in enumerate(zip(self.parts, pieces, self._dead(), strict=True)):
            if dead is not None and len(dead) == n and bool(dead.all()) and (piece is None or not bool(piece.any())):
                continue
            try:
                P.check(piece)
            except NotPositiveDefiniteError as error:
                raise NotPositiveDefiniteError(f"Block {i + 1} of {len(self.parts)} ({n} weights): {error}") from None


__all__ = ["Blocks"]
