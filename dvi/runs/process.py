"""A process in progress: the optimizer or a flow, advanced over a common time grid and recorded as it goes.

Times inside are the process's own clock, ``origin`` + recorded time, since a warm start does not set schedules back.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dvi.compiler.ablated import AblatedFlow
from dvi.compiler.flows import CompiledFlow
from dvi.problems import Ledger
from dvi.results.run_error import RunError
from dvi.results.solution import Cost, Solution
from dvi.results.status import Status
from dvi.runs import chatter, sampling
from dvi.runs.chatter import recent_cost
from dvi.runs.measures import MEASURES, measured
from dvi.runs.observables import Observation, Observer
from dvi.runs.unit_stretches import joined, unit_step_notes
from dvi.solvers.ccp import CCPError
from dvi.solvers.eigen.tracker import EigenTracker
from dvi.solvers.errors import BudgetError
from dvi.solvers.integrator import IntegratorBase
from dvi.solvers.protocol import Array, Node, State, StepResult

#: Above this effective sharpness a start is refused: the first oscillations would not be small.
FEASIBLE = 2.3

#: Unit times after the first oscillation at which the next Taylor term is measured first.
FIRST_MEASURE = 8.0

#: An effective sharpness above this, and above that of the start, was not seen coming: held directions stay at 2.
MISSED = 2.05


class Process(ABC):
    """One process of a run.

    Args:
        flow: the compiled flow or optimizer.
        start: where it starts.
        grid: recorded times, ascending from 0.
        observer: what is watched.
    """

    def __init__(self, flow: CompiledFlow, start: State, grid: Array, observer: Observer) -> None:
        self.flow, self.grid, self.observer = flow, grid, observer
        self.y, self.origin = start, start.t
        self.notes = list(flow.notes)  # of this run; the flow's own are those of its compilation
        self._survey()
        self.nodes: list[Observation] = []
        self.counts: list[dict[str, int]] = []
        self.ready: dict[int, Tensor] = {}  # weights at grid points not yet fetched

    @abstractmethod
    def advance(self) -> None:
        """Take one step and record it."""

    @abstractmethod
    def solution(self, status: Status, about: dict[str, Any]) -> Solution:
        """What was recorded until now."""

    def weights(self, i: int) -> Tensor:
        """The weights [d] to compare at grid point i; points are fetched in order, earlier ones are forgotten."""
        while i not in self.ready:
            self.advance()
        self.ready = {j: w for j, w in self.ready.items() if j >= i}
        return self.ready[i]

    @property
    def cost(self) -> float:
        """Gradient equivalents per unit time, so far."""
        spent = Ledger(**(self.counts[-1] if self.counts else {}), weights=self.flow.problem.ledger.weights)
        return spent.gradient_equivalents / max(self.y.t - self.origin, 1e-9)

    @property
    def whereabouts(self) -> Any:
        """What all ranks of a distributed problem have in common: weights, state, momentum, time."""
        return self.y.w, self.y.nu, self.y.m, self.y.t

    @property
    def near_end(self) -> bool:
        """Whether a step depended on where the run ends: from there on, a longer run is another one."""
        return False

    def mark(self) -> dict[str, Any]:
        """What :meth:`rewind` needs to come back to this moment; of records that only grow, their length."""
        copied = {name: dict(value) if isinstance(value, dict) else value for name, value in self.state().items()}
        return copied | {"nodes": len(self.nodes), "counts": len(self.counts)}

    def rewind(self, mark: dict[str, Any]) -> None:
        """Go back to where :meth:`mark` was made, earlier in the same run."""
        cut = {name: getattr(self, name)[: mark[name]] for name in ("nodes", "counts")}
        self.restore(mark | cut)

    def state(self) -> dict[str, Any]:
        """Everything needed to go on, as plain data (see :mod:`dvi.storage.checkpoint`)."""
        names = ("y", "origin", "nodes", "counts", "ready", *self._own_state)
        return {name: getattr(self, name) for name in names}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state`."""
        for name, value in state.items():
            setattr(self, name, value)
        self._survey()

    def _survey(self) -> None:
        """Look at the method's schedules over the run; what is wrong with them is said before it begins."""
        self.flow.timetable.survey(self.origin, self.origin + float(self.grid[-1]))

    _own_state: tuple[str, ...] = ()

    def _spent(self, before: Ledger, counts: list[dict[str, int]]) -> dict[str, int]:
        """This process's own, cumulative ledger: the last of ``counts`` and what was spent since ``before``."""
        last = counts[-1] if counts else {}
        return {kind: n + last.get(kind, 0) for kind, n in (self.flow.problem.ledger - before).counts.items()}

    def _cost(self, t: list[float]) -> Cost:
        total = Ledger(**(self.counts[-1] if self.counts else {}), weights=self.flow.problem.ledger.weights)
        return Cost(np.array(t), list(self.counts), total)


class FlowProcess(Process):
    """A flow driven by an integrator."""

    _own_state: tuple[str, ...] = (
        *("memory", "bound", "strained", "missed", "unit_steps"),
        *("fresh", "base", "anchor", "looked", "measured", "measured_at", "between"),
    )

    def __init__(
        self, flow: CompiledFlow, integrator: IntegratorBase, start: State, grid: Array, observer: Observer
    ) -> None:
        super().__init__(flow, start, grid, observer)
        self.integrator = integrator
        with flow.timetable.stretch(start.t):
            self.y = flow.settle(start)
            self.memory = integrator.init(flow, self.y)
        self.fresh = True  # the next step is the first one, or the first behind a jump of a schedule
        self.base = 0.0  # the largest effective sharpness at the beginning of a stretch
        self.strained: list[tuple[float, float]] = []  # steps with too large an error estimate: when, and over tol
        self.missed: list[tuple[float, float]] = []  # effective sharpnesses above 2 that were not seen coming, and when
        self.unit_steps: list[tuple[float, float]] = []  # from when to when steps of one unit were taken
        self.last = float(grid[-1])  # where the run ends
        self.bound = False  # a step has depended on where the run ends
        self.anchor = start  # a state up to about a unit of time ago
        self.looked = 0.0  # what the run had cost when kinks were last looked for
        made = (MEASURES[name](flow) for name in observer.measures)
        self.measures = [measure for measure in made if measure is not None]
        self.measured_at = -np.inf  # when something was last measured
        self.measured: tuple[float, float] | None = None  # since when it oscillates, and when the next term is due
        self.between: dict[float, Tensor] = {}  # by recorded time: weights within the last step

    @property
    def near_end(self) -> bool:
        """Whether a step depended on where the run ends."""
        return self.bound

    def advance(self) -> None:
        """One step of the integrator, at most to where a schedule jumps or has a kink.

        It is recorded all at once, so that an interruption leaves no half of it.
        """
        with self.flow.timetable.stretch(self.y.t) as (corner, jump):
            result = self._step(corner, jump)
        if result is not None:
            self._cross(result)

    def _step(self, corner: float, jump: bool) -> StepResult | None:
        """A step that ends at the corner at the latest; given back if it has reached a jump."""
        start, problem = self.y, self.flow.problem
        before, end = problem.ledger.copy(), self.last
        self.bound |= self.origin + end - start.t <= self.integrator.horizon(self.memory)
        try:
            result = self.integrator.step(self.flow, self.memory, start, min(self.origin + end, corner) - start.t)
        except Exception as error:
            if self.fresh and self.flow.constrained:
                self._require_feasible(float(EigenTracker().update_leading(self.flow, start, None).eigenvalues[0]))
            if isinstance(error, (CCPError, BudgetError)) and self._kinks_since_anchor():
                raise RunError(Status.KINKS, str(error)) from error
            raise
        node, base = result.node, self.base
        if self.fresh and self.flow.constrained:
            base = max(base, float(node.eigenvalues.max(initial=0.0)))
            self._require_feasible(float(node.eigenvalues[0]))
        counts = [self._spent(before, self.counts)]
        if result.y.t >= corner - 1e-9 * max(1.0, result.y.t):
            result = replace(result, y=replace(result.y, t=corner))
        reached = result.y.t - self.origin
        finished = reached >= end - 1e-9 * max(1.0, end)
        at_jump = jump and result.y.t == corner and not finished
        seen = self._observe(start, node) | self._measurements(start)
        if self.fresh and self.nodes:  # from here on, since what oscillated on the left of a jump does so no more
            seen["X_time"] = seen["t"]
        measured = self._measure(start, node, seen, finished)
        inside = np.flatnonzero((self.grid >= seen["t"]) & (self.grid < (np.inf if finished else reached)))
        if len(inside):
            seen |= self.observer.observe_outputs(self.flow, start, node)
        ready = self._shown(result, inside, finished)
        nodes = [self._carry(seen)]
        if self.nodes:
            nodes[0] |= self._losses_between(self.nodes[-1], nodes[0], self.between)
        times = self.grid[list(ready)].tolist()
        between = {t: w for t, w in zip(times, ready.values(), strict=True) if nodes[0]["t"] < t < reached}
        if finished or at_jump:  # what is seen at the end, or on the left of the jump
            before = problem.ledger.copy()
            last = self.integrator.observe(self.flow, result.memory, result.y)
            counts.append(self._spent(before, counts))
            outputs = self.observer.observe_outputs(self.flow, result.y, last)
            seen = self._observe(result.y, last) | outputs | {"t": end if finished else reached}
            nodes.append(seen | self._measurements(result.y, finished))
            nodes[1] |= self._losses_between(nodes[0], nodes[1], between)
            between = {}
        self.counts.extend(counts)
        self.nodes.extend(nodes)
        self.ready |= ready
        self.between = between
        if result.strain:
            self.strained.append((start.t - self.origin, result.strain))
        if result.unit:
            self.unit_steps.append((start.t - self.origin, reached))
        for t, sharpness in [
            *((node["t"], node["eigenvalues"].max(initial=0.0)) for node in nodes),
            (reached, result.missed),
        ]:
            if result.unit:  # there it is not held to a hundredth
                continue
            if self.flow.constrained and sharpness > max(MISSED, base + 1e-6):
                self.missed.append((float(t), float(sharpness)))
        # in the last two units a longer run may find that a table goes on steadily, where here it ends
        self.bound |= bool(self.flow.method.scheduled) and reached > end - 2
        self.y, self.memory, self.fresh, self.base = result.y, result.memory, False, base
        self.measured = measured
        if not finished:
            self._refuse_to_chatter(reached)
        if self.y.t >= self.anchor.t + 1:
            self.anchor = self.y
        return result if at_jump else None

    def _refuse_to_chatter(self, reached: float) -> None:
        """End the run if directions come and go at one place, or if it costs too much and kinks are the cause."""
        if self.integrator.fixed_steps:
            return
        self._refuse_to_come_and_go(reached)
        weights = self.flow.problem.ledger.weights
        cost, earlier = recent_cost([node["t"] for node in self.nodes], self.counts, weights, reached)
        if cost - max(earlier, self.looked) < chatter.KINK_COST:
            return
        self.looked = cost
        if self._kinks_since_anchor():
            raise RunError(
                Status.KINKS,
                f"{self.flow.name} flow: {cost - earlier:.0f} gradient equivalents since t = "
                f"{max(reached - chatter.KINK_TIME, 0):.4g}, and kinks were crossed on the way to t = {reached:.4g}.",
            )

    def _refuse_to_come_and_go(self, reached: float) -> None:
        if self.y.t < self.anchor.t + 0.5:  # from there w may have moved too little to say that it is at one place
            return
        count, amplitude = chatter.exits(self.nodes, reached)
        if count < chatter.EXITS:
            return
        moved = float((self.y.w - self.anchor.w).norm())
        if moved > amplitude:
            return
        raise RunError(
            Status.KINKS if self._kinks_since_anchor() else Status.CHATTERS,
            f"{self.flow.name} flow: in the last unit of time before t = {reached:.4g} directions have stopped to "
            f"oscillate {count} times, while w moved by {moved:.2g}; the oscillation itself is {amplitude:.2g} wide.",
        )

    def _kinks_since_anchor(self) -> bool:
        with self.flow.problem.ledger.paused():
            return self.flow.problem.kinks_between(self.y.w, self.anchor.w)

    def _cross(self, result: StepResult) -> None:
        """Begin a new stretch on the right side of a jump."""
        with self.flow.timetable.stretch(self.y.t):
            y = self.flow.settle(self.y)
            memory = self.integrator.restart(self.flow, result.memory, y)
        self.y, self.memory, self.fresh = y, memory, True

    def _shown(self, result: StepResult, inside: NDArray[np.intp], finished: bool) -> dict[int, Tensor]:
        """The weights at the grid points that a step has passed."""
        ready = {int(i): result.interpolate(self.origin + float(self.grid[i])).w for i in inside}
        return ready | {len(self.grid) - 1: result.y.w} if finished else ready

    def _strain(self) -> list[str]:
        """What to tell of steps that were taken in spite of their error estimate."""
        if not self.strained:
            return []
        (first, _), (last, _) = self.strained[0], self.strained[-1]
        worst, ratio = max(self.strained, key=lambda pair: pair[1])
        return [
            f"{self.flow.name} flow: {len(self.strained)} of {len(self.counts)} steps, from t = {first:g} to {last:g}, "
            f"were as short as allowed, or too late to be taken back, and had an error estimate above what tol allows, "
            f"the largest {ratio:.3g} tol at t = {worst:g}. From there on the result is less exact than asked for: "
            "lower h_min, or loosen tol to say so."
        ]

    def _missed(self) -> list[str]:
        """What to tell of directions that had come far above 2 before they were noticed."""
        if not self.missed:
            return []
        t, worst = max(self.missed, key=lambda pair: pair[1])
        return [
            f"{self.flow.name} flow: an effective sharpness above 2 was found that had not been seen coming, up to "
            f"{worst:.3f} at t = {t:g}. Either the flow before that time has not oscillated along that direction, and "
            "should have: give the integrator a watch=EigenTracker(survey_every=10), to look around for directions "
            "more often, or EigenTracker(CriticalSubspace(slack=3)), to follow more of them. Or a step has overshot "
            "(then there is a note on its error, too): lower h_min."
        ]

    def _require_feasible(self, sharpness: float) -> None:
        if sharpness <= FEASIBLE:
            return
        if not self.nodes:
            raise RunError(Status.INFEASIBLE_START, f"The effective sharpness at the start is {sharpness:.3f}.")
        t = self.y.t
        raise RunError(
            Status.INFEASIBLE_START,
            f"This start is the one behind a jump of a schedule, at t = {t:g} ({self.flow.timetable.changes(t)}): the "
            f"effective sharpness there is {sharpness:.3f}. Let the value rise over tens of steps instead; or begin "
            f"a second run there: dvi.solve(flow, …, start=dvi.State(solution.w, solution.nu, {t:g}), "
            'warm_start="auto").',
        )

    def _observe(self, y: State, node: Any) -> Observation:
        seen = self.observer.observe_flow(self.flow, y, node)
        seen["t"] -= self.origin
        seen["X_time"] -= self.origin
        return seen

    def _measurements(self, y: State, last: bool = False) -> Observation:
        """What is measured at y, if it is time for it; not counted as a cost of the run."""
        t = y.t - self.origin
        if not self.measures or (t < self.measured_at + self.observer.measure_every - 1e-9 and not last):
            return {}
        self.measured_at = t
        with self.flow.problem.ledger.paused():
            return {"measured": measured(self.measures, y)}

    def _measure(self, y: State, node: Node, seen: Observation, last: bool) -> tuple[float, float] | None:
        """Measure the next Taylor term where it is due: 8, 16, 32, … units after oscillations began, and at the end.

        The times do not depend on how long the run is, so that a longer one goes through the same states.
        """
        if not node.X.any() or isinstance(self.flow, AblatedFlow):
            return self.measured
        t = seen["t"]
        since, due = self.measured or (t, t + FIRST_MEASURE)
        if t >= due or last:
            seen["next_term"] = self.observer.next_term(self.flow, y, node)
        while due <= t:
            due = since + 2 * (due - since)
        return since, due

    def _losses_between(self, before: Observation, after: Observation, between: dict[float, Tensor]) -> Observation:
        """The losses at recorded times between two nodes if they cannot be interpolated; no cost of the run."""
        if not between or not sampling.doubtful(before, after, np.array(list(between))):
            return {}
        with self.flow.problem.ledger.paused():
            return {"evaluated": [(t, float(self.flow.problem.value(w))) for t, w in between.items()]}

    def _carry(self, seen: Observation) -> Observation:
        """Outputs are looked at only where a grid point needs them; other nodes repeat the last ones."""
        if self.observer.test_inputs is not None and "outputs" not in seen:
            seen |= {name: self.nodes[-1][name] for name in ("outputs", "osc_outputs")}
        return seen

    def solution(self, status: Status, about: dict[str, Any]) -> Solution:
        """The flow on the grid, as far as nodes reach."""
        stretches = joined(self.unit_steps)
        t = [node["t"] for node in self.nodes]
        grid = self.grid[self.grid <= (t[-1] if t else -1.0)]
        data = sampling.on_grid(self.nodes, grid) if len(grid) else {}
        empty = np.empty(0)
        strain = max((float(ratio) for _, ratio in self.strained), default=0.0)
        return Solution(
            name=self.flow.name,
            t=grid,
            loss=data.pop("loss", empty),
            predicted_loss=data.pop("predicted_loss", empty),
            eigenvalues=data.pop("eigenvalues", np.empty((0, 0))),
            X=data.pop("X", []),
            w=self.y.w,
            nu=self.y.nu,
            breakpoints=sampling.breakpoints(self.nodes),
            status=status,
            ledger=self._cost(t),
            series=data,
            notes=[*self.notes, *unit_step_notes(self.flow.name, stretches), *self._strain(), *self._missed()],
            about=about | {"integrator": repr(self.integrator), "unit_steps": stretches, "strain": strain},
        )


class MapProcess(FlowProcess):
    """The central map, one step ahead of what it shows: ¼(w_{t−1} + 2w_t + w_{t+1}), as the optimizer is shown.

    Raises:
        ValueError: if a recorded time is not a whole number of steps.
    """

    _own_state = (*FlowProcess._own_state, "raw", "middle")

    def __init__(
        self, flow: CompiledFlow, integrator: IntegratorBase, start: State, grid: Array, observer: Observer
    ) -> None:
        super().__init__(flow, integrator, start, grid, observer)
        if np.abs(grid - np.round(grid)).max() > 1e-9:
            raise ValueError("The central map is made of whole steps: steps and save_every must be whole numbers.")
        self.last += 1
        self.raw: dict[int, Tensor] = {}  # by step: those still needed
        self.middle = start.w

    def _shown(self, result: StepResult, inside: NDArray[np.intp], finished: bool) -> dict[int, Tensor]:
        reached = round(result.y.t - self.origin)
        for step in range(max(self.raw, default=-1) + 1, reached):
            self.raw[step] = result.interpolate(self.origin + step).w
        self.raw[reached] = result.y.w
        ready = {}
        for i, t in enumerate(np.round(self.grid).astype(int).tolist()):
            if t in self.raw and t + 1 in self.raw and i not in self.ready:
                now, before = self.raw[t], self.raw.get(t - 1)  # at time 0 there is no step before, as in the optimizer
                ready[i] = now if before is None else 0.25 * (before + 2 * now + self.raw[t + 1])
                self.middle = ready[i]
        self.raw = {step: w for step, w in self.raw.items() if step >= reached - 1}
        return ready

    def solution(self, status: Status, about: dict[str, Any]) -> Solution:
        """The map on the grid; w is the average at the last recorded step."""
        return replace(super().solution(status, about), w=self.middle)
