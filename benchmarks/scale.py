"""A million weights: on the CPU to show that it fits, on a GPU with the share of time spent inside the user's loss."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

import dvi
from dvi.methods import GradientDescent
from dvi.problems import Problem, digits

CALLS = ("value_and_grad", "value", "hvp", "hessian_gradient", "hessian_gradient_of")


@contextmanager
def timed(problem: Problem) -> Iterator[dict[str, float]]:
    """A context that measures the seconds inside the problem's evaluations, by kind."""
    spent = dict.fromkeys(CALLS, 0.0)
    wait = torch.cuda.synchronize if problem.device.type == "cuda" else (lambda: None)

    def clock(name: str) -> Any:
        call = getattr(problem, name)

        def timed_call(*args: Any, **options: Any) -> Any:
            wait()
            start = time.perf_counter()
            out = call(*args, **options)
            wait()
            spent[name] += time.perf_counter() - start
            return out

        return timed_call

    for name in CALLS:
        setattr(problem, name, clock(name))
    try:
        yield spent
    finally:
        for name in CALLS:
            delattr(problem, name)


def million_run(
    device: str, lr: float, steps: int, n: int, width: int = 965, dtype: Any = torch.float32
) -> dict[str, Any]:
    """A central flow of gradient descent for an MLP with a little more than ``width``² weights."""
    problem = digits("mlp", "mse", n=n, width=width, dtype=dtype, device=device)
    started = time.perf_counter()
    flow = dvi.central_flow(problem, GradientDescent(lr), check=False)
    with timed(problem) as spent:
        solution = dvi.solve(
            flow, steps, integrator=dvi.MacroStep(1e-3), warm_start="auto", eigen_every=0, progress=False, throw=False
        )
        seconds = time.perf_counter() - started
    found: dict[str, Any] = {
        "dim": problem.dim,
        "lr": lr,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "reached": float(solution.t[-1]) if len(solution.t) else 0.0,
        "status": solution.status.name,
        "seconds": seconds,
        "seconds_per_100_units": 100 * seconds / max(float(solution.t[-1]) if len(solution.t) else 1.0, 1e-9),
        "share_in_loss": sum(spent.values()) / seconds,
        "spent": spent,
        "counts": solution.ledger.ledger.counts,
        "cost": solution.ledger.ledger.gradient_equivalents / steps,
        "breakpoints": [list(b) for b in solution.breakpoints],
        "k_max": max((k for _, _, k in solution.breakpoints), default=0),
        "largest_eigenvalue": float(np.nanmax(solution.eigenvalues[-1])) if len(solution.t) else None,
        "gib": (
            torch.cuda.max_memory_allocated() if device == "cuda"
            else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        ) / 2**30,
    }  # fmt: skip
    found["words"] = (
        f"{found['dim']:,} weights in {str(dtype).removeprefix('torch.')} on {found['device']}, GD lr {lr}, "
        f"{found['reached']:.0f} unit times ({found['status']}), k up to {found['k_max']}: {seconds:.0f} s, "
        f"{found['seconds_per_100_units']:.0f} s per 100 unit times, {100 * found['share_in_loss']:.0f} % of them "
        f"inside the loss's evaluations; {found['cost']:.1f} gradient equivalents per unit time; peak memory "
        f"{found['gib']:.1f} GiB."
    )
    return found


def scale_run() -> dict[str, Any]:
    """A million weights on the CPU, once, a few tens of units into EOS."""
    return million_run("cpu", lr=0.0282, steps=80, n=100)


def gpu_run() -> dict[str, Any]:
    """A million weights on a GPU, k up to 5; skipped without CUDA."""
    if not torch.cuda.is_available():
        return {"skipped": True, "words": "GPU part skipped: no CUDA device."}
    return million_run("cuda", lr=0.05, steps=200, n=1000)
