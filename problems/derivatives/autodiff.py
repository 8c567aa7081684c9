"""Exact second and third derivatives, by reverse passes over reverse passes.

Every way of nesting forward and reverse mode was timed.  The table gives the cost in gradients per product and the peak
memory in MB, for k = 1 and k = 3 directions at once.  It is for float64 on one CPU thread, from one run on a shared
machine, so the times are accurate to about a third.

    ========================================  ===============  ===============  ===============  ===============
    H v (per column), T[u, v] (per pair)      MLP, 3.5k, k=1   MLP, k=3         GPT, 26k, k=1    GPT, k=3
    ========================================  ===============  ===============  ===============  ===============
    H: reverse over reverse                   2.1   3 MB       1.4   3 MB       2.8  106 MB      1.6   106 MB
    H: forward over reverse, vmap             4.4   4 MB       2.7   9 MB       2.6  128 MB      1.7   258 MB
    H: reverse over forward, vmap             3.5   5 MB       3.1  13 MB       2.9  160 MB      1.8   373 MB
    T: reverse over reverse over reverse      4.9   7 MB       3.2   7 MB       5.1  246 MB      3.8   252 MB
    T: reverse over forward over forward      8.0   6 MB       11.   6 MB       5.4  179 MB      5.3   183 MB
    T: the same, vmap, as the rest            8.8  13 MB       5.1  64 MB       6.5  409 MB      6.0  1817 MB
    T: forward over forward over reverse      10.   9 MB       8.4  42 MB       6.7  256 MB      5.5  1219 MB
    T: forward over reverse over forward      9.8  11 MB       8.7  57 MB       6.9  321 MB      5.2  1655 MB
    ========================================  ===============  ===============  ===============  ===============

Reverse mode is fastest because its graphs are shared: all directions share that of the gradient, and all pairs (i, j)
share that of H uᵢ.  It also demands least of the loss: it needs neither forward-mode formulas nor batching rules, and
allows data-dependent control flow.  Directions are processed one at a time unless ``max_directions`` says otherwise, so
memory does not grow with their number.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from dvi.problems.derivatives.protocol import Part, matrix_from_pairs, pull, reinstate
from dvi.problems.derivatives.safe import differentiable_layers
from dvi.problems.errors import DerivativeError
from dvi.problems.ledger import DEFAULT_WEIGHTS, Ledger


class Autodiff:
    """Exact derivatives of a sum of parts.

    A loss of one part keeps the graph of its gradient for as long as w stays the same.  This makes further products up
    to twice as cheap, and an eigensolver asks for many.  Chunked losses keep nothing, to save memory.
    """

    def __init__(self, parts: Sequence[Part], ledger: Ledger, max_directions: int = 1) -> None:
        self._parts = parts
        self._ledger = ledger
        self._max_directions = max_directions
        self._kept: tuple[Tensor, Tensor] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """The state without the stored graph, which cannot be pickled and which no copy needs."""
        return {**self.__dict__, "_kept": None}

    @property
    def weights(self) -> Mapping[str, float]:
        """Conservative costs: the highest ones measured on small networks.  Measure them for a given problem."""
        return DEFAULT_WEIGHTS

    def remember(self, w: Tensor, gradient: Tensor) -> None:
        """Does nothing: this backend keeps the graph of the gradient instead."""

    def uncertainty(self, w: Tensor) -> dict[str, float]:
        """Empty: all derivatives are exact up to rounding."""
        return {}

    def hvp(self, w: Tensor, V: Tensor) -> Tensor:
        """Rows H(w) vᵢ [k, d]."""
        self._ledger.hvps += len(V)
        products = torch.zeros_like(V)
        with explained("second"):
            for x, gradient in self._gradients(w):
                products += self._pull_rows(gradient, x, V)
        return products

    def pairs(self, w: Tensor, U: Tensor) -> Tensor:
        """Rows T[uᵢ, uⱼ] [k(k+1)/2, d] for i ≤ j."""
        k = len(U)
        self._ledger.third_derivatives += k * (k + 1) // 2
        rows = U.new_zeros(k * (k + 1) // 2, U.shape[1])
        with explained("third"):
            for x, gradient in self._gradients(w):
                done = 0
                for i in range(k):
                    product = pull(gradient, x, U[i], again=True)
                    rows[done : done + k - i] += self._pull_rows(product, x, U[i:])
                    done += k - i
        return rows

    def squares(self, w: Tensor, U: Tensor) -> Tensor:
        """Rows T[uᵢ, uᵢ] [k, d]."""
        self._ledger.third_derivatives += len(U)
        rows = torch.zeros_like(U)
        with explained("third"):
            for x, gradient in self._gradients(w):
                for row, u in zip(rows, U, strict=True):
                    product = pull(gradient, x, u, again=True)
                    row += pull(product, x, u, keep=True)
        return rows

    def along(self, w: Tensor, U: Tensor, V: Tensor) -> Tensor:
        """Return the matrices uᵢᵀ T[v] uⱼ [m, k, k], by the cheaper of T[v, uᵢ] and T[uᵢ, uⱼ]."""
        k, m = len(U), len(V)
        if 2 * m >= k + 1:
            return matrix_from_pairs(V @ self.pairs(w, U).T, k)
        self._ledger.third_derivatives += m * k
        matrices = U.new_zeros(m, k, k)
        with explained("third"):
            for x, gradient in self._gradients(w):
                for matrix, v in zip(matrices, V, strict=True):
                    product = pull(gradient, x, v, again=True)
                    matrix += self._pull_rows(product, x, U) @ U.T
        return (matrices + matrices.mT) / 2

    def _gradients(self, w: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """For each part, a leaf holding w and the part's gradient there, differentiable with respect to it."""
        # Compared by value: a tensor changed in place through .data has the same identity and version.
        if self._kept is not None and torch.equal(self._kept[0], w):
            reinstate(self._parts[0], self._kept[0])
            yield self._kept
            return
        self._kept = None
        for part in self._parts:
            with torch.enable_grad():
                x = w.detach().clone().requires_grad_()
                value = part(x)
                gradient = pull(value, x, again=True)
            if len(self._parts) == 1:
                self._kept = (x, gradient)
            yield x, gradient

    def _pull_rows(self, y: Tensor, x: Tensor, V: Tensor) -> Tensor:
        """Rows vᵢᵀ ∂y/∂x, ``max_directions`` at once; the graph of y is kept."""
        if self._max_directions == 1 or not y.requires_grad:
            return torch.stack([pull(y, x, v, keep=True) for v in V])
        blocks = []
        for block in torch.split(V, self._max_directions):
            (rows,) = torch.autograd.grad(
                get_gradient_edge(y),
                get_gradient_edge(x),
                block,
                retain_graph=True,
                is_grads_batched=True,
                allow_unused=True,
            )
            blocks.append(torch.zeros_like(block) if rows is None else rows)
        return torch.cat(blocks)


@contextmanager
def explained(order: str) -> Iterator[None]:
    """Turn autograd's refusals into an error that names the cause and a remedy.

    Activation checkpointing runs a part of the loss again in the backward pass.  In this context, unsafe layers are
    composed there as they were in the forward pass.
    """
    try:
        with differentiable_layers():
            yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if isinstance(error, RecursionError):
            raise
        raise DerivativeError(
            f"automatic differentiation could not compute a {order} derivative of this loss: {error}\n"
            'If an operation has no double backward, derivatives="finite-difference" needs first derivatives only.'
        ) from error
