"""Runge–Kutta steps with located breakpoints: the accurate reference.

Every stage makes eigenvectors, third derivatives and X anew; a step that crosses a breakpoint is cut there.  Orders 2
and 4 hold through breakpoints.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import brentq
from torch import Tensor

from dvi.solvers.critical import CRITICAL, CriticalSubspace
from dvi.solvers.errors import DomainError, StepError
from dvi.solvers.face import ARRIVED, Face, Look, node_of
from dvi.solvers.hermite import hermite
from dvi.solvers.protocol import Array, Flow, Node, State, StepResult, combine
from dvi.solvers.watch import Sighting, Watch


@dataclass(frozen=True)
class Tableau:
    """An explicit Runge–Kutta method with an embedded error estimate; checks itself when made."""

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
    # Heun's method with Euler's inside
    2: Tableau(2, ((), (1.0,)), (0.5, 0.5), (-0.5, 0.5)),
    # the classical method with Zonneveld's fifth stage for a third-order estimate
    4: Tableau(
        4,
        ((), (0.5,), (0.0, 0.5), (0.0, 0.0, 1.0), (5 / 32, 7 / 32, 13 / 32, -1 / 32)),
        (1 / 6, 1 / 3, 1 / 3, 1 / 6, 0.0),
        (1 / 6 + 1 / 2, 1 / 3 - 7 / 3, 1 / 3 - 7 / 3, 1 / 6 - 13 / 6, 16 / 3),
    ),
}


def to_lattice(t: float, h: float) -> float:
    """How far it is from t to the next multiple of h."""
    return float((np.floor(t / h + 1e-9) + 1) * h - t)


def sharp_watch(tol: float) -> Watch:
    """Eigenpairs a thousand times sharper than the steps.

    Before an arrival two eigenvalues are close, and their eigenvectors off by residual/distance.
    """
    return Watch(CriticalSubspace(tol=max(1e-11, 1e-3 * tol)), survey_every=20.0)


@dataclass(frozen=True)
class FaceMemory:
    """Eigenvectors [d, k] of the directions held at 2, the eigenpairs, and the next step to try."""

    held: Tensor
    seen: Sighting
    h: float


@dataclass(frozen=True)
class RungeKutta:
    """Adaptive or fixed Runge–Kutta steps of order 2 or 4, breakpoints located and landed on.

    Args:
        order: 2 or 4.
        tol: error allowed per step, in the norm of w, for adaptive steps.
        h: fixed steps between the multiples of h (unit times) instead, cut only at breakpoints: to study convergence.
        h_max: largest adaptive step: beyond about 1.2 an explicit method is unstable at an effective sharpness of 2.
        watch: how eigenpairs are followed (default: as sharply as tol asks for, or to 1e-11 with a fixed h).

    Raises:
        ValueError: for another order, or a step or tolerance that is not positive.
    """

    order: int = 4
    tol: float = 1e-6
    h: float | None = None
    h_max: float = 1.2
    watch: Watch = None  # type: ignore[assignment]  # made from tol

    def __post_init__(self) -> None:
        if self.order not in TABLEAUX:
            raise ValueError(f"RungeKutta(order={self.order}): choose from {', '.join(map(str, TABLEAUX))}.")
        if not self.tol > 0 or (self.h is not None and not self.h > 0) or not self.h_max > 0:
            raise ValueError("RungeKutta: tol, h and h_max must be positive (h in unit times).")
        if self.watch is None:
            object.__setattr__(self, "watch", sharp_watch(self.tol if self.h is None else 0.0))

    def init(self, flow: Flow, y: State) -> FaceMemory:
        """The directions at 2 already."""
        face = Face(flow, self.watch, y.w.new_zeros(len(y.w), 0))
        if not flow.constrained:
            return FaceMemory(face.held, self.watch.glance(flow, y, None), self.h or 0.1)
        held = face.arrived(y)
        assert face.seen is not None
        return FaceMemory(held, face.seen, self.h or 0.1)

    def horizon(self, memory: FaceMemory) -> float:
        """How near the end decides about a step."""
        return 1.001 * (self.h or memory.h)

    def step(self, flow: Flow, memory: FaceMemory, y: State, h: float) -> StepResult:
        """One step of at most h unit times, or to the next breakpoint.

        Raises:
            StepError: if steps of 1e-6 unit times still fail.
        """
        size = min(memory.h if self.h is None else to_lattice(y.t, self.h), h)
        if h - size < 1e-9 * max(1.0, h):
            size = h
        while True:
            face = Face(flow, self.watch, memory.held, memory.seen, y)
            begin = face.look(y)
            try:
                end, error = self._advance(face, y, begin, size)
                after = face.look(end)
            except DomainError as failure:
                error, reason = np.inf, str(failure)
            else:
                reason = f"error {error:.1e}"
                if self.h is not None or error <= self.tol:
                    break
            if size <= 1e-6:
                raise StepError(f"RungeKutta at t = {y.t:g}: a step of {size:.1e} still fails ({reason}); loosen tol.")
            size *= (
                0.5
                if not np.isfinite(error)
                else float(np.clip(0.9 * (self.tol / error) ** (1 / self.order), 0.2, 0.9))
            )
        taken = size
        if flow.constrained and face.event(begin, after):
            # The trial step ran through the breakpoint, so its dense output is off behind it: locate, land, look again.
            for _ in range(8):
                located = self._locate(face, y, end, begin, after)
                end, _ = self._advance(face, y, begin, located)
                after = face.look(end)
                closer, taken = taken - located, located
                if not face.event(begin, after) or closer < 1e-10:
                    break
            arriving = after.next_eigenvalue >= CRITICAL - ARRIVED
            held = face.arrived(end) if arriving else face.kept(after)
        else:
            held = face.kept(after)
        assert face.seen is not None
        following = self.h or float(np.clip(0.9 * (self.tol / max(error, 1e-16)) ** (1 / self.order), 0.3, 3.0)) * size
        memory = FaceMemory(held, face.seen, min(following, self.h_max if self.h is None else following))
        dense = hermite(y, end, begin.rate, after.rate)
        return StepResult(end, memory, node_of(flow, begin, y.t), dense)

    def observe(self, flow: Flow, memory: FaceMemory, y: State) -> Node:
        """What a step from y would begin with."""
        face = Face(flow, self.watch, memory.held, memory.seen)
        return node_of(flow, face.look(y), y.t)

    def _advance(self, face: Face, y: State, begin: Look, h: float) -> tuple[State, float]:
        """One plain step of length h on a face: the end, and the embedded error estimate in w."""
        tableau = TABLEAUX[self.order]
        rates = [begin.rate]
        for row in tableau.A[1:]:
            weight = [(h * a, rate.parts) for a, rate in zip(row, rates, strict=True) if a]
            w, nu = combine([(1.0, y.parts), *weight])
            rates.append(face.look(State(w, nu, y.t + h * sum(row))).rate)
        w, nu = combine([(1.0, y.parts), *((h * b, rate.parts) for b, rate in zip(tableau.b, rates, strict=True) if b)])
        off = combine([(h * e, rate.w) for e, rate in zip(tableau.b_error, rates, strict=True)])
        error: float = torch.linalg.vector_norm(off).item()
        return face.mend(State(w, nu, y.t + h)), error if np.isfinite(error) else float("inf")

    def _locate(self, face: Face, y: State, end: State, begin: Look, after: Look) -> float:
        """Where in the step the first breakpoint is: a root on the dense output."""
        dense = hermite(y, end, begin.rate, after.rate)
        h = end.t - y.t

        def sign(s: float) -> float:
            return face.sign(begin, begin if s == 0 else after if s == h else face.look(dense(y.t + s)))

        if sign(0.0) <= 0:  # it lies at the start itself: a short step shows what follows
            return min(h, 1e-6)
        return float(brentq(sign, 0.0, h, xtol=1e-11 * max(1.0, h), rtol=1e-12))
