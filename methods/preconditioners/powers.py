"""Powers of a symmetric positive definite matrix, with derivatives that are right also for repeated eigenvalues.

With A = Q diag(λ) Qᵀ, the derivative of A^p along a symmetric E is (Daleckii and Krein)

    d A^p[E] = Q (F ∘ QᵀEQ) Qᵀ,        F_ij = (λᵢ^p − λⱼ^p)/(λᵢ − λⱼ),   F_ii = p λᵢ^(p−1).

Differentiation through the eigenvectors would divide by λᵢ − λⱼ and give NaN for repeated eigenvalues.  Those do occur:
Shampoo's state begins as ε I plus a few gradients.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor


class Factor:
    """A symmetric positive definite matrix A [n, n] that is decomposed once and gives its powers.

    The decomposition is in float64 for every dtype of A, because negative powers depend on small eigenvalues beside
    large ones.  The powers have A's dtype.  They can be differentiated once in A, forwards and backwards, also under
    ``vmap``.  Only the symmetric part of A is used.

    A row and column of zeros (an input that is always zero has zero gradients) stays zero in every power; the powers
    are those of the remaining matrix.

    Args:
        A: the matrix [n, n].
    """

    def __init__(self, A: Tensor) -> None:
        self.A = A
        self._powers: dict[float, Tensor] = {}

    @property
    def size(self) -> int:
        """The order n."""
        return int(self.A.shape[-1])

    @cached_property
    def live(self) -> Tensor:
        """The mask [n] of the rows of A that are not zero throughout."""
        return (self.A.detach() != 0).any(dim=-1)

    @cached_property
    def eigen(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues [n], ascending, and eigenvectors [n, n], float64; constants for differentiation.

        Rows of zeros get the largest entry of A (1 if all are zero) on the diagonal, which lies between the other
        eigenvalues.
        """
        A = _symmetric(self.A.detach().double())
        largest = A.abs().max()
        filler = torch.where(self.live, torch.zeros_like(A[0]), torch.where(largest > 0, largest, 1.0))
        values, vectors = torch.linalg.eigh(A + torch.diag(filler))
        return values, vectors

    def power(self, p: float) -> Tensor:
        """A^p [n, n]; NaN if A has a negative eigenvalue and p is not an integer."""
        if p not in self._powers:
            self._powers[p] = _symmetric(self.A) if p == 1 else self._power(p)
        return self._powers[p]

    def _power(self, p: float) -> Tensor:
        power: Tensor = _Power.apply(self.A, *self.eigen, p)  # type: ignore[no-untyped-call]
        return torch.where(self.live[:, None] & self.live, power, torch.zeros_like(power))


def divided_difference(x: Tensor, y: Tensor, p: float) -> Tensor:
    """(x^p − y^p)/(x − y) for positive x and y, or p x^(p−1) if they are equal; accurate to a few roundings.

    It is computed as y^(p−1) · expm1(p log(1+r))/r with r = (x − y)/y: x − y is exact if x and y are close, and neither
    expm1 nor log1p cancels.
    """
    r = (x - y) / y
    equal = r == 0
    safe = torch.where(equal, torch.ones_like(r), r)
    return y ** (p - 1) * torch.where(equal, torch.full_like(r, p), torch.expm1(p * torch.log1p(safe)) / safe)


def _symmetric(A: Tensor) -> Tensor:
    return 0.5 * (A + A.mT)


class _Power(torch.autograd.Function):
    """A ↦ A^p, given A's eigenvalues and eigenvectors."""

    generate_vmap_rule = True

    @staticmethod
    def forward(A: Tensor, values: Tensor, vectors: Tensor, p: float) -> Tensor:
        return ((vectors * (values**p)[..., None, :]) @ vectors.mT).to(A.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        A, values, vectors, ctx.p = inputs
        ctx.save_for_backward(A, values, vectors)
        ctx.save_for_forward(A, values, vectors)

    @staticmethod
    def jvp(ctx: Any, dA: Tensor, *_: Any) -> Any:
        return _Derivative.apply(dA, *ctx.saved_tensors, ctx.p)  # type: ignore[no-untyped-call]

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        adjoint = _Derivative.apply(cotangent, *ctx.saved_tensors, ctx.p)  # type: ignore[no-untyped-call]
        return adjoint, None, None, None  # the derivative is self-adjoint


class _Derivative(torch.autograd.Function):
    """E ↦ d A^p[E]: linear in E; it cannot be differentiated in A."""

    generate_vmap_rule = True

    @staticmethod
    def forward(E: Tensor, A: Tensor, values: Tensor, vectors: Tensor, p: float) -> Tensor:
        F = divided_difference(values[..., :, None], values[..., None, :], p)
        inner = vectors.mT @ _symmetric(E.double()) @ vectors
        return (vectors @ (F * inner) @ vectors.mT).to(E.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(_ONCE)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        raise NotImplementedError(_ONCE)


_ONCE = "the second derivative of a matrix power is not implemented; flows need only the first."


__all__ = ["Factor", "divided_difference"]
