"""The common part of the integrators that step from breakpoint to breakpoint: memory, approach, landing."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import brentq
from torch import Tensor

from dvi.solvers.eigen.block_method import CRITICAL, CriticalSubspace
from dvi.solvers.eigen.tracker import EigenTracker, SpectrumEstimate
from dvi.solvers.hermite import hermite
from dvi.solvers.integrator import IntegratorBase
from dvi.solvers.protocol import ConstrainedFlow, Node, State, StepResult, combine
from dvi.solvers.reference.active_set import BAND, Face, Look, node_of
from dvi.solvers.repair import Repair

#: Fraction of the time left until an arrival that a step covers if other directions are held.
APPROACH = 0.7
#: A landing is no longer than this (unit times), whatever the tolerance.
LONGEST_LANDING = 0.25
#: Steps shorter than this (unit times) are not tried.
SHORTEST = 1e-6


@dataclass(frozen=True)
class FaceMemory:
    """The memory that is passed to the next step.

    Attributes:
        held: eigenvectors [d, k] of the directions held at 2.
        seen: the eigenpairs.
        h: the next step to try.
        climb: how fast the next eigenvalue rose in the last step, per unit time; 0 if unknown.
        look: the flow at the state of this memory, if it was evaluated with these directions held.
    """

    held: Tensor
    seen: SpectrumEstimate
    h: float
    climb: float = 0.0
    look: Look | None = None


class BreakpointIntegrator(IntegratorBase):
    """An integrator that steps from breakpoint to breakpoint, and lands on arrivals."""

    watch: EigenTracker

    @abstractmethod
    def precision(self, y: State) -> tuple[float, float]:
        """How close to 2 an arrival is located, and the longest landing (unit times)."""

    @abstractmethod
    def advance(
        self, face: Face, y: State, begin: Look, memory: FaceMemory, h: float, longest: float
    ) -> tuple[State, Look, float] | None:
        """A step that passes no breakpoint: its end, the evaluation there, and the next step to try.

        None if a landing must do it.

        Args:
            face: the directions held at 2.
            y: the state at the beginning.
            begin: the evaluation there.
            memory: the memory before the step.
            h: the longest step that the run allows, unit times.
            longest: the longest step before the next arrival, unit times.

        Raises:
            StepError: if no step can be made.
        """

    def step(self, flow: ConstrainedFlow, memory: FaceMemory, y: State, h: float) -> StepResult:
        """One step of at most h unit times, or to the next breakpoint.

        Raises:
            StepError: if no step can be made.
        """
        near, landing = self.precision(y)
        face = Face(flow, self.watch, memory.held, memory.seen, Repair(flow, y), near)
        begin = memory.look or face.look(y)
        left = time_left(face, begin, memory)
        found = self.advance(face, y, begin, memory, h, max(APPROACH * left, landing)) if left > landing else None
        if found is None:
            return landed(face, y, begin, min(landing, h), memory.h)
        end, after, following = found
        memory = gone_on(face, begin, after, end.t - y.t, end, following)
        return StepResult(end, memory, node_of(flow, begin, y.t), hermite(y, end, begin.rate, after.rate))

    def observe(self, flow: ConstrainedFlow, memory: FaceMemory, y: State) -> Node:
        """The node with which a step from y would begin."""
        return node_of(flow, memory.look or Face(flow, self.watch, memory.held, memory.seen).look(y), y.t)


def to_lattice(t: float, h: float) -> float:
    """The distance from t to the next multiple of h."""
    return float((np.floor(t / h + 1e-9) + 1) * h - t)


def sharp_watch(tol: float) -> EigenTracker:
    """A tracker whose eigenpairs are ten times more accurate than the steps: the error of X is of their residuals'
    order.

    Eigenpairs that were another ten times more accurate did not change results.
    """
    return EigenTracker(CriticalSubspace(tol=max(1e-11, 0.1 * tol)), survey_every=20.0)


def nearness(tol: float) -> float:
    """How close to 2 an arrival is located for steps with an error of tol: the distance enters w to second order."""
    return float(np.clip(0.1 * tol, 1e-9, 1e-3))


def landing_time(tol: float) -> float:
    """The longest landing: its error is about h² times the change of dw/dt per unit time (mostly below 1)."""
    return float(min(LONGEST_LANDING, np.sqrt(tol)))


def initial_memory(flow: ConstrainedFlow, watch: EigenTracker, y: State, near: float, h: float) -> FaceMemory:
    """The directions at 2 already."""
    face = Face(flow, watch, y.w.new_zeros(len(y.w), 0), near=near)
    if not flow.constrained:
        return FaceMemory(face.held, watch.update_leading(flow, y, None), h)
    held = face.arrived(y)
    assert face.seen is not None
    return FaceMemory(held, face.seen, h)


def time_left(face: Face, begin: Look, memory: FaceMemory) -> float:
    """Time until the next arrival at the present rate if other directions are held; else infinity.

    An arrival while no direction is held is no singularity, and steps need not shrink before it.
    """
    return (CRITICAL - begin.next_eigenvalue) / memory.climb if face.k and memory.climb > 0 else float("inf")


def may_land(face: Face, begin: Look, landing: float, h: float) -> bool:
    """True if a step of h is short enough for a landing and an eigenvalue may arrive in it."""
    return bool(face.k) and h <= landing and CRITICAL - begin.next_eigenvalue < BAND


def landed(face: Face, y: State, begin: Look, h: float, following: float) -> StepResult:
    """A landing: a step of h by linearised complementarity over an arrival.  The next step to try is ``following``."""
    end, held = face.land(y, begin.g, h)
    assert face.seen is not None
    return StepResult(end, FaceMemory(held, face.seen, following), node_of(face.flow, begin, y.t), _straight(y, end))


def gone_on(face: Face, begin: Look, after: Look, span: float, end: State, following: float) -> FaceMemory:
    """The memory after a step of ``span`` unit times that ended before or on a breakpoint."""
    arriving = face.flow.constrained and after.next_eigenvalue >= CRITICAL - face.near
    held = face.arrived(end) if arriving else face.kept(after)
    assert face.seen is not None
    if held.shape[1] != face.k:
        return FaceMemory(held, face.seen, following)
    climb = (after.next_eigenvalue - begin.next_eigenvalue) / span if face.k else 0.0
    # third derivatives take most of the memory, and the rate already contains them
    look = replace(after, frame=replace(after.frame, T=after.frame.T[:0]))
    return FaceMemory(held, face.seen, following, climb, look)


def find_arrival(face: Face, dense: Callable[[float], State], begin: Look, after: Look, t: float, h: float) -> float:
    """The time after t at which the next eigenvalue reaches 2, on the dense output of a step of h in which it passes 2.

    Only eigenvalues are computed.  The error of the time is at most that in which the eigenvalue moves by a tenth of
    ``face.near`` at its mean rate.
    """
    before, behind = CRITICAL - begin.next_eigenvalue, CRITICAL - after.next_eigenvalue
    if before <= 0:  # it is at 2 at the start: a short step shows what follows
        return min(h, SHORTEST)

    def distance(s: float) -> float:
        return before if s == 0 else behind if s == h else CRITICAL - face.next_value(dense(t + s))

    precision = max(1e-11 * max(1.0, h), 0.1 * face.near * h / (before - behind))
    return float(brentq(distance, 0.0, h, xtol=precision, rtol=1e-12))


def _straight(y: State, end: State) -> Callable[[float], State]:
    """Linear interpolation between the ends of a step."""

    def at(t: float) -> State:
        s = (t - y.t) / (end.t - y.t)
        w, nu = combine([(1 - s, y.parts), (s, end.parts)])
        return State(w, nu, t)

    return at
