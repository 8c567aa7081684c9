"""The problem, the method and the run of a row of the table."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

import dvi
from dvi.paper.table import Experiment, Size, table
from dvi.problems import ModuleProblem, ProblemError
from dvi.problems.catalogue.cifar import load_cifar10
from dvi.problems.catalogue.data import make_sorting, usable
from dvi.problems.catalogue.fashion import load_fashion
from dvi.results.comparison import Comparison
from dvi.sweeps.records import Task

#: The folder of the CIFAR-10 files, unless another one is given.
CIFAR10 = Path("cifar10")

#: The number of weights, evenly spread, for which "coordinates" are recorded.
COORDINATES = 12

#: The options of a row that belong to its problem, to its method and to its run.
_OF_PROBLEM = ("activation", "n", "pixels")
_OF_METHOD = ("lr", "beta2", "bias_correction")
_OF_RUN = ("steps", "measure_every")

#: Records with their own argument of :func:`dvi.compare`; the others are measures.
_BY_ARGUMENT = ("outputs", "coordinates")


def spec_of(row: Experiment, size: Size) -> dict[str, Any]:
    """The description of a run as plain data: its problem, its method, and how they are run.

    Raises:
        ValueError: if the row sets an unknown option.
    """
    options, known = row.options[size], (*_OF_PROBLEM, *_OF_METHOD, *_OF_RUN)
    unknown = set(options) - set(known)
    if unknown:
        raise ValueError(f"{row.name} sets {', '.join(sorted(unknown))}; a row may set {', '.join(known)}.")

    def part(names: tuple[str, ...]) -> dict[str, Any]:
        return {name: options[name] for name in names if name in options}

    return {
        "problem": table().problems[row.problem][size] | part(_OF_PROBLEM),
        "method": table().methods[row.method][size] | part(_OF_METHOD),
        "run": part(_OF_RUN) | {"runs": list(row.runs), "record": list(row.record), "warm_start": row.warm_start},
    }


def make_problem(spec: dict[str, Any], device: str = "cpu", cifar10: Path = CIFAR10) -> ModuleProblem:
    """The problem of a run.

    Raises:
        ProblemError: if its data or the device are missing.
    """
    options = dict(spec["problem"])
    make = getattr(dvi.problems, options.pop("task"))
    if make is dvi.problems.cifar10:
        options["folder"] = cifar10
    options["dtype"] = getattr(torch, options["dtype"])
    problem: ModuleProblem = make(**options, device=device)
    return problem


def make_method(spec: dict[str, Any]) -> dvi.Method:
    """The method of a run."""
    options = dict(spec["method"])
    method: dvi.Method = getattr(dvi.methods, options.pop("name"))(**options)
    return method


def example_of(spec: dict[str, Any], device: str = "cpu", cifar10: Path = CIFAR10) -> torch.Tensor:
    """One test example, whose outputs are recorded: a picture [1, channels, s, s], or tokens [1, context] (int64)."""
    problem = spec["problem"]
    task, seed, dtype = problem["task"], problem.get("seed", 0), getattr(torch, problem["dtype"])
    if task == "sorting":
        return make_sorting(1, seed=seed + 1, device=device)[0]
    sizes = (problem["n"], problem["classes"], problem.get("pixels"))
    if task == "cifar10":
        return load_cifar10(cifar10, *sizes, seed, dtype, device).test_inputs[:1]
    return load_fashion(*sizes, None, seed, dtype, device).test_inputs[:1]


def run(
    spec: dict[str, Any], path: Path, device: str = "cpu", cifar10: Path = CIFAR10, every: float = 10.0
) -> Comparison:
    """Make a run, or continue it; its file is updated every ``every`` seconds."""
    problem, how = make_problem(spec, device, cifar10), spec["run"]
    d, record = len(problem.w0), how["record"]
    extra: dict[str, Any] = {}
    if "outputs" in record:
        extra["test_inputs"] = example_of(spec, device, cifar10)
    if "coordinates" in record:
        extra["coordinates"] = [(2 * i + 1) * d // (2 * COORDINATES) for i in range(COORDINATES)]
    measures = [name for name in record if name not in _BY_ARGUMENT]
    if measures:
        extra |= {"measures": measures, "measure_every": how["measure_every"]}
    return dvi.compare(
        problem,
        make_method(spec),
        how["steps"],
        runs=tuple(how["runs"]),
        warm_start=how["warm_start"],
        check=False,
        path=path,
        resume=True,
        checkpoint_every=every,
        progress=False,
        throw=False,
        **extra,
    )


def _run(path: Path, spec: dict[str, Any], device: str, cifar10: Path) -> Comparison:
    return run(spec, path, device, cifar10)


def task_of(row: Experiment, size: Size, device: str = "cpu", cifar10: Path = CIFAR10) -> Task:
    """The run of a row, as a task for a sweep.

    Raises:
        ProblemError: if it cannot be run at this size (the message says why), or if there is no such device.
    """
    if row.why_not(size):
        raise ProblemError(f"{row.name} cannot be run at size {size}: {row.why_not(size)}")
    spec = spec_of(row, size)
    kind = usable(device).type
    return Task(row.name, partial(_run, spec=spec, device=device, cifar10=cifar10.resolve()), spec | {"device": kind})


__all__ = ["CIFAR10", "example_of", "make_method", "make_problem", "run", "spec_of", "task_of"]
