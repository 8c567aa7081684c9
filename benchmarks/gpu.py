"""Estimates the cost of the paper's experiments on this machine's GPU: ``make gpu``, at most ten minutes.

The script runs the tests marked ``gpu``.  Then it runs the CNN and the ViT at the paper's size on 1,000 examples, with
gradient descent and RMSProp, optimizer and flows side by side, for as many steps as the time allows.  For each case it
prints the seconds per 100 steps, the fraction of time inside the loss and its derivatives, the copies from the GPU per
step, and the largest memory.  Finally it estimates the hours for all 115 experiments, for comparison with the paper's
2,000.  Without a GPU it does the same at the small size on the CPU, in two minutes.

Each part gets a fraction of the remaining time.  When this is over, the part is stopped and its results until then are
printed.  ``--skip tests`` (or gradients, copies, cnn, vit) leaves parts out.

The pictures are those of CIFAR-10 if ``--cifar10`` names its folder, else the 1,000 of Fashion-MNIST in the package.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import machine
import torch

import dvi
from dvi.paper.making import make_method
from dvi.paper.table import Experiment, Size, table

ROOT = Path(__file__).resolve().parents[1]
EVALUATIONS = ("value", "value_and_grad", "hvp", "hessian_gradient")

#: What a unit of time of the stationary flow takes, in gradients: the mean of Figure 11's rows at the small size.
STATIONARY = 280

#: Seconds are wall-clock time on a GPU, and CPU time otherwise, because the CPU may be shared.
clock = time.perf_counter if torch.cuda.is_available() else time.process_time

#: The parts that --skip accepts.
PARTS = ("tests", "gradients", "copies", "cnn", "vit")

#: The networks and methods, with learning rates at which the edge of stability is reached early.
CASES = {
    ("cnn", "gd"): {"full": 0.04, "small": 0.6},
    ("cnn", "rmsprop"): {"full": 4e-5, "small": 2e-3},
    ("vit", "gd"): {"full": 0.02, "small": 0.28},
    ("vit", "rmsprop"): {"full": 4e-5, "small": 1.6e-3},
}


def make(network: str, size: Size, device: str, cifar10: Path | None, **other: int) -> dvi.problems.ModuleProblem:
    """A problem of the paper, on the pictures that are at hand; ``other`` as a row may set (n, pixels)."""
    name = f"{network}-mse" if network in ("transformer", "rnn") else f"{network}-mse-4"
    options = table().problems[name][size] | other
    task, dtype = options.pop("task"), getattr(torch, options.pop("dtype"))
    if task == "cifar10" and cifar10 is None:
        task = "fashion"
    elif task == "cifar10":
        options["folder"] = cifar10
    problem: dvi.problems.ModuleProblem = getattr(dvi.problems, task)(**options, dtype=dtype, device=device)
    return problem


class Watch:
    """Counts the seconds inside the loss and its derivatives."""

    def __init__(self, problem: dvi.Problem) -> None:
        self.inside = 0.0
        self.depth = 0
        for name in EVALUATIONS:
            setattr(problem, name, self._timed(getattr(problem, name), problem.device))

    def _timed(self, call: Any, device: torch.device) -> Any:
        def timed(*given: Any, **named: Any) -> Any:
            begin = clock()
            self.depth += 1
            try:
                out = call(*given, **named)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
            finally:
                self.depth -= 1
                if not self.depth:  # one evaluation may call another
                    self.inside += clock() - begin
            return out

        return timed


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """A context that interrupts its body after some seconds, as Ctrl-C does."""

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1.0))
    try:
        yield
    except KeyboardInterrupt:
        pass
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def measure(
    problem: dvi.problems.ModuleProblem, network: str, method: str, size: Size, seconds: float, copies: bool
) -> dict[str, Any]:
    """One case: the row that is printed."""
    options = table().methods[method][size] | {"lr": CASES[network, method][size]}
    make_it = make_method({"method": options})
    cuda = problem.device.type == "cuda"
    found: dict[str, Any] = {"network": network, "method": method, "weights": len(problem.w0)}
    found["copies"] = None
    end = time.monotonic() + seconds
    if copies:
        with at_most(seconds / 4):
            found["copies"] = copies_per_step(problem, make_it)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    watch = Watch(problem)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "race.h5"
        begin = clock()
        with at_most(end - time.monotonic()):
            dvi.compare(
                problem, make_it, 2000, check=False, path=path, checkpoint_every=1e9, progress=False, throw=False
            )
        wall = clock() - begin
        race = dvi.load(path) if path.exists() else None
    memory = torch.cuda.max_memory_allocated() / 2**30 if cuda else None
    found |= {"inside": watch.inside / wall, "memory": memory}
    if race is None:  # there was no time for a first step
        return found | {"reached": 0.0, "status": "NOT STARTED", "per_100": None, "k": 0, "cost": None}
    reached = min((float(run.t[-1]) for run in race.runs.values() if len(run.t)), default=0.0)
    central = race.central
    return found | {
        "reached": reached,
        "status": race.status.name,
        "per_100": 100 * wall / reached if reached else None,
        "k": max((k for _, _, k in central.breakpoints), default=0),
        "cost": central.ledger.per_unit_time() if len(central.t) > 1 else None,
    }


def gradient_seconds(problem: dvi.Problem) -> float:
    """Seconds of one gradient."""
    times = []
    for turn in range(6):
        begin = clock()
        problem.value_and_grad(problem.w0 * (1 + 1e-6 * turn))  # ends with a check that waits for the GPU
        times.append(clock() - begin)
    return median(times[1:])


def copies_per_step(problem: dvi.Problem, method: dvi.Method, steps: int = 3) -> float:
    """How often a step of all processes waits for a number from the GPU (on the CPU: reads one from a tensor)."""
    from torch.profiler import ProfilerActivity, profile

    cuda = problem.device.type == "cuda"
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=kinds) as profiled:
        dvi.compare(problem, method, steps, check=False, warm_start=0, eigen_every=0, progress=False, throw=False)
    names = ("Memcpy DtoH",) if cuda else ("aten::_local_scalar_dense",)
    count: int = sum(event.count for event in profiled.key_averages() if event.key.startswith(names))
    return count / steps


def scale(row: Experiment, size: Size) -> tuple[str, int | None, int | None]:
    """What the time of a gradient depends on: the network, and how many and how large pictures, where the row says."""
    options = row.options[size]
    return row.problem.split("-")[0], options.get("n"), options.get("pixels")


def hours(
    row: Experiment,
    rows: list[dict[str, Any]],
    gradients: dict[tuple[str, int | None, int | None], float],
    size: Size,
) -> float | None:
    """An estimate for an experiment: the time measured for its network and method, or one scaled by a gradient's time.

    Returns:
        the hours; None if there is no measurement to scale from.
    """
    key = scale(row, size)
    kind = "rmsprop" if row.method == "rmsprop" else "gd"
    steps = row.options[size]["steps"]
    if key not in gradients:
        return None
    if row.runs[0].startswith("stationary"):
        return float(steps * STATIONARY * gradients[key] / 3600)
    likes = [found for found in rows if found["per_100"] and (found["network"], None, None) in gradients]
    if not likes:
        return None
    like = min(likes, key=lambda found: (found["network"] != key[0], found["method"] != kind))
    seconds = like["per_100"] / 100 * gradients[key] / gradients[like["network"], None, None]
    return float(steps * seconds / 3600)


def run_tests(limit: float) -> str:
    """Run the tests marked gpu, and return the outcome in words; only their files are read, which is quicker."""
    files = [str(path) for path in sorted((ROOT / "tests").glob("test_*.py")) if "mark.gpu" in path.read_text()]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", *files, "-p", "no:cacheprovider"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return f"not finished in {limit:.0f} s"
    lines = (done.stdout.strip() or done.stderr.strip()).splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return "\n".join([*failed, lines[-1] if lines else f"exit code {done.returncode}"])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--minutes", type=float, help="for all together (default: 10 on a card, 2 without)")
    parser.add_argument("--cifar10", type=Path, help="the folder with CIFAR-10's binary files")
    parser.add_argument("--out", type=Path, help="a JSON file for the numbers")
    parser.add_argument("--skip", nargs="*", default=[], choices=PARTS, help="parts to leave out")
    given = parser.parse_args()
    cuda = torch.cuda.is_available()
    device = "cuda" if cuda else "cpu"
    size: Size = "full" if cuda else "small"
    limit = 60 * (given.minutes or (10 if cuda else 2))
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # as in the paper
    end = time.monotonic() + limit
    card = torch.cuda.get_device_name() if cuda else "no card: the small size on the CPU"
    print(f"{card}\n{machine.describe()['words']}", flush=True)
    if "tests" not in given.skip:
        print(f"tests marked gpu: {run_tests(limit / 3)}", flush=True)

    can = [row for row in table().experiments.values() if not row.why_not(size)]
    gradients: dict[tuple[str, int | None, int | None], float] = {}
    with at_most(limit / 6):
        for key in {} if "gradients" in given.skip else dict.fromkeys(scale(row, size) for row in can):
            other = {name: value for name, value in zip(("n", "pixels"), key[1:], strict=True) if value is not None}
            gradients[key] = gradient_seconds(make(key[0], size, device, given.cifar10, **other))
    told = ", ".join(f"{named(*key)} {1e3 * seconds:.1f}" for key, seconds in gradients.items())
    print(f"\none gradient, ms: {told or 'not measured'}\n", flush=True)
    print(
        f"{'':14}{'weights':>9}{'steps':>7}{'k ≤':>5}{'s per 100':>11}{'cost':>7}{'in loss':>9}{'copies':>8}{'GiB':>6}"
    )
    rows: list[dict[str, Any]] = []
    cases = [case for case in CASES if case[0] not in given.skip]
    for i, (network, method) in enumerate(cases):
        problem = make(network, size, device, given.cifar10)
        share = 0.9 * (end - time.monotonic()) / (len(cases) - i)
        rows.append(measure(problem, network, method, size, share, "copies" not in given.skip))
        print(in_a_line(rows[-1]), flush=True)
    print(
        "(s per 100: seconds per 100 steps of optimizer, central and stable flow together; cost: of the central flow, "
        "in gradients per step; in loss: share of the time inside the loss and its derivatives; copies: reads of "
        "numbers from the device per step)\n"
    )
    by_name = {row.name: hours(row, rows, gradients, size) for row in can}
    known = [value for value in by_name.values() if value is not None]
    if known:
        print(f"{len(known)} of {len(by_name)} experiments at size {size}, estimated: {sum(known):.1f} hours", end="")
        print(f" on this card; the paper's took about 2,000 GPU-hours ({card})" if cuda else "")
    else:
        print("No estimate: the time was too short, or the parts it needs were left out. Give more --minutes.")
    if given.out:
        given.out.write_text(json.dumps({"card": card, "rows": rows, "hours": by_name}, indent=1) + "\n")


def named(network: str, n: int | None, pixels: int | None) -> str:
    """As in "cnn (20 of 7×7)"."""
    parts = [*([str(n)] if n else []), *([f"{pixels}×{pixels}"] if pixels else [])]
    return f"{network} ({' of '.join(parts)})" if parts else network


def in_a_line(found: dict[str, Any]) -> str:
    """A row of the table."""

    def number(name: str, form: str) -> str:
        return "–" if found[name] is None else format(found[name], form)

    return (
        f"{found['network'] + ', ' + found['method']:14}{found['weights']:>9}{found['reached']:>7.0f}{found['k']:>5}"
        f"{number('per_100', '.1f'):>11}{number('cost', '.1f'):>7}{number('inside', '.0%'):>9}"
        f"{number('copies', '.0f'):>8}{number('memory', '.1f'):>6}  {found['status']}"
    )


if __name__ == "__main__":
    main()
