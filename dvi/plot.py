"""The paper's picture of a run (Figs. 2, 4, 6): train loss, effective eigenvalues, distances, and what is adapted.

The optimizer is drawn in blue, its central flow in black, the stable flow in grey; they differ in width, dash and
brightness, too, so the picture survives a black-and-white printer.  One legend stands below the panels, off the
curves: a line means the same process in all of them.

Figures are made without pyplot: no window, no global list of figures, no backend to choose.  Only the style is set
through matplotlib's settings, for as long as a figure is being made.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dvi.compare import Comparison, gaussian_average
from dvi.solution import Solution
from dvi.solvers.protocol import Array
from dvi.status import Status

try:
    import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FuncFormatter
except ImportError as error:
    raise ImportError("Drawing needs matplotlib: pip install 'dvi-flows[plot]'.") from error

CRITICAL = 2.0  # the threshold of effective eigenvalues

_BLUE, _PALE, _GREY, _RED = "#3b82c4", "#a9cdec", "#8c8c8c", "#b2182b"
_OPTIMIZER: dict[str, Any] = {"color": _BLUE, "lw": 2.4, "solid_capstyle": "round"}
_RAW: dict[str, Any] = {"color": _PALE, "lw": 0.6}
_CENTRAL: dict[str, Any] = {"color": "black", "lw": 1.1}
_PREDICTED: dict[str, Any] = {"color": _RED, "lw": 1.2, "ls": (0, (4, 1.6))}
_STABLE: dict[str, Any] = {"color": _GREY, "lw": 1.3, "ls": (0, (1.2, 1.2))}
_OTHERS: tuple[dict[str, Any], ...] = (
    {"color": "0.45", "lw": 1.0, "ls": "-."},
    {"color": "0.45", "lw": 1.0, "ls": (0, (6, 2, 1, 2, 1, 2))},
)

_DOTS: dict[str, Any] = {"ls": "none", "marker": "o", "ms": 1.9, "mew": 0, "color": _BLUE, "alpha": 0.6, "zorder": 1.5}

_NAMES = {"discrete": "optimizer", "central": "central flow", "stable": "stable flow"}
_STYLES = {"discrete": _OPTIMIZER, "central": _CENTRAL, "stable": _STABLE}

_EVERY, _AVERAGED = "optimizer, every step", "optimizer, averaged (σ)"
_PREDICTION = "central flow’s predicted time average"
_ORDER = (_EVERY, _AVERAGED, _PREDICTION, "central flow", "stable flow")
_TIME = "time (optimizer steps)"
_RASTER = 20_000  # points of one line above which a vector file holds it as an image
_HUGE = 1e100  # values beyond are those of a run that diverged, and are not drawn
_DECADES = 1.5  # a loss that spans more is drawn on a logarithmic axis

_SETTINGS: dict[str, Any] = {
    "text.color": "black",
    "axes.facecolor": "white",
    "axes.edgecolor": "black",
    "axes.labelcolor": "black",
    "axes.formatter.use_mathtext": True,
    "axes.formatter.limits": (-3, 4),
    "axes.unicode_minus": True,
    "mathtext.fontset": "dejavusans",
    "font.family": "sans-serif",
    "lines.antialiased": True,
    "path.simplify": True,
}


class Picture(Figure):
    """A matplotlib figure that shows itself in a notebook, without pyplot."""

    def _repr_html_(self) -> str:
        data = io.BytesIO()
        self.savefig(data, format="png", dpi=120)
        code = base64.b64encode(data.getvalue()).decode()
        return f'<img src="data:image/png;base64,{code}" style="max-width:100%"/>'


@dataclass(frozen=True)
class _Style:
    """What the panels ask of the call: σ of the averages (unit times), font size (points), how many eigenvalues."""

    sigma: float
    font: float
    leading: int

    @property
    def small(self) -> float:
        """Font size of tick labels and remarks."""
        return self.font - 1.0


def plot_comparison(
    race: Comparison,
    path: str | Path | None = None,
    *,
    sigma: float | None = None,
    leading: int = 8,
    title: str | None = None,
    width: float = 7.2,
    font_size: float = 8.0,
) -> Figure:
    """Draw a comparison: loss, effective eigenvalues, weight-space distances, and learning rate or oscillations.

    Panels without data are left out, so any subset of runs will do, and a run that is not finished.

    Args:
        race: what :func:`dvi.compare` gave or :func:`dvi.load` read.
        path: a file to save to; its ending says the format (.pdf and .svg hold vectors, .png 200 dots an inch).
        sigma: standard deviation of the Gaussian time averages of the optimizer, unit times; by default 50 as in the
            paper, or a tenth of the run if that is less.
        leading: how many eigenvalues of each process are drawn, at most.
        title: instead of the method and the problem.
        width: of the figure, inches.
        font_size: points.

    Returns:
        the figure; in a notebook it shows itself.

    Raises:
        ValueError: if sigma, leading, width or font_size is not positive, or matplotlib knows no such format.
        OSError: if the file cannot be written.
    """
    for name, value in (("leading", leading), ("width", width), ("font_size", font_size)):
        if not value > 0:
            raise ValueError(f"{name}={value!r} must be positive.")
    style = _Style(_sigma(race.runs, sigma), float(font_size), int(leading))
    settings: Any = _SETTINGS | {"font.size": style.font}
    with matplotlib.rc_context(settings):
        figure = _draw(race, style, width, _title(race) if title is None else title)
        if path is not None:
            _save(figure, Path(path))
    return figure


def plot_solution(solution: Solution, path: str | Path | None = None, **options: Any) -> Figure:
    """Draw one run: loss, effective eigenvalues, gradient or step length, and learning rate or oscillations.

    Args:
        solution: what :func:`dvi.solve` gave or :func:`dvi.load` read.
        path: a file to save to, see :func:`plot_comparison`.
        options: further arguments of :func:`plot_comparison`.

    Raises:
        ValueError, OSError: as :func:`plot_comparison`.
    """
    alone = Comparison(
        t=solution.t,
        runs={solution.name: solution},
        distance={},
        status=solution.status,
        notes=solution.notes,
        about=solution.about,
    )
    return plot_comparison(alone, path, **options)


def time_average(run: Solution, values: Array, sigma: float) -> Array:
    """Average a run's values over time with a Gaussian of ``sigma`` unit times, gaps (NaN) left out."""
    values = np.asarray(values, dtype=np.float64)
    known = np.isfinite(values)
    if known.all():
        return gaussian_average(run.t, values, sigma)
    total = gaussian_average(run.t, np.where(known, values, 0.0), sigma)
    weight = gaussian_average(run.t, known.astype(np.float64), sigma)
    return np.where(weight > 1e-12, total / np.maximum(weight, 1e-12), np.nan)


# ---- the figure -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Panel:
    """One panel: its title, what a reader should know about it, and what draws it."""

    title: str
    remark: str
    draw: Callable[[Axes, Comparison, _Style], None]


def _draw(race: Comparison, style: _Style, width: float, title: str) -> Figure:
    runs = race.runs
    panels = _choose(race)
    rows, columns = (2, 2) if len(panels) == 4 else (1, max(1, len(panels)))
    height = width * (0.84 if rows == 2 else {1: 0.72, 2: 0.52, 3: 0.42}[columns])
    figure = Picture(figsize=(width, height), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    layout: Any = figure.get_layout_engine()
    layout.set(w_pad=0.05, h_pad=0.05, wspace=0.05, hspace=0.05)
    first: Axes | None = None
    end = max((float(run.t[-1]) for run in runs.values() if len(run.t)), default=0.0)
    onset = next((b[0] for run in runs.values() for b in run.breakpoints if b[1] == "enter"), None)
    for i, (panel, letter) in enumerate(zip(panels, "abcd", strict=False)):
        axes = figure.add_subplot(rows, columns, i + 1, sharex=first)
        first = first or axes
        panel.draw(axes, race, style)
        if onset is not None:
            axes.axvline(onset, color="0.45", lw=0.7, ls=(0, (1, 2)), zorder=0.5, label="_onset")
        axes.set_xlim(0, end if end > 0 else 1)
        row = panels[i - i % columns : i - i % columns + columns]
        _dress(axes, f"({letter}) {panel.title}", panel.remark, style, any(other.remark for other in row))
    if not panels:
        axes = figure.add_subplot()
        axes.set_axis_off()
        axes.text(0.5, 0.5, "Nothing recorded yet.", ha="center", va="center", fontsize=style.font)
    _legend(figure, onset, style)
    if title:
        figure.suptitle(title, fontsize=style.font + 1, linespacing=1.35)
    return figure


def _choose(race: Comparison) -> list[_Panel]:
    """Choose the panels there is something to draw in."""
    runs = race.runs.values()
    panels: list[_Panel] = []
    if any(np.isfinite(run.loss).any() for run in runs):
        predicts = any(_differ(run.predicted_loss, run.loss) for run in runs)
        remark = "dashed: L + ½⟨H, Σ⟩ predicts the time average" if predicts else ""
        panels.append(_Panel("train loss", remark, _loss))
    if any(np.isfinite(run.eigenvalues).any() for run in runs):
        ticks = "ticks: breakpoints (long: enter, short: leave)" if any(run.breakpoints for run in runs) else ""
        panels.append(_Panel("effective eigenvalues", ticks, _eigenvalues))
    if any(np.isfinite(values).any() for values in race.distance.values()):
        if "discrete" in race.runs:
            remark = "from the optimizer to each flow; pale: ‖w$_{t+1}$ − w$_t$‖"
        else:
            remark = "between " + " and ".join(_name(name) for name in next(iter(race.distance)))
        panels.append(_Panel("distance in weight space", remark, _distances))
    elif any(_present(run, "grad_sq") for run in runs):
        panels.append(_Panel("squared gradient norm", "", _gradient))
    if any(_varies(run.series.get("effective_lr", np.empty(0))) for run in runs):
        panels.append(_Panel("effective learning rate", "harmonic mean over weights", _learning_rate))
    elif any(np.nan_to_num(run.series.get("trace", np.empty(0))).any() for run in runs):
        panels.append(_Panel("size of the oscillations", "trace of their covariance Σ", _trace))
    return panels


def _dress(axes: Axes, title: str, remark: str, style: _Style, room: bool) -> None:
    """Labels, ticks and the panel's title, with ``room`` for a remark below if its row has any."""
    axes.set_xlabel(_TIME, fontsize=style.font)
    axes.tick_params(labelsize=style.small, color="black", labelcolor="black", width=0.6, length=3, which="major")
    axes.tick_params(labelsize=style.small, color="black", labelcolor="black", width=0.4, length=1.8, which="minor")
    for name, spine in axes.spines.items():
        spine.set_linewidth(0.6)
        spine.set_visible(name in ("left", "bottom"))
    axes.yaxis.label.set_fontsize(style.font)
    _scale(axes)
    pad = 4 + (1.3 * style.small if room else 0)
    axes.set_title(title, loc="left", fontsize=style.font, fontweight="bold", pad=pad + 3)
    if remark:
        axes.annotate(
            remark,
            (0, 1),
            xytext=(0, pad),
            xycoords="axes fraction",
            textcoords="offset points",
            va="top",
            fontsize=style.small,
            color="0.25",
        )


def _scale(axes: Axes) -> None:
    """Put a power of ten common to all ticks into the label, where it is not overlooked."""
    if axes.get_yscale() != "linear":
        return
    largest = max(map(abs, axes.get_ylim()))
    exponent = int(np.floor(np.log10(largest))) if largest > 0 else 0
    if -3 < exponent < 4:
        axes.ticklabel_format(axis="y", style="plain", useOffset=False)
        return
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 10**exponent:.6g}"))
    label = axes.get_ylabel()
    axes.set_ylabel(label.replace("(", f"(10$^{{{exponent}}}$ ", 1))


def _legend(figure: Figure, onset: float | None, style: _Style) -> None:
    """One legend for all panels, below them: a line means the same process everywhere."""
    found: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    if not found:
        return
    order = [label for label in _ORDER if label in found]
    order += [label for label in found if label not in _ORDER]
    handles = [found[label] for label in order]
    labels = [label.replace("σ", f"σ = {style.sigma:.3g} steps") for label in order]
    if onset is not None:
        handles.append(Line2D([], [], color="0.45", lw=0.9, ls=(0, (1, 2))))
        labels.append(f"edge of stability, from step {onset:.3g}")
    columns = min(len(labels), 3 if len(labels) != 4 else 2)
    figure.legend(
        _by_rows(handles, columns),
        _by_rows(labels, columns),
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        fontsize=style.font - 0.7,
        handlelength=2.8,
        columnspacing=1.6,
        labelspacing=0.35,
    )


def _by_rows(items: Sequence[Any], columns: int) -> list[Any]:
    """Items reordered so that a legend, which fills column by column, reads row by row."""
    return [item for column in range(columns) for item in items[column::columns]]


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=200, facecolor="white")


# ---- the panels -----------------------------------------------------------------------------------------


def _loss(axes: Axes, race: Comparison, style: _Style) -> None:
    axes.set_ylabel("train loss L (units of the loss)")
    _with_average(axes, race, style, lambda run: run.loss, lambda run: run.predicted_loss)
    _limits(axes, [run.loss for run in race.runs.values()], zero=True)


def _gradient(axes: Axes, race: Comparison, style: _Style) -> None:
    axes.set_ylabel("‖∇L‖² (units of loss²/w²)")

    def values(run: Solution) -> Array:
        return run.series.get("grad_sq", np.empty(0))

    _with_average(axes, race, style, values, lambda run: run.series.get("predicted_grad_sq", np.empty(0)))
    _limits(axes, [values(run) for run in race.runs.values()], zero=True)


def _eigenvalues(axes: Axes, race: Comparison, style: _Style) -> None:
    axes.set_ylabel("effective eigenvalue (critical: 2)")
    axes.axhline(CRITICAL, color="0.6", lw=0.6, zorder=1.2, label="_threshold")
    high, seen = 1.25 * CRITICAL, [CRITICAL]
    for name, run in _below_first(race.runs):
        t, table = _leading(run, 1 if name == "stable" else style.leading)
        if not table.size:
            continue
        finite = table[np.isfinite(table)]
        if name == "discrete":
            looks = _DOTS
            high = max(high, float(np.percentile(finite, 99.5)))
        else:
            looks = {"zorder": 2.2} | _looks(name)
            if name != "stable" or len(race.runs) == 1:
                high = max(high, float(finite.max()))
        for j, column in enumerate(table.T):
            label = f"optimizer, every {_spacing(t):g} steps" if name == "discrete" else _name(name)
            _line(axes, t, column, "_" if j else label, **looks)
        seen.extend(finite)
    high = min(high, 2 * CRITICAL) if len(race.runs) > 1 else high
    low = float(np.percentile(seen, 1))
    axes.set_ylim(max(0.0, min(0.75 * CRITICAL, low) - 0.08), 1.06 * high)
    _beyond(axes, race, style)
    across = axes.get_xaxis_transform()
    for kind, length, colour in (("enter", 0.055, "black"), ("leave", 0.028, "0.35")):
        times = [b[0] for run in race.runs.values() for b in run.breakpoints if b[1] == kind]
        if times:
            axes.vlines(times, 1 - length, 1, colors=colour, lw=0.8, transform=across, label="_" + kind)


def _beyond(axes: Axes, race: Comparison, style: _Style) -> None:
    """Say how far the stable flow's sharpness goes where it leaves the panel."""
    if "stable" not in race.runs:
        return
    t, table = _leading(race.runs["stable"], 1)
    high = axes.get_ylim()[1]
    outside = np.flatnonzero(table[:, 0] > high) if table.size else np.empty(0)
    if len(outside):
        where = float(t[outside[0]])
        right = where < 0.6 * float(t[-1])
        axes.annotate(
            f"stable flow: up to {np.nanmax(table):.3g} ↑",
            (where, high),
            xytext=(5 if right else -5, -10),
            textcoords="offset points",
            ha="left" if right else "right",
            va="top",
            fontsize=style.small,
            color="0.25",
            bbox={"fc": "white", "ec": "none", "alpha": 0.85, "pad": 1.0},
        )


def _distances(axes: Axes, race: Comparison, style: _Style) -> None:
    axes.set_ylabel("distance ‖w − w′‖ (units of w)")
    tops = []
    optimizer = race.runs.get("discrete")
    if optimizer is not None and "step_length" in optimizer.series:
        step = optimizer.series["step_length"]
        _line(axes, optimizer.t, step, _EVERY, **_RAW)
        tops.append(_percentile(step, 99.5))
    for (a, b), values in reversed(race.distance.items()):
        n = min(len(values), len(race.t))
        others = [name for name in (a, b) if name != "discrete"]
        if len(others) == 2 and optimizer is not None:
            continue  # between two flows: says nothing about the optimizer
        looks = _looks(others[0])
        _line(axes, race.t[:n], values[:n], _name(others[0]) if len(others) == 1 else "_", **looks)
        tops.append(_percentile(values[:n], 100))
    axes.set_ylim(0, 1.05 * max([top for top in tops if top > 0], default=1.0))


def _trace(axes: Axes, race: Comparison, style: _Style) -> None:
    axes.set_ylabel("tr Σ (units of w²)")
    tops = []
    for name, run in _below_first(race.runs):
        values = run.series.get("trace", np.empty(0))
        if name == "discrete":
            mean = _inner_average(run, values, style.sigma)
            _line(axes, run.t, values, _EVERY, **_RAW)
            _line(axes, run.t, mean, _AVERAGED, **_OPTIMIZER)
            # bursts may leave the panel, so that the averages stay legible
            tops += [_percentile(mean, 100), min(2.5 * _percentile(mean, 100), _percentile(values, 100))]
        elif np.nan_to_num(values).any():
            _line(axes, run.t, values, _PREDICTION, **_PREDICTED)
            tops.append(_percentile(values, 100))
    axes.set_ylim(0, 1.05 * max([top for top in tops if top > 0], default=1.0))


def _learning_rate(axes: Axes, race: Comparison, style: _Style) -> None:
    axes.set_ylabel("learning rate (units of w²/loss)")
    drawn = []
    for name, run in _below_first(race.runs):
        values = run.series.get("effective_lr", np.empty(0))
        looks = _RAW | {"lw": 3.0} if name == "discrete" else _looks(name)
        _line(axes, run.t, values, _EVERY if name == "discrete" else _name(name), **looks)
        drawn.append(values)
    _limits(axes, drawn, zero=False)


def _with_average(
    axes: Axes,
    race: Comparison,
    style: _Style,
    values: Callable[[Solution], Array],
    predicted: Callable[[Solution], Array],
) -> None:
    """Draw a quantity of the optimizer, its time average, the flows' values and their prediction of the average."""
    for name, run in _below_first(race.runs):
        if name == "discrete":
            _line(axes, run.t, values(run), _EVERY, **_RAW)
            _line(axes, run.t, _inner_average(run, values(run), style.sigma), _AVERAGED, **_OPTIMIZER)
        else:
            _line(axes, run.t, values(run), _name(name), **_looks(name))
    for _, run in _below_first(race.runs):
        if _differ(predicted(run), values(run)):
            _line(axes, run.t, predicted(run), _PREDICTION, **_PREDICTED)


# ---- small things ---------------------------------------------------------------------------------------


def _line(axes: Axes, t: Array, values: Array, label: str, **looks: Any) -> None:
    """Draw a labelled line, if there is a number to draw; a long one is an image inside a vector file."""
    n = min(len(t), len(values))
    values = np.asarray(values[:n], dtype=np.float64)
    values = np.where(np.abs(values) < _HUGE, values, np.nan)
    if not np.isfinite(values).any():
        return
    axes.plot(t[:n], values, label=label, rasterized=n > _RASTER, **looks)


def _leading(run: Solution, count: int) -> tuple[Array, Array]:
    """Return times of looks and the ``count`` largest eigenvalues there, NaN where fewer are known."""
    table = np.asarray(run.eigenvalues, dtype=np.float64)[:, :count]
    n = min(len(table), len(run.t))
    looked = np.isfinite(table[:n]).any(axis=1)
    return run.t[:n][looked], table[:n][looked]


def _spacing(t: Array) -> float:
    return float(np.median(np.diff(t))) if len(t) > 1 else 1.0


def _below_first(runs: dict[str, Solution]) -> list[tuple[str, Solution]]:
    """Order the runs as they are painted: the optimizer, the stable flow, the central flow, others."""
    order = ("discrete", "stable", "central")
    return sorted(runs.items(), key=lambda item: order.index(item[0]) if item[0] in order else len(order))


def _name(name: str) -> str:
    return _NAMES.get(name, f"{name} flow")


def _looks(name: str) -> dict[str, Any]:
    return _STYLES.get(name, _OTHERS[sum(map(ord, name)) % len(_OTHERS)])


def _present(run: Solution, name: str) -> bool:
    return bool(np.isfinite(run.series.get(name, np.empty(0))).any())


def _percentile(values: Array, percent: float) -> float:
    values = values[np.isfinite(values)]
    return float(np.percentile(values, percent)) if len(values) else 0.0


def _inner_average(run: Solution, values: Array, sigma: float) -> Array:
    """Average over time where the window fits: within σ of either end it would lean to one side."""
    mean = time_average(run, values, sigma)
    n = min(len(mean), len(run.t))
    if n and run.t[n - 1] - run.t[0] > 4 * sigma:
        outside = (run.t[:n] < run.t[0] + sigma) | (run.t[:n] > run.t[n - 1] - sigma)
        mean = np.where(outside, np.nan, mean[:n])
    return mean


def _sigma(runs: dict[str, Solution], sigma: float | None) -> float:
    if sigma is not None:
        if not sigma > 0:
            raise ValueError(f"sigma={sigma!r} must be positive, in unit times (the paper's is 50).")
        return float(sigma)
    run = runs.get("discrete") or next(iter(runs.values()), None)
    duration = float(run.t[-1] - run.t[0]) if run is not None and len(run.t) > 1 else 0.0
    return min(50.0, duration / 10) or 1.0


def _varies(values: Array) -> bool:
    values = values[np.isfinite(values)]
    return len(values) > 1 and bool(np.ptp(values) > 1e-6 * np.abs(values).max())


def _differ(a: Array, b: Array) -> bool:
    """Whether a says anything that b does not."""
    n = min(len(a), len(b))
    known = np.isfinite(a[:n]) & np.isfinite(b[:n])
    return bool(known.any()) and not np.allclose(a[:n][known], b[:n][known], rtol=1e-12, atol=0)


def _limits(axes: Axes, drawn: Sequence[Array], zero: bool) -> None:
    """Choose a logarithmic axis where values span decades; else from zero, if that wastes no more than half."""
    known = np.concatenate([values[np.abs(values) < _HUGE] for values in drawn])
    if not len(known):
        return
    low, high = float(known.min()), float(known.max())
    if low > 0 and high / low > 10**_DECADES:
        axes.set_yscale("log")
        return
    room = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    axes.set_ylim(0.0 if zero and 0 <= low < 0.5 * high else low - room, high + room)


def _title(race: Comparison) -> str:
    """Name method and problem, and how the run ended unless it reached its end."""
    parts = []
    method, problem = str(race.about.get("method", "")), str(race.about.get("problem", ""))
    if method:
        parts.append(_method_in_words(method))
    if problem:
        parts.append("on " + _problem_in_words(problem))
    title = " ".join(parts)
    warm = re.search(r"Warm start: (\d+) steps", " ".join(race.notes))
    if warm:
        title += f"\ntime 0 is after {warm[1]} step{'s' if warm[1] != '1' else ''} of warm start"
    if race.status is not Status.SUCCESS:
        end = max((float(run.t[-1]) for run in race.runs.values() if len(run.t)), default=0.0)
        steps = race.about.get("steps")
        of = f" of {steps:g}" if isinstance(steps, (int, float)) else ""
        title += f"\nunfinished: step {end:g}{of} ({race.status.name.lower().replace('_', ' ')})"
    return title


def _method_in_words(method: str) -> str:
    """``RMSProp(lr=0.002, beta2=0.99, bias_correction=True)`` as RMSProp (η = 0.002, β₂ = 0.99, bias-corrected)."""
    name, _, inside = method.partition("(")
    inside = inside.removesuffix(")")
    inside = re.sub(r",? *bias_correction=False", "", inside).replace("bias_correction=True", "bias-corrected")
    inside = re.sub(r",? *eps=0(\.0)?(?=,|$)", "", inside)
    for field, letter in (("lr", "η"), ("beta1", "β$_1$"), ("beta2", "β$_2$"), ("eps", "ε")):
        inside = re.sub(rf"\b{field}=", f"{letter} = ", inside)
    words = re.sub(r"(?<=[a-z])(?=[A-Z][a-z])", " ", name).replace("RMSProp Norm", "RMSProp-Norm")
    words = words.replace("Gradient Descent", "Gradient descent")
    return f"{words} ({inside})" if inside else words


def _problem_in_words(problem: str) -> str:
    """``ModuleProblem('digits-mlp-mse', dim=3466, …)`` as digits-mlp-mse (3466 weights)."""
    found = re.match(r"\w+\('([^']*)', dim=(\d+)", problem)
    return f"{found[1]} ({found[2]} weights)" if found else problem


__all__ = ["Picture", "plot_comparison", "plot_solution", "time_average"]
