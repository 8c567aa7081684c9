"""The cost of each kind of evaluation on this machine, in gradients."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from statistics import median
from time import perf_counter, process_time
from typing import Any, Protocol

import torch
from torch import Tensor

BLOCK = 2  # directions at once: a flow usually follows about this many


class Evaluated(Protocol):
    """The part of a problem that is timed."""

    w0: Tensor

    def value(self, w: Tensor) -> Any:
        """The loss."""

    def value_and_grad(self, w: Tensor) -> Any:
        """The loss and its gradient."""

    def hvp(self, w: Tensor, V: Tensor) -> Any:
        """Products with the Hessian."""

    def hessian_gradient(self, w: Tensor, U: Tensor) -> Any:
        """Third derivatives."""


def measure(problem: Evaluated, repeats: int) -> dict[str, float]:
    """Median time of each kind of evaluation, relative to one gradient: CPU time, or wall-clock time on other devices.

    On a shared machine, wall-clock time includes the time of others, most of all for calls longer than a time slice.
    The kinds take turns, so that a slow period of the machine affects all of them.  Each evaluation is at new weights,
    so nothing can be reused from the last.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    U = torch.randn(problem.w0.numel(), BLOCK, generator=generator, dtype=torch.float64, device="cpu").to(problem.w0)
    U = U / torch.linalg.vector_norm(U, dim=0)
    calls: dict[str, tuple[Callable[[Tensor], object], int]] = {
        "gradients": (problem.value_and_grad, 1),
        "values": (problem.value, 1),
        "hvps": (lambda w: problem.hvp(w, U), BLOCK),
        "third_derivatives": (lambda w: problem.hessian_gradient(w, U), BLOCK * (BLOCK + 1) // 2),
    }
    clock = process_time if problem.w0.device.type == "cpu" else perf_counter
    times: dict[str, list[float]] = {kind: [] for kind in calls}
    shifts = count()
    for turn in range(repeats + 1):
        for kind, (call, number) in calls.items():
            w = problem.w0 * (1 + 1e-6 * next(shifts))
            start = clock()
            call(w)  # it ends with a test for finite numbers, which waits for the device
            if turn:  # the first turn is a warm-up
                times[kind].append((clock() - start) / number)
    gradient = median(times["gradients"])
    return {kind: median(spent) / gradient for kind, spent in times.items()}
