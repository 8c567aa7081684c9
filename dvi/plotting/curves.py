"""The numbers that a picture of a run is made of: recorded quantities, their time averages, and what they say."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from dvi.compare import gaussian_average
from dvi.solution import Solution
from dvi.solvers.protocol import Array

HUGE = 1e100  # values beyond are those of a run that diverged, and are not drawn


def recorded(run: Solution, name: str) -> Array:
    """A quantity at the run's times [n] by its name, NaN where it was not recorded."""
    found = {"loss": run.loss, "predicted_loss": run.predicted_loss, **run.series}.get(name, np.empty(0))
    out = np.full(len(run.t), np.nan)
    n = min(len(found), len(out))
    out[:n] = found[:n]
    return out


def duration(runs: Mapping[str, Solution]) -> float:
    """The last time that any of the runs recorded, 0 if there is none."""
    return max((float(run.t[-1]) for run in runs.values() if len(run.t)), default=0.0)


def leading(run: Solution, count: int) -> tuple[Array, Array]:
    """Times of looks [n], and the ``count`` largest eigenvalues there [n, ≤ count], NaN where fewer are known."""
    table = np.asarray(run.eigenvalues, dtype=np.float64)[:, :count]
    looked = np.isfinite(table).any(axis=1)
    return run.t[looked], table[looked]


# ---- averages over time ---------------------------------------------------------------------------------


def time_average(run: Solution, values: Array, sigma: float) -> Array:
    """Average a run's values over time with a Gaussian of ``sigma`` unit times, gaps (NaN) left out."""
    values = np.asarray(values, dtype=np.float64)
    known = np.isfinite(values)
    total = gaussian_average(run.t, np.where(known, values, 0.0), sigma)
    weight = gaussian_average(run.t, known.astype(np.float64), sigma)
    return np.where(weight > 1e-12, total / np.maximum(weight, 1e-12), np.nan)


def inner_average(run: Solution, values: Array, sigma: float) -> Array:
    """Average over time where the window fits: within σ of either end it would lean to one side."""
    mean = time_average(run, values, sigma)
    if len(run.t) and np.ptp(run.t) > 4 * sigma:
        mean[(run.t < run.t[0] + sigma) | (run.t > run.t[-1] - sigma)] = np.nan
    return mean


# ---- what values say ------------------------------------------------------------------------------------


def usable(values: Array) -> Array:
    """The values that can be drawn: numbers, and not those of a run that diverged."""
    return values[np.abs(values) < HUGE]


def top(values: Array, percent: float = 100.0) -> float:
    """Their maximum, or another percentile; 0 where there is none."""
    values = usable(values)
    return float(np.percentile(values, percent)) if len(values) else 0.0


def varies(values: Array) -> bool:
    """Whether they change by more than rounding."""
    values = usable(values)
    return bool(len(values)) and bool(np.ptp(values) > 1e-6 * np.abs(values).max())


def differ(a: Array, b: Array) -> bool:
    """Whether a says anything that b does not."""
    known = np.isfinite(a) & np.isfinite(b)
    return not np.allclose(a[known], b[known], rtol=1e-12, atol=0)


__all__ = [
    "HUGE",
    "differ",
    "duration",
    "inner_average",
    "leading",
    "recorded",
    "time_average",
    "top",
    "usable",
    "varies",
]
