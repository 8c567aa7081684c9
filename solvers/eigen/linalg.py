"""Arithmetic with a few long vectors, the columns of blocks [d, m] with d up to millions: Gram matrices and bases.

For large d the time goes into memory traffic: every pass over a block counts, and so does every new block.  So blocks
that belong together are never copied side by side.  The columns of a block are contiguous in memory (:func:`upright`),
which makes products with small matrices several times faster than interleaved columns.

Small matrices are float64 on the host.  Nothing else leaves the device, and no long vector is converted to another
dtype as a whole.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dvi.solvers.protocol import Array, host, like

#: Entries of a vector converted to float64 at a time: few enough for the cache of a processor, enough to fill a GPU.
_PIECE_HOST, _PIECE_DEVICE = 2**14, 2**18

#: The least norm that a column of norm one keeps without its parts along the others: its accuracy falls with the
#: square.
_INDEPENDENT = 1e-3


def upright(V: Tensor) -> Tensor:
    """V [d, m] with contiguous columns; the same tensor if they are contiguous already."""
    return V.T.contiguous().T


def beside(*blocks: Tensor) -> Tensor:
    """The columns of all blocks [d, m_i] in one block with contiguous columns."""
    return torch.cat([block.T for block in blocks]).T


def gram(S: Sequence[Tensor], others: Sequence[Tensor] = ()) -> Array:
    """Sᵀ[S, T] on the host [m, m + n], for blocks S = [S₀ S₁ …] with m columns in all and blocks T with n.

    Products and sums are computed in float64 for every dtype.  The error is eps₆₄ √d at most; a sum in float32 would
    lose half the digits at d = 10⁶.
    """
    device, blocks = S[0].device, [block.T for block in (*S, *others)]
    m, total, d = sum(block.shape[1] for block in S), sum(len(block) for block in blocks), len(S[0])
    piece = min(d, _PIECE_HOST if device.type == "cpu" else _PIECE_DEVICE)
    rows = torch.empty(total, piece, dtype=torch.float64, device=device)
    G = torch.zeros(m, total, dtype=torch.float64, device=device)
    ends = np.cumsum([len(block) for block in blocks]).tolist()
    for begin in range(0, d, piece):
        width = min(piece, d - begin)
        for block, end in zip(blocks, ends, strict=True):
            rows[end - len(block) : end, :width].copy_(block[:, begin : begin + width])
        G.addmm_(rows[:m, :width], rows[:, :width].T)
    return host(G)[0]


def combined(S: Sequence[Tensor], C: Array, onto: Tensor | None = None) -> Tensor:
    """``onto`` plus the combinations C [m, n] of the m columns of all blocks S: [d, n] with contiguous columns."""
    ends = np.cumsum([block.shape[1] for block in S]).tolist()
    result = None if onto is None else onto.T
    for block, end in zip(S, ends, strict=True):
        part = like(C[end - block.shape[1] : end].T, block)
        result = part @ block.T if result is None else torch.addmm(result, part, block.T)
    assert result is not None
    return result.T


def orthonormal_against(W: Tensor, X: Tensor | None, rounds: int = 2) -> Tensor:
    """An orthonormal basis [d, n] of the part of W [d, n] that is orthogonal to X [d, m]; X is orthonormal.

    It uses the Cholesky factor of the Gram matrix.  This costs half as much as Householder reflections, and it is exact
    to rounding in float32 at d = 10⁶, where reflections are not.  But W must have full rank to half the digits; if it
    does not, reflections come first.  Two rounds make the basis orthogonal to rounding for every W.
    """
    known = [] if X is None else [X]
    for _ in range(rounds):
        factors = _factors(W, known)
        if factors is None:
            W = upright(torch.linalg.qr(W if X is None else W - X @ (X.T @ W))[0])
            factors = _factors(W, known)
        W = combined([W, *known], factors) if factors is not None else W
    return W


def _factors(W: Tensor, known: list[Tensor]) -> Array | None:
    """The combinations C [n + m, n] that make W orthonormal and orthogonal to X, or None if W is nearly dependent."""
    n = W.shape[1]
    G = gram([W], known)
    length = np.sqrt(G.diagonal()) if n else np.ones(0)
    if not (np.isfinite(G).all() and (length > 0).all()):
        return None
    inside = G[:, n:] / length[:, None]
    correlation = G[:, :n] / np.outer(length, length) - inside @ inside.T
    try:
        L = np.linalg.cholesky(correlation)
    except np.linalg.LinAlgError:
        return None
    if L.diagonal().min(initial=1.0) < _INDEPENDENT:
        return None
    inverse = np.linalg.inv(L).T / length[:, None]
    return np.concatenate([inverse, -G[:, n:].T @ inverse])
