"""The summary of a comparison in a few numbers, for tables of many runs."""

from __future__ import annotations

from typing import Any

import numpy as np

from dvi.results.averages import gaussian_average
from dvi.results.comparison import Comparison
from dvi.results.solution import Solution
from dvi.solvers.eigen.block_method import CRITICAL
from dvi.solvers.protocol import Array

#: The paper's width of time averages (unit times), and its largest allowed fraction of a run.
SIGMA, PART = 50.0, 0.1


def width(t: Array) -> float:
    """The standard deviation of time averages (unit times): the paper's 50, or a tenth of the run if that is less."""
    return min(SIGMA, PART * float(t[-1])) if len(t) and t[-1] > 0 else 1.0


def summarise(race: Comparison) -> dict[str, Any]:
    """A comparison in numbers; None stands for what is unknown.

    Returns:
        a dictionary with these entries:

        - ``weights``: their number; ``reached``: unit times; ``warm_start``: steps.
        - For the central flow, or else another flow with oscillations: ``edge``, the time at which the first direction
          starts to oscillate; ``k``, the largest number of oscillating directions; ``breakpoints``, their number.
        - ``loss`` at the end and ``gradient_equivalents`` per unit time, by run; ``notes`` of all runs together.
        - Means since the edge (or since 0, if it is not reached), where the window of the averages fits: ``distance``
          by pair, as "discrete–central"; ``predicted_error`` and ``stable_error``, the relative errors of the loss that
          the central and the stable flow predict for the optimizer's average.
        - ``unit_steps``: unit times that the flow covered in steps of one unit.
        - ``peak``: where the optimizer's largest eigenvalue was furthest above the edge since the flow reached it:
          [unit times since then, multiple of the threshold].
    """
    names = list(race.runs)
    lead = next((name for name in ("central", "map", "ablated", *names) if name in race.runs), None)
    reached = min((float(run.t[-1]) if len(run.t) else 0.0 for run in race.runs.values()), default=0.0)
    found: dict[str, Any] = {
        "weights": race.about.get("dim"),
        "reached": reached,
        "warm_start": race.about.get("warm_start"),
        "loss": {name: float(run.loss[-1]) for name, run in race.runs.items() if len(run.loss)},
        "gradient_equivalents": {
            name: run.ledger.per_unit_time() for name, run in race.runs.items() if len(run.ledger.t) > 1
        },
        "edge": None,
        "k": 0,
        "breakpoints": 0,
        "distance": {},
        "predicted_error": None,
        "stable_error": None,
        "unit_steps": 0.0,
        "peak": None,
        "notes": list(race.notes),
    }
    if lead is None:
        return found
    breaks = race.runs[lead].breakpoints
    if breaks:
        found |= {"edge": breaks[0][0], "k": max(k for _, _, k in breaks), "breakpoints": len(breaks)}
    found["unit_steps"] = float(sum(end - start for start, end in race.runs[lead].about.get("unit_steps", [])))
    since = found["edge"] or 0.0
    for (a, b), values in race.distance.items():
        later = values[race.t[: len(values)] >= since]
        found["distance"][f"{a}–{b}"] = float(later.mean()) if len(later) else None
    if "discrete" in names:
        found["predicted_error"] = _error(race, "central", "predicted_loss", since)
        found["stable_error"] = _error(race, "stable", "loss", since)
        if breaks:
            found["peak"] = _peak(race.runs["discrete"], since)
    return found


def _peak(observed: Solution, since: float) -> list[float] | None:
    """The time after ``since`` at which the largest effective eigenvalue peaks, and its multiple of the threshold."""
    top = observed.eigenvalues[:, 0] if observed.eigenvalues.ndim == 2 and observed.eigenvalues.size else np.empty(0)
    t = observed.t[: len(top)]
    there = np.isfinite(top) & (t >= since)
    if not there.any():
        return None
    i = int(np.argmax(np.where(there, top, -np.inf)))
    return [float(t[i]) - since, float(top[i]) / CRITICAL]


def _error(race: Comparison, name: str, of: str, since: float) -> float | None:
    """The mean relative error of a predicted loss, both sides averaged over time; None if it is unknown."""
    if name not in race.runs:
        return None
    observed, predicted = race.runs["discrete"], race.runs[name]
    n = min(len(observed.t), len(predicted.t))
    if n < 2 or not np.array_equal(observed.t[:n], predicted.t[:n]):  # recorded at other times than each step
        return None
    t, sigma = observed.t[:n], width(observed.t[:n])
    inner = (t >= since) & (t > sigma) & (t < t[-1] - sigma)
    average, told = (gaussian_average(t, values[:n], sigma) for values in (observed.loss, getattr(predicted, of)))
    if not inner.any() or not np.isfinite(told[inner]).all():
        return None
    return float(np.mean(np.abs(told[inner] / average[inner] - 1)))


__all__ = ["summarise", "width"]
