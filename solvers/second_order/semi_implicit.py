"""The semi-implicit step: for flows whose momentum is part of the state, and for the central map (dt = 1).

X enters dm/dt but not dw/dt, so no explicit method can hold the constraint with it.  A step that moves m first, and
then w with the new m, can.  The gap at its end determines X,

    X ⪰ 0   ⟂   gap(t + dt) + β[X] ⪰ 0,

at one gradient a step.  Eigenvectors and third derivatives are kept over a block of several steps and renewed at its
end.  There the trapezoid rule and a signed correction of the impulse account for their change, as in the macro step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dvi.solvers import ccp
from dvi.solvers.budget import Spending
from dvi.solvers.constants import CONSTANTS
from dvi.solvers.eigen.block_method import CRITICAL
from dvi.solvers.eigen.tracker import EigenTracker, SpectrumEstimate, landing_at
from dvi.solvers.errors import BudgetError, DomainError, StepError
from dvi.solvers.integrator import IntegratorBase
from dvi.solvers.macro.model import Slope, StepContext, critical_frame, evaluate, settled, transport
from dvi.solvers.macro.stage import CONTROLLER, SHARE, displacement
from dvi.solvers.nodes import node
from dvi.solvers.numbers import named_only, with_numbers
from dvi.solvers.protocol import Array, Flow, Frame, Node, Rate, Staggered, State, StepResult, combine, like
from dvi.solvers.repair import Repair
from dvi.solvers.svec import smat, svec


@dataclass(frozen=True)
class SemiImplicitMemory:
    """The memory of the semi-implicit step.

    Attributes:
        h: the next block to try, unit times.
        s: momentum and ν at half-steps (None: not started).
        dt: the substep by which they are staggered.
        context: the evaluations at the current state.
        spent: what the last blocks have cost.
    """

    h: float
    s: Staggered | None = None
    dt: float = 0.0
    context: StepContext | None = None
    spent: Spending = field(default_factory=Spending)


@named_only
@dataclass(frozen=True, kw_only=True)
class SemiImplicit(IntegratorBase):
    """Semi-implicit steps of dt in blocks of adaptive length; the integrator of flows of second order.

    The method is of second order in dt.  It takes one gradient a step, and one update of eigenvectors and third
    derivatives a block.  Its arguments are given by name, because ``dt`` and ``tol`` are both small numbers, and other
    integrators take one or the other as their first argument.

    Args:
        dt: unit times per step, at most 1 (where the flow becomes the optimizer's own map plus the force of Σ).
        tol: error in w, in its norm, that a block of one unit time may have because its frame is kept (tol·√h in a
            block of h); 0: blocks of one step.
        h_max: longest block, unit times.
        watch: the tracker of the critical eigenpairs.
        max_rejections: rejections in a row before :class:`StepError`.
        budget: gradient equivalents per unit time, averaged over 20 units; a run that exceeds it ends (None: no bound).

    Raises:
        TypeError: if a number has no name.
        ValueError: if dt is not in (0, 1], tol is negative, h_max is shorter than dt, or budget is not positive.
    """

    dt: float = 0.5
    tol: float = 1e-3
    h_max: float = 20.0
    watch: EigenTracker = field(default_factory=lambda: EigenTracker(survey_every=100.0))
    max_rejections: int = 25
    budget: float | None = None

    def __post_init__(self) -> None:
        with_numbers(self)
        if not 0 < self.dt <= 1:
            raise ValueError(f"SemiImplicit(dt={self.dt}): dt must be in (0, 1], in unit times.")
        if not self.tol >= 0 or not self.h_max >= self.dt:
            raise ValueError(f"SemiImplicit(tol={self.tol}, h_max={self.h_max}): need tol >= 0 and h_max >= dt.")
        if self.budget is not None and not self.budget > 0:
            raise ValueError(f"SemiImplicit(budget={self.budget}): a budget is positive, in gradients per unit time.")

    def init(self, flow: Flow, y: State) -> SemiImplicitMemory:
        """The first block is one step."""
        return SemiImplicitMemory(self.dt)

    def accepts(self, flow: Flow) -> str:
        """Flows with momentum in their state, and with dt = 1 the central map."""
        if flow.quasistatic or (flow.stepwise and self.dt != 1):
            return super().accepts(flow)
        if flow.inertial:
            return ""
        return (
            f'SemiImplicit is for flows of accuracy="second-order", not for this {flow.name} flow of accuracy="paper": '
            "take MacroStep, or compile the flow with the other accuracy."
        )

    @property
    def fixed_steps(self) -> bool:
        """Every step is dt, however long the blocks."""
        return True

    def restart(self, flow: Flow, memory: SemiImplicitMemory, y: State) -> SemiImplicitMemory:
        """The memory after a jump of the flow: the momentum is kept, all else is computed anew."""
        s = None if memory.s is None else replace(memory.s, t=y.t)
        return SemiImplicitMemory(self.dt, s, memory.dt)

    def horizon(self, memory: SemiImplicitMemory) -> float:
        """A larger h than this would not change the block: a block that would pass the end is shortened."""
        return max(min(memory.h, self.h_max), self.dt) + self.dt

    def step(self, flow: Flow, memory: SemiImplicitMemory, y: State, h: float) -> StepResult:
        """One accepted block of at most h unit times.

        Raises:
            StepError: if a single step leaves the finite numbers or the domain of P, or the flow has no momentum state.
            BudgetError: if the last ``window`` units cost more than the budget.
        """
        if not flow.inertial:
            raise StepError('SemiImplicit is for flows of accuracy="second-order"; take MacroStep for this one.')
        before = flow.spent()
        result = self._block(flow, memory, y, h)
        spent = memory.spent.after(result.y.t, flow.spent() - before)
        cost = spent.per_unit_time(result.y.t)
        if self.budget is not None and cost > self.budget:
            raise BudgetError(
                f"SemiImplicit at t = {y.t:g}: the last {CONSTANTS.window:g} units cost {cost:.0f} gradients each, and "
                f"budget={self.budget:g} are allowed ({result.node.k} directions are held). Raise budget, tol or dt, "
                "or lower lr."
            )
        return replace(result, memory=replace(result.memory, spent=spent))

    def _block(self, flow: Flow, memory: SemiImplicitMemory, y: State, h: float) -> StepResult:
        """One accepted block."""
        context = memory.context or evaluate(flow, self.watch, y, None, memory.h)
        dt = (
            min(self.dt, flow.longest_step(y, 1.2 * float(context.spectrum.eigenvalues[0])))
            if not flow.constrained
            else self.dt
        )
        # Without a constraint, a block keeps only the sharpness, on which dt depends.
        longest = self.h_max if flow.constrained else min(self.h_max, max(4.0, self.dt))
        size, landing = min(memory.h, longest), True
        for _ in range(self.max_rejections):
            wanted = landing_at(context.spectrum, y.t, size, self.dt) if landing and flow.constrained else size
            count = max(1, round(wanted / dt))
            if count * dt >= h * (1 - 1e-9):
                count = max(1, int(np.ceil(h / dt - 1e-9)))
                step = h / count
            else:
                step = dt
            try:
                s = memory.s or flow.stagger(y, context.g, step)
                if memory.s is not None and abs(step - memory.dt) > 1e-12:
                    s = flow.restagger(s, context.g, memory.dt, step)
                tried = _Block(flow, self.watch, self.tol, context, s, step, count).run()
            except DomainError as error:
                if count == 1:
                    raise StepError(
                        f"SemiImplicit at t = {y.t:g}: a step of {step:g} fails: {error} Lower lr, or warm-start with "
                        "real optimizer steps."
                    ) from error
                size, landing = count * step / 2, False
                continue
            if isinstance(tried, float):
                size, landing = tried, False
                continue
            return self._accept(flow, context, y, size, step, count, tried)
        raise StepError(f"SemiImplicit at t = {y.t:g}: {self.max_rejections} rejections in a row. Loosen tol.")

    def observe(self, flow: Flow, memory: SemiImplicitMemory, y: State) -> Node:
        """The node at y, with the X of a step from there."""
        context = memory.context or evaluate(flow, self.watch, y, None, self.dt)
        s = memory.s or flow.stagger(y, context.g, self.dt)
        first = flow.implicit_step(s, context.g, context.frame, memory.dt or self.dt)
        X = _solve(flow, -first.gap, first.beta)
        end = first.end(X)
        rate = Rate((end.w - s.w) / (end.t - s.t), end.nu_now)
        return node(flow, y.t, context.loss, context.g, context.spectrum, context.frame, X, y.t, rate)

    # ---- inside ---------------------------------------------------------------------------------------

    def _accept(
        self, flow: Flow, context: StepContext, y: State, wanted: float, step: float, count: int, new: _Taken
    ) -> StepResult:
        length = step * count
        # after a block that was cut to end on an arrival, the next may be as long as the one tried before
        h = length * CONTROLLER.factor(new.error, max(CONSTANTS.change[1], wanted / length)) if self.tol else self.dt
        following = new.context
        if flow.constrained:
            following = replace(
                following, slope=Slope.between(context.frame, context.spectrum, following.frame, following.spectrum)
            )
        memory = SemiImplicitMemory(float(np.clip(h, self.dt, self.h_max)), new.s, step, following)
        begin = node(
            flow, y.t, context.loss, context.g, context.spectrum, new.X_frame, new.X, y.t + 0.5 * length, new.rate
        )
        return StepResult(new.s.state, memory, begin, _linear(new.path, new.s))


@dataclass(frozen=True)
class _Taken:
    """An accepted block: its end, the evaluations there, its mean X, its weights step by step."""

    s: Staggered
    context: StepContext
    X: Array
    X_frame: Frame
    rate: Rate
    error: float
    path: list[tuple[float, Tensor]]


@dataclass
class _Block:
    """One try of a block; ``run`` returns the accepted block, or (a float) the length to try instead."""

    flow: Flow
    watch: EigenTracker
    tol: float
    context: StepContext
    s: Staggered
    dt: float
    count: int

    def run(self) -> _Taken | float:
        flow, context, length = self.flow, self.context, self.dt * self.count
        single = self.count == 1
        frame = context.frame if single else context.ahead(length / 2)
        impulse = _Impulse(frame.k)
        s, path, g = self.s, [(self.s.t, self.s.w)], context.g
        rate: Rate | None = None
        for j in range(self.count):
            if j:
                g = flow.value_and_grad(s.state)[1]
            step = flow.implicit_step(s, g, frame, self.dt)
            X = _solve(flow, -step.gap, step.beta)
            impulse.add(svec(X), step.decay, self.dt, j / self.count)
            following = step.end(X)
            if rate is None:
                rate = Rate((following.w - s.w) / self.dt, following.nu_now)
            s = following
            path.append((s.t, s.w))
        if not bool(s.w.isfinite().all()):
            raise DomainError("the state is not finite.")
        loss, g = flow.value_and_grad(s.state)
        assert rate is not None
        if not flow.constrained:
            after = evaluate(flow, self.watch, s.state, context.spectrum, length, (float(loss), g))
            return _Taken(s, after, np.zeros((0, 0)), after.frame, rate, 0.0, path)
        seen = self.watch.update(flow, s.state, context.spectrum, length, context.vectors_ahead(s.t))
        if seen.eigenvalues[0] > CRITICAL + CONSTANTS.band and not single:
            return 0.5 * length
        new = critical_frame(flow, s.state, seen, self.watch.critical(seen, length))
        if single or not new.k:
            mean = smat(impulse.Z) / length if frame.k else np.zeros((0, 0))
            return _Taken(s, StepContext(float(loss), g, seen, new), mean, frame, rate, 0.0, path)
        return self._correct(s, float(loss), g, seen, new, frame, impulse, rate, path)

    def _correct(
        self,
        s: Staggered,
        loss: float,
        g: Tensor,
        seen: SpectrumEstimate,
        new: Frame,
        middle: Frame,
        impulse: _Impulse,
        rate: Rate,
        path: list[tuple[float, Tensor]],
    ) -> _Taken | float:
        """The trapezoid rule for the change of T and U, then the signed correction of the impulse (as in the macro
        step).
        """
        flow, old, length = self.flow, self.context.frame, self.dt * self.count
        lin = flow.linearised(s.state, g, new)
        Z = last = np.zeros((new.k, new.k))
        moved, error = s, 0.0
        if old.k:
            R = transport(flow, s.state, new, old)

            def turn(z: Array) -> Array:
                turned: Array = R @ smat(z) @ R.T
                return turned

            Z, last = turn(impulse.Z), length * turn(impulse.last)
            if impulse.Z.any():
                at_old, at_middle = (flow.linearised(s.state, g, frame) for frame in (old, middle))
                i = impulse
                dw = combine(
                    [
                        (1.0, at_old.kick(smat(i.w - i.w_late)).w),
                        (1.0, lin.kick(turn(i.w_late)).w),
                        (-1.0, at_middle.kick(smat(i.w)).w),
                    ]
                )
                dnu = combine([(-1.0, at_old.kick(smat(i.Z_late)).nu), (1.0, lin.kick(turn(i.Z_late)).nu)])
                dm = 0.5 * (
                    like(i.m - i.m_late, g) @ old.T + like(svec(turn(i.m_late)), g) @ new.T - like(i.m, g) @ middle.T
                )
                error = displacement(flow, s.state, g, (dw, dnu), length) / (self.tol * length**SHARE)
                if error > CONSTANTS.allowed:
                    return length * CONTROLLER.factor(error)
                moved = self._displaced(s, dw, dm, dnu)
                lin = flow.linearised(moved.state, g, new)
        Y = _solve(flow, smat(lin.beta @ svec(last)) - lin.gap, lin.beta)
        y = Y - last
        if y.any():
            kick = lin.kick(y)
            moved = self._displaced(moved, kick.w, torch.zeros_like(kick.w), kick.nu)
            flow.velocity(moved.state, g)  # still in the domain?
        if moved is not s:
            value, g = flow.value_and_grad(moved.state)
            loss = float(value)
        gap = flow.linearised(moved.state, g, new).gap
        frame, seen = settled(flow, moved.state, new, gap, seen, length)
        path[-1] = (moved.t, moved.w)
        return _Taken(moved, StepContext(loss, g, seen, frame), (Z + y) / length, new, rate, error, path)

    def _displaced(self, s: Staggered, dw: Tensor, dm: Tensor, dnu: Any) -> Staggered:
        def shifted(nu: Any, before: Any) -> Any:
            there = combine([(1.0, nu), (1.0, dnu)])
            return Repair(self.flow, State(s.w, before, self.s.t))(State(s.w, there, s.t)).nu

        return replace(s, w=s.w + dw, m=s.m + dm, nu=shifted(s.nu, self.s.nu), nu_now=shifted(s.nu_now, self.s.nu_now))


class _Impulse:
    """The effect of X in a block, svec: on w (through m), on m at its end, on ν; and its part weighted by time."""

    def __init__(self, k: int) -> None:
        n = k * (k + 1) // 2
        self.m, self.m_late, self.w, self.w_late, self.Z, self.Z_late = (np.zeros(n) for _ in range(6))
        self.last = np.zeros(n)
        self._previous = np.zeros(n)

    def add(self, x: Array, decay: float, dt: float, late: float) -> None:
        """One step with X = x at the fraction ``late`` of the block."""
        self.m = decay * self.m + (1 - decay) * x
        self.m_late = decay * self.m_late + (1 - decay) * late * x
        self.w = self.w + dt * self.m
        self.w_late = self.w_late + dt * self.m_late
        self.Z = self.Z + dt * x
        self.Z_late = self.Z_late + dt * late * x
        # two steps' mean: at dt = 1 X has a component of period two
        self.last = x if late == 0 else 0.5 * (x + self._previous)
        self._previous = x


def _solve(flow: Flow, alpha: Array, beta: Array) -> Array:
    if not len(alpha):
        return np.zeros((0, 0))
    X = ccp.solve(alpha, beta).X
    flow.count_ccp()
    return X


def _linear(path: list[tuple[float, Tensor]], end: Staggered) -> Callable[[float], State]:
    """Linear between steps: second order, like the steps themselves."""
    times = [t for t, _ in path]

    def at(t: float) -> State:
        i = int(np.clip(np.searchsorted(times, t + 1e-9) - 1, 0, len(times) - 2))
        (left, a), (right, b) = path[i], path[i + 1]
        share = (t - left) / (right - left)
        w = a if share <= 1e-9 else b if share >= 1 - 1e-9 else (1 - share) * a + share * b
        return State(w, end.nu_now, t)

    return at
