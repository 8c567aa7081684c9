"""P̃(ν, t), and its derivatives in ν and t.

Momentum Q enters by its threshold c and gain Q₁, and weight decay by Γ = diag(γ).  With c = 2/Q(z = −1), the edge
H ⪯ cP(I − Γ/2) is H ⪯ 2P̃ for P̃ = (c/2)P(I − Γ/2).  All numerics use P̃, so that the edge is at 2.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor
from torch.func import vmap
from torch.utils import _pytree as pytree

from dvi.compiler.jacobian_structure import generic, random_like
from dvi.compiler.tangents import derivative, still
from dvi.compiler.tracing import Replays
from dvi.methods import Diagonal, Method, Nu, Preconditioner, Scalar, Timetable
from dvi.methods.per_weight import PerWeight
from dvi.methods.validation import decay_of


class Metric:
    """P̃ of a spec.

    Args:
        method: the declaration.
        nu: an example of ν, after a first update.
        w: an example of weights [d].
        replays: the traced derivatives of the spec.
        centred: how schedules are evaluated, see :meth:`dvi.methods.Timetable.at`.
    """

    def __init__(self, method: Method, nu: Nu, w: Tensor, replays: Replays, centred: bool = False) -> None:
        self.method, self.replays, self.centred = method, replays, centred
        self.w = w
        self.timetable = Timetable(method)
        self.scheduled = bool(method.scheduled)
        self.momentum = not method.at(0.0).Q().trivial
        self.stateless = not pytree.tree_leaves(nu)
        P = self.P(nu, 0.0)
        #: is P diag(p) or p I with a tensor p?
        self.simple = type(P) in (Diagonal, Scalar) and isinstance(P.p, Tensor)  # type: ignore[attr-defined]
        self._example = nu

    @cached_property
    def local(self) -> bool:
        """Does each entry of ν act on its own entry of p alone?  Found when it is asked for."""
        return self.simple and not self.stateless and self._is_local(self._example, self.w)

    def at(self, t: float) -> Method:
        """The method with its schedules' values at t."""
        return self.timetable.at(t, centred=self.centred)

    def P(self, nu: Nu, t: float) -> Preconditioner:
        """P̃ at (ν, t): the preconditioner, scaled so that the threshold is 2."""
        return self._scaled(self.at(t), nu)

    def _scaled(self, method: Method, nu: Nu) -> Preconditioner:
        P = method.P(nu).scaled(0.5 * method.Q().threshold) if self.momentum else method.P(nu)
        declared = method.decay()
        return P if declared is None else P.weighted(PerWeight.of(declared, self.w).map(lambda x: 1 - x / 2))

    def decay(self, t: float) -> PerWeight | None:
        """γ at t, or None without weight decay.

        Raises:
            ScheduleError: if γ is outside [0, 1).
        """
        return decay_of(self.at(t), self.w, t)

    def rates(self, nu: Nu, t: float, dnu: Nu, U: Tensor) -> Tensor:
        """The upper triangles of Uᵀ ∂P̃[ν̇_b] U [b, k(k+1)/2] for b directions ν̇_b (leading dimension of ``dnu``)."""
        k = U.shape[1]
        rows, columns = torch.triu_indices(k, k, device=U.device)
        if self.simple:  # no [d, k] products are needed
            p = self._p_rates(nu, t, dnu)
            products = U[:, rows] * U[:, columns]
            return p @ products if p.ndim == 2 else torch.outer(p, products.sum(dim=0))

        def rate(dnu: Nu) -> Tensor:
            PU: Tensor = derivative(lambda nu: self.P(nu, t).apply(U), nu, dnu)
            return (U.T @ PU)[rows, columns]

        generic: Tensor = vmap(rate, chunk_size=max(1, 64 // k))(dnu)  # each direction holds a [d, k] product
        return generic

    def clock_rate(self, nu: Nu, t: float, U: Tensor) -> Tensor:
        """Uᵀ (∂P̃/∂t) U [k, k], per unit time: the effect of the schedules."""
        dt = U.new_zeros(())
        method = self.timetable.moving(t, self.centred)

        def image(dt: Tensor) -> Tensor:
            return self._scaled(method(dt), nu).apply(U)

        PU: Tensor = derivative(image, dt, torch.ones_like(dt))
        return U.T @ PU

    def _p_rates(self, nu: Nu, t: float, dnu: Nu) -> Tensor:
        """d/ds p(ν + s·dν) for a batch of directions [b, d], or [b] of p I."""
        if not self.local:
            rates: Tensor = self.replays.each(self._p_rate, self.at(t), (nu,), dnu)
            return rates
        slopes = self.replays(self._p_slopes, self.at(t), nu)
        return _along(slopes, dnu)

    def _p_slopes(self, method: Method, nu: Nu) -> list[Tensor]:
        """∂p/∂ν for every leaf of ν, of which entry i acts on pᵢ alone, or a single one on all: [d] each."""
        leaves, spec = pytree.tree_flatten(nu)

        def slope(i: int) -> Tensor:
            def p(leaf: Tensor) -> Tensor:
                return self._p(method, pytree.tree_unflatten([*leaves[:i], leaf, *leaves[i + 1 :]], spec))

            # a tangent may be zero within p: of √(v c(t)) at v = 0 along t
            found: Tensor = derivative(p, leaves[i], torch.ones_like(leaves[i]))
            return found

        return [slope(i) for i in range(len(leaves))]

    def _is_local(self, nu: Nu, w: Tensor) -> bool:
        """Does each entry of a ν like w act on its own entry of p alone?  Random probes of three sizes must show it."""
        if any(x.shape not in (w.shape, ()) or not x.is_floating_point() for x in pytree.tree_leaves(nu)):
            return False
        method, generator = self.method.at(0.0), torch.Generator().manual_seed(2)
        for scale in (1e-3, 1.0, 1e3):
            at = generic(method, nu, scale * w, generator)
            dnu = pytree.tree_map(lambda x: random_like(x, generator), at)
            seen = self._p_rate(method, at, dnu)
            if seen.shape != w.shape:
                return False
            slopes = self._p_slopes(method, at)
            expected = _along(slopes, pytree.tree_map(lambda x: x[None], dnu))[0]
            # Both sides are products and sums of few numbers: some hundred eps, relative to the largest entry.
            largest = float(torch.maximum(expected.abs().max(), seen.abs().max()))
            if not float((seen - expected).abs().max()) <= 1e3 * torch.finfo(w.dtype).eps * largest:
                return False
        return True

    def _p_rate(self, method: Method, nu: Nu, dnu: Nu) -> Tensor:
        """d/ds p(ν + s·dν) for P̃ = diag(p), [d], or p I, []."""
        rate: Tensor = derivative(lambda nu: self._p(method, nu), nu, dnu)
        return rate

    def _p(self, method: Method, nu: Nu) -> Tensor:
        entries: Tensor = self._scaled(method, nu).p  # type: ignore[attr-defined]
        return torch.where(entries > 0, entries, torch.zeros_like(entries))  # a dead coordinate stays so


def _along(slopes: list[Tensor], changes: Nu) -> Tensor:
    """Σ slope [d] · change over the leaves of a batch of changes, [b, d] or [b] each: [b, d].

    A product is zero where the change is exactly zero, however steep the slope.
    """
    pairs = zip(slopes, pytree.tree_leaves(changes), strict=True)
    whole = [(slope, change if change.ndim == 2 else change[:, None]) for slope, change in pairs]
    return torch.stack([still(change, change * slope) for slope, change in whole]).sum(dim=0)
