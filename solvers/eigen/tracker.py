"""Which eigenvectors are critical over the next step: the leading eigenpairs, their rates, and the band below 2."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dvi.solvers.constants import CONSTANTS
from dvi.solvers.eigen.block_method import CRITICAL, CriticalSubspace, Eigenblock
from dvi.solvers.numbers import with_numbers
from dvi.solvers.protocol import Array, ConstrainedFlow, Frame, State, host

#: Overlap from which on two vectors are one direction: above 1/√2 no other can have as much.
SAME = 0.7


@dataclass(frozen=True)
class SpectrumEstimate:
    """The leading eigenpairs as last seen.

    Attributes:
        block: leading eigenpairs.
        rates: dλ/dt [m] per unit time.
        t: when.
        surveyed: when a random look-around was last made.
        until: the moment until which none can have come near 2, by how fast they were: no need to look before.
        speed: how fast the fastest was, rising or falling.
        U: the eigenvectors in the metric of P, UᵀPU = I [d, m], where there is a time until which to believe them.
        below: where an eigenvalue that the block is blind to may have been when one was last looked for, at most.
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
        """The eigenvalues to report: the leading one, and those after it whose vectors are at hand to a few percent."""
        return shown(self.block)

    def frame(self, flow: ConstrainedFlow, y: State, k: int, third: bool = True) -> Frame:
        """The frame at y of the k leading eigenvectors that were seen there, with T if asked for."""
        return flow.frame(y, self.block.V[:, :k], self.block.AV[:, :k], third)


@dataclass(frozen=True)
class Approach:
    """Effective eigenvalues and their rates; descending, [k].

    ``turns``: by how much those rates rise per unit time, where they do; 0 where that is not known.
    """

    values: Array
    rates: Array
    turns: Array

    def arrivals(self) -> Array:
        """In how many unit times each arrives at 2; ∞ for those that are there, or not on their way."""
        room = CRITICAL - self.values
        on_its_way = (room > CONSTANTS.at_edge) & (self.rates > 1e-7)
        rates, turns = np.where(on_its_way, self.rates, 1.0), np.maximum(self.turns, 1e-12)
        times: Array = np.where(
            on_its_way, (np.sqrt(np.maximum(rates**2 + 2 * turns * room, 0.0)) - rates) / turns, np.inf
        )
        return np.where(on_its_way & (turns * room < 1e-6 * rates**2), room / rates, times)

    def none_within(self, h: float) -> bool:
        """Is none at the edge, nor to arrive there before a step of h is nearly over?"""
        return bool(np.all(CRITICAL - self.values > CONSTANTS.at_edge) and np.all(self.arrivals() > 0.9 * h))


@dataclass(frozen=True)
class EigenTracker:
    """Follows the eigenpairs and says which of them the constraint must hold over the next step.

    Args:
        subspace: the block method.
        band: an eigenvalue within ``band`` of 2 counts as critical (its constraint is then watched; X stays zero on it
            until it reaches 2).
        lookahead: one that would come within the band in ``lookahead`` steps at its present rate counts, too.
        survey_every: unit times between random look-arounds for an eigenvalue the block is blind to, at most.
        survey_soonest: and at least, where one may have come to 2 that rises twice as fast as those in sight.
        patience: unit times for which a spectrum far from 2 is believed, at most.
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
        """The eigenpairs at y, down to what a step of h may bring to 2.

        The search starts from ``guess``, or from the last ones.
        """
        A = flow.effective_hessian(y)
        if last is None:
            block = self.subspace.start(A, y.w, want=CRITICAL - 1.2 * min(1.0, max(h, 0.1)))
            rates, below = np.full(block.size, CONSTANTS.unknown_rate), float(block.eigenvalues[-1])
            return SpectrumEstimate(block, rates, y.t, y.t, below=below)
        fastest = max(0.0, float(last.rates.max()))
        want = CRITICAL - float(np.clip(2 * fastest * h, max(0.1, 1.5 * self.band), 1.2))
        # Far from 2 the eigenvectors only serve to see it coming: no need for them to be sharp.
        distance = CRITICAL - float(last.eigenvalues[0]) - self.lookahead * fastest * (h + y.t - last.t)
        # But sharp beside their eigenvalue: any vector has a small residual where most eigenvalues are small.
        tol = max(self.subspace.tol, min(0.2, 0.15 * distance, 0.05 * abs(float(last.eigenvalues[0]))))
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

    def update_leading(
        self, flow: ConstrainedFlow, y: State, last: SpectrumEstimate | None, every: float = 1.0
    ) -> SpectrumEstimate:
        """The leading eigenvalue alone, to a few percent: all that a flow without constraint needs for its step size.

        Args:
            flow, y: where.
            last: the last estimate, given back as it is if it is younger than ``every`` unit times.
            every: unit times between looks.
        """
        if last is not None and y.t < last.t + every * (1 - 1e-9):
            return last
        A = flow.effective_hessian(y)
        only = np.inf  # no eigenvalue is wanted beyond the leading one
        if last is None:  # sharp, since a random vector's residual may be small, too
            block = self.subspace.start(A, y.w, only)
            return SpectrumEstimate(block, np.zeros(block.size), y.t, y.t)
        tol = 0.03 * max(1.0, float(last.eigenvalues[0]))
        block, surveyed = self.subspace.follow(A, last.block, only, tol), last.surveyed
        if y.t - surveyed >= self.survey_every:
            block, surveyed = self.subspace.survey(A, block, only, tol), y.t
        return SpectrumEstimate(block, np.zeros(block.size), y.t, surveyed)

    def critical(self, now: SpectrumEstimate, h: float, held: int = 0) -> int:
        """How many leading eigenvectors the constraint must hold over the next h: contiguous, converged ones only.

        Of those ``held`` now one is let go only when it has fallen half as far again below 2 as it takes to be held,
        so that an eigenvalue that lingers there does not make k change at every step.
        """
        reach = now.eigenvalues + self.lookahead * np.maximum(now.rates, 0.0) * h + self.band
        reach[:held] += 0.5 * self.band
        return min(leading(reach >= CRITICAL), leading(now.block.residuals <= self._rough))

    def frame(self, flow: ConstrainedFlow, y: State, now: SpectrumEstimate, h: float) -> Frame:
        """The frame of the critical eigenvectors at y."""
        return now.frame(flow, y, self.critical(now, h))

    def trusted(self, flow: ConstrainedFlow, y: State, now: SpectrumEstimate, held: int, until: float) -> bool:
        """May the eigenvalues beyond the leading ``held`` be taken as below the band until then, without a look?

        Their rates say so, and so does P as it is at y: an eigenvalue of P⁻¹H that rises because P falls shows in
        λ/uᵀPu, at no product with H.
        """
        if now.U is None or (not held and until > now.until):
            return False
        if now.block.size == held:
            return now.block.V.shape[0] == held  # there are no others
        room = CRITICAL - self.band - now.eigenvalues - now.block.residuals
        if held:
            room -= self.lookahead * np.maximum(now.rates, 0.0) * (until - now.t)
        (length,) = host((now.U * flow.precondition(y, now.U)).sum(dim=0))
        # What has sunk because P grew is not further from 2: the rates, seen as P grew, take it there all the same.
        risen = np.maximum(now.eigenvalues * (1 / np.maximum(length, 1e-12) - 1), 0.0)
        return bool(np.all(risen[held:] < 0.5 * room[held:]))

    def rise(self, now: SpectrumEstimate, t: float) -> float:
        """By how much an eigenvalue may have risen by t, if it comes near 2 at ``now.until`` at the earliest."""
        room = CRITICAL - self.band - float(now.eigenvalues[0])
        return room * float(np.clip((t - now.t) / max(now.until - now.t, 1e-9), 0.0, 1.0))

    def due(self, now: SpectrumEstimate) -> float:
        """The moment of the next random look-around."""
        time = (CRITICAL - now.below) / (2 * max(float(now.rates.max()), 1e-6))
        return now.surveyed + min(max(time, self.survey_soonest), self.survey_every)

    def _until(self, block: Eigenblock, speeds: Array, t: float, last: SpectrumEstimate, h: float) -> float:
        """The moment until which no eigenvalue of the block comes within ``band`` of 2, by how fast they were.

        Speeds are believed up to a factor of four, rising or falling, and for three times as long as it took to measure
        them: the intervals between looks grow as fast as the flow calms down; and not for more than six steps like this
        one, h, which are short where something moves fast.  What has become faster since the last look is expected to
        do so twice over: a speed is that of the middle of an interval.
        """
        speeds = speeds * max(1.0, float(speeds.max()) / max(last.speed, 1e-12)) ** 2
        room = CRITICAL - self.band - block.eigenvalues - block.residuals
        time = float(np.min(room / np.maximum(CONSTANTS.sudden * speeds, 1e-12)))
        return t + max(0.0, min(time, CONSTANTS.believed * (t - last.t), 6 * h, self.patience))

    @property
    def _rough(self) -> float:
        """A residual up to which a vector serves as an eigenvector for a while."""
        return min(20 * self.subspace.tol, max(CONSTANTS.rough, self.subspace.tol))

    def _rates(self, last: SpectrumEstimate, block: Eigenblock, t: float, found: bool) -> tuple[Array, Array]:
        """dλ/dt of vectors recognised from last time by overlap; unknown ones are assumed as fast as the fastest.

        One that a look-around has found came from below what the last one saw; it is taken to be half again as fast as
        that takes, so that it is looked at once more before it arrives.

        Also what |dλ/dt| may have been at most, which for an unknown one is more.
        """
        elapsed = t - last.t
        if elapsed <= 0:
            rates = np.resize(last.rates, block.size)
            return rates, np.maximum(np.abs(rates), CONSTANTS.unknown_rate)
        overlap = np.abs(host(last.block.V.T @ block.V)[0])
        match = overlap.argmax(axis=0)
        rates = (block.eigenvalues - last.eigenvalues[match]) / elapsed
        # a Ritz value is off by about residual²/gap, at most the residual: of no use as a rate if that is large
        limit = 0.05 * np.maximum(CONSTANTS.rough, CRITICAL - block.eigenvalues) + self._rough
        rough = np.maximum(block.residuals, last.block.residuals[match])
        known = (overlap.max(axis=0) > SAME) & (rough < limit)
        fastest = max(0.0, rates[known].max()) if known.any() else max(0.0, float(last.rates.max()))
        others = np.full(block.size, fastest)
        if found and last.surveyed < t and np.isfinite(last.below):
            others = np.maximum(others, 1.5 * (block.eigenvalues - last.below) / (t - last.surveyed))
        return np.where(known, rates, others), np.abs(rates) + np.where(known, 0.0, 2 * rough / elapsed)


def shown(block: Eigenblock) -> Array:
    """The eigenvalues to report: the leading one, and those after it whose vectors are at hand to a few percent."""
    return block.eigenvalues[: 1 + leading(block.residuals[1:] <= 0.05)]


def landing_at(now: SpectrumEstimate, t: float, h: float, shortest: float, approach: Approach | None = None) -> float:
    """The step h from t, cut (not below ``shortest``) to end where the next eigenvalue is predicted to arrive at 2.

    Those in the frame are where ``approach`` says (at t), the others where the last look saw them go.
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
    """How many hold from the first on, without a break."""
    return len(holds) if holds.all() else int(np.argmin(holds))
