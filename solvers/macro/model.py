"""The model of the constraint that a macro step uses: critical frame, slope of T, and moments of the oscillation.

Between two updates, the model's gap is linear in w and exact in P(ν), and T follows its slope.  The model keeps moments
of X.  With these, the next update corrects for what T did differently (:mod:`dvi.solvers.macro.defect`).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dvi.solvers import ccp
from dvi.solvers.constants import CONSTANTS
from dvi.solvers.eigen.tracker import SAME, Approach, EigenTracker, SpectrumEstimate
from dvi.solvers.nodes import empty_frame
from dvi.solvers.protocol import Array, ConstrainedFlow, Frame, Linearised, State, combine, host, like
from dvi.solvers.svec import outer, skron

#: Of (w, ν).
Change = tuple[Tensor, Any]


def displaced(y: State, change: Change) -> State:
    """The state after this change, at the same time."""
    w, nu = combine([(1.0, y.parts), (1.0, change)])
    return State(w, nu, y.t)


def partial_isometry(overlap: Array) -> Array:
    """The rotation nearest to an overlap of two frames; zero on directions that the frames do not share."""
    left, size, right = np.linalg.svd(overlap, full_matrices=False)
    shared = size > SAME
    nearest: Array = left[:, shared] @ right[shared]
    return nearest


def transport(flow: ConstrainedFlow, end: State, new: Frame, old: Frame) -> Array:
    """The rotation from the old frame to the new one [k', k]: the polar factor of U'ᵀPU.  k may have changed."""
    if not new.k or not old.k:
        return np.zeros((new.k, old.k))
    return partial_isometry(host(new.U.T @ flow.precondition(end, old.U))[0])


@dataclass(frozen=True)
class Slope:
    """The change of T and of the eigenvectors from one update to the next, per unit time.

    Attributes:
        T: [n, d], in the later frame; zero for pairs with a new direction.
        V: eigenvectors [d, m]; zero for new ones.
        span: unit times between the two updates.
        known: projector [k, k] on the directions for which the slope of T is known.
    """

    T: Tensor
    V: Tensor
    span: float
    known: Array

    @classmethod
    def between(cls, old: Frame, before: SpectrumEstimate, new: Frame, now: SpectrumEstimate) -> Slope | None:
        """The slope from the frames and spectra of two updates; None if both were made at the same time."""
        span = now.t - before.t
        if span <= 0:
            return None
        V, V_old = now.block.V, before.block.V
        (overlap,) = host(V_old.T @ V)
        known = np.linalg.norm(overlap, axis=0) > SAME
        turned = like(partial_isometry(overlap), V)
        R = partial_isometry(overlap[: old.k, : new.k].T)
        both = R @ R.T
        if not old.k or not new.k:
            change = torch.zeros_like(new.T)
        else:
            change = like(skron(both), new.T) @ new.T - like(skron(R), new.T) @ old.T
        return cls(change / span, (V - V_old @ turned) * like(known / span, V), span, both)

    def covers(self, X: Array) -> bool:
        """Whether the slope of T is known where X oscillates, up to a quarter of X."""
        size = float(np.abs(X).sum())
        return float(np.abs(X - self.known @ X @ self.known).sum()) <= 0.25 * size

    def within(self, s: float) -> float:
        """The time over which to extrapolate, s after the update: no longer than slopes are believed."""
        return min(s, CONSTANTS.believed * self.span)


@dataclass(frozen=True)
class Moments:
    """∫X sʲ ds for j = 0, 1, 2, where s is the time since the last update; in the frame of that update, [k, k] each."""

    zeroth: Array
    first: Array
    second: Array

    @classmethod
    def none(cls, k: int) -> Moments:
        """The moments before anything has oscillated."""
        return cls(*(np.zeros((k, k)) for _ in range(3)))

    def after(self, X: Array, s: float, h: float) -> Moments:
        """The moments after a step from s to s + h with constant X."""
        first, second = h * (s + h / 2), h * (s * s + s * h + h * h / 3)
        return Moments(self.zeroth + h * X, self.first + first * X, self.second + second * X)

    def bent(self, H: float, slope: Slope | None) -> Array:
        """The impulse that must be multiplied by the error of T at the end of an interval H.

        With a known slope, T is quadratic in time through the last three updates.  The error at s is then the part s(s
        + a)/H(H + a) of that at H, where a is the length of the interval before.  Without a slope T is linear, and the
        part is s/H.
        """
        linear: Array = self.first / H
        if slope is None:
            return linear
        quadratic = (self.second + slope.span * self.first) / (H * (H + slope.span))
        bent: Array = linear + slope.known @ (quadratic - linear) @ slope.known
        return bent


@dataclass(frozen=True)
class Taken:
    """Which third derivatives the last update computed.

    Attributes:
        axes: those along these orthonormal directions of its frame, [k, k]; None: all.
        looks: number of updates since all of them were computed.
        whole: the time of that update.
    """

    axes: Array | None = None
    looks: int = 0
    whole: float = np.nan


@dataclass(frozen=True)
class StepContext:
    """All that is known at the start of a step.

    Attributes:
        loss, g: loss and gradient there.
        spectrum, frame: the eigenvectors and the critical frame of the last update.
        slope: their change since the update before, if there was one.
        moments: moments of X since the last update (None: the update was made here).
        approach: the eigenvalues in the frame and their rates (None: not known).
        until: no update is needed before this time.
        interval: allowed length of the next interval between updates (0: not known).
        taken: which third derivatives the last update computed (by default all).
        measured: whether the last update measured the model's error.
    """

    loss: float
    g: Tensor
    spectrum: SpectrumEstimate
    frame: Frame
    slope: Slope | None = None
    moments: Moments | None = None
    approach: Approach | None = None
    until: float = np.inf
    interval: float = 0.0
    taken: Taken = field(default_factory=Taken)
    measured: bool = False

    def ahead(self, s: float) -> Frame:
        """The frame at a time s after its update, with T extrapolated if its slope is known."""
        if self.slope is None or not self.frame.k:
            return self.frame
        return replace(self.frame, T=self.frame.T + self.slope.within(s) * self.slope.T)

    def vectors_ahead(self, t: float) -> Tensor | None:
        """The eigenvectors extrapolated to the time t; None without a slope."""
        if self.slope is None:
            return None
        return self.spectrum.block.V + self.slope.within(t - self.spectrum.t) * self.slope.V

    def shown(self, flow: ConstrainedFlow, y: State, frame: Frame) -> Frame:
        """The frame to record: with the U that it will have at y, and HU = 2PU as at the edge."""
        V = self.vectors_ahead(y.t)
        if V is None or not frame.k:
            return frame
        U = flow.basis(y, V[:, : frame.k])
        return replace(frame, U=U, HU=2 * flow.precondition(y, U))


def evaluate(
    flow: ConstrainedFlow,
    tracker: EigenTracker,
    y: State,
    last: SpectrumEstimate | None,
    h: float,
    known: tuple[float, Tensor] | None = None,
) -> StepContext:
    """All that a step from y needs to know; ``known`` is the loss and the gradient, if they were computed already."""
    if known is None:
        loss, g = flow.value_and_grad(y)
        known = float(loss), g
    if not flow.constrained:
        return StepContext(*known, tracker.update_leading(flow, y, last), empty_frame(flow, y))
    spectrum = tracker.update(flow, y, last, h)
    return StepContext(*known, spectrum, critical_frame(flow, y, spectrum, tracker.critical(spectrum, h)))


def critical_frame(flow: ConstrainedFlow, y: State, spectrum: SpectrumEstimate, k: int, third: bool = True) -> Frame:
    """The frame of the k critical eigenvectors.  If oscillations act on ν within a step, it takes HU = 2PU."""
    return replace(spectrum.frame(flow, y, k, third), on_edge=True)


def third_derivatives(flow: ConstrainedFlow, y: State, frame: Frame, foreseen: Tensor, axes: Array | None) -> Tensor:
    """T [n, d] of a frame: all of it, or a prediction corrected along some orthonormal ``axes``.

    For k directions, T consists of k(k+1)/2 contractions of ∇³L, which are most of an update's cost.  But only T[X]
    pushes w, that is T[q, q] for the k axes q of the oscillation.  The other entries only determine how X responds to
    the gap.  A prediction is good enough for them, as an old Jacobian is for Newton's method: the next update sees the
    remaining gap.
    """
    if axes is None:
        return flow.third_derivatives(y, frame.U)
    squares = flow.third_derivatives(y, frame.U @ like(axes, frame.U), squares=True)
    S = like(outer(axes), foreseen)
    return foreseen + S.T @ (squares - S @ foreseen)


def oscillating(X: Array) -> Array:
    """The axes of X [k, k] along which there is an oscillation, [k, a]."""
    if not X.any():
        return np.zeros((len(X), 0))
    x, Q = np.linalg.eigh(X)
    return Q[:, x > CONSTANTS.rest * x[-1]]


def baumgarte(h: float) -> float:
    """The rate at which a step of h closes the gap, per unit time."""
    return 4 / max(h, 2.0)


def multiplier(
    flow: ConstrainedFlow,
    lin: Linearised,
    gamma: float,
    warm: list[ccp.CCPResult | None] | None = None,
    on: Array | None = None,
) -> Array:
    """X of Baumgarte type: γ gap + β[X] − α ⪰ 0 ⟂ X ⪰ 0.  If ``on`` [k, a] is given, X acts on its columns only."""
    alpha, beta = lin.alpha - gamma * lin.gap, lin.beta
    if on is not None:
        S = skron(on.T)
        alpha, beta = on.T @ alpha @ on, S @ beta @ S.T
    if not len(alpha):
        return np.zeros_like(lin.alpha)
    solved = ccp.solve(alpha, beta, warm=warm[0] if warm else None)
    flow.count_ccp()
    if warm:
        warm[0] = solved
    return solved.X if on is None else on @ solved.X @ on.T


def anchored(flow: ConstrainedFlow, y: State, frame: Frame, gap: Array) -> Frame:
    """The frame with this gap at y.  From there on, the gap is linear in the displacement of w from y."""
    M = 2 * host(frame.U.T @ flow.precondition(y, frame.U))[0] - gap
    return replace(frame, w=y.w, M=0.5 * (M + M.T))


def settled(
    flow: ConstrainedFlow, moved: State, new: Frame, gap: Array, spectrum: SpectrumEstimate, h: float
) -> tuple[Frame, SpectrumEstimate]:
    """The frame and the eigenvalues after the small correction of the state, to first order."""
    values = spectrum.eigenvalues.copy()
    values[: new.k] = 2 - np.linalg.eigvalsh(gap)
    shift = (values - spectrum.eigenvalues) / h
    block = replace(spectrum.block, eigenvalues=values)
    return anchored(flow, moved, new, gap), replace(spectrum, block=block, rates=spectrum.rates + shift)


def amplitude(X: Array, frame: Frame) -> float:
    """The amplitude of the oscillation in w: √tr Σ = √tr UXUᵀ."""
    if not frame.k:
        return 0.0
    (G,) = host(frame.U.T @ frame.U)
    return float(max((X * G).sum(), 0.0) ** 0.5)
