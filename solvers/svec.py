"""Symmetric matrices as vectors: the isometry Sym_k ↔ R^{k(k+1)/2} in which α and β are written.

The order is that of ``numpy.triu_indices(k)``, the upper triangle row by row, with off-diagonal entries times √2.
So ⟨A, B⟩ = svec(A)·svec(B), and a linear operator on symmetric matrices is an ordinary n × n matrix, n = k(k+1)/2.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import isqrt
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[np.float64]
ArrayOrTensor = TypeVar("ArrayOrTensor", NDArray[np.float64], NDArray[np.float32], torch.Tensor)


@dataclass(frozen=True, slots=True, eq=False)
class Triu:
    """The upper triangle of a k × k matrix, row by row: n = k(k+1)/2 positions. All arrays are read-only."""

    k: int
    n: int
    rows: NDArray[np.intp]  # [n]
    columns: NDArray[np.intp]  # [n]
    diagonal: NDArray[np.intp]  # [k], which of the n lie on the diagonal
    weight: Array  # [n], 1 on the diagonal and √2 off it
    flat: NDArray[np.intp]  # [n], into the ravelled matrix
    position: NDArray[np.intp]  # [k,k], the inverse: where in the vector an entry of the matrix lies
    inverse_weight: Array  # [k,k], 1 on the diagonal and 1/√2 off it
    identity: Array  # [n], svec of the unit matrix

    def vector(self, M: Array) -> Array:
        """Return svec(M) of a float64 array M [k,k], without the checks of `svec`, which cost more than the work."""
        return M.ravel().take(self.flat) * self.weight

    def matrix(self, v: Array) -> Array:
        """Return smat(v) of a float64 array v [n], without the checks of `smat`."""
        return v.take(self.position) * self.inverse_weight


def dimension(k: int) -> int:
    """Return n = k(k+1)/2, the length of the svec of a k × k matrix."""
    return k * (k + 1) // 2


def order(n: int) -> int:
    """Return the order k of the matrix whose svec has length n. Raises ValueError if n is not k(k+1)/2 for any k."""
    k = (isqrt(8 * n + 1) - 1) // 2 if n >= 0 else -1
    if dimension(k) != n or k < 0:
        raise ValueError(f"no symmetric matrix has an svec of length {n}: it must be k(k+1)/2 (0, 1, 3, 6, 10, 15, …)")
    return k


@cache
def triu(k: int) -> Triu:
    """Return indices and weights of svec for k × k matrices, made once for each k."""
    rows, columns = np.triu_indices(k)
    n = len(rows)
    position = np.empty((k, k), dtype=np.intp)
    position[rows, columns] = position[columns, rows] = np.arange(n)
    on_diagonal = rows == columns
    made = Triu(
        k=k,
        n=n,
        rows=rows,
        columns=columns,
        diagonal=np.flatnonzero(on_diagonal),
        weight=np.where(on_diagonal, 1.0, np.sqrt(2.0)),
        flat=rows * k + columns,
        position=position,
        inverse_weight=np.where(np.eye(k, dtype=bool), 1.0, np.sqrt(0.5)),
        identity=on_diagonal.astype(np.float64),
    )
    for name in ("rows", "columns", "diagonal", "weight", "flat", "position", "inverse_weight", "identity"):
        getattr(made, name).setflags(write=False)  # shared by all callers
    return made


def svec(M: ArrayOrTensor) -> ArrayOrTensor:
    """Return the upper triangle of M [..., k, k] as a vector [..., n].

    M is a Numpy array or torch tensor; dtype and device are kept. M is assumed to be symmetric: entries below the
    diagonal are not read. Raises ValueError if M is not square.
    """
    if M.ndim < 2 or M.shape[-1] != M.shape[-2]:
        raise ValueError(f"svec takes square matrices [..., k, k], not an array of shape {tuple(M.shape)}")
    index = triu(M.shape[-1])
    entries = M.reshape(*M.shape[:-2], index.k * index.k)
    if isinstance(entries, torch.Tensor):
        flat = torch.tensor(index.flat, device=entries.device)
        weight = torch.tensor(index.weight, device=entries.device, dtype=entries.dtype)
        return entries[..., flat] * weight
    return entries[..., index.flat] * index.weight.astype(entries.dtype, copy=False)


def smat(v: ArrayOrTensor) -> ArrayOrTensor:
    """Return the symmetric matrix [..., k, k] whose svec is v [..., n].

    v is a Numpy array or torch tensor; dtype and device are kept. Raises ValueError if n is not k(k+1)/2.
    """
    if v.ndim < 1:
        raise ValueError("smat takes vectors [..., n], not a scalar")
    index = triu(order(v.shape[-1]))
    if isinstance(v, torch.Tensor):
        position = torch.tensor(index.position, device=v.device)
        weight = torch.tensor(index.inverse_weight, device=v.device, dtype=v.dtype)
        return v[..., position] * weight
    return v[..., index.position] * index.inverse_weight.astype(v.dtype, copy=False)


def skron(G: Array) -> Array:
    """Return the matrix [m(m+1)/2, k(k+1)/2] of H ↦ G H Gᵀ in svec, G [m, k]: the symmetric Kronecker product G ⊗ G.

    ``skron(G) @ svec(H) == svec(G @ H @ G.T)``. It is orthogonal if G is, and ``skron(G).T == skron(G.T)``.
    """
    to, of = triu(G.shape[0]), triu(G.shape[1])
    at_row, at_column = G.take(to.rows, 0), G.take(to.columns, 0) * (0.5 * to.weight)[:, None]  # [·, k]
    i, j = of.rows, of.columns
    product = at_row.take(i, 1) * at_column.take(j, 1) + at_row.take(j, 1) * at_column.take(i, 1)
    return np.asarray(product * of.weight, dtype=np.float64)


def outer(Q: Array) -> Array:
    """Return the rows svec(qqᵀ) [m, n] for the columns q of Q [k, m]: orthonormal if they are."""
    return svec(Q.T[:, :, None] * Q.T[:, None, :])
