"""Second and third derivatives from differences of gradients.

A Hessian-vector product is the difference of a gradient and the one at w, which is known.  T[u, u] is a second
difference of two gradients and the one at w.  T[u, v] follows by polarisation along (u + v)/√2.  The loss needs only
first derivatives.

Step sizes.  A gradient has rounding noise of about ε_m |g|, where ε_m is the machine epsilon.  Differences have a
truncation error: h |L‴| if one-sided, h² |L⁗| (or |L⁵|) if central.  ε_m/h + h is least at h ∝ ε_m^½, ε_m/h + h² at
h ∝ ε_m^⅓, and ε_m/h² + h² at h ∝ ε_m^¼.  In float64 a one-sided difference gives a product to 1e-8 … 3e-7, far more
accurate than eigenvectors require.  In float32 that would be 3e-4, so there products use central differences, which
cost two gradients each and are accurate to 2e-5.  h is the length of the displacement, not a multiple of the direction:
directions may have any length.  The best constant was measured on small networks (MLP, CNN, transformer) in both
precisions, along eigenvectors, the gradient and random directions.  It lies between 0.3 and 3 for every ‖w‖.  Here it
is ½, times the root mean square of w if that exceeds 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dvi.problems.derivatives.protocol import Part, matrix_from_pairs, value_and_gradient
from dvi.problems.ledger import Ledger


class FiniteDifference:
    """Derivatives of a sum of parts from its gradients.

    A Hessian-vector product costs one gradient (``central``: two), a contraction T[uᵢ, uⱼ] costs two.  The gradient at
    w is kept between calls, and counted when it is computed.

    Args:
        parts, ledger: see :class:`~dvi.problems.problem.Problem`.
        central: True if products are central differences.
    """

    def __init__(self, parts: Sequence[Part], ledger: Ledger, central: bool) -> None:
        self._parts = parts
        self._ledger = ledger
        self._central = central
        self._kept: tuple[Tensor, Tensor] | None = None

    @property
    def weights(self) -> Mapping[str, float]:
        """Exactly one gradient per product (two if central) and two per contraction."""
        return {"hvps": 2.0 if self._central else 1.0, "third_derivatives": 2.0}

    def remember(self, w: Tensor, gradient: Tensor) -> None:
        """Store the gradient at w, which is known already."""
        self._kept = (w.detach().clone(), gradient.clone())

    def uncertainty(self, w: Tensor) -> dict[str, float]:
        """The relative change of H g and T[g, g], where g is the gradient, when their steps are doubled."""
        here = self._gradient_here(w)
        if self._central:
            products = [self._central_difference(w, here, scale) for scale in (1.0, 2.0)]
        else:
            products = [self._forward_difference(w, here, here, scale) for scale in (1.0, 2.0)]
        return {"hvps": _change(*products), "third_derivatives": self.third_uncertainty(w)}

    def third_uncertainty(self, w: Tensor) -> float:
        """The relative change of T[g, g] alone."""
        here = self._gradient_here(w)
        return _change(self._second_difference(w, here), self._second_difference(w, here, 2.0))

    def hvp(self, w: Tensor, V: Tensor) -> Tensor:
        """Rows H(w) vᵢ [k, d]."""
        self._ledger.hvps += len(V)
        if self._central:
            return torch.stack([self._central_difference(w, v) for v in V])
        here = self._gradient_here(w)
        return torch.stack([self._forward_difference(w, v, here) for v in V])

    def pairs(self, w: Tensor, U: Tensor) -> Tensor:
        """Rows T[uᵢ, uⱼ] [k(k+1)/2, d] for i ≤ j."""
        k = len(U)
        self._ledger.third_derivatives += k * (k + 1) // 2
        # If columns had very different lengths, the shorter one would be lost in their sum.
        norms = _norms(U)
        unit = U / norms[:, None]
        squares = [self._second_difference(w, u) for u in unit]
        rows = []
        for i in range(k):
            for j in range(i, k):
                if i == j:
                    row = squares[i]
                else:
                    diagonal = self._second_difference(w, (unit[i] + unit[j]) / math.sqrt(2))
                    row = diagonal - (squares[i] + squares[j]) / 2
                rows.append(norms[i] * norms[j] * row)
        return torch.stack(rows)

    def squares(self, w: Tensor, U: Tensor) -> Tensor:
        """Rows T[uᵢ, uᵢ] [k, d]."""
        self._ledger.third_derivatives += len(U)
        return torch.stack([self._second_difference(w, u) for u in U])

    def along(self, w: Tensor, U: Tensor, V: Tensor) -> Tensor:
        """Return the matrices uᵢᵀ T[v] uⱼ [m, k, k]."""
        return matrix_from_pairs(V @ self.pairs(w, U).T, len(U))

    def _gradient(self, w: Tensor) -> Tensor:
        return value_and_gradient(self._parts, w)[1]

    def _gradient_here(self, w: Tensor) -> Tensor:
        if self._kept is None or not torch.equal(self._kept[0], w):
            self._ledger.gradients += 1
            self._kept = (w.detach().clone(), self._gradient(w))
        return self._kept[1]

    def _forward_difference(self, w: Tensor, v: Tensor, here: Tensor, scale: float = 1.0) -> Tensor:
        length: Tensor = scale * torch.finfo(w.dtype).eps ** (1 / 2) * unit(w)
        step = length / _norms(v)
        return (self._gradient(w + step * v) - here) / step

    def _central_difference(self, w: Tensor, v: Tensor, scale: float = 1.0) -> Tensor:
        length: Tensor = scale * torch.finfo(w.dtype).eps ** (1 / 3) * unit(w)
        step = length / _norms(v)
        return (self._gradient(w + step * v) - self._gradient(w - step * v)) / (2 * step)

    def _second_difference(self, w: Tensor, u: Tensor, scale: float = 1.0) -> Tensor:
        length: Tensor = scale * torch.finfo(w.dtype).eps ** (1 / 4) * unit(w)
        step = length / _norms(u)
        here = self._gradient_here(w)
        return (self._gradient(w + step * u) - here + (self._gradient(w - step * u) - here)) / (step * step)


def unit(w: Tensor) -> Tensor:
    """Return the unit of length [] for steps of differences at w."""
    size: Tensor = torch.linalg.vector_norm(w) / math.sqrt(w.numel())
    return 0.5 * torch.clamp(size, min=1.0)


def _change(one: Tensor, other: Tensor) -> float:
    size = float(torch.linalg.vector_norm(one))
    return float(torch.linalg.vector_norm(other - one)) / size if size else 0.0


def _norms(u: Tensor) -> Tensor:
    """Lengths of the rows of u; 1 for a zero row, whose products are zero for every step."""
    norms: Tensor = torch.linalg.vector_norm(u, dim=-1)
    return torch.where(norms > 0, norms, torch.ones_like(norms))
