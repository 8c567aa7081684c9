"""The stationary flow: the central flow with ν always at its stationary value, a flow in w alone (paper, eq. 13)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dvi.compiler.exact_rates import Accuracy
from dvi.compiler.flows import CompiledFlow
from dvi.compiler.linearised import LinearisedFlow
from dvi.interop.binding import MethodLike
from dvi.problems import Problem
from dvi.solvers import ccp
from dvi.solvers.eigen.tracker import shown
from dvi.solvers.integrator import IntegratorBase
from dvi.solvers.numbers import with_numbers
from dvi.solvers.protocol import Array, Flow, Frame, Node, Rate, State, StepResult
from dvi.stationarity.api import StationaryPoint, stationary

Part = Literal["curvature penalty"]

#: The relative residual to which a stationary ν is solved; ν itself is then off by its square or so, and the push
#: ½∇³L[Σ] by TOL, far below what a step of Heun's method misses.
TOL = 1e-4

#: Unit times from one look around for directions that are not followed to the next.
LOOK = 2.0


class StationaryFlow(CompiledFlow):
    """The stationary flow (eq. 13, with the sign that its text has lost)

    dw/dt = −P̄(w)⁻¹ [∇L(w) + ½∇³L(w)[Σ]],        P̄(w) = P(ν̄(w)),

    with ν̄(w) the stationary ν and Σ the solution of the central flow's CCP (eq. 25) at (w, ν̄(w)).  This Σ differs
    from the one that defines ν̄: there w is held fixed, and here it moves.

    Attributes:
        without: the term left out, if any: "curvature penalty" keeps the preconditioner and drops ½∇³L[Σ] (Fig. 11).
    """

    name = "stationary"
    quasistatic = True
    without: Part | None = None
    tol: float | None = None
    _first: StationaryPoint | None = None  # the last one that was sought without a start

    def __init__(
        self,
        problem: Problem,
        method: MethodLike,
        *,
        check: bool = True,
        accuracy: Accuracy | None = None,
        max_gib: float = 4.0,
    ) -> None:
        # eq. (13) is the paper's, whatever accuracy the other flows have
        super().__init__(problem, method, check=check, accuracy="paper", max_gib=max_gib)

    def settled(self, y: State, start: StationaryPoint | None = None, survey: bool = True) -> StationaryPoint:
        """The stationary point at y's weights, see :func:`dvi.stationary`."""
        known, tol = self._first, self.tol or max(TOL, 1e2 * torch.finfo(y.w.dtype).eps)
        if start is None and known is not None and known.t == y.t and torch.equal(known.w, y.w):
            return known
        point = stationary(self, y.w, t=y.t, start=start, tol=tol, rank=4, survey=survey)
        if start is None:  # a run asks for its first one more than once
            self._first = point
        return point

    def settle(self, y: State) -> State:
        """The state y with ν at its stationary value."""
        return self.settled(y).state

    def look(self, point: StationaryPoint) -> Look:
        """The flow at a stationary point."""
        loss, g = self.value_and_grad(point.state)
        frame = self._frame(point.state, point.U, point.HU, third=self.without is None)
        lin = LinearisedFlow(self.calculus, point.state, g, frame)
        X = np.zeros((0, 0))
        rate = -self.velocity(point.state, g)
        if point.k and self.without is None:
            X = ccp.solve(lin.alpha, lin.beta).X
            self.count_ccp()
            rate = lin.drift(X).w
        elif self.without is not None:
            frame = replace(frame, U=point.U[:, :0], HU=point.HU[:, :0])
        return Look(float(loss), g, frame, X, rate, point)


class AblatedStationaryFlow(StationaryFlow):
    """The stationary flow without its curvature penalty ½∇³L[Σ] (Fig. 11)."""

    name = "stationary, ablated"
    without = "curvature penalty"


@dataclass(frozen=True)
class Look:
    """The stationary flow at one point: loss [], gradient [d], frame, X [k, k], dw/dt [d]."""

    loss: float
    g: Tensor
    frame: Frame
    X: Array
    rate: Tensor
    point: StationaryPoint

    def node(self) -> Node:
        """The node that a run records."""
        still = pytree.tree_map(torch.zeros_like, self.point.nu)
        return Node(
            t=self.point.t,
            loss=self.loss,
            grad_sq=float(self.g @ self.g),
            eigenvalues=shown(self.point.block),
            U=self.frame.U,
            HU=self.frame.HU,
            X=self.X,
            X_time=self.point.t,
            g=self.g,
            rate=Rate(self.rate, still),
        )


@dataclass(frozen=True)
class Settled:
    """The stationary point at the current weights, from which the next search starts, and the time of the last look."""

    point: StationaryPoint
    looked: float


@dataclass(frozen=True)
class Quasistatic(IntegratorBase):
    """The integrator of the stationary flow: Heun's method in w, with the stationary ν computed anew at every stage.

    It is of second order in h between breakpoints.  A step takes two stationary points.

    Args:
        h: the step, unit times; above 1 it is unstable at an effective sharpness of 2.

    Raises:
        ValueError: if h is not in (0, 1].
    """

    h: float = 0.5

    def __post_init__(self) -> None:
        with_numbers(self)
        if not 0 < self.h <= 1:
            raise ValueError(f"Quasistatic(h={self.h}): h must lie in (0, 1] unit times.")

    def accepts(self, flow: Flow) -> str:
        """Why another flow than the stationary one is refused, in words; "" if the flow is accepted."""
        if flow.quasistatic:
            return ""
        return (
            f"Quasistatic integrates dvi.stationary_flow, not the {flow.name} flow. Leave integrator out: the default "
            "fits the flow."
        )

    @property
    def fixed_steps(self) -> bool:
        """Always true: every step is h, or ends at the end of the run."""
        return True

    def init(self, flow: Flow, y: State) -> Settled:
        """The stationary point at the start."""
        return Settled(self._own(flow).settled(y), y.t)

    def step(self, flow: Flow, memory: Settled, y: State, h: float) -> StepResult:
        """One step of at most h unit times."""
        flow, h = self._own(flow), min(self.h, h)
        begin = flow.look(memory.point)
        tried = flow.settled(State(y.w + h * begin.rate, y.nu, y.t + h), memory.point, survey=False)
        rate = flow.look(tried).rate
        bend = (rate - begin.rate) / (2 * h)
        look = y.t + h >= memory.looked + LOOK
        point = flow.settled(State(y.w + h * begin.rate + h**2 * bend, y.nu, y.t + h), tried, survey=look)

        def inside(t: float) -> State:
            s = t - y.t
            nu = pytree.tree_map(lambda a, b: a + s / h * (b - a), y.nu, point.nu)
            return State(y.w + s * begin.rate + s**2 * bend, nu, t)

        return StepResult(point.state, Settled(point, y.t + h if look else memory.looked), begin.node(), inside)

    def observe(self, flow: Flow, memory: Settled, y: State) -> Node:
        """The node at which a step from y would begin."""
        return self._own(flow).look(memory.point).node()

    def _own(self, flow: Flow) -> StationaryFlow:
        if refusal := self.accepts(flow):
            raise ValueError(refusal)
        return cast(StationaryFlow, flow)


def stationary_flow(
    problem: Problem, method: MethodLike, *, without: Part | None = None, check: bool = True, tol: float | None = None
) -> StationaryFlow:
    """Compile the stationary flow of a method on a problem (eq. 13): ν at its stationary value at all times.

    Args:
        problem, method, check: as for :func:`dvi.central_flow`.
        without: "curvature penalty" leaves out ½∇³L[Σ] (Fig. 11).
        tol: relative residual of a stationary ν, see :func:`dvi.stationary` (default: 1e-4).

    Raises:
        SpecError: if the declaration is wrong, or ν has no stationary value.
        ConvergenceError: if the stationary ν at the initial weights is not reached.
    """
    if without not in (None, "curvature penalty"):
        raise ValueError(f'without is "curvature penalty" or None, not {without!r}.')
    flow = (StationaryFlow if without is None else AblatedStationaryFlow)(problem, method, check=check)
    flow.tol = tol
    flow.initial = flow.settle(flow.initial)
    return flow
