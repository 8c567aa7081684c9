"""Decides which eigenvectors are critical over the next step: leading eigenpairs, their rates, the band below 2."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dvi.solvers.constants import CONSTANTS
from dvi.solvers.eigen.block_method import CRITICAL, CriticalSubspace, Eigenblock
from dvi.solvers.numbers import with_numbers
from dvi.solvers.protocol import Array, ConstrainedFlow, Frame, State, host

#: Two vectors with at least this overlap are the same direction: above 1/√2 no other vector can have as much.
SAME = 0.7


@dataclass(frozen=True)
class SpectrumEstimate:
    """The leading eigenpairs at their last update.

    Attributes:
        block: leading eigenpairs.
        rates: dλ/dt [m] per unit time.
        t: time of the update.
        surveyed: time of the last random search.
        until: by the measured speeds, no eigenvalue can come near 2 before this time, so no update is needed before.
        speed: largest |dλ/dt|, rising or falling.
        U: the eigenvectors in the metric of P, UᵀPU = I [d, m]; only if ``until`` is later than ``t``.
        below: upper bound, at the last random search, for an eigenvalue that the block has missed.
    """

    block: Eigenblock
    rates: Array
    t: float
    surveyed: float
    until: float = -np.inf
    speed: float = CONSTANTS.unknown_rate
    U: Tensor | None = None
    below: float = -np.inf

    @property
    def eigenvalues(self) -> Array:
        """Effective eigenvalues, descending [m]."""
        return self.block.eigenvalues

    @property
    def shown(self) -> Array:
        """The eigenvalues to report: the leading one, and the next ones whose vectors are known to a few percent."""
        return shown(self.block)

    def frame(self, flow: ConstrainedFlow, y: State, k: int, third: bool = True) -> Frame:
        """The frame at y of the k leading eigenvectors found there, with T if asked for."""
        return flow.frame(y, self.block.V[:, :k], self.block.AV[:, :k], third)


@dataclass(frozen=True)
class Approach:
    """Effective eigenvalues and their rates; descending, [k].

    ``turns``: how fast rising rates rise, per unit time; 0 for the others and where it is not known.
    """

    values: Array
    rates: Array
    turns: Array

    def arrivals(self) -> Array:
        """Unit times until each arrives at 2; ∞ for those that are there already or do not approach."""
        room = CRITICAL - self.values
        on_its_way = (room > CONSTANTS.at_edge) & (self.rates > 1e-7)
        rates, turns = np.where(on_its_way, self.rates, 1.0), np.maximum(self.turns, 1e-12)
        times: Array = np.where(
            on_its_way, (np.sqrt(np.maximum(rates**2 + 2 * turns * room, 0.0)) - rates) / turns, np.inf
        )
        return np.where(on_its_way & (turns * room < 1e-6 * rates**2), room / rates, times)

    def none_within(self, h: float) -> bool:
        """True if none is at the edge, and none arrives there before a step of h is nearly over."""
        return bool(np.all(CRITICAL - self.values > CONSTANTS.at_edge) and np.all(self.arrivals() > 0.9 * h))


@dataclass(frozen=True)
class EigenTracker:
    """Follows the eigenpairs and says which of them the constraint must include over the next step.

    Args:
        subspace: the block method.
        band: an eigenvalue within ``band`` of 2 counts as critical.  Its constraint is then included; X stays zero on
            it until it reaches 2.
        lookahead: an eigenvalue that would enter the band within ``lookahead`` steps at its present rate also counts.
        survey_every: longest time between random searches for an eigenvalue that the block has missed, in unit times.
        survey_soonest: shortest such time.  It applies if a missed eigenvalue, rising twice as fast as the known ones,
            may have reached 2.
        patience: longest time for which a spectrum is trusted, in unit times; a longer step ends with an update.
    """

    subspace: CriticalSubspace = field(default_factory=CriticalSubspace)
    band: float = CONSTANTS.band
    lookahead: float = 1.5
    survey_every: float = 20.0
    survey_soonest: float = np.inf
    patience: float = 10.0

    def __post_init__(self) -> None:
        with_numbers(self)

    def update(
        self, flow: ConstrainedFlow, y: State, last: SpectrumEstimate | None, h: float, guess: Tensor | None = None
    ) -> SpectrumEstimate:
        """The eigenpairs at y, including all that a step of h may bring to 2.

        The search starts from ``guess``, or from the last ones.
        """
        A = flow.effective_hessian(y)
        if last is None:
            block = self.subspace.start(A, y.w, want=CRITICAL - CONSTANTS.reach * min(1.0, max(h, 0.1)))
            rates, below = np.full(block.size, CONSTANTS.unknown_rate), float(block.eigenvalues[-1])
            return SpectrumEstimate(block, rates, y.t, y.t, below=below)
        fastest = max(0.0, float(last.rates.max()))
        want = CRITICAL - float(np.clip(2 * fastest * h, 2 * self.band, CONSTANTS.reach))
        # Far from 2 the eigenvectors only serve to predict an arrival, so they need not be accurate.
        distance = CRITICAL - float(last.eigenvalues[0]) - self.lookahead * fastest * (h + y.t - last.t)
        # But the residual must be small beside the eigenvalue: if most eigenvalues are small, any vector has a small
        # one.
        part, most = CONSTANTS.far
        tol = max(self.subspace.tol, min(most, part * distance, CONSTANTS.beside * abs(float(last.eigenvalues[0]))))
        block = last.block if guess is None else replace(last.block, V=guess)
        block = self.subspace.follow(A, block, want, tol)
        surveyed, below, size = last.surveyed, last.below, block.size
        if y.t >= self.due(last) * (1 - 1e-12):
            block, surveyed = self.subspace.survey(A, block, want, tol), y.t
            below = float(block.eigenvalues[-1])
        rates, doubt = self._rates(last, block, y.t, block.size > size)
        until, speed = self._until(block, doubt, y.t, last, h), float(doubt.max())
        now = SpectrumEstimate(block, rates, y.t, surveyed, until, speed, flow.basis(y, block.V), below)
        return replace(now, until=min(until, self.due(now)))

    def update_leading(self, flow: ConstrainedFlow, y: State, last: SpectrumEstimate | None) -> SpectrumEstimate:
        """The leading eigenvalue alone, to a few percent: all that a flow without constraint needs for its step size.

        Args:
            flow, y: the flow and the state.
            last: the last estimate, returned unchanged if it is younger than a unit of time.
        """
        if last is not None and y.t < last.t + (1 - 1e-9):
            return last
        A = flow.effective_hessian(y)
        only = np.inf  # no eigenvalue is wanted beyond the leading one
        if last is None:  # accurate, since the residual of a random vector may be small, too
            block = self.subspace.start(A, y.w, only)
            return SpectrumEstimate(block, np.zeros(block.size), y.t, y.t)
        tol = 0.03 * max(1.0, float(last.eigenvalues[0]))
        block, surveyed = self.subspace.follow(A, last.block, only, tol), last.surveyed
        if y.t - surveyed >= self.survey_every:
            block, surveyed = self.subspace.survey(A, block, only, tol), y.t
        return SpectrumEstimate(block, np.zeros(block.size), y.t, surveyed)

    def critical(self, now: SpectrumEstimate, h: float, held: int = 0) -> int:
        """How many leading eigenvectors the constraint must include over the next h: contiguous, converged ones only.

        One of the ``held`` directions is released only when it has fallen below 2 by 1.5 times the distance at which it
        is included.  So k does not change at every step when an eigenvalue stays near that distance.
        """
        reach = now.eigenvalues + self.lookahead * np.maximum(now.rates, 0.0) * h + self.band
        reach[:held] += 0.5 * self.band
        return min(leading(reach >= CRITICAL), leading(now.block.residuals <= self._rough))

    def frame(self, flow: ConstrainedFlow, y: State, now: SpectrumEstimate, h: float) -> Frame:
        """The frame of the critical eigenvectors at y."""
        return now.frame(flow, y, self.critical(now, h))

    def trusted(self, flow: ConstrainedFlow, y: State, now: SpectrumEstimate, held: int, until: float) -> bool:
        """True if the eigenvalues beyond the leading ``held`` stay below the band until then, so that no update is
        needed.

        Two things must say so: their rates, and the present P.  If an eigenvalue of P⁻¹H rises because P falls, then
        λ/uᵀPu shows it without a product with H.
        """
        if now.U is None or (not held and until > now.until):
            return False
        if now.block.size == held:
            return now.block.V.shape[0] == held  # there are no others
        room = CRITICAL - self.band - now.eigenvalues - now.block.residuals
        if held:
            room -= self.lookahead * np.maximum(now.rates, 0.0) * (until - now.t)
        (length,) = host((now.U * flow.precondition(y, now.U)).sum(dim=0))
        # An eigenvalue that fell because P grew is not taken as further from 2: its rate was measured while P grew.
        risen = np.maximum(now.eigenvalues * (1 / np.maximum(length, 1e-12) - 1), 0.0)
        return bool(np.all(risen[held:] < 0.5 * room[held:]))

    def rise(self, now: SpectrumEstimate, t: float) -> float:
        """By how much an eigenvalue may have risen by t, if it comes near 2 no earlier than at ``now.until``."""
        room = CRITICAL - self.band - float(now.eigenvalues[0])
        return room * float(np.clip((t - now.t) / max(now.until - now.t, 1e-9), 0.0, 1.0))

    def due(self, now: SpectrumEstimate) -> float:
        """The time of the next random search."""
        time = (CRITICAL - now.below) / (2 * max(float(now.rates.max()), 1e-6))
        return now.surveyed + min(max(time, self.survey_soonest), self.survey_every)

    def _until(self, block: Eigenblock, speeds: Array, t: float, last: SpectrumEstimate, h: float) -> float:
        """The time until which no eigenvalue of the block comes within ``band`` of 2, by their measured speeds.

        A measured speed is trusted up to the factor ``CONSTANTS.sudden``.  It is extrapolated over at most
        ``CONSTANTS.believed`` times the interval of its measurement, so the intervals grow as the flow calms down.  It
        is also extrapolated over at most ``CONSTANTS.steps`` steps of the present length h, since steps are short when
        something moves fast.  If the speeds have grown since the last update, the growth is expected twice more: a
        measured speed belongs to the middle of its interval.
        """
        speeds = speeds * max(1.0, float(speeds.max()) / max(last.speed, 1e-12)) ** 2
        room = CRITICAL - self.band - block.eigenvalues - block.residuals
        time = float(np.min(room / np.maximum(CONSTANTS.sudden * speeds, 1e-12)))
        return t + max(0.0, min(time, CONSTANTS.believed * (t - last.t), CONSTANTS.steps * h, self.patience))

    @property
    def _rough(self) -> float:
        """The residual up to which a vector serves as an eigenvector for a while."""
        return min(20 * self.subspace.tol, max(CONSTANTS.rough, self.subspace.tol))

    def _rates(self, last: SpectrumEstimate, block: Eigenblock, t: float, found: bool) -> tuple[Array, Array]:
        """dλ/dt [m], and an upper bound of |dλ/dt| [m].

        Vectors are recognised by their overlap with the last ones.  An unknown vector is assumed to be as fast as the
        fastest.  A vector found by a random search came from below the bound of the last search.  It is assumed to be
        ``lookahead`` times as fast as that implies, so that another update comes before it arrives.  The bound is
        larger for unknown vectors.
        """
        elapsed = t - last.t
        if elapsed <= 0:
            rates = np.resize(last.rates, block.size)
            return rates, np.maximum(np.abs(rates), CONSTANTS.unknown_rate)
        overlap = np.abs(host(last.block.V.T @ block.V)[0])
        match = overlap.argmax(axis=0)
        rates = (block.eigenvalues - last.eigenvalues[match]) / elapsed
        # the error of a Ritz value is about residual²/gap, at most the residual: if that is large, its rate is useless
        limit = CONSTANTS.beside * np.maximum(CONSTANTS.rough, CRITICAL - block.eigenvalues) + self._rough
        rough = np.maximum(block.residuals, last.block.residuals[match])
        known = (overlap.max(axis=0) > SAME) & (rough < limit)
        fastest = max(0.0, rates[known].max()) if known.any() else max(0.0, float(last.rates.max()))
        others = np.full(block.size, fastest)
        if found and last.surveyed < t and np.isfinite(last.below):
            others = np.maximum(others, self.lookahead * (block.eigenvalues - last.below) / (t - last.surveyed))
        return np.where(known, rates, others), np.abs(rates) + np.where(known, 0.0, 2 * rough / elapsed)


def shown(block: Eigenblock) -> Array:
    """The eigenvalues to report: the leading one, and the next ones whose vectors are known to a few percent."""
    return block.eigenvalues[: 1 + leading(block.residuals[1:] <= CONSTANTS.beside)]


def landing_at(now: SpectrumEstimate, t: float, h: float, shortest: float, approach: Approach | None = None) -> float:
    """The step h from t, cut (not below ``shortest``) to end where the next eigenvalue is predicted to arrive at 2.

    For eigenvalues in the frame, ``approach`` predicts (from t); for the others, their rates at the last update do.
    """
    arrivals = Approach(now.eigenvalues, now.rates, np.zeros(now.block.size)).arrivals() - (t - now.t)
    if approach is not None:
        arrivals[: len(approach.values)] = approach.arrivals()
    for arrival in arrivals:
        if arrival < h:
            h = max(min(h, shortest), arrival)
        elif arrival < 2 * h:
            h = max(min(h, shortest), arrival / 2)
    return min(h, now.until - t) if now.t < t < now.until else h


def leading(holds: NDArray[np.bool_]) -> int:
    """The number of leading True entries, up to the first False."""
    return len(holds) if holds.all() else int(np.argmin(holds))
