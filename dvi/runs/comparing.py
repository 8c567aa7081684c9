"""Run the optimizer and its flows side by side: ``compare(problem, method, steps)``."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dvi.compiler.ablated import AblatedFlow
from dvi.compiler.exact_rates import Accuracy
from dvi.compiler.flows import CentralFlow, CentralMap, CompiledFlow, MethodLike, StableFlow
from dvi.compiler.optimizer import Discrete
from dvi.problems import Problem
from dvi.results.comparison import Comparison
from dvi.results.run_error import RunError
from dvi.results.status import Status
from dvi.runs.identity import identity, settings
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
from dvi.solvers.protocol import Integrator
from dvi.storage.checkpoint import freeze
from dvi.storage.files import writable

RUNS: dict[str, type[CompiledFlow]] = {
    "discrete": Discrete,
    "central": CentralFlow,
    "map": CentralMap,
    "stable": StableFlow,
    "ablated": AblatedFlow,
}


def compare(
    problem: Problem,
    method: MethodLike,
    steps: int,
    *,
    runs: Sequence[str] = ("discrete", "central", "stable"),
    integrator: Integrator | None = None,
    accuracy: Accuracy | None = None,
    warm_start: WarmStart = "auto",
    save_every: float = 1,
    coordinates: Sequence[int] = (),
    test_inputs: Any = None,
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
        problem, method: what is compared.
        steps: how long, in unit times (steps of the optimizer).
        runs: which processes, of "discrete", "central", "map" (see :func:`dvi.central_map`), "stable", "ablated".
        integrator: for the central flow (default: :func:`dvi.runs.solving.default_integrator`).
        accuracy: of the central and the stable flow, "paper" or "second-order", see :func:`dvi.central_flow`.
        warm_start: steps of the real optimizer before time 0; "auto": as many as it takes to bring the effective
            sharpness to 2 or below (none, if it starts there) and to fill the buffers of momentum, and it is told.
        save_every: unit times between recorded moments; a whole number beside the optimizer or the map.
        coordinates: indices of weights whose (∂ᵢL)² is observed and predicted.
        test_inputs: network inputs whose outputs are observed and predicted.
        eigen_every: unit times between looks at the eigenvalues of the optimizer (0: never).
        check: compare the loss's derivatives with finite differences once.
        path: an HDF5 file that is kept up to date while the run goes on; tried before anything is computed.
        resume: go on from that file to the same result, bit for bit, as an uninterrupted run; with more ``steps`` than
            before the run becomes longer, whether it was finished or not, and the moments before its end, where steps
            were cut to land on it, are computed again.  Refused if the file belongs to another run: another problem,
            data, method, schedule (by its values over the time that both know), or argument.
        checkpoint_every: seconds between updates of the file (more, if writing it takes long).
        progress: show a progress bar.
        throw: raise where a process cannot go on; otherwise give back what was computed, with its status.

    Raises:
        RunError: where a process or the warm start cannot go on; its ``result`` is the comparison until then.
        TypeError: if there is a path and an integrator of the user's has a memory that a file cannot hold.
        SpecError, DerivativeError, ValueError: for a wrong declaration, loss or argument.
        StoreError: if the file cannot be written (then, after a run, ``error.result`` is the comparison) or does not
            belong to this run.
    """
    from dvi.storage.hdf5 import Keeper

    names = (runs,) if isinstance(runs, str) else tuple(runs)
    if isinstance(runs, str) or not names or not set(names) <= set(RUNS) or len(set(names)) < len(names):
        raise ValueError(f"runs={runs!r}: choose from {', '.join(map(repr, RUNS))}; a tuple of names, each once.")
    steps, save_every, eigen_every = numbers(steps=steps, save_every=save_every, eigen_every=eigen_every)
    if not isinstance(warm_start, str):
        (warm_start,) = numbers(warm_start=warm_start)
    grid = time_grid(steps, save_every)
    ranks = problem.ranks
    keeps, resume = ranks.share(lambda: (path is not None, resume))
    if not ranks.first:  # which alone writes and shows progress
        path, progress = None, False
    with ranks.together():
        if path is not None:
            writable(path)
    compiled = {
        name: RUNS[name](
            problem, method, check=check and i == 0, accuracy="second-order" if name == "map" else accuracy
        )
        for i, name in enumerate(runs)
    }
    first = next(iter(compiled.values()))
    observer = Observer(tuple(coordinates), test_inputs)
    kind = next(
        (flow for name, flow in compiled.items() if name in ("central", "stable")), first
    )  # what accuracy= means
    about = describe(first, steps) | {"accuracy": kind.accuracy, "save_every": float(save_every), "runs": list(runs)}
    arguments = {
        "integrator": settings(integrator or default_integrator(compiled.get("central", first))),
        "warm_start": warm_start,
        "coordinates": [int(i) for i in coordinates],
        "eigen_every": float(eigen_every),
    }
    keeper = Keeper(path, every=checkpoint_every, device=problem.device)
    saved, longer = keeper.checkpoint(ranks) if resume else None, False
    status: Status = Status.SUCCESS
    failure: BaseException | None = None
    if saved is None:
        try:
            start, told = warm_up(first, warm_start)
        except RunError as error:
            start, told, status, failure = first.initial, [], error.status, error
    else:
        start, told = first.initial, saved["notes"]
    if keeps:
        origin = start.t if saved is None else next(iter(saved["processes"].values()))["origin"]
        words = {name: value for name, value in (about | arguments).items() if name not in ("method", "dvi", "torch")}
        known = identity(first, words, {"test_inputs": test_inputs}, origin, grid)
        longer = ranks.share(lambda: keeper.identify(known, saved))
    processes = {
        name: make_process(flow, integrator if name == "central" else None, start, grid, observer, eigen_every)
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

    mark = here() if saved is None else saved["mark"]  # the last moment that a longer run would come through, too
    if keeps:
        freeze(checkpoint())  # what cannot be stored is refused before anything is computed
    if failure is not None:  # nothing to go on from: a file without a checkpoint says so
        race = result(status)
        race.notes.append(f"Stopped: {detail(failure)}")
        keeper.write(race)
        if throw:
            raise RunError(status, detail(failure), race) from failure
        return race
    at_work, why = "", ""
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
                row = {(a, b): _distance(w[a], w[b]) for a, b in pairs}
                for pair, value in row.items():  # indexed by `done`: an interruption in between leaves nothing doubled
                    distance[pair][done:] = [value]
                done += 1
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


def _distance(a: Tensor, b: Tensor) -> float:
    return float(torch.linalg.vector_norm(a - b))


def _of_the_optimizer(processes: dict[str, Process]) -> str:
    """What is known of the optimizer where a flow has diverged."""
    if "discrete" not in processes:
        return "without the optimizer beside it"
    process = processes["discrete"]
    return f"not in the optimizer, which has come to t = {process.y.t - process.origin:g} without"


def _where(processes: dict[str, Process]) -> str:
    return ", ".join(f"{name} at t = {p.y.t - p.origin:g}" for name, p in processes.items())
