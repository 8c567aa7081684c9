"""Run the optimizer and its flows side by side: ``compare(problem, method, steps)``."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from dvi.compiler.ablated import AblatedFlow
from dvi.compiler.exact_rates import Accuracy
from dvi.compiler.flows import CentralFlow, CentralMap, CompiledFlow, StableFlow
from dvi.compiler.optimizer import Discrete
from dvi.interop.binding import MethodLike, bind, read
from dvi.noise.flow import noisy_flow
from dvi.noise.optimizer import MiniBatchOptimizer
from dvi.noise.sampling import Sampling
from dvi.problems import Problem
from dvi.results.comparison import Comparison
from dvi.results.run_error import RunError
from dvi.results.status import Status
from dvi.runs.identity import identity, settings
from dvi.runs.measures import check_names
from dvi.runs.observables import Observer
from dvi.runs.process import Process
from dvi.runs.solving import (
    FAILURES,
    WarmStart,
    default_integrator,
    describe,
    detail,
    make_process,
    numbers,
    progress_bar,
    time_grid,
    verdict,
    warm_up,
)
from dvi.solvers.protocol import Integrator, State
from dvi.stationarity.flow import AblatedStationaryFlow, StationaryFlow
from dvi.storage.checkpoint import freeze
from dvi.storage.files import writable

RUNS: dict[str, type[CompiledFlow]] = {
    "discrete": Discrete,
    "central": CentralFlow,
    "map": CentralMap,
    "stable": StableFlow,
    "ablated": AblatedFlow,
    "stationary": StationaryFlow,
    "stationary-ablated": AblatedStationaryFlow,
}
#: The runs that take mini-batches.
NOISY = ("sgd", "noisy")


def compare(
    problem: Problem,
    method: MethodLike,
    steps: int,
    *,
    runs: Sequence[str] = ("discrete", "central", "stable"),
    integrator: Integrator | None = None,
    accuracy: Accuracy | None = None,
    batch_size: int | None = None,
    sampling: Sampling | None = None,
    warm_start: WarmStart = "auto",
    scheduler: Any = None,
    start: State | Literal["state", "fresh"] | None = None,
    save_every: float = 1,
    coordinates: Sequence[int] = (),
    test_inputs: Any = None,
    measures: Sequence[str] = (),
    measure_every: float = 10,
    eigen_every: float = 5,
    check: bool = True,
    path: str | Path | None = None,
    resume: bool = False,
    checkpoint_every: float = 10.0,
    progress: bool = True,
    throw: bool = True,
) -> Comparison:
    """Run the optimizer, its central flow and its stable flow side by side from one start.

    Args:
        problem: the loss, a :class:`dvi.Problem`.
        method: the optimizer: a :class:`dvi.Method`, a triple of functions, or a ``torch.optim.Optimizer``.
        steps: length of the run in unit times (steps of the optimizer).
        runs: the processes: "discrete", "central", "map" (see :func:`dvi.central_map`), "stable", "ablated" (see
            :func:`dvi.ablated_flow`), "stationary" (see :func:`dvi.stationary_flow`) and "stationary-ablated", the same
            without its curvature penalty.  With a batch size, also "sgd", replicas of the optimizer on mini-batches,
            and "noisy" (:func:`dvi.noisy_flow`).
        integrator: for the central flow (default: :func:`dvi.runs.solving.default_integrator`).
        accuracy: of the central and the stable flow, "paper" or "second-order", see :func:`dvi.central_flow`.
        batch_size: examples in a mini-batch, for "sgd" and "noisy"; the other runs take all examples at every step.
        sampling: how batches are drawn, see :class:`dvi.Sampling`.
        warm_start: number of steps of the real optimizer before time 0.  "auto" takes as many as are needed to bring
            the effective sharpness to 2 or below (none, if it starts there) and to fill the buffers of momentum; a note
            reports them.  "stationary" takes no steps, but sets ν to its stationary value (:func:`dvi.stationary`), so
            that runs of different learning rates start at the same weights.
        scheduler: of a torch optimizer, see :func:`dvi.from_torch`.
        start: for a torch optimizer, "state" continues from its buffers and the present values of its parameters (the
            default), and "fresh" starts at the problem's w0 with empty buffers.  For any method: a state to start from.
        save_every: unit times between recorded moments; a whole number if the optimizer or the map is among the runs.
        coordinates: indices of weights that are observed, with their νᵢ, and whose (∂ᵢL)² is observed and predicted.
        test_inputs: network inputs whose outputs are observed and predicted.
        measures: quantities that are measured now and then along the flows, see :mod:`dvi.runs.measures`: "sharpness"
            (of H itself) and "stationarity" (ν compared with its stationary value, and the rates of the loss).  They do
            not count as a cost.
        measure_every: least number of unit times between measurements.
        eigen_every: unit times between computations of the optimizer's eigenvalues (0: never).
        check: compare the loss's derivatives with finite differences once.
        path: an HDF5 file that is updated during the run; the run first checks that it can be written.
        resume: continue from that file, with the same result, bit for bit, as an uninterrupted run.  With more
            ``steps`` than before, the run becomes longer, whether it was finished or not.  The moments before its old
            end, where steps were shortened to reach it, are then computed again.  A file of another run is refused:
            one with another problem, data, method, schedule (compared over the time that both cover), or argument.
        checkpoint_every: seconds between updates of the file (more, if writing it takes long).
        progress: show a progress bar.
        throw: raise if a process cannot continue; otherwise return what was computed, with its status.

    Raises:
        RunError: if a process or the warm start cannot continue; its ``result`` is the comparison until then.
        TypeError: if there is a path, but the memory of the user's integrator cannot be stored in a file.
        SpecError, DerivativeError, ValueError: for a wrong declaration, loss or argument.
        StoreError: if the file does not belong to this run, or cannot be written; if it fails after a run,
            ``error.result`` is the comparison.
    """
    from dvi.storage.hdf5 import Keeper

    names = (runs,) if isinstance(runs, str) else tuple(runs)
    known = (*RUNS, *NOISY)
    if isinstance(runs, str) or not names or not set(names) <= set(known) or len(set(names)) < len(names):
        raise ValueError(f"runs={runs!r}: choose from {', '.join(map(repr, known))}, as a tuple of names, each once.")
    if (batch_size is None) == bool(set(names) & set(NOISY)) or (batch_size is None and sampling is not None):
        raise ValueError(
            f'batch_size={batch_size!r} with runs={runs!r}: a batch size is for the runs "sgd" and "noisy" only, and '
            'they need one, as in batch_size=32, runs=("sgd", "noisy", "central", "stable").'
        )
    steps, save_every, eigen_every = numbers(steps=steps, save_every=save_every, eigen_every=eigen_every)
    check_names(measures)
    if not isinstance(warm_start, str):
        (warm_start,) = numbers(warm_start=warm_start)
    grid = time_grid(steps, save_every)
    problem, method = bind(problem, read(method, scheduler, start if isinstance(start, str) else None))
    given = None if isinstance(start, str) else start
    ranks = problem.ranks
    keeps, resume = ranks.share(lambda: (path is not None, resume))
    if not ranks.first:  # only the first rank writes and shows progress
        path, progress = None, False
    with ranks.together():
        if path is not None:
            writable(path)
    compiled: dict[str, CompiledFlow] = {}
    for i, name in enumerate(runs):
        first_check = check and i == 0
        if batch_size is not None and name == "sgd":
            compiled[name] = MiniBatchOptimizer(problem, method, batch_size, sampling or Sampling(), check=first_check)
        elif batch_size is not None and name == "noisy":
            compiled[name] = noisy_flow(problem, method, batch_size, sampling, check=first_check)
        else:
            compiled[name] = RUNS[name](
                problem, method, check=first_check, accuracy="second-order" if name == "map" else accuracy
            )
    first = next(iter(compiled.values()))
    observer = Observer(tuple(coordinates), test_inputs, tuple(measures), measure_every)
    kind = next(
        (flow for name, flow in compiled.items() if name in ("central", "stable")), first
    )  # the flows that ``accuracy`` applies to
    about = describe(first, steps) | {"accuracy": kind.accuracy, "save_every": float(save_every), "runs": list(runs)}
    arguments: dict[str, Any] = {
        "integrator": settings(integrator or default_integrator(compiled.get("central", first))),
        "warm_start": warm_start,
        "coordinates": [int(i) for i in coordinates],
        "eigen_every": float(eigen_every),
    }
    if measures:
        arguments |= {"measures": list(measures), "measure_every": float(measure_every)}
    if batch_size is not None:
        arguments |= {"batch_size": batch_size, "sampling": repr(sampling or Sampling())}
    keeper = Keeper(path, every=checkpoint_every, device=problem.device)
    saved, longer = keeper.checkpoint(ranks) if resume else None, False
    status: Status = Status.SUCCESS
    failure: BaseException | None = None
    if saved is None:
        try:
            begin, told = warm_up(first, warm_start, given)
        except RunError as error:
            begin, told, status, failure = given or first.initial, [], error.status, error
    else:
        begin, told = given or first.initial, saved["notes"]
    if keeps:
        origin = begin.t if saved is None else next(iter(saved["processes"].values()))["origin"]
        words = {name: value for name, value in (about | arguments).items() if name not in ("method", "dvi", "torch")}
        data = {"test_inputs": test_inputs} | _remembered(given or first.initial, started=given is not None)
        whose = identity(first, words, data, origin, grid)
        longer = ranks.share(lambda: keeper.identify(whose, saved))
    processes = {
        name: make_process(flow, integrator if name == "central" else None, begin, grid, observer, eigen_every)
        for name, flow in compiled.items()
    }
    pairs = list(combinations(runs, 2))
    distance: dict[tuple[str, str], list[float]] = {pair: [] for pair in pairs}
    done = 0
    if saved is not None:
        done = saved["done"]
        distance = {tuple(pair): list(values) for pair, values in saved["distance"]}
        for name, process in processes.items():
            process.restore(saved["processes"][name])
            if longer:
                process.rewind(saved["mark"]["processes"][name])
        if longer:
            done = saved["mark"]["done"]
            distance = {pair: values[:done] for pair, values in distance.items()}
    about["warm_start"] = next(iter(processes.values())).origin

    def result(status: Status) -> Comparison:
        n = min([done, *(len(values) for values in distance.values())])
        solutions = {name: p.solution(status, about) for name, p in processes.items()}
        notes = list(dict.fromkeys([*told, *(note for s in solutions.values() for note in s.notes)]))
        table = {pair: np.array(values[:n]) for pair, values in distance.items()}
        return Comparison(grid[:n], solutions, table, status, notes, dict(about))

    def checkpoint() -> dict[str, Any]:
        return {
            "done": done,
            "mark": mark,
            "notes": told,
            "distance": [[list(pair), values] for pair, values in distance.items()],
            "processes": {name: process.state() for name, process in processes.items()},
        }

    def here() -> dict[str, Any]:
        return {"done": done, "processes": {name: process.mark() for name, process in processes.items()}}

    mark = here() if saved is None else saved["mark"]  # the last moment that a longer run would share
    if keeps:
        freeze(checkpoint())  # refuses what cannot be stored before anything is computed
    if failure is not None:  # there is nothing to continue from, so the file gets no checkpoint
        race = result(status)
        race.notes.append(f"Stopped: {detail(failure)}")
        keeper.write(race)
        if throw:
            raise RunError(status, detail(failure), race) from failure
        return race
    at_work, why = names[0], ""  # before any process runs, each knows the same of the loss
    with progress_bar(len(grid), ", ".join(runs), progress) as bar:
        bar.update(done)
        try:
            problem.check_unchanged()
            while done < len(grid):
                if not any(process.near_end for process in processes.values()):
                    mark = here()
                w = {}
                for at_work, process in processes.items():
                    w[at_work] = process.weights(done)
                ranks.agree([process.whereabouts for process in processes.values()], f"at t = {grid[done]:g}")
                row = {(a, b): distance_between(w[a], w[b]) for a, b in pairs}
                for pair, value in row.items():  # indexed by `done`, so that an interruption doubles nothing
                    distance[pair][done:] = [value]
                done += 1
                costs = [f"{name} {p.cost:.3g}" for name, p in processes.items() if name != "discrete"]
                bar.set_postfix_str(f"gradients per unit: {', '.join(costs)}", refresh=False)
                bar.update(1)
                keeper.maybe(lambda: (result(Status.RUNNING), checkpoint()))
            problem.check_unchanged()
        except KeyboardInterrupt:
            keeper.write(result(Status.INTERRUPTED), checkpoint())
            raise
        except FAILURES as error:
            (status, why), failure = verdict(error, compiled[at_work], processes[at_work].y), error
            why = f"{why} ({_where(processes)})"
    race = result(status)
    if status is Status.DIVERGED and at_work != "discrete" and "optimizer itself" not in why:
        why = f"In the {compiled[at_work].name} flow, {_of_the_optimizer(processes)}: {why}"
    if failure is not None:
        race.notes.append(f"Stopped: {why}")
    keeper.write(race, checkpoint())
    if failure is not None and throw:
        raise RunError(status, why, race) from failure
    return race


def _remembered(y: State, started: bool) -> dict[str, Any]:
    """The parts of a start that identify a run, besides w0 and the method."""
    whole = {"start": (y.w, y.nu)} if started else {}
    filled = isinstance(y.m, tuple) and any(bool(x.any()) for x in y.m)
    return whole | ({"momentum at the start": y.m} if filled else {})


def distance_between(a: Tensor, b: Tensor) -> float:
    """‖a − b‖ for weights [d]; the mean over replicas [R, d]."""
    if a.ndim == b.ndim == 1:
        return float(torch.linalg.vector_norm(a - b))
    return float(torch.linalg.vector_norm(a - b, dim=-1).mean())


def _of_the_optimizer(processes: dict[str, Process]) -> str:
    """A sentence part on the optimizer, for the message that a flow has diverged."""
    if "discrete" not in processes:
        return "without the optimizer beside it"
    process = processes["discrete"]
    return f"not in the optimizer, which has come to t = {process.y.t - process.origin:g} without"


def _where(processes: dict[str, Process]) -> str:
    return ", ".join(f"{name} at t = {p.y.t - p.origin:g}" for name, p in processes.items())
