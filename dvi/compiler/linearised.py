"""The constraint (α, β, the gap) and the drift of a compiled flow at one state, both linear in X."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dvi.compiler.calculus import LossLeftDomainError, SpecCalculus
from dvi.compiler.decay import Decay, entrywise
from dvi.methods import Nu, Preconditioner
from dvi.solvers.protocol import Array, Frame, Rate, State, host, like
from dvi.solvers.svec import smat, svec, triu


@dataclass(frozen=True)
class LinearisedFlow:
    """The constraint and the drift of a compiled flow at one state.

    Both are linear in X [k, k], the covariance of the oscillation in the frame.

    Attributes:
        calculus: the derivatives of the spec.
        y: the state.
        g: the gradient [d] at y.
        frame: critical directions with HU and T, at or near y.
        push: whether oscillations act on w; False leaves ½∇³L[Σ] out of dw/dt and of β (an ablated flow).
    """

    calculus: SpecCalculus
    y: State
    g: Tensor
    frame: Frame
    push: bool = True

    @cached_property
    def _P(self) -> Preconditioner:
        return self.calculus.P(self.y.nu, self.y.t)

    @property
    def preconditioner(self) -> Preconditioner:
        """P(ν), after a check that it is positive definite."""
        self._host  # noqa: B018  which checks
        return self._P

    @property
    def speed(self) -> float:
        """κ, see :meth:`SpecCalculus.speed`."""
        return self.calculus.speed(self.y.t)

    @cached_property
    def _decay(self) -> Decay | None:
        return self.calculus.decay(self.y.t)

    def _velocity(self, V: Tensor) -> Tensor:
        """−P̃⁻¹V [d], times 1 − γ/2 if there is weight decay."""
        solved = -self.preconditioner.solve(V)
        return solved if self._decay is None else self._decay.share * solved

    @cached_property
    def _nu_rate(self) -> Nu:
        return self.calculus.nu_rate(self.y.nu, self.y.t, self.g)

    @cached_property
    def _nu_response(self) -> Nu:
        frame = self.frame
        HU = 2 * self._P.apply(frame.U) if frame.on_edge else frame.HU
        return self.calculus.nu_response(self.y.nu, self.y.t, self.g, HU, frame.T)

    @cached_property
    def _host(self) -> tuple[Array, Array, Array]:
        """α [k, k], β [n, n] and the gap [k, k], moved to the host in one transfer with the checks of g and P.

        Raises:
            LossLeftDomainError: if g is not finite.
            LeftDomainError: if P(ν) is not positive definite.
        """
        k, t, P = self.frame.k, self.y.t, self._P
        sound = P.sound(self.g)
        if sound is None:
            self.calculus.require(P, t, self.g)
        finite = torch.isfinite(self.g).all()
        if not self.calculus.elementwise and not finite:  # a coupled ν needs a solve, which fails on such numbers
            raise self._not_finite()
        healthy, *rest = host(torch.stack([finite, finite if sound is None else sound]), *self._parts())
        if not healthy[0]:
            raise self._not_finite()
        if not healthy[1]:
            self.calculus.require(P, t, self.g)
        if not k:
            return np.zeros((0, 0)), np.zeros((0, 0)), np.zeros((0, 0))
        index = triu(k)
        a, B, G, m, *rest = rest
        A, B = smat(a), 0.5 * (B + B.T)
        if self.calculus.metric.scheduled:
            C = rest.pop()
            A = A - (C + C.T)
        if rest:  # svec of Uᵀ∂P[ν̇_b]U: its upper triangle with the weights of the off-diagonals
            A, B = A - 2 * smat(index.weight * rest[0][0]), B + 2 * index.weight[:, None] * rest[0][1:].T
        return A, B, 0.5 * (G + G.T) - self.frame.M - smat(m)

    def _not_finite(self) -> LossLeftDomainError:
        return LossLeftDomainError(f"At t = {self.y.t:g}: the loss, or its gradient, is not finite.")

    def _parts(self) -> list[Tensor]:
        """The parts of α, β and the gap, on the device."""
        if not self.frame.k:
            return []
        U, T, P, nu, t = self.frame.U, self.frame.T, self._P, self.y.nu, self.y.t
        decay = self._decay
        slope, products = gram_of_pairs(P, T, self.g, share=None if decay is None else decay.share)
        push = 0.5 * self.speed if self.push else 0.0
        free = -self.speed * slope
        if decay is not None:
            free = free - T @ (decay.gamma * self.y.w)
        parts = [free, push * products, 2 * (U.T @ P.apply(U)), T @ (self.y.w - self.frame.w)]
        if not self.calculus.stateless:
            rates = pytree.tree_map(lambda x, b: torch.cat([x[None], b]), self._nu_rate, self._nu_response)
            parts.append(self.calculus.metric.rates(nu, t, rates, U))
        if self.calculus.metric.scheduled:
            parts.append(self.calculus.metric.clock_rate(nu, t, U))
        return parts

    @property
    def alpha(self) -> Array:
        """α [k, k]."""
        return self._host[0]

    @property
    def beta(self) -> Array:
        """β [n, n] in svec, n = k(k+1)/2."""
        return self._host[1]

    @property
    def gap(self) -> Array:
        """Uᵀ(2P − H)U [k, k]; H is extrapolated linearly from the frame's anchor."""
        return self._host[2]

    def drift(self, X: Array | None) -> Rate:
        """dw/dt = −P⁻¹[∇L + ½∇³L[Σ]] − γw and dν/dt = ν̇₀ + ν̇_X per unit time (eq. 31 with its errata)."""
        w = self.speed * self._velocity(self.g)
        free = Rate(w if self._decay is None else w - self._decay.gamma * self.y.w, self._nu_rate)
        if X is None or not X.any():
            return free
        pushed = self.kick(X)
        return Rate(free.w + pushed.w, pytree.tree_map(torch.add, free.nu, pushed.nu))

    def kick(self, Z: Array) -> Rate:
        """−P⁻¹ ½∇³L[UZUᵀ] and ν̇_Z: the part of the drift that oscillations cause; Z [k, k]."""
        z = like(svec(Z), self.g)
        dnu = self.y.nu
        if not self.calculus.stateless:
            dnu = pytree.tree_map(lambda b: torch.tensordot(z, b, dims=1), self._nu_response)
        push = 0.5 * self.speed * (z @ self.frame.T) if self.push else torch.zeros_like(self.g)
        return Rate(self._velocity(push), dnu)


def gram_of_pairs(
    P: Preconditioner, T: Tensor, g: Tensor, block: int = 2**23, share: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """T P⁻¹g [n] and T P⁻¹Tᵀ [n, n] for T [n, d].

    The products are computed in blocks of rows with about ``block`` numbers each, so that P⁻¹Tᵀ is never stored whole.
    With ``share`` ([d] or []), diag(share)P⁻¹ takes the place of P⁻¹.
    """
    slopes, columns = [], []
    for piece in torch.split(T, max(1, block // T.shape[1])):
        solved = P.solve(piece.T)
        if share is not None:
            solved = entrywise(share, solved)
        slopes.append(solved.T @ g)
        columns.append(T @ solved)
    return torch.cat(slopes), torch.cat(columns, dim=1)


@dataclass(frozen=True)
class Linearisation:
    """The constraint and the drift at one (w, ν), as the compiler derives them: see :meth:`dvi.CentralFlow.linearise`.

    Attributes:
        alpha: [k, k], host float64: −d/dt Uᵀ(2P − H)U without oscillation, per unit time.
        beta: [n, n], host float64, svec, n = k(k+1)/2: with oscillation X, d/dt Uᵀ(2P − H)U = β[X] − α.
        gap: [k, k]: Uᵀ(2P − H)U.
        eigenvalues: [k], of P⁻¹H on U.
        U: [d, k].
        T: [n, d], ∇_w uᵢᵀH uⱼ in svec order.
        flow: the drift, see :meth:`drift`.
    """

    alpha: Tensor
    beta: Tensor
    gap: Tensor
    eigenvalues: Tensor
    U: Tensor
    T: Tensor
    flow: LinearisedFlow

    def drift(self, X: Any = None) -> Rate:
        """(dw/dt [d], dν/dt) with oscillation covariance Σ = UXUᵀ, X [k, k]; per unit time."""
        return self.flow.drift(None if X is None else np.asarray(X, dtype=np.float64))
