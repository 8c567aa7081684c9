"""Runge–Kutta steps with located breakpoints: the accurate reference.

Every stage computes eigenvectors, third derivatives and X anew.  A step that crosses a breakpoint is cut there.  Orders
2 and 4 hold through breakpoints.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import brentq

from dvi.solvers.constants import CONSTANTS
from dvi.solvers.controller import StepController
from dvi.solvers.eigen.tracker import EigenTracker
from dvi.solvers.errors import DomainError, StepError
from dvi.solvers.hermite import hermite
from dvi.solvers.numbers import with_numbers
from dvi.solvers.protocol import Array, ConstrainedFlow, Rate, State, combine
from dvi.solvers.reference.active_set import ARRIVED, Face, Look
from dvi.solvers.reference.breakpoints import (
    APPROACH,
    SHORTEST,
    BreakpointIntegrator,
    FaceMemory,
    find_arrival,
    initial_memory,
    landing_time,
    may_land,
    nearness,
    sharp_watch,
    to_lattice,
)


@dataclass(frozen=True)
class Tableau:
    """An explicit Runge–Kutta method with an embedded error estimate; its order is checked when it is made."""

    order: int
    A: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    b_error: tuple[float, ...]  # b minus the embedded method's weights

    def __post_init__(self) -> None:
        c = self.c
        conditions = [(np.ones(len(c)), 1.0), (c, 1 / 2), (c**2, 1 / 3), (self.matrix @ c, 1 / 6)]
        conditions += [(c**3, 1 / 4), (c * (self.matrix @ c), 1 / 8), (self.matrix @ c**2, 1 / 12)]
        conditions += [(self.matrix @ self.matrix @ c, 1 / 24)]
        needed = {1: 1, 2: 2, 3: 4, 4: 8}
        for weights, order in ((self.b, self.order), (np.subtract(self.b, self.b_error), self.order - 1)):
            for value, wanted in conditions[: needed[order]]:
                if abs(np.dot(weights, value) - wanted) > 1e-14:
                    raise ValueError(f"the tableau is not of order {order}")

    @property
    def c(self) -> Array:
        """Stage times."""
        times: Array = self.matrix.sum(axis=1)
        return times

    @property
    def matrix(self) -> Array:
        """A as a square array."""
        s = len(self.b)
        out = np.zeros((s, s))
        for i, row in enumerate(self.A):
            out[i, : len(row)] = row
        return out


TABLEAUX = {
    # Heun's method with Euler's method embedded
    2: Tableau(2, ((), (1.0,)), (0.5, 0.5), (-0.5, 0.5)),
    # the classical method; with the rate at the end, needed anyway, in place of the fourth stage it is of third order
    4: Tableau(
        4,
        ((), (0.5,), (0.0, 0.5), (0.0, 0.0, 1.0), (1 / 6, 1 / 3, 1 / 3, 1 / 6)),
        (1 / 6, 1 / 3, 1 / 3, 1 / 6, 0.0),
        (0.0, 0.0, 0.0, 1 / 6, -1 / 6),
    ),
}


@dataclass(frozen=True)
class RungeKutta(BreakpointIntegrator):
    """Adaptive or fixed Runge–Kutta steps of order 2 or 4 that locate breakpoints and end on them.

    A step ends on each arrival at 2.  If other directions are held already, the steps before it shrink with the time
    left.  With adaptive steps, an exit is passed if ignoring it changes w by less than tol; the next step sees it.

    Args:
        order: 2 or 4.
        tol: error allowed per step, in the norm of w, for adaptive steps.
        h: fixed steps between the multiples of h (unit times) instead, cut only at breakpoints: to study convergence.
            The order holds through breakpoints, except when directions at 2 turn into an arriving one.  There it was
            observed, too, but is not guaranteed.
        h_max: largest adaptive step: beyond about 1.2 an explicit method is unstable at an effective sharpness of 2.
        watch: the tracker of eigenpairs (default: as accurate as tol requires, or to 1e-11 with a fixed h).

    Raises:
        ValueError: for another order, or a step or tolerance that is not positive.
    """

    order: int = 4
    tol: float = 1e-6
    h: float | None = None
    h_max: float = 1.2
    watch: EigenTracker = None  # type: ignore[assignment]  # made from tol

    def __post_init__(self) -> None:
        with_numbers(self)
        if self.order not in TABLEAUX:
            raise ValueError(f"RungeKutta(order={self.order}): choose from {', '.join(map(str, TABLEAUX))}.")
        if not self.tol > 0 or (self.h is not None and not self.h > 0) or not self.h_max > 0:
            raise ValueError("RungeKutta: tol, h and h_max must be positive (h in unit times).")
        if self.watch is None:
            object.__setattr__(self, "watch", sharp_watch(self.tol if self.h is None else 0.0))

    @property
    def near(self) -> float:
        """How close to 2 an arrival is located."""
        return ARRIVED if self.h is not None else nearness(self.tol)

    @property
    def landing(self) -> float:
        """The longest landing (unit times); with fixed steps it is so short that the order holds."""
        return 0.01 * self.h ** (self.order / 2) if self.h is not None else landing_time(self.tol)

    def init(self, flow: ConstrainedFlow, y: State) -> FaceMemory:
        """The directions at 2 already."""
        return initial_memory(flow, self.watch, y, self.near, self.h or 0.1)

    @property
    def fixed_steps(self) -> bool:
        """True if the user gives h."""
        return self.h is not None

    def horizon(self, memory: FaceMemory) -> float:
        """A larger h than this would not change the step."""
        return 1.001 * max(self.h or memory.h, self.landing)

    def precision(self, y: State) -> tuple[float, float]:
        """How close to 2 an arrival is located, and the longest landing (unit times)."""
        return self.near, self.landing

    def advance(
        self, face: Face, y: State, begin: Look, memory: FaceMemory, h: float, longest: float
    ) -> tuple[State, Look, float] | None:
        """One step of at most h unit times, or to the next breakpoint.

        Raises:
            StepError: if steps of 1e-6 unit times still fail.
        """
        size = min(memory.h if self.h is None else to_lattice(y.t, self.h), h, longest)
        if h - size < 1e-9 * max(1.0, h):
            size = h
        found = self._find(face, y, begin, size)
        if found is None:
            return None
        end, error, after = found
        taken, following = end.t - y.t, self.h
        if following is None:
            # a step that was cut says little about longer ones: keep the earlier choice
            most = max(CONSTANTS.change[1], memory.h / taken)
            following = min(self.h_max, taken * StepController(self.order).factor(error / self.tol, most))
        return end, after, following

    def _find(self, face: Face, y: State, begin: Look, size: float) -> tuple[State, float, Look] | None:
        """A step of at most ``size`` that is accurate and passes no breakpoint: its end, its error, the evaluation
        there.

        None if a landing must do it.

        Raises:
            StepError: if steps of 1e-6 unit times still fail.
        """
        searched = 0
        while True:
            try:
                end, error, after = self._advance(face, y, begin, size)
            except DomainError as failure:
                error, reason = np.inf, str(failure)
            else:
                reason = f"error {error:.1e}"
                if self.h is not None or error <= self.tol:
                    if not self._passed(face, begin, after, size) or searched == 8 or size <= SHORTEST:
                        return end, error, after
                    # The trial step ran through the breakpoint, so its dense output is wrong after it: locate it, step
                    # there, evaluate again.  If others are held, come closer first, since all changes fast close to it.
                    located = self._locate(face, y, end, begin, after)
                    if face.passed(after):
                        if may_land(face, begin, self.landing, located):
                            return None
                        if face.k:
                            located = max(APPROACH * located, self.landing)
                    if size - located < 1e-10:
                        return end, error, after
                    searched, size = searched + 1, max(located, SHORTEST)
                    continue
            if may_land(face, begin, self.landing, size):
                return None
            if size <= SHORTEST:
                raise StepError(f"RungeKutta at t = {y.t:g}: a step of {size:.1e} still fails ({reason}); loosen tol.")
            size *= StepController(self.order).factor(error / self.tol, CONSTANTS.safety) if np.isfinite(error) else 0.5

    def _passed(self, face: Face, begin: Look, after: Look, h: float) -> bool:
        """True if the step crosses a breakpoint that it must not cross."""
        if not face.flow.constrained:
            return False
        if self.h is not None:
            return face.event(begin, after)
        return face.passed(after) or face.kink(begin, after, h) > self.tol

    def _advance(self, face: Face, y: State, begin: Look, h: float) -> tuple[State, float, Look]:
        """One plain step of length h on a face: the end, the embedded error estimate in w, and the evaluation at the
        end.
        """
        tableau = TABLEAUX[self.order]
        rates = [begin.rate]
        for row in tableau.A[1:]:
            stage = _stage(y, rates, row, h)
            after = face.look(stage)
            rates.append(after.rate)
        end = _stage(y, rates, tableau.b, h)
        if tableau.A[-1] != tableau.b[:-1]:  # else the last stage is the end
            after = face.look(end)
        off = combine([(h * e, rate.w) for e, rate in zip(tableau.b_error, rates, strict=True)])
        error: float = torch.linalg.vector_norm(off).item()
        return face.mend(end), error if np.isfinite(error) else float("inf"), after

    def _locate(self, face: Face, y: State, end: State, begin: Look, after: Look) -> float:
        """The place of the first breakpoint in the step: a root on the dense output."""
        dense = hermite(y, end, begin.rate, after.rate)
        h = end.t - y.t
        if begin.rank == after.rank or (face.passed(after) and (face.k or self.h is None)):
            return find_arrival(face, dense, begin, after, y.t, h)

        def sign(s: float) -> float:
            return face.sign(begin, begin if s == 0 else after if s == h else face.look(dense(y.t + s)))

        if sign(0.0) <= 0:  # it lies at the start: a short step shows what follows
            return min(h, SHORTEST)
        precision = 1e-11 * max(1.0, h)
        if self.h is None:
            precision = max(precision, 0.3 * self.tol / max(begin.weakest, after.weakest))
        return float(brentq(sign, 0.0, h, xtol=precision, rtol=1e-12))


def _stage(y: State, rates: list[Rate], row: tuple[float, ...], h: float) -> State:
    """The state at a stage: y and h times a row of the tableau."""
    w, nu = combine([(1.0, y.parts), *((h * a, rate.parts) for a, rate in zip(row, rates, strict=False) if a)])
    return State(w, nu, y.t + h * sum(row))
