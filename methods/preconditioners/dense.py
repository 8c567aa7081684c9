"""A full matrix as a preconditioner: full-matrix AdaGrad, natural gradient, or any other P of a small problem."""

from __future__ import annotations

from torch import Tensor

from dvi.methods.preconditioners.kronecker import Kronecker


class Dense(Kronecker):
    """P = A^p with a symmetric positive definite A [d, d].

    Every A costs d² numbers of memory and a decomposition of d³ operations.  Use it for up to a few thousand weights,
    or for one small parameter tensor in :class:`Blocks`.

    Args:
        A: the matrix [d, d].
        power: the exponent p; ½ for full-matrix AdaGrad.

    Raises:
        NotPositiveDefiniteError: if A is not a square matrix.
    """

    def __init__(self, A: Tensor, power: float = 1.0) -> None:
        super().__init__([A], power)


__all__ = ["Dense"]
