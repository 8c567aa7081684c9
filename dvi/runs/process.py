"""A process in progress: the optimizer or a flow, advanced over a common time grid and recorded.

Inside, times are on the process's own clock, ``origin`` + recorded time, because a warm start does not reset schedules.
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

#: A start with a larger effective sharpness is refused, because the first oscillations would not be small.
FEASIBLE = 2.3

#: Unit times from the first oscillation to the first measurement of the next Taylor term.
FIRST_MEASURE = 8.0

#: If the effective sharpness exceeds this and that of the start, a direction was missed: known directions stay at 2.
MISSED = 2.05


class Process(ABC):
    """One process of a run.

    Args:
        flow: the compiled flow or optimizer.
        start: the first state.
        grid: recorded times, ascending from 0.
        observer: the quantities that are observed.

    Raises:
        ValueError: if the process takes whole steps, but a recorded time is not a whole number of steps.
    """

    #: The subject of the sentence that the process takes whole steps; "" if its steps may have any length.
    whole_steps: str = ""
    #: Does the process read schedules at whole times only?
    whole_times: bool = False

    def __init__(self, flow: CompiledFlow, start: State, grid: Array, observer: Observer) -> None:
        if self.whole_steps and np.abs(grid - np.round(grid)).max() > 1e-9:
            raise ValueError(f"{self.whole_steps} takes whole steps: steps and save_every must be whole numbers.")
        self.flow, self.grid, self.observer = flow, grid, observer
        self.y, self.origin = start, start.t
        self.notes = list(flow.notes)  # of this run; the flow keeps the notes of its compilation
        self._survey()
        self.nodes: list[Observation] = []
        self.counts: list[dict[str, int]] = []
        self.ready: dict[int, Tensor] = {}  # weights at grid points not yet fetched

    @abstractmethod
    def advance(self) -> None:
        """Take one step and record it."""

    @abstractmethod
    def solution(self, status: Status, about: dict[str, Any]) -> Solution:
        """The result recorded until now."""

    def weights(self, i: int) -> Tensor:
        """The weights [d] to compare at grid point i; points must be fetched in order, and earlier ones are dropped."""
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
        """The data that all ranks of a distributed problem must share: weights, state, momentum, time."""
        return self.y.w, self.y.nu, self.y.m, self.y.t

    @property
    def near_end(self) -> bool:
        """Whether a step has depended on the end of the run; from then on, a longer run would differ."""
        return False

    def mark(self) -> dict[str, Any]:
        """What :meth:`rewind` needs to return to this moment; for records that only grow, this is their length."""
        copied = {name: dict(value) if isinstance(value, dict) else value for name, value in self.state().items()}
        return copied | {"nodes": len(self.nodes), "counts": len(self.counts)}

    def rewind(self, mark: dict[str, Any]) -> None:
        """Return to the moment of :meth:`mark`, earlier in the same run."""
        cut = {name: getattr(self, name)[: mark[name]] for name in ("nodes", "counts")}
        self.restore(mark | cut)

    def state(self) -> dict[str, Any]:
        """Everything needed to continue, as plain data (see :mod:`dvi.storage.checkpoint`)."""
        names = ("y", "origin", "nodes", "counts", "ready", *self._own_state)
        return {name: getattr(self, name) for name in names}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a result of :meth:`state`."""
        for name, value in state.items():
            setattr(self, name, value)
        self._survey()

    def _survey(self) -> None:
        """Evaluate the method's schedules over the run, so that errors in them are raised before it begins."""
        self.flow.timetable.survey(self.origin, self.origin + float(self.grid[-1]), whole=self.whole_times)

    _own_state: tuple[str, ...] = ()

    def _spent(self, before: Ledger, counts: list[dict[str, int]]) -> dict[str, int]:
        """This process's own cumulative ledger: the last of ``counts`` plus the evaluations since ``before``."""
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
        self.fresh = True  # the next step is the first one, or the first after a jump of a schedule
        self.base = 0.0  # the largest effective sharpness at the beginning of a stretch
        self.strained: list[tuple[float, float]] = []  # steps with an error estimate above tol: (time, ratio)
        self.missed: list[tuple[float, float]] = []  # (time, effective sharpness) of missed directions above 2
        self.unit_steps: list[tuple[float, float]] = []  # beginnings and ends of steps of one unit
        self.last = float(grid[-1])  # the end of the run
        self.bound = False  # a step has depended on the end of the run
        self.anchor = start  # a state at most about one unit of time ago
        self.looked = 0.0  # the cost of the run at the last search for kinks
        made = (MEASURES[name](flow) for name in observer.measures)
        self.measures = [measure for measure in made if measure is not None]
        self.measured_at = -np.inf  # the time of the last measurement
        self.measured: tuple[float, float] | None = None  # (start of oscillation, time at which the next term is due)
        self.between: dict[float, Tensor] = {}  # by recorded time: weights within the last step

    @property
    def near_end(self) -> bool:
        """Whether a step has depended on the end of the run."""
        return self.bound

    def advance(self) -> None:
        """One step of the integrator, which ends at the next jump or kink of a schedule at the latest.

        All of it is recorded at once, so that an interruption leaves no half of a step.
        """
        with self.flow.timetable.stretch(self.y.t) as (corner, jump):
            result = self._step(corner, jump)
        if result is not None:
            self._cross(result)

    def _step(self, corner: float, jump: bool) -> StepResult | None:
        """Take a step that ends at the corner at the latest; return it if it has reached a jump."""
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
        if self.fresh and self.nodes:  # from here on, because the directions that oscillated before a jump no longer do
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
        if finished or at_jump:  # the observation at the end of the run, or just before the jump
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
        seen_at = [(node["t"], node["eigenvalues"].max(initial=0.0)) for node in nodes] + [(reached, result.missed)]
        if result.unit:  # unit steps do not hold it to a hundredth; the first of them begins where others ended
            others = not self.unit_steps or self.unit_steps[-1][1] < nodes[0]["t"]
            seen_at = seen_at[:1] if others else []
            self.unit_steps.append((start.t - self.origin, reached))
        for t, sharpness in seen_at:
            if self.flow.constrained and sharpness > max(MISSED, base + 1e-6):
                self.missed.append((float(t), float(sharpness)))
        # in the last two units, a longer run may find that a table continues smoothly where it ends here
        self.bound |= bool(self.flow.method.scheduled) and reached > end - 2
        self.y, self.memory, self.fresh, self.base = result.y, result.memory, False, base
        self.measured = measured
        if not finished:
            self._refuse_to_chatter(reached)
        if self.y.t >= self.anchor.t + 1:
            self.anchor = self.y
        return result if at_jump else None

    def _refuse_to_chatter(self, reached: float) -> None:
        """End the run if directions come and go while w stands still, or if kinks make it too expensive."""
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
                f"{self.flow.name} flow: it took {cost - earlier:.0f} gradient equivalents since t = "
                f"{max(reached - chatter.KINK_TIME, 0):.4g}, and kinks were crossed before t = {reached:.4g}.",
            )

    def _refuse_to_come_and_go(self, reached: float) -> None:
        if self.y.t < self.anchor.t + 0.5:  # too short a time to say that w stands still
            return
        count, amplitude = chatter.exits(self.nodes, reached)
        if count < chatter.EXITS:
            return
        moved = float((self.y.w - self.anchor.w).norm())
        if moved > amplitude:
            return
        raise RunError(
            Status.KINKS if self._kinks_since_anchor() else Status.CHATTERS,
            f"{self.flow.name} flow: in the last unit of time before t = {reached:.4g}, directions stopped oscillating "
            f"{count} times, while w moved by {moved:.2g}. The amplitude of the oscillation is {amplitude:.2g}.",
        )

    def _kinks_since_anchor(self) -> bool:
        with self.flow.problem.ledger.paused():
            return self.flow.problem.kinks_between(self.y.w, self.anchor.w)

    def _cross(self, result: StepResult) -> None:
        """Begin a new stretch after a jump."""
        with self.flow.timetable.stretch(self.y.t):
            y = self.flow.settle(self.y)
            memory = self.integrator.restart(self.flow, result.memory, y)
        self.y, self.memory, self.fresh = y, memory, True

    def _shown(self, result: StepResult, inside: NDArray[np.intp], finished: bool) -> dict[int, Tensor]:
        """The weights at the grid points that a step has passed."""
        ready = {int(i): result.interpolate(self.origin + float(self.grid[i])).w for i in inside}
        return ready | {len(self.grid) - 1: result.y.w} if finished else ready

    def _strain(self) -> list[str]:
        """The note on steps that were accepted in spite of their error estimate."""
        if not self.strained:
            return []
        (first, _), (last, _) = self.strained[0], self.strained[-1]
        worst, ratio = max(self.strained, key=lambda pair: pair[1])
        return [
            f"{self.flow.name} flow: {len(self.strained)} of {len(self.counts)} steps, from t = {first:g} to {last:g}, "
            "had an error estimate above what tol allows, but were as short as allowed or too late to be taken back. "
            f"The largest estimate was {ratio:.3g} tol at t = {worst:g}. After that the result is less exact than "
            "asked for: lower h_min, or loosen tol to accept it."
        ]

    def _missed(self) -> list[str]:
        """The note on directions that were far above 2 when they were found."""
        if not self.missed:
            return []
        t, worst = max(self.missed, key=lambda pair: pair[1])
        return [
            f"{self.flow.name} flow: an effective sharpness above 2 appeared without warning, up to {worst:.3f} at "
            f"t = {t:g}. Either a direction was missed, along which the flow should have oscillated before that time. "
            "Then give the integrator watch=EigenTracker(survey_every=10), to search for directions more often, or "
            "EigenTracker(CriticalSubspace(slack=3)), to follow more of them. Or a step has overshot (then there is a "
            "note on its error, too): lower h_min."
        ]

    def _require_feasible(self, sharpness: float) -> None:
        if sharpness <= FEASIBLE:
            return
        if not self.nodes:
            raise RunError(Status.INFEASIBLE_START, f"The effective sharpness at the start is {sharpness:.3f}.")
        t = self.y.t
        raise RunError(
            Status.INFEASIBLE_START,
            f"The flow starts anew after a jump of a schedule at t = {t:g} ({self.flow.timetable.changes(t)}), where "
            f"the effective sharpness is {sharpness:.3f}. Let the value rise over tens of steps instead, or begin a "
            f"second run there: dvi.solve(flow, …, start=dvi.State(solution.w, solution.nu, {t:g}), "
            'warm_start="auto").',
        )

    def _observe(self, y: State, node: Any) -> Observation:
        seen = self.observer.observe_flow(self.flow, y, node)
        seen["t"] -= self.origin
        seen["X_time"] -= self.origin
        return seen

    def _measurements(self, y: State, last: bool = False) -> Observation:
        """The measurements at y, if they are due; they do not count as a cost of the run."""
        t = y.t - self.origin
        if not self.measures or (t < self.measured_at + self.observer.measure_every - 1e-9 and not last):
            return {}
        self.measured_at = t
        with self.flow.problem.ledger.paused():
            return {"measured": measured(self.measures, y)}

    def _measure(self, y: State, node: Node, seen: Observation, last: bool) -> tuple[float, float] | None:
        """Measure the next Taylor term if due: 8, 16, 32, … units after the first oscillation, and at the end.

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
        """The losses at recorded times between two nodes if interpolation fails; they do not count as a cost."""
        if not between or not sampling.doubtful(before, after, np.array(list(between))):
            return {}
        with self.flow.problem.ledger.paused():
            return {"evaluated": [(t, float(self.flow.problem.value(w))) for t, w in between.items()]}

    def _carry(self, seen: Observation) -> Observation:
        """Compute network outputs only if a grid point needs them; other nodes repeat the last ones."""
        if self.observer.test_inputs is not None and "outputs" not in seen:
            seen |= {name: self.nodes[-1][name] for name in ("outputs", "osc_outputs")}
        return seen

    def solution(self, status: Status, about: dict[str, Any]) -> Solution:
        """The flow on the grid, up to the last node."""
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
            notes=[
                *self.notes,
                *unit_step_notes(self.flow.name, stretches, self.nodes),
                *self._strain(),
                *self._missed(),
            ],
            about=about | {"integrator": repr(self.integrator), "unit_steps": stretches, "strain": strain},
        )


class MapProcess(FlowProcess):
    """The central map, shown by its midpoints ¼(w_{t−1} + 2w_t + w_{t+1}), like the optimizer.

    It therefore runs one step ahead of its results.
    """

    whole_steps = "The central map"
    _own_state = (*FlowProcess._own_state, "raw", "middle")

    def __init__(
        self, flow: CompiledFlow, integrator: IntegratorBase, start: State, grid: Array, observer: Observer
    ) -> None:
        super().__init__(flow, integrator, start, grid, observer)
        self.last += 1
        self.raw: dict[int, Tensor] = {}  # the steps that are still needed
        self.middle = start.w

    def _shown(self, result: StepResult, inside: NDArray[np.intp], finished: bool) -> dict[int, Tensor]:
        reached = round(result.y.t - self.origin)
        for step in range(max(self.raw, default=-1) + 1, reached):
            self.raw[step] = result.interpolate(self.origin + step).w
        self.raw[reached] = result.y.w
        ready = {}
        for i, t in enumerate(np.round(self.grid).astype(int).tolist()):
            if t in self.raw and t + 1 in self.raw and i not in self.ready:
                now, before = self.raw[t], self.raw.get(t - 1)  # as for the optimizer, there is no step before time 0
                ready[i] = now if before is None else 0.25 * (before + 2 * now + self.raw[t + 1])
                self.middle = ready[i]
        self.raw = {step: w for step, w in self.raw.items() if step >= reached - 1}
        return ready

    def solution(self, status: Status, about: dict[str, Any]) -> Solution:
        """The map on the grid; w is the average at the last recorded step."""
        return replace(super().solution(status, about), w=self.middle)
