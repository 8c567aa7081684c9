"""A Kronecker product of matrix powers: Shampoo's preconditioner, and K-FAC's (Gupta, Koren and Singer, 2018)."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from dvi.methods.errors import NotPositiveDefiniteError
from dvi.methods.numbers import number
from dvi.methods.preconditioners.base import Preconditioner
from dvi.methods.preconditioners.powers import Factor


class Kronecker(Preconditioner):
    """P = F₁^{p₁} ⊗ F₂^{p₂} ⊗ …, acting on tensors of shape [n₁, n₂, …] flattened row by row.

    For a weight matrix W [m, n] and ``Kronecker([L, R], 1/4)``, P W = L^{1/4} W R^{1/4}.  With the learning rate,
    ``Kronecker([L, R], 1/4) / lr`` is Shampoo's P.  Each factor is decomposed once; the derivatives of its powers are
    right also for repeated eigenvalues.

    Rows of zeros in a factor (inputs that are always zero, a layer without any input) mark *dead* coordinates, like a
    zero of :class:`Diagonal`: P and P⁻¹ are zero there.

    Args:
        factors: one for each dimension of the tensor: a symmetric positive definite matrix [nᵢ, nᵢ], or the number
            nᵢ alone for the unit matrix.
        powers: the exponents pᵢ, or one for all.

    Raises:
        NotPositiveDefiniteError: if a factor is not a square matrix, or if there are not as many powers as factors.
    """

    def __init__(self, factors: Sequence[Tensor | int], powers: float | Sequence[float] = 1.0) -> None:
        powers, factors = number(powers), [F if isinstance(F, Tensor) else number(F) for F in factors]
        many = [float(powers)] * len(factors) if isinstance(powers, (int, float)) else [float(p) for p in powers]
        if not factors or len(many) != len(factors):
            raise NotPositiveDefiniteError(
                f"Kronecker takes one power for each factor: {len(many)} for {len(factors)} factors."
            )
        for factor in factors:
            if isinstance(factor, Tensor) and (factor.ndim != 2 or factor.shape[0] != factor.shape[1]):
                raise NotPositiveDefiniteError(
                    f"Kronecker takes square matrices [n, n] (or a number n for the unit matrix), not a tensor of "
                    f"shape {list(factor.shape)}; for diag(p) write Diagonal(p)."
                )
        self.shape = tuple(factor if isinstance(factor, int) else int(factor.shape[0]) for factor in factors)
        self._factors = [
            (i, Factor(F), p) for i, (F, p) in enumerate(zip(factors, many, strict=True)) if not isinstance(F, int)
        ]

    def __repr__(self) -> str:
        powers = {i: p for i, _, p in self._factors}
        parts = " ⊗ ".join(f"[{n}, {n}]^{powers[i]:g}" if i in powers else f"I[{n}]" for i, n in enumerate(self.shape))
        return f"{type(self).__name__}({parts})"

    def _times(self, V: Tensor, sign: float) -> Tensor:
        """P^sign V."""
        X = V.reshape(*self.shape, *V.shape[1:])
        for i, factor, p in self._factors:
            X = torch.tensordot(factor.power(sign * p), X, dims=([1], [i])).movedim(0, i)
        return X.reshape(V.shape)

    def apply(self, V: Tensor) -> Tensor:
        """P V."""
        return self._times(V, 1.0)

    def solve(self, V: Tensor) -> Tensor:
        """P⁻¹ V."""
        return self._times(V, -1.0)

    def inv_sqrt(self, V: Tensor) -> Tensor:
        """P^{−1/2} V."""
        return self._times(V, -0.5)

    def sqrt(self, V: Tensor) -> Tensor:
        """P^{1/2} V."""
        return self._times(V, 0.5)

    def effective_lr(self) -> Tensor:
        """1/mean of the diagonal of P over the coordinates that move; the mean of a product is the product of the
        means.
        """
        means = [factor.power(p).diagonal().double().sum() / factor.live.sum() for _, factor, p in self._factors]
        lr = 1 / torch.stack(means).prod() if means else torch.ones((), dtype=torch.float64, device="cpu")
        return lr.to(self._factors[0][1].A) if self._factors else lr

    def dead(self) -> Tensor | None:
        """The coordinates in a row of zeros of some factor [d]; P is zero there."""
        if not self._factors:
            return None
        live = torch.ones(self.shape, dtype=torch.bool, device=self._factors[0][1].A.device)
        for i, factor, _ in self._factors:
            live &= factor.live.reshape(-1, *[1] * (len(self.shape) - 1 - i))
        return ~live.reshape(-1)

    def check(self, g: Tensor | None = None) -> None:
        """Raise unless all factors are finite, symmetric and clearly positive definite, apart from rows of zeros."""
        d = prod(self.shape)
        if g is not None and d != len(g):
            raise NotPositiveDefiniteError(
                f"{self!r} acts on {'×'.join(map(str, self.shape))} = {d} weights, not on {len(g)}."
            )
        for i, factor, _ in self._factors:
            where = f"P(ν): factor {i + 1} of {self!r}"
            A = factor.A.detach()
            largest = float(A.abs().max())
            if not largest < float("inf"):
                raise NotPositiveDefiniteError(f"{where} is not finite. Check the formula of P.")
            # a sum of products GGᵀ is symmetric up to the order of its sums
            if float((A - A.mT).abs().max()) > 1e3 * torch.finfo(A.dtype).eps * largest:
                raise NotPositiveDefiniteError(f"{where} is not symmetric. Check f and init: GGᵀ is symmetric.")
            values = factor.eigen[0]
            low, high = float(values[0]), float(values[-1])
            if not (low > 0 and low > factor.size * torch.finfo(values.dtype).eps * high):
                raise NotPositiveDefiniteError(
                    f"{where} is not positive definite: its eigenvalues reach from {low:g} to {high:g}. A few "
                    "gradients do not span the space: give the method an eps > 0, well above rounding."
                )
        dead = self.dead()
        if dead is not None and bool(dead.all()):
            raise NotPositiveDefiniteError("P(ν) = 0: the gradient has been zero everywhere; there is nothing to move.")
        if dead is not None and g is not None and bool((dead & (g != 0)).any()):
            raise NotPositiveDefiniteError(
                "P(ν) is zero at coordinates whose gradient is not zero, so the step there would be infinite. "
                "Give the method an eps > 0, or start ν after one update of the optimizer."
            )


__all__ = ["Kronecker"]
