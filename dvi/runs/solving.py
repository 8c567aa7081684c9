"""Run one process: ``solve(flow, steps)``; with the functions that :func:`dvi.compare` shares with it."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from dvi.compiler.flows import CompiledFlow
from dvi.compiler.optimizer import Discrete, OptimizerDivergedError, at_lr
from dvi.methods import NotPositiveDefiniteError
from dvi.methods.errors import ScheduleError
from dvi.noise.flow import NoisyFlow
from dvi.noise.optimizer import MiniBatchOptimizer
from dvi.noise.step import ChaosError, NoisyStep
from dvi.problems import LossChangedError, ProblemError, RanksError
from dvi.results.run_error import RunError
from dvi.results.solution import Solution
from dvi.results.status import Status
from dvi.runs.measures import check_names
from dvi.runs.noisy_process import NoisyProcess
from dvi.runs.observables import Observer
from dvi.runs.optimizer_process import DiscreteProcess
from dvi.runs.process import FlowProcess, MapProcess, Process
from dvi.runs.sgd_process import SGDProcess
from dvi.solvers.ccp import CCPError
from dvi.solvers.eigen.block_method import CRITICAL
from dvi.solvers.eigen.tracker import EigenTracker
from dvi.solvers.errors import BudgetError, ConvergenceError, DomainError, MemoryLimitError, SolverError, StepError
from dvi.solvers.integrator import Driver
from dvi.solvers.macro import MacroStep
from dvi.solvers.numbers import number
from dvi.solvers.protocol import Array, Integrator, State
from dvi.solvers.second_order.semi_implicit import SemiImplicit
from dvi.stationarity.api import stationary
from dvi.stationarity.flow import Quasistatic

logger = logging.getLogger("dvi")

WarmStart = int | Literal["auto", "stationary"]

_AUTO_LIMIT = 500  # steps of the optimizer after which "auto" gives up


def solve(
    flow: CompiledFlow,
    steps: int,
    *,
    integrator: Integrator | None = None,
    warm_start: WarmStart = 0,
    save_every: float = 1,
    save: tuple[str, ...] = (),
    coordinates: tuple[int, ...] = (),
    test_inputs: Any = None,
    measures: Sequence[str] = (),
    measure_every: float = 10,
    eigen_every: float = 5,
    progress: bool = True,
    throw: bool = True,
    start: State | None = None,
) -> Solution:
    """Integrate a flow, or run the optimizer, over ``steps`` unit times.

    Args:
        flow: a result of :func:`dvi.central_flow`, :func:`dvi.stable_flow`, :func:`dvi.discrete` or their like.
        steps: length of the run in unit times (steps of the optimizer).
        integrator: drives the flow (default: the integrator that suits the flow, see :func:`default_integrator`).
        warm_start: number of steps of the real optimizer before time 0.  "auto" takes as many as are needed to bring
            the effective sharpness to 2 or below, and to fill the buffers of momentum.  "stationary" takes no steps,
            but sets ν to its stationary value, see :func:`dvi.compare`.
        save_every: unit times between recorded moments.
        save: ("w",) records the weights, too, at every recorded moment.
        coordinates, test_inputs: what else to observe, see :class:`dvi.runs.observables.Observer`.
        measures, measure_every: what to measure now and then along a flow, see :func:`dvi.compare`.
        eigen_every: unit times between computations of the optimizer's eigenvalues, which it does not need (0: never).
        progress: show a progress bar.
        throw: raise if the run cannot continue; otherwise return what was computed, with its status.
        start: a state to start from instead of the flow's own.

    Raises:
        RunError: if the run or its warm start cannot continue, with a :class:`dvi.Status` and the Solution until then.
        SpecError: if a schedule of the method fails during the run.
        ValueError: if steps or save_every is not positive.
    """
    steps, save_every, eigen_every = numbers(steps=steps, save_every=save_every, eigen_every=eigen_every)
    check_names(measures)
    grid = time_grid(steps, save_every)
    status, words = Status.SUCCESS, ""
    failure: BaseException | None = None
    try:
        start, notes = warm_up(flow, warm_start, start)
    except RunError as error:
        start, notes, failure = start or flow.initial, [], error
        status, words = error.status, error.detail
    observer = Observer(tuple(coordinates), test_inputs, tuple(measures), measure_every)
    process = make_process(flow, integrator, start, grid, observer, eigen_every)
    process.notes.extend(notes)
    about = describe(flow, steps) | {"warm_start": start.t}
    kept: list[Array] = []
    todo = len(grid) if failure is None else 0
    ranks = flow.problem.ranks
    shown = progress and ranks.first
    with progress_bar(todo, f"{flow.name} flow" if flow.constrained else flow.name, shown) as bar:
        try:
            flow.problem.check_unchanged()
            for i in range(todo):
                w = process.weights(i)
                ranks.agree(process.whereabouts, f"at t = {grid[i]:g}")
                bar.set_postfix_str(f"{process.cost:.3g} gradients per unit", refresh=False)
                if "w" in save:
                    kept.append(w.detach().cpu().numpy())
                bar.update(1)
            flow.problem.check_unchanged()
        except FAILURES as error:
            (status, words), failure = verdict(error, flow, process.y), error
    solution = process.solution(status, about)
    if kept:
        solution.series["w"] = np.stack(kept[: len(solution.t)])
    if failure is not None:
        solution.notes.append(f"Stopped: {words}")
        if throw:
            raise RunError(status, words, solution) from failure
    return solution


# ---- shared with compare ------------------------------------------------------------------------------

FAILURES = (
    *(RunError, ScheduleError, CCPError, SolverError, NotPositiveDefiniteError, ProblemError, RanksError),
    FloatingPointError,
)


def classify(error: BaseException) -> Status:
    """The status for an exception of a run."""
    if isinstance(error, RunError):
        return error.status
    for kind, status in (
        (RanksError, Status.RANKS),
        (LossChangedError, Status.LOSS_CHANGED),
        (ChaosError, Status.CHAOTIC),
        (CCPError, Status.NO_SOLUTION),
        (ConvergenceError, Status.NOT_CONVERGED),
        (NotPositiveDefiniteError, Status.NOT_POSITIVE_DEFINITE),
        (ScheduleError, Status.SCHEDULE),
        (MemoryLimitError, Status.OUT_OF_MEMORY),
        (BudgetError, Status.OVER_BUDGET),
        (StepError, Status.DIVERGED),
        (DomainError, Status.DIVERGED),
        (FloatingPointError, Status.DIVERGED),
    ):
        if isinstance(error, kind):
            return status
    return Status.DERIVATIVES


def verdict(error: BaseException, flow: CompiledFlow, y: State) -> tuple[Status, str]:
    """The status for an exception of a flow at y, and its message.

    If eigenvectors do not converge, the reason is often that the weights have diverged.  If the optimizer diverges from
    y, too, the message says so.
    """
    status, words = classify(error), detail(error)
    if status is Status.NOT_CONVERGED:
        optimizer = Discrete(flow.problem, flow.method, check=False)
        try:
            with flow.problem.ledger.paused():
                begin = float(flow.problem.value(flow.problem.w0))
                _refuse_divergence(optimizer, State(y.w, y.nu, y.t, optimizer.initial.m), begin)
        except OptimizerDivergedError as cause:
            return Status.DIVERGED, f"{cause} (Before that: {words})"
        except FAILURES:
            pass
    return status, words


def detail(error: BaseException) -> str:
    """The exception's own message, without the sentence of the status, which is printed before it."""
    return error.detail if isinstance(error, RunError) else str(error)


def numbers(**arguments: Any) -> tuple[Any, ...]:
    """Convert numbers of NumPy and tensors of shape [] to Python's numbers."""
    return tuple(number(x, name) for name, x in arguments.items())


def time_grid(steps: float, save_every: float) -> Array:
    """The recorded times 0, save_every, …, and the end itself (unit times)."""
    if not 0 < steps < np.inf or not 0 < save_every < np.inf:
        raise ValueError(f"steps={steps} and save_every={save_every} must be positive and finite (unit times).")
    grid = np.arange(0, np.floor(steps / save_every + 1e-9) + 1) * float(save_every)
    return np.append(grid, float(steps)) if grid[-1] < steps - 1e-9 else grid


def default_integrator(flow: CompiledFlow) -> Integrator:
    """The default integrator of a flow: the first of the library's integrators that accepts it."""
    if isinstance(flow, NoisyFlow):
        return NoisyStep()
    candidates = (MacroStep(), SemiImplicit(), SemiImplicit(dt=1.0), Quasistatic())
    return next((integrator for integrator in candidates if not integrator.accepts(flow)), candidates[0])


def make_process(
    flow: CompiledFlow,
    integrator: Integrator | None,
    start: State,
    grid: Array,
    observer: Observer,
    eigen_every: float,
) -> Process:
    """Make the process for a flow or an optimizer."""
    observer.check(len(flow.problem.w0))
    if isinstance(flow, Discrete):
        if integrator is not None:
            raise ValueError("The optimizer itself takes its own steps: leave integrator out.")
        if isinstance(flow, MiniBatchOptimizer):
            return SGDProcess(flow, start, grid, observer, eigen_every)
        return DiscreteProcess(flow, start, grid, observer, eigen_every)
    if isinstance(flow, NoisyFlow):
        if integrator is not None:
            raise ValueError("The flow with noise takes the optimizer's own steps: leave integrator out.")
        return NoisyProcess(flow, start, grid, observer)
    driver = Driver(default_integrator(flow) if integrator is None else integrator)
    if refusal := driver.accepts(flow):
        raise ValueError(refusal)
    kind = MapProcess if flow.stepwise else FlowProcess
    return kind(flow, driver, start, grid, observer)


def describe(flow: CompiledFlow, steps: float) -> dict[str, Any]:
    """The description of a run that its result stores."""
    import dvi

    return {
        "method": repr(flow.method),
        "problem": repr(flow.problem),
        "dim": len(flow.problem.w0),
        "dtype": str(flow.problem.w0.dtype),
        "device": str(flow.problem.w0.device),
        "covariance": flow.covariance,
        "accuracy": flow.accuracy,
        "steps": float(steps),
        "dvi": dvi.__version__,
        "torch": str(torch.__version__),
    }


def warm_up(flow: CompiledFlow, warm_start: WarmStart, start: State | None = None) -> tuple[State, list[str]]:
    """The state after a few steps of the real optimizer, and the notes on them.

    With "auto", the optimizer takes steps until the effective sharpness at the iterate is at most 2.  If the buffers of
    momentum are empty, it takes at least four times the lag τ′, because a flow does not describe the effect of an empty
    buffer on the first steps.  With "stationary" it takes no step, but ν gets its stationary value at the first
    weights.

    Raises:
        RunError: if the optimizer diverges (DIVERGED), or its sharpness stays above 2 (INFEASIBLE_START).
    """
    if start is not None and not isinstance(start, State):
        raise ValueError(f"start is a dvi.State(w, nu, t), not a {type(start).__name__}.")
    y = start or flow.initial
    if warm_start == "stationary":
        with flow.problem.ledger.paused():
            return settled(flow, y), ["Time 0 is at the first weights, with ν at its stationary value there."]
    auto = isinstance(warm_start, str) and warm_start == "auto"
    if not isinstance(warm_start, str):
        (warm_start,) = numbers(warm_start=warm_start)
    if not auto and not (isinstance(warm_start, int) and warm_start >= 0):
        raise ValueError(f'warm_start={warm_start!r}: a number of optimizer steps, "auto" or "stationary".')
    if warm_start == 0:
        return y, []
    optimizer = Discrete(flow.problem, flow.method, check=False)
    limit = _AUTO_LIMIT if auto else int(warm_start)
    with flow.problem.ledger.paused():
        try:
            empty = isinstance(y.m, tuple) and not any(bool(x.any()) for x in y.m)
            burn_in = int(np.ceil(4 * flow.calculus.lag(y.t))) if auto and empty else 0
            y, taken, sharpness = _settle(optimizer, y, limit, until_stable=auto, at_least=burn_in)
        except FAILURES as error:
            raise RunError(classify(error), f"In the warm start: {detail(error)}") from error
    if taken == 0:
        return y, []
    why = f" (effective sharpness {sharpness:.2f} at the start)" if auto else ""
    note = f"Warm start: {taken} steps of the real optimizer before time 0{why}."
    if flow.problem.ranks.first:
        logger.warning("%s", note)
    return y, [note]


def settled(flow: CompiledFlow, y: State) -> State:
    """The state with ν at its stationary value.

    Raises:
        SpecError: if ν has no stationary value.
        RunError: if the stationary value is not found.
    """
    try:
        return replace(y, nu=stationary(flow, y.w, t=y.t).nu)
    except FAILURES as error:
        raise RunError(classify(error), f"At the start: {detail(error)}") from error


def _settle(
    optimizer: Discrete, y: State, limit: int, until_stable: bool, at_least: int = 0
) -> tuple[State, int, float]:
    """Take at most ``limit`` steps of the optimizer: the state, their number, and the first effective sharpness."""
    loss, g = optimizer.problem.value_and_grad(y.w)
    begin = float(loss)
    watch, first, suspected = EigenTracker(), float("nan"), False
    for taken in range(limit + 1):
        if _run_away(loss, begin) and not suspected:
            suspected = True
            _refuse_divergence(optimizer, y, begin)
        if until_stable and (taken == 0 or taken >= at_least):
            try:
                seen = watch.update_leading(optimizer, y, None)  # anew: an early step may change P completely
            except FAILURES:  # either the loss is hard, or the weights have diverged
                _refuse_divergence(optimizer, y, begin)
                raise
            sharpness = float(seen.eigenvalues[0])
            first = sharpness if taken == 0 else first
            if sharpness <= CRITICAL and taken >= at_least:
                return y, taken, first
        if taken == limit:
            break
        y, loss, g = optimizer.step(y, g)
    if until_stable:
        _refuse_divergence(optimizer, y, begin)
        raise RunError(
            Status.INFEASIBLE_START,
            f"{limit} steps of the optimizer left the effective sharpness at {sharpness:.2f}.",
        )
    return y, limit, first


def _refuse_divergence(optimizer: Discrete, y: State, begin: float) -> None:
    """Let the optimizer continue from y, without eigenvectors, and raise if it diverges.

    Raises:
        OptimizerDivergedError: if numbers overflow, or if the loss ends far above ``begin``.
    """
    loss, g = optimizer.value_and_grad(y)
    here = loss
    for _ in range(_AUTO_LIMIT):
        y, loss, g = optimizer.step(y, g)
    if _run_away(loss, begin) and loss > here:
        raise OptimizerDivergedError(
            f"The optimizer itself diverges{at_lr(optimizer.method.at(y.t))}: after {y.t:g} steps the loss has grown "
            f"from {begin:.3g} to {float(loss):.3g}."
        )


def _run_away(loss: Tensor, begin: float) -> bool:
    """Has the loss grown more than in a catapult phase?"""
    return float(loss) - begin > 1e3 * abs(begin)


@contextmanager
def progress_bar(total: int, what: str, show: bool) -> Iterator[Any]:
    """A tqdm bar over recorded moments."""
    from tqdm.auto import tqdm

    with tqdm(total=total, desc=what, unit="t", disable=not show, leave=False) as bar:
        yield bar
