"""The macro step: a central flow for about the price of training.

Between breakpoints the flow is smooth and mildly stiff: the spectrum of its Jacobian is in [−2, small], because the
effective sharpness is at most 2.  A stabilised explicit method can therefore take steps of many units.  Eigenvectors
and third derivatives are expensive, so they are computed only when needed; in between, a model replaces the constraint.

A step consists of these parts:

    1  RKC2 with a fixed model (:mod:`dvi.solvers.macro.stage`).  Each stage costs one gradient and one CCP.
    2  The embedded error decides whether the step is accepted, before anything expensive is computed.
    3  The model is kept, or updated (:mod:`dvi.solvers.macro.refresh`).
    4  An update measures the model's defect and corrects it (:mod:`dvi.solvers.macro.defect`).
    5  One controller chooses the next step from the error, and the next interval between updates from the defect.

A step ends where an eigenvalue is predicted to reach 2.  Unit steps (:mod:`dvi.solvers.macro.unit`) replace macro steps
in two cases: the steps are shorter than one unit but resolve less than the oscillation hides, or the budget is spent.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from dvi.solvers.budget import Spending
from dvi.solvers.constants import CONSTANTS
from dvi.solvers.eigen.block_method import CriticalSubspace
from dvi.solvers.eigen.tracker import EigenTracker, landing_at
from dvi.solvers.errors import BudgetError, ConvergenceError, DomainError, StepError
from dvi.solvers.hermite import hermite
from dvi.solvers.integrator import IntegratorBase
from dvi.solvers.macro.defect import correct
from dvi.solvers.macro.model import (
    Moments,
    StepContext,
    amplitude,
    baumgarte,
    critical_frame,
    evaluate,
    multiplier,
    transport,
)
from dvi.solvers.macro.refresh import carried, kept_until, refreshed, with_thirds
from dvi.solvers.macro.stage import CONTROLLER, run_stages, silent
from dvi.solvers.macro.unit import UnitMemory, unit_step
from dvi.solvers.nodes import node
from dvi.solvers.numbers import with_numbers
from dvi.solvers.protocol import Array, ConstrainedFlow, Frame, Node, Rate, State, StepResult


@dataclass(frozen=True)
class MacroMemory:
    """The state of the macro step between two calls.

    Attributes:
        h: the next step to try.
        context: what is known at the current state.
        amplitude: √tr Σ, smoothed over steps; 0 if oscillations do not act on w, because they then hide nothing.
        needless: number of successive updates after steps that resolve less than the oscillation hides.
        unit: memory of the unit steps in progress (None: there are none).
        left: when the last unit steps ended, and how long they were planned to last.
        over: since when the last ``window`` units have exceeded the budget (None: they do not).
        dear: when unit steps last gave way because they exceeded the budget.
        spent: cost of the last steps.
    """

    h: float
    context: StepContext | None = None
    amplitude: float = 0.0
    needless: int = 0
    unit: UnitMemory | None = None
    left: tuple[float, float] = (-np.inf, 0.0)
    over: float | None = None
    dear: float = -np.inf
    spent: Spending = field(default_factory=Spending)

    def amplitude_with(self, now: float) -> float:
        """The amplitude after a step: the mean of the old value and this one, once something has oscillated."""
        return now if not self.amplitude else 0.5 * (self.amplitude + now)


@dataclass(frozen=True)
class _Accepted:
    """An accepted step: its end, the context there, X in its frame, the rates, and errors divided by the tolerance."""

    y: State
    context: StepContext
    X: Array
    frame: Frame
    first: Rate
    last: Rate
    error: float
    late: float = 0.0  # the defect of an interval of several steps: too late to take them back
    missed: float = 0.0  # an effective sharpness far above 2, where no shorter step could be tried
    updated: bool = True


@dataclass(frozen=True)
class MacroStep(IntegratorBase):
    """Adaptive macro steps with RKC2 inside; the default integrator.

    Args:
        tol: error allowed in a step of one unit time, in the norm of w (tol·√h in a step of h).  Default: 0.3 √tr Σ,
            within 1e-3 and 1, which is as fine as the oscillation resolves.
        h_min, h_max: bounds on the step, in unit times.
        h_start: first step, in unit times.  A random initialisation has a transient, so it is short.
        watch: how to follow the critical eigenpairs.  Default: as accurately as tol requires.
        max_rejections: number of successive rejections after which the run ends.
        budget: gradient equivalents per unit time, averaged over 20 units.  Above it, unit steps replace macro steps;
            if they exceed it, too, the run ends.  Default: 100, or no bound if tol is given.

    Raises:
        ValueError: if tol or budget is not positive, or the bounds are not 0 < h_min ≤ h_start ≤ h_max.
    """

    tol: float | None = None
    h_min: float = 1 / 256
    h_max: float = 20.0
    h_start: float = 0.25
    watch: EigenTracker | None = None
    max_rejections: int = 25
    budget: float | None = None

    def __post_init__(self) -> None:
        with_numbers(self)
        if self.tol is not None and not self.tol > 0:
            raise ValueError(
                f"MacroStep(tol={self.tol}): tol must be positive; without it, it follows the oscillation."
            )
        if self.budget is not None and not self.budget > 0:
            raise ValueError(f"MacroStep(budget={self.budget}): a budget is positive, in gradients per unit time.")
        if not 0 < self.h_min <= self.h_start <= self.h_max:
            raise ValueError("MacroStep: bounds on the step must satisfy 0 < h_min <= h_start <= h_max (unit times).")

    @property
    def limit(self) -> float:
        """The budget, in gradient equivalents per unit time."""
        if self.budget is not None:
            return self.budget
        return CONSTANTS.budget if self.tol is None else np.inf

    def tolerance(self, memory: MacroMemory) -> float:
        """The tolerance of the next step."""
        if self.tol is not None:
            return self.tol
        return float(np.clip(CONSTANTS.resolved * memory.amplitude, *CONSTANTS.tolerances))

    def tracker(self, tol: float) -> EigenTracker:
        """The tracker of the critical eigenpairs for this tolerance."""
        if self.watch is not None:
            return self.watch
        sharp = min(CONSTANTS.band, CONSTANTS.sharp * (tol / 1e-3) ** 0.5)
        # Of 200 look-arounds with eight products (d = 3,000) all find an eigenvalue 0.5 above ten others, 95 % one 0.2
        # above them.
        # A spectrum is trusted for as long as the longest step. With 10 as with 25 units, a direction that rises after
        # a long calm is held in time (an RNN on sorting, and a toy); 10 cost up to a twelfth more on digits.
        followed = CriticalSubspace(tol=sharp, krylov=8)
        return EigenTracker(followed, survey_every=100.0, survey_soonest=25.0, patience=20.0)

    def init(self, flow: ConstrainedFlow, y: State) -> MacroMemory:
        """The memory at the start, for a short first step."""
        return MacroMemory(self.h_start)

    def horizon(self, memory: MacroMemory) -> float:
        """The end of the run affects a step that is nearer to it than this: it halves the rest."""
        return 1.001 if memory.unit else 2.0 * min(memory.h, self.h_max)

    def step(self, flow: ConstrainedFlow, memory: MacroMemory, y: State, h: float) -> StepResult:
        """One accepted step of at most h unit times.

        Raises:
            StepError: if a step of h_min still gives numbers that are not finite, or leaves the domain of P.
            BudgetError: if the cost, averaged over ``window`` units, has exceeded the budget for twice that time.
        """
        before = flow.spent()
        result = self._unit_step(flow, memory, y, h) if memory.unit else self._macro_step(flow, memory, y, h)
        now = replace(result.memory, spent=memory.spent.after(result.y.t, flow.spent() - before))
        return replace(result, memory=self._within_budget(now, result) if flow.constrained else now)

    def _within_budget(self, now: MacroMemory, result: StepResult) -> MacroMemory:
        """The memory after a step.  Steps that exceed the budget by themselves give way to the other kind."""
        t, cost = result.y.t, now.spent.per_unit_time(result.y.t)
        if cost <= self.limit:
            return replace(now, over=None)
        over = t if now.over is None else now.over
        if t >= over + 2 * CONSTANTS.window:  # time for either kind of steps to show what it costs
            raise BudgetError(
                f"MacroStep at t = {t:g}: steps of one unit, and longer ones where these cost more, take {cost:.0f} "
                f"gradients per unit time, and budget={self.limit:g} are allowed ({result.node.k} directions are "
                "held). Lower lr, or raise budget."
            )
        now = replace(now, over=over)
        if now.unit:
            spare = now.spent.since(now.unit.begin) <= self.limit * CONSTANTS.window
            return now if spare else replace(now, dear=t, unit=replace(now.unit, until=t))
        # longer steps that replaced unit steps may soon be seen to cost more than these
        time = min(t - now.left[0] + 0.25 * CONSTANTS.window, CONSTANTS.window)
        return now if now.spent.since(now.left[0]) <= self.limit * time else self._entered(now, t)

    def observe(self, flow: ConstrainedFlow, memory: MacroMemory, y: State) -> Node:
        """The node at y.  Eigenvalues are updated if they are older; X solves the last CCP of Baumgarte type."""
        tracker = self.tracker(self.tolerance(memory))
        context = memory.context
        if memory.unit:
            context = evaluate(flow, tracker, y, memory.unit.spectrum, 1.0)
        if context is None:
            context = evaluate(flow, tracker, y, None, memory.h)
        if flow.constrained and context.spectrum.t < y.t:
            context = evaluate(flow, tracker, y, context.spectrum, memory.h, (context.loss, context.g))
        lin = flow.linearised(y, context.g, context.frame)
        X = multiplier(flow, lin, baumgarte(memory.h), None)
        return node(flow, y.t, context.loss, context.g, context.spectrum, context.frame, X, y.t, lin.drift(X))

    # ---- unit steps -----------------------------------------------------------------------------------

    def _free(self, memory: MacroMemory, t: float) -> bool:
        """Whether unit steps may begin within the budget.  They may not if they have just exceeded it."""
        return self.tol is None and t >= memory.dear + CONSTANTS.window

    def _entered(self, memory: MacroMemory, t: float) -> MacroMemory:
        """The memory with which unit steps begin.  If they ended just before, they last twice as long this time."""
        left, stretch = memory.left
        stretch = 2 * stretch if t - left < CONSTANTS.unit_steps else CONSTANTS.unit_steps
        context = memory.context
        assert context is not None
        X = np.zeros((context.frame.k, context.frame.k))
        unit = UnitMemory(context.spectrum, context.frame, X, begin=t, until=t + stretch)
        return replace(memory, context=None, needless=0, unit=unit)

    def _unit_step(self, flow: ConstrainedFlow, memory: MacroMemory, y: State, h: float) -> StepResult:
        assert memory.unit is not None
        tracker = self.tracker(self.tolerance(memory))
        if self.watch is None:
            tracker = replace(tracker, subspace=replace(tracker.subspace, tol=CONSTANTS.rough))
        # half the budget may go into steps that shrink where the sharpness overshoots
        shortest = 1.0 if memory.spent.since(memory.unit.begin) > 0.5 * self.limit * CONSTANTS.window else 0.0
        try:
            end, unit, seen = unit_step(flow, tracker, memory.unit, y, h, shortest)
        except ConvergenceError as error:
            raise ConvergenceError(
                f"{error} MacroStep took steps of one unit before, since the oscillation is stiff. At this "
                "lr they may have lost the edge of stability. Lower lr, or raise budget, which allows shorter steps."
            ) from error
        rate = seen.rate
        assert rate is not None
        size = amplitude(seen.X, unit.frame) if flow.pushed else 0.0
        now = replace(memory, unit=unit, amplitude=memory.amplitude_with(size))
        if end.t >= unit.until - 1e-9 or not seen.k:
            context = evaluate(flow, tracker, end, unit.spectrum, 1.0)
            now = replace(now, h=1.0, context=context, unit=None, left=(end.t, unit.until - unit.begin))
        return StepResult(end, now, seen, lambda t: y.moved(rate, t - y.t), unit=True)

    # ---- macro steps ----------------------------------------------------------------------------------

    def _macro_step(self, flow: ConstrainedFlow, memory: MacroMemory, y: State, h: float) -> StepResult:
        tol = self.tolerance(memory)
        tracker = self.tracker(tol)
        context = memory.context or evaluate(flow, tracker, y, None, memory.h)
        size, landing = memory.h, True
        for attempt in range(self.max_rejections):
            size = min(size, self.h_max)
            length = size
            if landing and flow.constrained:
                room = context.until - y.t
                if not context.frame.k:  # with nothing held a step is long, and nothing else would make it look around
                    room = min(room, max(tracker.due(context.spectrum) - y.t, self.h_start))
                length = landing_at(context.spectrum, y.t, min(size, room), self.h_start, context.approach)
            length = h if length >= h * (1 - 1e-9) else (h / 2 if 2 * length > h else length)
            final = length <= self.h_min * 1.01 or h <= self.h_min
            closing = length >= h * (1 - 1e-9) or not landing
            try:
                tried = self._attempt(flow, tracker, tol, context, y, length, final, closing)
            except DomainError as error:
                if final:
                    raise StepError(
                        f"MacroStep at t = {y.t:g}: a step of {length:g} still fails: {error} "
                        "Lower lr, warm-start with real optimizer steps, or lower h_min."
                    ) from error
                tried = length / 2
            if isinstance(tried, float):
                if attempt >= 2 and self._free(memory, y.t) and memory.amplitude and context.frame.k:
                    return self._unit_step(flow, self._entered(replace(memory, context=context), y.t), y, h)
                size, landing = max(self.h_min, tried), False
                # What was taken on trust may be why: look.  With directions held, the step's own error comes first.
                if flow.constrained and context.spectrum.t < y.t and (not context.frame.k or attempt):
                    known = context.loss, context.g
                    context = evaluate(flow, tracker, y, context.spectrum, size, known)
                continue
            return self._accept(flow, memory, context, tol, y, length, size, h, tried)
        raise StepError(
            f"MacroStep at t = {y.t:g}: {self.max_rejections} rejections in a row. Loosen tol, or use Euler(0.25) to "
            "see what happens there."
        )

    def _attempt(
        self,
        flow: ConstrainedFlow,
        tracker: EigenTracker,
        tol: float,
        context: StepContext,
        y: State,
        h: float,
        final: bool,
        closing: bool,
    ) -> _Accepted | float:
        """One attempt at a step: the accepted step, or the length (a float) to try instead.

        Args:
            final: the step is as short as allowed, so any finite result is accepted.
            closing: update the model at the end of the step in any case.
        """
        k, since = context.frame.k, y.t - context.spectrum.t
        step = run_stages(flow, tracker, context, y, h)
        error = step.error / tol
        if not np.isfinite(error) or (error > CONSTANTS.allowed and not final):
            return _shorter(h, error, final)
        end, known = step.y, (step.loss, step.g)
        if not flow.constrained:
            after = evaluate(flow, tracker, end, context.spectrum, h, known)
            return _Accepted(end, after, step.mean, after.frame, step.first, step.last, error)

        moments = (context.moments or Moments.none(k)).after(step.mean, since, h)
        until = end.t
        if not (closing and k):
            until = kept_until(flow, tracker, context, step, moments, h * CONTROLLER.factor(error))
        if until > end.t:
            after = carried(flow, context, step, moments, h, until)
            shown = context.shown(flow, y, context.ahead(since + h / 2))
            return _Accepted(end, after, step.mean, shown, step.first, step.last, error, updated=False)

        now = tracker.update(flow, end, context.spectrum, h, context.vectors_ahead(end.t))
        above = float(now.eigenvalues[0]) - 2
        on_trust = silent(context, h) if k else since > 0  # nothing was constrained because none was near 2
        if above > (10 * CONSTANTS.at_edge if on_trust else CONSTANTS.overshoot) and not final:
            return 0.5 * h
        new = critical_frame(flow, end, now, tracker.critical(now, h, k), third=False)
        R = transport(flow, end, new, context.frame)
        new, taken = with_thirds(flow, end, new, now, context, R, step.X)
        corrected = correct(flow, context, step, moments, new, R)
        bend = corrected.bend / tol
        if not np.isfinite(bend) or (bend > CONSTANTS.allowed and not since and not final):
            return _shorter(h, bend, final)
        after = refreshed(flow, context, step, now, new, R, taken, corrected, tol)
        return _Accepted(
            corrected.y,
            after,
            corrected.X,
            replace(new, T=after.frame.T),
            step.first,
            step.last,
            error if since else max(error, bend),
            bend if since else 0.0,
            above + 2 if above > CONSTANTS.overshoot else 0.0,
        )

    def _accept(
        self,
        flow: ConstrainedFlow,
        memory: MacroMemory,
        context: StepContext,
        tol: float,
        y: State,
        length: float,
        tried: float,
        available: float,
        new: _Accepted,
    ) -> StepResult:
        # a step that was cut to land may be followed by one as long as was tried before
        h = length * CONTROLLER.factor(new.error, max(CONSTANTS.change[1], tried / length))
        h = float(np.clip(h, self.h_min, self.h_max))
        size = amplitude(new.X, new.frame) if flow.pushed else 0.0
        now = replace(
            memory,
            h=h,
            context=new.context,
            amplitude=memory.amplitude_with(size),
            needless=self._needless(memory, y, max(length, h), available, new),
        )
        if now.needless >= 2 and self._free(now, new.y.t):
            now = self._entered(now, new.y.t)
        largest = max(new.error, new.late)
        begin = node(
            flow,
            y.t,
            context.loss,
            context.g,
            context.spectrum,
            new.frame,
            new.X,
            y.t + 0.5 * length,
            new.first,
            context.approach,
        )
        inside = hermite(y, new.y, new.first, new.last)
        strain = largest if largest > CONSTANTS.allowed else 0.0
        return StepResult(new.y, now, begin, inside, strain, new.missed)

    def _needless(self, memory: MacroMemory, y: State, longest: float, available: float, new: _Accepted) -> int:
        """Number of successive updates after steps shorter than one unit that move w less than the oscillation hides.

        Then the force is stiff, or the oscillation hides what such steps resolve.
        """
        if not new.updated:
            return memory.needless
        moved = float((new.y.w - y.w).norm())
        fine = longest < 1 <= available - 1 and moved <= CONSTANTS.resolved * memory.amplitude
        return memory.needless + 1 if fine else 0


def _shorter(h: float, error: float, final: bool) -> float:
    """The length to try instead of h, after an error (divided by the tolerance) that is too large."""
    if np.isfinite(error):
        return h * CONTROLLER.factor(error)
    if final:
        raise DomainError("the state is not finite.")
    return 0.5 * h
