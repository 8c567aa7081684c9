"""The flow with momentum as a state: of second order in the step size, for every filter and without one (τ = 0).

    dw/dt = −Q₁P(ν)⁻¹ m,      τ′ dm/dt = g + ½∇³L[Σ] − m,      τ′ = τ + ½,
    dν/dt = K J⁻¹ (f(ν, g) + ½∇²_g f[HΣH]),      K = log(I+J), J = ∂f/∂ν,
    0 ⪯ Σ  ⟂  cP(ν) − H(w) ⪰ 0.

With weight decay γ, dw/dt = (log(1−γ)/γ) (γw + Q₁P(ν)⁻¹m), and P(I − Γ/2) replaces P in the last line.

If a schedule changes Q₁, then Q₁m obeys the second equation (times Q₁).

An optimizer's step from w_t to w_{t+1} uses m_t and ν_t, which were made with the gradient at w_t.  They belong to the
middle of that step, t + ½.  Hence the ½ in τ′, and hence the clocks of ν and of the schedules run half a step behind.

A semi-implicit step of length h has m and ν at half-steps.  With e = (τ′ − h/2)/(τ′ + h/2):

    m⁺ = e m + (1−e)(g + ½∇³L[Σ]),      ν⁺ = ν + ((I+J)ʰ − I)J⁻¹ (f + ½∇²f[HΣH]),      w⁺ = w − h Q₁P(ν⁺)⁻¹ m⁺.

With weight decay, :meth:`dvi.compiler.decay.Decay.span` replaces h, and γw times that span is subtracted.  For h = 1
this is the optimizer's own step plus the force of Σ: exactly so for filters with one buffer and no direct part, and
without a filter.  Σ follows from the gap at the end of the step, which is linear in X if the response of ν is small.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dvi.compiler.decay import Decay, entrywise
from dvi.methods import Nu, Preconditioner
from dvi.solvers.protocol import Array, Frame, Staggered, State, host, like
from dvi.solvers.svec import smat, svec, triu

if TYPE_CHECKING:
    from dvi.compiler.calculus import SpecCalculus


def stagger(calculus: SpecCalculus, y: State, g: Tensor, h: float) -> Staggered:
    """The state with momentum and ν half a step h behind y.

    Args:
        calculus: the derivatives of the spec.
        y: a state of the optimizer, with ν after the update with g; or a state of a flow with momentum, with ν and
            m [d] at y.t.
        g: the gradient at y [d].
        h: the length of the step, unit times, at most 1.

    Without a filter m starts at g.  A start on the slow manifold, m = g + τ′Hg̃, costs one more product with H and was
    measured to end 4 to 8 times further from gradient descent.  The reason is that the short transient of a start at g
    cancels a part of the error of the next order.
    """
    lag = calculus.lag(y.t)
    last = calculus.last_update(y.nu, y.t, g)
    if isinstance(y.m, Tensor):
        m = regained(calculus, y.m - 0.5 * h / lag * (g - y.m), y.t, y.t - 0.5 * h)
        return Staggered(y.w, m, _shifted(y.nu, last, -0.5 * h), y.nu, y.t)
    if y.m is None:
        m = g
    else:
        Q = calculus.metric.at(y.t).Q()
        now = Q.step(g, y.m)[0] / Q.gain  # the flow's m at ½, and at −½
        before = y.m[-1] / calculus.metric.at(calculus.clock(y.t - 0.5)).Q().gain
        m = before + (0.5 - 0.5 * h) * (now - before)
    return Staggered(y.w, m, _shifted(y.nu, last, -0.5 - 0.5 * h), _shifted(y.nu, last, -0.5), y.t)


def restagger(calculus: SpecCalculus, s: Staggered, g: Tensor, before: float, h: float) -> Staggered:
    """Move momentum and ν from half a step ``before`` behind w to half a step h behind it, without oscillation."""
    by = 0.5 * (before - h)
    m = s.m + by / calculus.lag(s.t) * (g - s.m)
    m = regained(calculus, m, s.t - 0.5 * before, s.t - 0.5 * h)
    return replace(s, m=m, nu=pytree.tree_map(torch.add, s.nu, calculus.nu_changes(s.nu, s.t, g, [by])[0]))


def regained(calculus: SpecCalculus, m: Tensor, before: float, now: float) -> Tensor:
    """Rescale momentum m [d] from the gain at one time to that at another, so that Q₁m stays the same."""
    if not calculus.momentum or not calculus.metric.scheduled:
        return m
    old, new = (float(calculus.metric.at(calculus.clock(t)).Q().gain) for t in (before, now))
    return m if old == new else (old / new) * m


def _shifted(nu: Nu, change: Nu, by: float) -> Nu:
    return pytree.tree_map(lambda x, dx: x + by * dx, nu, change)


@dataclass(frozen=True)
class ImplicitStep:
    """A semi-implicit step of length h from s, with the constraint linear in X.

    Attributes:
        calculus: the derivatives of the spec.
        s: the state with momentum and ν half a step h behind w.
        g: the gradient [d] at w.
        frame: critical directions U with HU and T, which model the constraint.
        h: the length of the step, unit times.
    """

    calculus: SpecCalculus
    s: Staggered
    g: Tensor
    frame: Frame
    h: float

    @cached_property
    def decay(self) -> float:
        """E = (τ′ − h/2)/(τ′ + h/2)."""
        lag = self.calculus.lag(self.s.t)
        return (lag - 0.5 * self.h) / (lag + 0.5 * self.h)

    @cached_property
    def _free(self) -> tuple[Tensor, Nu, Nu]:
        """(m, ν) at t + h/2 and ν at t + h, without oscillation."""
        s, e = self.s, self.decay
        kept = regained(self.calculus, s.m, s.t - 0.5 * self.h, s.t + 0.5 * self.h)
        m = e * kept + (1 - e) * self.g
        middle, end = (
            pytree.tree_map(torch.add, s.nu, change)
            for change in self.calculus.nu_changes(s.nu, s.t, self.g, [self.h, 1.5 * self.h])
        )
        return m, middle, end

    @property
    def _middle_clock(self) -> float:
        return self.calculus.clock(self.s.t + 0.5 * self.h)

    @cached_property
    def _decay(self) -> Decay | None:
        return self.calculus.decay(self._middle_clock)

    def _moved(self, P: Preconditioner, m: Tensor) -> Tensor:
        """The change of w that a momentum m [d] or [d, n] causes in this step."""
        speed = self.calculus.speed(self._middle_clock)
        if self._decay is None:
            return -self.h * speed * P.solve(m)
        return -speed * entrywise(self._decay.span(self.h) * self._decay.share, P.solve(m))

    @cached_property
    def _kept(self) -> Tensor:
        """The weights w [d] after their decay."""
        w = self.s.w
        return w if self._decay is None else w - self._decay.span(self.h) * self._decay.gamma * w

    def _middle_P(self, nu: Nu) -> Preconditioner:
        return self.calculus.checked_P(nu, self._middle_clock, self.g)

    @cached_property
    def _responses(self) -> tuple[Nu, Nu]:
        """The responses of ν at t + h/2 and at t + h to every svec basis element of X."""
        s, frame = self.s, self.frame
        HU = 2 * self._middle_P(self._free[1]).apply(frame.U)  # HU on the constraint
        second = self.calculus.f_curvature(s.nu, s.t, self.g, HU, frame.T)
        middle, end = self.calculus.nu_changes(s.nu, s.t, self.g, [self.h, 1.5 * self.h], second)
        return middle, end

    @cached_property
    def _host(self) -> tuple[Array, Array]:
        """The gap [k, k] at t + h without oscillation, and its response to X [n, n]."""
        frame, calculus, end_clock = self.frame, self.calculus, self.calculus.clock(self.s.t + self.h)
        k, (m, nu, nu_end) = frame.k, self._free
        if not k:
            return np.zeros((0, 0)), np.zeros((0, 0))
        P, P_end = self._middle_P(nu), calculus.checked_P(nu_end, end_clock)
        opened = frame.T @ (0.5 * (1 - self.decay) * self._moved(P, frame.T.T))
        gap = 2 * (frame.U.T @ P_end.apply(frame.U))
        moved = frame.T @ (self._kept + self._moved(P, m) - frame.w)
        parts = [-opened, gap, moved]
        if not calculus.stateless:
            parts.append(calculus.metric.rates(nu_end, end_clock, self._responses[1], frame.U).T)
        B, G, v, *bP = host(*parts)
        B = B + 2 * triu(k).weight[:, None] * bP[0] if bP else 0.5 * (B + B.T)
        return 0.5 * (G + G.T) - frame.M - smat(v), B

    @property
    def gap(self) -> Array:
        """Uᵀ(2P̃ − H)U [k, k] at the end of the step, without oscillation."""
        return self._host[0]

    @property
    def beta(self) -> Array:
        """The response of that gap to X, [n, n] in svec."""
        return self._host[1]

    def end(self, X: Array | None) -> Staggered:
        """The state after the step with oscillation covariance UXUᵀ, X [k, k] (None: without oscillation)."""
        s, h = self.s, self.h
        m, nu, nu_end = self._free
        if X is not None and X.any():
            z = like(svec(X), self.g)
            m = m + (1 - self.decay) * 0.5 * (z @ self.frame.T)
            if not self.calculus.stateless:
                nu, nu_end = (
                    pytree.tree_map(lambda x, b: x + torch.tensordot(z, b, dims=1), base, response)
                    for base, response in zip((nu, nu_end), self._responses, strict=True)
                )
        return Staggered(self._kept + self._moved(self._middle_P(nu), m), m, nu, nu_end, s.t + h)
