"""The panels of a figure: their titles, labels and remarks, and how they are drawn."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from dvi.plotting.style import AVERAGED, DOTS, EVERY, LAYERS, PREDICTED, PREDICTED_NOISY, Look, of_flow, rank
from dvi.results.averages import gaussian_average
from dvi.results.comparison import Comparison
from dvi.results.solution import Solution
from dvi.solvers.eigen.block_method import CRITICAL
from dvi.solvers.protocol import Array

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_HUGE = 1e100  # larger values belong to a run that diverged, and are not drawn
_RASTER = 20_000  # a line with more points becomes an image inside a vector file
DECADES = 1.5  # a quantity that spans more is drawn on a logarithmic axis


@dataclass(frozen=True)
class Panel:
    """One panel: title, label of the vertical axis with units, a function that draws it, and a remark below the title.

    ``xlabel`` is the label of the horizontal axis, which ends at ``until``; with None, the lines determine its limits.
    """

    title: str
    label: str
    draw: Callable[[Axes], None]
    remark: str = ""
    xlabel: str = "time (optimizer steps)"
    until: float | None = None


def panels(race: Comparison, sigma: float, leading: int) -> list[Panel]:
    """The panels that have something to draw; of two alternatives, only the first.

    Args:
        race: the runs.
        sigma: standard deviation of the time averages, unit times.
        leading: largest number of eigenvalues to draw for each process.
    """
    race = in_layers(race)
    found = (
        loss(race, sigma),
        eigenvalues(race, leading),
        distances(race) or _gradient(race, sigma),
        learning_rate(race) or _oscillations(race, sigma),
    )
    return [panel for panel in found if panel]


def in_layers(race: Comparison) -> Comparison:
    """The same runs, in the order in which they are drawn over one another."""
    return replace(race, runs=dict(sorted(race.runs.items(), key=lambda item: rank(item[0], LAYERS))))


def duration(race: Comparison) -> float:
    """The last recorded time of any run (unit times), 0 if there is none."""
    return max((float(run.t[-1]) for run in race.runs.values() if len(run.t)), default=0.0)


# ---- quantities that the flow predicts the average of ---------------------------------------------------


def loss(race: Comparison, sigma: float) -> Panel | None:
    """The train loss: at every step, averaged, along the flows, and the central flow's prediction of the average."""
    remark = "dashed: L + ½⟨H, Σ⟩ predicts the time average"
    return averaged(race, sigma, "loss", "train loss", "train loss L (units of the loss)", remark)


def _gradient(race: Comparison, sigma: float) -> Panel | None:
    return averaged(race, sigma, "grad_sq", "squared gradient norm", "‖∇L‖² (units of loss²/w²)")


def averaged(
    race: Comparison,
    sigma: float,
    name: str,
    title: str,
    label: str,
    remark: str = "",
    which: tuple[int, ...] = (),
    log: bool = True,
) -> Panel | None:
    """The optimizer's values and their time average, the flows' values and their prediction of the average.

    Args:
        race: the runs.
        sigma: standard deviation of the time averages, unit times.
        name: "loss" or the name of a series.
        title, label, remark: those of the panel.
        which: the entry of a series of arrays, as in (example, output) or (coordinate,).
        log: whether the axis may be logarithmic.
    """
    values = recorded(race, name, which)
    if not len(usable(*values.values())):
        return None
    predicted = {  # drawn if it differs from the flow's own values
        process: average
        for process, average in recorded(race, "predicted_" + name, which).items()
        if (np.isfinite(average) & ~np.isclose(average, values[process], rtol=1e-12, atol=0)).any()
    }

    def draw(axes: Axes) -> None:
        for process, run in race.runs.items():
            if process == "discrete":
                line(axes, run.t, values[process], EVERY)
                line(axes, run.t, _inner_average(run, values[process], sigma), AVERAGED)
            else:
                line(axes, run.t, values[process], of_flow(process))
                _band(axes, run, values[process], run.series.get(name + "_spread"), of_flow(process))
        for process, average in predicted.items():
            line(axes, race.runs[process].t, average, PREDICTED_NOISY if process == "noisy" else PREDICTED)
        fit(axes, usable(*values.values()), zero=True, log=log)

    return Panel(title, label, draw, remark if predicted else "")


# ---- eigenvalues ----------------------------------------------------------------------------------------


def eigenvalues(race: Comparison, leading: int, unit: float = 1.0, of: str = "effective eigenvalue") -> Panel | None:
    """Effective eigenvalues, with a tick at every breakpoint; the stable flow's may leave the panel.

    Args:
        race: the runs.
        leading: largest number to draw for each process.
        unit: a factor for the eigenvalues and the critical value 2; 1/η gives the eigenvalues of H for gradient
            descent.
        of: the name of the scaled eigenvalues.
    """
    tables = {name: _leading(run, 1 if name == "stable" else leading) for name, run in race.runs.items()}
    tables = {name: (t, unit * table) for name, (t, table) in tables.items()}
    critical = unit * CRITICAL
    seen = usable(*(table.ravel() for _, table in tables.values()))
    if not len(seen):
        return None
    alone = len(tables) == 1
    tops = [
        _top(table, 99.5 if name == "discrete" else 100.0)
        for name, (_, table) in tables.items()
        if name != "stable" or alone
    ]
    high = max(1.25 * critical, *tops)
    high = 1.06 * (high if alone else min(high, 2 * critical))
    low = max(0.0, min(0.75 * critical, float(np.percentile(seen, 1))) - 0.08 * unit)
    remarks = ["ticks: enter (long), leave (short)"] if any(run.breakpoints for run in race.runs.values()) else []
    if "stable" in tables and (highest := _top(tables["stable"][1])) > high:
        remarks.append(f"stable flow: up to {highest:.3g} ↑")

    def draw(axes: Axes) -> None:
        axes.axhline(critical, color="0.6", lw=0.6, zorder=1.2, label="_threshold")
        for name, (t, table) in tables.items():
            label, options = of_flow(name)
            if name == "discrete":
                spacing = float(np.median(np.diff(t))) if len(t) > 1 else 1.0
                label, options = f"optimizer, every {spacing:g} steps", DOTS | {"zorder": 1.5}
            for j, column in enumerate(table.T):
                line(axes, t, column, ("_" if j else label, {"zorder": 2.2} | options))
        axes.set_ylim(low, high)
        for name, run in race.runs.items():
            for kind, length in (("enter", 0.055), ("leave", 0.028)):
                times = [b[0] for b in run.breakpoints if b[1] == kind]
                colour, across = of_flow(name)[1]["color"], axes.get_xaxis_transform()
                axes.vlines(times, 1 - length, 1, colors=colour, lw=0.8, transform=across, label="_" + kind)

    return Panel(of.replace("eigenvalue", "eigenvalues"), f"{of} (critical: {critical:.4g})", draw, "; ".join(remarks))


def _leading(run: Solution, count: int) -> tuple[Array, Array]:
    """Times [n] at which any eigenvalue is known, and the largest ones then [n, ≤ count]."""
    table = np.asarray(run.eigenvalues, dtype=np.float64)[:, :count]
    known = np.isfinite(table).any(axis=1)
    return run.t[known], table[known]


# ---- distances and what is adapted ----------------------------------------------------------------------


def distances(race: Comparison) -> Panel | None:
    """Distances in weight space from the optimizer to each flow, or between the flows if there is no optimizer."""
    optimizer = race.runs.get("discrete")
    centre = next((name for name in ("discrete", "sgd") if name in race.runs), None)
    # a distance between two flows says nothing about the optimizer
    shown = {pair: values for pair, values in race.distance.items() if centre is None or centre in pair}
    if not any(np.isfinite(values).any() for values in shown.values()):
        return None
    between = " and ".join(of_flow(name)[0] for name in next(iter(shown)))

    def draw(axes: Axes) -> None:
        tops = []
        if optimizer is not None:  # the optimizer's step length, for comparison
            step = recorded(race, "step_length")["discrete"]
            line(axes, optimizer.t, step, EVERY)
            tops.append(_top(step, 99.5))
        for pair, values in reversed(shown.items()):
            label, options = of_flow(next(name for name in pair if name != (centre or "discrete")))
            line(axes, race.t, values, ("_" if centre is None else label, options))
            tops.append(_top(values))
        from_zero(axes, tops)

    remark = f"between {between}" if optimizer is None else "from the optimizer to each flow; pale: ‖w$_{t+1}$ − w$_t$‖"
    if centre == "sgd":
        remark = "from the averages of single replicas to each flow"
    return Panel("distance in weight space", "distance ‖w − w′‖ (units of w)", draw, remark)


def learning_rate(race: Comparison) -> Panel | None:
    """The effective learning rate of an adaptive method; the optimizer's is a pale band behind those of the flows."""
    rates = recorded(race, "effective_lr")
    if not any(len(usable(rate)) and np.ptp(usable(rate)) > 1e-6 * _top(np.abs(rate)) for rate in rates.values()):
        return None
    band = (EVERY[0], EVERY[1] | {"lw": 3.0})

    def draw(axes: Axes) -> None:
        for name, rate in rates.items():
            line(axes, race.runs[name].t, rate, band if name == "discrete" else of_flow(name))
        fit(axes, usable(*rates.values()), zero=False)

    return Panel("effective learning rate", "learning rate (units of w²/loss)", draw, "harmonic mean over weights")


def _oscillations(race: Comparison, sigma: float) -> Panel | None:
    """The trace of the oscillations' covariance; bursts may leave the panel, so that the averages can be read."""
    traces = {name: trace for name, trace in recorded(race, "trace").items() if usable(trace).any()}
    if not traces:
        return None

    def draw(axes: Axes) -> None:
        tops = []
        for name, trace in traces.items():
            run = race.runs[name]
            if name == "discrete":
                mean = _inner_average(run, trace, sigma)
                line(axes, run.t, trace, EVERY)
                line(axes, run.t, mean, AVERAGED)
                tops.append(min(2.5 * _top(mean), _top(trace)))
            else:
                line(axes, run.t, trace, PREDICTED_NOISY if name == "noisy" else PREDICTED)
                tops.append(_top(trace))
        from_zero(axes, tops)

    return Panel("size of the oscillations", "tr Σ (units of w²)", draw, "trace of their covariance Σ")


# ---- numbers --------------------------------------------------------------------------------------------


def time_average(run: Solution, values: Array, sigma: float) -> Array:
    """Average a run's values over time with a Gaussian of ``sigma`` unit times; gaps (NaN) are left out."""
    values = np.asarray(values, dtype=np.float64)
    known = np.isfinite(values)
    total = gaussian_average(run.t, np.where(known, values, 0.0), sigma)
    weight = gaussian_average(run.t, known.astype(np.float64), sigma)
    return np.where(weight > 1e-12, total / np.maximum(weight, 1e-12), np.nan)


def _inner_average(run: Solution, values: Array, sigma: float) -> Array:
    """Average over time where the window fits: within σ of either end it would be one-sided."""
    mean = time_average(run, values, sigma)
    if len(run.t) and np.ptp(run.t) > 4 * sigma:
        mean[(run.t < run.t[0] + sigma) | (run.t > run.t[-1] - sigma)] = np.nan
    return mean


def recorded(race: Comparison, name: str, which: tuple[int, ...] = ()) -> dict[str, Array]:
    """A quantity of every run at the run's times [n], NaN where it was not recorded.

    Args:
        race: the runs.
        name: "loss", "predicted_loss" or the name of a series.
        which: the entry of a series of arrays [n, …].
    """
    out = {}
    for process, run in race.runs.items():
        known = {"loss": run.loss, "predicted_loss": run.predicted_loss, **run.series}.get(name, np.empty(0))
        known = component(known, which)
        out[process] = np.append(known, np.full(len(run.t), np.nan))[: len(run.t)]
    return out


def component(values: Array, which: tuple[int, ...]) -> Array:
    """One entry [n] of a series of arrays [n, …]; a series of numbers stays as it is."""
    if values.ndim < 2:
        return values
    found: Array = values.reshape(len(values), -1)[:, int(np.ravel_multi_index(which, values.shape[1:]))]
    return found


def usable(*values: Array) -> Array:
    """Which values can be drawn: numbers that do not belong to a run that diverged."""
    joined = np.concatenate(values)
    return joined[np.abs(joined) < _HUGE]


def _top(values: Array, percent: float = 100.0) -> float:
    """The maximum, or another percentile; 0 if there is no number."""
    values = usable(values.ravel())
    return float(np.percentile(values, percent)) if len(values) else 0.0


# ---- lines and limits -----------------------------------------------------------------------------------


def line(axes: Axes, t: Array, values: Array, look: Look) -> None:
    """Draw a line, if there is a number to draw; a long line becomes an image inside a vector file."""
    n = min(len(t), len(values))
    values = np.where(np.abs(values[:n]) < _HUGE, values[:n], np.nan)
    label, options = look
    if np.isfinite(values).any():
        axes.plot(t[:n], values, label=label, rasterized=n > _RASTER, **options)


def _band(axes: Axes, run: Solution, values: Array, spread: Array | None, look: Look) -> None:
    """Draw a band of one standard deviation of replicas about their mean, where they were recorded."""
    if spread is not None and np.isfinite(spread).any():
        axes.fill_between(run.t, values - spread, values + spread, color=look[1]["color"], alpha=0.2, lw=0)


def from_zero(axes: Axes, tops: Iterable[float]) -> None:
    """Let the vertical axis begin at zero and end a little above the largest of the tops."""
    axes.set_ylim(0, 1.05 * (max(tops, default=0.0) or 1.0))


def fit(axes: Axes, known: Array, zero: bool, log: bool = True, decades: float = DECADES) -> None:
    """Choose a logarithmic axis if values span decades; else one from zero, if that wastes no more than half of it."""
    low, high = float(known.min()), float(known.max())
    if log and low > 0 and high / low > 10**decades:
        axes.set_yscale("log")
        return
    room = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    axes.set_ylim(0.0 if zero and 0 <= low < 0.5 * high else low - room, high + room)
