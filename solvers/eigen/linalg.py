"""Arithmetic with a few long vectors, the columns of blocks [d, m] with d up to millions: Gram matrices and bases.

Where d is large, memory takes the time: every pass over a block counts, and every new one.  So blocks that belong
together are never copied side by side, and each vector of a block lies in one piece (:func:`upright`), for which
products with small matrices are several times faster than for vectors that are interleaved.

Small matrices are float64 on the host.  Nothing else leaves the device, and nothing long is held in another dtype.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dvi.solvers.protocol import Array, host, like

#: Entries of a vector converted to float64 at a time: what a processor's cache holds, and what keeps a GPU busy.
_PIECE_HOST, _PIECE_DEVICE = 2**14, 2**18

#: What must be left of a column of norm one, without its parts along the others: its own digits go with the square.
_INDEPENDENT = 1e-3


def upright(V: Tensor) -> Tensor:
    """V [d, m] with every column in one piece; the same tensor where that is so already."""
    return V.T.contiguous().T


def beside(*blocks: Tensor) -> Tensor:
    """The columns of all blocks [d, m_i] in one, upright."""
    return torch.cat([block.T for block in blocks]).T


def gram(S: Sequence[Tensor], others: Sequence[Tensor] = ()) -> Array:
    """Sᵀ[S, T] on the host [m, m + n], of blocks S = [S₀ S₁ …] with m columns in all and others T with n.

    Products and sums are made in float64 whatever the dtype: the error is eps₆₄ √d at most, where a sum in float32
    would lose half the digits at d = 10⁶.
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
    """``onto`` plus the combinations C [m, n] of the m columns of all blocks S, upright [d, n]."""
    ends = np.cumsum([block.shape[1] for block in S]).tolist()
    result = None if onto is None else onto.T
    for block, end in zip(S, ends, strict=True):
        part = like(C[end - block.shape[1] : end].T, block)
        result = part @ block.T if result is None else torch.addmm(result, part, block.T)
    assert result is not None
    return result.T


def orthonormal_against(W: Tensor, X: Tensor | None, rounds: int = 2) -> Tensor:
    """An orthonormal basis [d, n] of the part of W [d, n] that is orthogonal to X [d, m], itself orthonormal.

    Cholesky's factor of the Gram matrix, which costs half of Householder's reflections and is exact to rounding also
    at d = 10⁶ in float32, where those are not; but it needs W of full rank to half the digits: where W is not,
    reflections first.  Two rounds make the basis orthogonal to rounding, whatever W was.
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
    """What makes W's part orthogonal to the known orthonormal: C [n + m, n], or None where W is nearly dependent."""
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
