"""Run integrators on a case: cost by phase, errors against the fine solution, time."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from cases import Case, Entry
from reference import Reference

import dvi
from dvi.problems import Ledger, Problem
from dvi.solvers.errors import StepError
from dvi.solvers.protocol import Array, Flow, Integrator, Node, State, StepResult

#: The usual weights: a Hessian–vector product costs 2.5 gradients, and a contraction of third derivatives 9.
CANONICAL = {"gradients": 1.0, "hvps": 2.5, "third_derivatives": 9.0, "values": 1 / 3, "ccp_solves": 0.0}
#: With differences of gradients the number is plain gradients.
DIFFERENCES = CANONICAL | {"hvps": 1.0, "third_derivatives": 2.0}  # in float64
MIXED = CANONICAL | {"third_derivatives": 2.0}

TRANSIENT = 20.0  # unit times after a random initialisation that count as the first transient
SETTLED = 20.0  # unit times without a breakpoint after which a run counts as settled

Phase = tuple[str, float, float]
PHASES = ("k = 0, first", "k = 0, later", "k = 1", "k = 2", "k >= 3", "settled, k <= 3", "settled, k > 3")


def phases(breakpoints: list[tuple[float, str, int]], end: float) -> list[Phase]:
    """Divide the run into phases (name, from, to), at breakpoints and where it settles."""
    times = [t for t, _, _ in breakpoints]
    cuts = sorted({0.0, end, *(t for t in [TRANSIENT, *times, *(t + SETTLED for t in times)] if 0 < t < end)})
    found = []
    for a, b in pairwise(cuts):
        middle = 0.5 * (a + b)
        past = [(t, k) for t, _, k in breakpoints if t <= middle]
        k = past[-1][1] if past else 0
        if k == 0:
            name = PHASES[0] if middle < TRANSIENT else PHASES[1]
        elif middle >= past[-1][0] + SETTLED:
            name = PHASES[5] if k <= 3 else PHASES[6]
        else:
            name = PHASES[1 + min(k, 3)]
        found.append((name, a, b))
    return found


@dataclass
class Cost:
    """The cost of a run until each node, in gradient equivalents at given weights."""

    t: Array
    spent: Array
    total: float

    @classmethod
    def of(cls, solution: dvi.Solution, weights: Mapping[str, float]) -> Cost:
        """The cost of a solution.  The counts of a step belong to its end, the next node."""
        ledger = solution.ledger
        spent = np.array([Ledger(**counts, weights=weights).gradient_equivalents for counts in ledger.counts])
        return cls(np.asarray(ledger.t), np.concatenate([[0.0], spent[:-1]]), float(spent[-1]))

    def by_phase(self, cut: list[Phase]) -> dict[str, float]:
        """Gradient equivalents per unit time in each phase."""
        out = {}
        for name in dict.fromkeys(name for name, _, _ in cut):
            spans = [(a, b) for n, a, b in cut if n == name and a < self.t[-1]]
            length = sum(min(b, self.t[-1]) - a for a, b in spans)
            if length > 0:
                out[name] = sum(self._until(b) - self._until(a) for a, b in spans) / length
        return out

    def _until(self, t: float) -> float:
        return float(np.interp(t, self.t, self.spent))


def warm_started(case: Case) -> tuple[Problem, State, float]:
    """The case's problem, the state after the warm start, and its number of optimizer steps."""
    from dvi.runs.solving import warm_up

    problem = case.make("autodiff")
    flow = dvi.central_flow(problem, case.method, check=False)
    y, _ = warm_up(flow, "auto")
    return problem, y, y.t


def measured_weights(problem: Problem, repeats: int = 15) -> dict[str, float]:
    """The cost of each kind of evaluation in gradients: the fastest of ``repeats`` calls, taken in turns.

    ``problem.measure_weights()`` uses wall-clock time.  On a shared machine this is too long for calls that do not fit
    into a time slice, so CPU time is used here, except on a GPU.  "pairwise" is a contraction T[v, v] that shares
    nothing with others.
    """
    clock = time.process_time if problem.device.type == "cpu" else time.perf_counter
    v = torch.randn(problem.dim, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(problem.w0)
    v = v / torch.linalg.vector_norm(v, dim=0)
    one = torch.ones(1, 1, dtype=torch.float64)
    calls: dict[str, tuple[Callable[[torch.Tensor], Any], int]] = {
        "gradients": (problem.value_and_grad, 1),
        "values": (problem.value, 1),
        "hvps": (lambda w: problem.hvp(w, v), 2),
        "third_derivatives": (lambda w: problem.hessian_gradient(w, v), 3),
        "pairwise": (lambda w: problem.hessian_gradient_of(w, v[:, :1], one), 1),
    }
    best = dict.fromkeys(calls, np.inf)
    with problem.ledger.paused():
        for turn in range(repeats):
            for j, (name, (call, number)) in enumerate(calls.items()):
                w = problem.w0 * (1 + 1e-6 * (len(calls) * turn + j))  # new weights, so that nothing is reused
                start = clock()
                call(w)
                best[name] = min(best[name], (clock() - start) / number)
    weights = {name: value / best["gradients"] for name, value in best.items()}
    return weights | {"ccp_solves": 0.0, "milliseconds": 1e3 * best["gradients"]}


def run(case: Case, entry: Entry, start: State, reference: Reference, weights: Mapping[str, float]) -> dict[str, Any]:
    """Run one integrator on one case, and return a row of numbers.

    Args:
        weights: the result of :func:`measured_weights` for the autodiff problem.
    """
    flow = dvi.central_flow(case.make(entry.derivatives), case.method, check=False)
    wall, cpu = time.perf_counter(), time.process_time()
    limited = Limited(entry.integrator, cpu + entry.limit)
    solution = dvi.solve(
        flow, entry.steps(case), integrator=limited, start=start, save=("w",), progress=False, throw=False
    )
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    row: dict[str, Any] = {
        "case": case.name,
        "kind": case.kind,
        "integrator": entry.name,
        "family": entry.family,
        "knob": entry.knob,
        "status": "OUT_OF_TIME" if cpu > entry.limit else solution.status.name,
        "seconds": wall,
        "cpu_seconds": cpu,
        "reached": float(solution.t[-1]) if len(solution.t) else 0.0,
        "k_max": max((k for _, _, k in solution.breakpoints), default=0),
        "counts": solution.ledger.ledger.counts,
        "ccp_solves": solution.ledger.ledger.ccp_solves,
        "steps_taken": len(solution.ledger.t) - 1,
    }
    if not len(solution.t):
        return row
    measured = {name: value for name, value in weights.items() if name in CANONICAL}
    if entry.derivatives == "finite-difference":
        kinds = {"canonical": DIFFERENCES, "measured": DIFFERENCES}
    elif entry.derivatives == "mixed":
        kinds = {"canonical": MIXED, "measured": measured | {"third_derivatives": 2.0}}
    elif entry.pairwise:
        kinds = {"canonical": CANONICAL, "measured": measured | {"third_derivatives": weights["pairwise"]}}
    else:
        kinds = {"canonical": CANONICAL, "measured": measured}
    cut = phases(reference.breakpoints, case.steps)
    for name, chosen in kinds.items():
        cost = Cost.of(solution, chosen)
        row[name] = cost.total / row["reached"] if row["reached"] else None
        row[name + "_by_phase"] = cost.by_phase(cut)
    return row | errors(solution, reference)


@dataclass(frozen=True)
class Limited:
    """An integrator that stops at a given CPU time of the process."""

    integrator: Integrator
    deadline: float

    def init(self, flow: Flow, y: State) -> Any:
        """The integrator's own."""
        return self.integrator.init(flow, y)

    def step(self, flow: Flow, memory: Any, y: State, h: float) -> StepResult:
        """The integrator's own, while there is time."""
        if time.process_time() > self.deadline:
            raise StepError("out of time")
        return self.integrator.step(flow, memory, y, h)

    def observe(self, flow: Flow, memory: Any, y: State) -> Node:
        """The integrator's own."""
        return self.integrator.observe(flow, memory, y)


def errors(solution: dvi.Solution, reference: Reference) -> dict[str, float]:
    """Errors in w (largest, and at the end), and relative errors in tr Σ and predicted loss."""
    n = min(len(solution.t), len(reference.t))
    off = np.linalg.norm(solution.series["w"][:n] - reference.w[:n], axis=1)
    trace, loss = reference.trace[:n], reference.predicted_loss[:n]
    X = np.abs(solution.series["trace"][:n] - trace) / max(trace.max(), 1e-300)
    L = np.abs(solution.predicted_loss[:n] - loss) / loss
    return {
        "error_w": float(off.max()),
        "error_w_end": float(off[-1]),
        "error_X": float(X.max()),
        "error_X_mean": float(X.mean()),
        "error_loss": float(L.max()),
        "error_loss_mean": float(L.mean()),
    }
