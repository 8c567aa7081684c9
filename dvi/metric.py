"""P̃(ν, t), and how it changes when ν and the clock move.

Momentum Q enters by its threshold c and gain Q₁.  H ⪯ cP is H ⪯ 2P̃ with P̃ = (c/2)P, so all of the numerics is written
in P̃, where the edge is at 2.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from torch.func import jvp, vmap
from torch.utils import _pytree as pytree

from dvi.local import away, random_like
from dvi.methods import Diagonal, Method, Nu, Preconditioner, Scalar
from dvi.replay import Replays


class Metric:
    """P̃ of a spec.

    Args:
        method: the declaration.
        nu: an example of ν, after a first update.
        replays: the derivatives of the spec that are replayed.
    """

    def __init__(self, method: Method, nu: Nu, replays: Replays) -> None:
        self.method, self.replays = method, replays
        self.scheduled = bool(method.scheduled)
        self.momentum = not method.at(0.0).Q().trivial
        self.stateless = not pytree.tree_leaves(nu)
        #: is it diag(p) or p I, known by its p?
        self.simple = type(self.P(nu, 0.0)) in (Diagonal, Scalar)
        self.entrywise = self.simple and not self.stateless and self._is_entrywise(nu)

    def at(self, t: float) -> Method:
        """The method with its schedules' values at t."""
        return self.method.at(t) if self.scheduled else self.method

    def P(self, nu: Nu, t: float) -> Preconditioner:
        """P̃ at (ν, t): the preconditioner, scaled so that the threshold is 2."""
        return self._scaled(self.at(t), nu)

    def _scaled(self, method: Method, nu: Nu) -> Preconditioner:
        return method.P(nu).scaled(0.5 * method.Q().threshold) if self.momentum else method.P(nu)

    def rates(self, nu: Nu, t: float, dnu: Nu, U: Tensor) -> Tensor:
        """The upper triangles of Uᵀ ∂P̃[ν̇_b] U for a batch ν̇_b of b directions (a leading dimension): [b, k(k+1)/2]."""
        k = U.shape[1]
        rows, columns = torch.triu_indices(k, k, device=U.device)
        if self.simple:  # then [d, k] products are not needed
            p, products = self._p_rates(nu, t, dnu), U[:, rows] * U[:, columns]
            return p @ products if p.ndim == 2 else torch.outer(p, products.sum(dim=0))

        def rate(dnu: Nu) -> Tensor:
            PU: Tensor = jvp(lambda nu: self.P(nu, t).apply(U), (nu,), (dnu,))[1]
            return (U.T @ PU)[rows, columns]

        generic: Tensor = vmap(rate, chunk_size=max(1, 64 // k))(dnu)  # each direction holds a [d, k] product
        return generic

    def clock_rate(self, nu: Nu, t: float, U: Tensor) -> Tensor:
        """Uᵀ (∂P̃/∂t) U [k, k], as the schedules move."""
        dt = U.new_zeros(())
        PU: Tensor = jvp(lambda dt: self._scaled(self.method.at(t, dt), nu).apply(U), (dt,), (torch.ones_like(dt),))[1]
        return U.T @ PU

    # ---- P̃ known by its p -----------------------------------------------------------------------------

    def _p_rate(self, method: Method, nu: Nu, dnu: Nu) -> Tensor:
        """d/ds p(ν + s·dν), [d] or []."""

        def p(nu: Nu) -> Tensor:
            entries: Tensor = self._scaled(method, nu).p  # type: ignore[attr-defined]
            return torch.where(entries > 0, entries, torch.zeros_like(entries))  # a dead coordinate stays so

        rate: Tensor = jvp(p, (nu,), (dnu,))[1]
        return rate

    def _p_slopes(self, method: Method, nu: Nu) -> list[Tensor]:
        """∂p/∂ν for every leaf of ν, entry by entry, like p."""
        leaves, spec = pytree.tree_flatten(nu)
        zeros = [torch.zeros_like(x) for x in leaves]
        alone = [[*zeros[:i], torch.ones_like(x), *zeros[i + 1 :]] for i, x in enumerate(leaves)]
        return [self._p_rate(method, nu, pytree.tree_unflatten(one, spec)) for one in alone]

    def _p_rates(self, nu: Nu, t: float, dnu: Nu) -> Tensor:
        """d/ds p(ν + s·dν) for a batch of dν: [b, d] or [b]."""
        method = self.at(t)
        if not self.entrywise:
            return cast(Tensor, self.replays.each(self._p_rate, method, (nu,), dnu))
        slopes = self.replays(self._p_slopes, method, nu)
        parts = [
            dx * slope if dx.ndim == slope.ndim + 1 else torch.outer(dx, slope)
            for slope, dx in zip(slopes, pytree.tree_leaves(dnu), strict=True)
        ]
        return torch.stack(parts).sum(dim=0) if len(parts) > 1 else parts[0]

    def _is_entrywise(self, nu: Nu) -> bool:
        """Is entry i of p made of the entries i of ν, and of its scalars?  A random probe must agree with that."""
        method, generator = self.method.at(0.0), torch.Generator().manual_seed(2)
        nu = away(nu, generator)
        probe = pytree.tree_map(lambda x: x * random_like(x, generator), nu)
        parts = []
        for slope, dx in zip(self._p_slopes(method, nu), pytree.tree_leaves(probe), strict=True):
            if dx.shape not in (slope.shape, ()):
                return False
            parts.append(slope * dx)
        seen, largest = self._p_rate(method, nu, probe), max(float(x.abs().max()) for x in parts)
        # Both sides are sums of a few products: some hundred eps of the largest.
        return float((sum(parts) - seen).abs().max()) <= 1e3 * torch.finfo(seen.dtype).eps * largest
