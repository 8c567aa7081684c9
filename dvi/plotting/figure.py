"""The paper's figure of a run (Figs. 2, 4, 6): train loss, effective eigenvalues, distances, and the learning rate.

One legend below the panels applies to all of them: a line means the same process everywhere.

Figures are made without pyplot, so there is no window, no global list of figures and no backend to choose.  The
settings of matplotlib are changed only while a figure is made.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dvi.plotting.panels import Panel, duration, panels
from dvi.plotting.style import LEGEND, ONSET, rank, settings
from dvi.results.comparison import Comparison
from dvi.results.solution import Solution
from dvi.results.status import Status
from dvi.storage.files import replacing, writable

try:
    import matplotlib.style
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter
except ImportError as error:
    raise ImportError("Drawing needs matplotlib: pip install 'dvi-flows[plot]'.") from error

#: Rows, columns, and the height of the figure per width, by the number of panels.
_LAYOUTS = {0: (1, 1, 0.72), 1: (1, 1, 0.72), 2: (1, 2, 0.52), 3: (1, 3, 0.42), 4: (2, 2, 0.84)}


class Picture(Figure):
    """A matplotlib figure that a notebook displays without pyplot."""

    def _repr_html_(self) -> str:
        data = io.BytesIO()
        self.savefig(data, format="png", dpi=120)
        code = base64.b64encode(data.getvalue()).decode()
        return f'<img src="data:image/png;base64,{code}" style="max-width:100%"/>'


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

    Panels without data are left out, so the comparison may have any subset of runs, and need not be finished.

    Args:
        race: a result of :func:`dvi.compare` or :func:`dvi.load`.
        path: a file for the figure; its ending determines the format (.pdf and .svg contain vectors, .png has 200 dots
            an inch).
        sigma: standard deviation of the Gaussian time averages of the optimizer, unit times; by default 50 as in the
            paper, or a tenth of the run if that is less.
        leading: largest number of eigenvalues to draw for each process.
        title: title of the figure, instead of the method and the problem.
        width: width of the figure, inches.
        font_size: size of the letters, points.

    Returns:
        the figure, which a notebook displays.

    Raises:
        ValueError: if sigma, leading, width or font_size is not positive, or matplotlib does not know the format.
        StoreError: if the file cannot be written; an older one is then intact.
    """
    if sigma is None:
        sigma = min(50.0, duration(race) / 10) or 1.0
    for name, value, unit in (
        ("sigma", sigma, ", in unit times (the paper's is 50)"),
        ("leading", leading, ""),
        ("width", width, ", in inches"),
        ("font_size", font_size, ", in points"),
    ):
        if not value > 0:
            raise ValueError(f"{name}={value!r} must be positive{unit}.")
    with matplotlib.style.context(["default", settings(font_size)]):
        shown = panels(race, float(sigma), int(leading))
        rows, columns, height = _LAYOUTS[len(shown)]
        grid = [[_with_moments(race, panel) for panel in shown[i * columns :][:columns]] for i in range(rows)]
        figure = _draw(grid, width, width * height, font_size, letters=True)
        _legend(figure, sigma)
        figure.suptitle(_title(race) if title is None else title, linespacing=1.35)
        _save(figure, path)
    return figure


def arrange(
    grid: Sequence[Sequence[Panel | None]],
    path: str | Path | None = None,
    *,
    sigma: float,
    title: str = "",
    width: float = 7.2,
    row_height: float = 2.2,
    font_size: float = 8.0,
    letters: bool = True,
) -> Figure:
    """Draw panels in rows, with one legend for all of them.

    Args:
        grid: the rows; None leaves a place empty.
        path: a file for the figure, see :func:`plot_comparison`.
        sigma: standard deviation of the time averages in the legend, unit times.
        title: the title above the panels.
        width: width of the figure, inches.
        row_height: height of a row, inches.
        font_size: size of the letters, points.
        letters: whether the titles of panels begin with (a), (b), ….

    Raises:
        ValueError, StoreError: as for :func:`plot_comparison`.
    """
    with matplotlib.style.context(["default", settings(font_size)]):
        figure = _draw(grid, width, row_height * len(grid), font_size, letters)
        _legend(figure, sigma)
        figure.suptitle(title, linespacing=1.35)
        _save(figure, path)
    return figure


def _save(figure: Figure, path: str | Path | None) -> None:
    if path is not None:
        target = picture(path)
        with replacing(target) as temporary:
            figure.savefig(temporary, format=target.suffix[1:], dpi=200, facecolor="white")


def picture(path: str | Path) -> Path:
    """The path of a figure, after a check that it can be written; without an ending it gets .png.

    Raises:
        ValueError: if matplotlib does not know the format.
        StoreError: if the file cannot be written.
    """
    path = writable(path)
    if not path.suffix:
        path = writable(path.with_name(f"{path.name}.png"))
    formats = FigureCanvasAgg.get_supported_filetypes()
    if path.suffix[1:].lower() not in formats:
        raise ValueError(f"{path}: matplotlib cannot write the format {path.suffix}; choose {', '.join(formats)}.")
    return path


def plot_solution(solution: Solution, path: str | Path | None = None, **options: Any) -> Figure:
    """Draw one run: loss, effective eigenvalues, gradient or step length, and learning rate or oscillations.

    Args:
        solution: a result of :func:`dvi.solve` or :func:`dvi.load`.
        path: a file for the figure, see :func:`plot_comparison`.
        options: further arguments of :func:`plot_comparison`.

    Raises:
        ValueError, StoreError: as for :func:`plot_comparison`.
    """
    alone = Comparison(solution.t, {solution.name: solution}, {}, solution.status, about=solution.about)
    return plot_comparison(alone, path, **options)


# ---- the figure -----------------------------------------------------------------------------------------


def _with_moments(race: Comparison, panel: Panel) -> Panel:
    """The panel with marks at the edge of stability and at stretches that were too stiff for longer steps."""
    by_rank = sorted(race.runs, key=lambda name: name != "central")  # the central flow first, if it exists
    onset = next((b[0] for name in by_rank for b in race.runs[name].breakpoints if b[1] == "enter"), None)

    def draw(axes: Axes) -> None:
        panel.draw(axes)
        for start, end in race.runs["central"].about.get("unit_steps", []) if "central" in race.runs else []:
            axes.axvspan(start, end, color="0.93", linewidth=0, zorder=0)
        if onset is not None:
            axes.axvline(onset, lw=0.7, zorder=0.5, label=f"edge of stability, from step {onset:.3g}", **ONSET)

    return replace(panel, draw=draw, until=duration(race) or 1)


def _draw(grid: Sequence[Sequence[Panel | None]], width: float, height: float, font: float, letters: bool) -> Figure:
    figure = Picture(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    layout: Any = figure.get_layout_engine()
    layout.set(w_pad=0.05, h_pad=0.05, wspace=0.05, hspace=0.05)
    columns, names = max(map(len, grid), default=1), iter("abcdefghijklmnopqrstuvwxyz")
    for i, row in enumerate(grid):
        for j, panel in enumerate(row):
            if panel is None:
                continue
            axes = figure.add_subplot(len(grid), columns, i * columns + j + 1)
            panel.draw(axes)
            axes.set(xlabel=panel.xlabel, ylabel=panel.label)
            if panel.until is not None:
                axes.set_xlim(0, panel.until)
            _scale(axes)
            pad = 4 + (1.3 * (font - 1) if any(other and other.remark for other in row) else 0)  # room for remarks
            axes.set_title(f"({next(names)}) {panel.title}" if letters else panel.title, pad=pad + 3)
            place: Any = {"xycoords": "axes fraction", "textcoords": "offset points", "va": "top"}
            axes.annotate(panel.remark, (0, 1), xytext=(0, pad), fontsize=font - 1, color="0.25", **place)
    if not figure.axes:
        axes = figure.add_subplot()
        axes.set_axis_off()
        axes.text(0.5, 0.5, "Nothing recorded yet.", ha="center", va="center")
    return figure


def _scale(axes: Axes) -> None:
    """Put a power of ten that all ticks share into the label, where it is easily seen."""
    if axes.get_yscale() != "linear":
        return
    largest = max(map(abs, axes.get_ylim()))
    exponent = int(np.floor(np.log10(largest))) if largest > 0 else 0
    if -3 < exponent < 4:
        axes.ticklabel_format(axis="y", style="plain", useOffset=False)
        return
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 10**exponent:.6g}"))
    axes.set_ylabel(axes.get_ylabel().replace("(", f"(10$^{{{exponent}}}$ ", 1))


def _legend(figure: Figure, sigma: float) -> None:
    """One legend for all panels, below them: a line means the same process everywhere."""
    found: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    if not found:
        return
    labels = sorted(found, key=lambda label: (label.startswith("edge"), rank(label, LEGEND)))
    widest = max(1, int(figure.get_figwidth() / 2.3))  # the width of a long label, inches
    columns = min(len(labels), 3 if len(labels) != 4 else 2, widest)
    labels = [label for column in range(columns) for label in labels[column::columns]]  # matplotlib fills columns first
    figure.legend(
        [found[label] for label in labels],
        [label.replace("σ", f"σ = {sigma:.3g} steps") for label in labels],
        loc="outside lower center",
        ncols=columns,
        handlelength=2.8,
        columnspacing=1.6,
        labelspacing=0.35,
        markerscale=1.6,
    )


# ---- the title ------------------------------------------------------------------------------------------

_LETTERS = {"lr": "η", "momentum": "β", "beta1": "β$_1$", "beta2": "β$_2$", "eps": "ε", "weight_decay": "λ"}
_LONG = 90  # characters of a title, with the $ of letters, that fit on one line
_SPOKEN = {"bias_correction=True": "bias-corrected", "one_sided=True": "one-sided"}
_UNTOLD = re.compile(r"(shapes|memory)=|(bias_correction|one_sided)=False|eps=0(\.0)?$")
_NAMES = {
    "GradientDescent": "Gradient descent",
    "RMSPropNorm": "RMSProp-Norm",
    "AdaGrad": "AdaGrad",
    "AdaGradNorm": "AdaGrad-Norm",
    "CentredRMSProp": "Centred RMSProp",
    "HeavyBall": "Heavy ball",
    "NormalizedGD": "Normalised gradient descent",
    "QuasiHyperbolic": "Quasi-hyperbolic momentum",
}


def _title(race: Comparison) -> str:
    """The title: method and problem, the warm start if any, and the last time of an unfinished run."""
    about = race.about
    problem = re.sub(r"^\w+\('([^']*)', dim=(\d+).*", r"\1 (\2 weights)", str(about.get("problem", "")))
    method = _method_in_words(str(about.get("method", "")))
    told = [part for part in (method, problem and f"on {problem}") if part]
    lines = [" ".join(told)] if sum(map(len, told)) <= _LONG else told
    warm, steps = about.get("warm_start"), about.get("steps")
    if isinstance(warm, (int, float)) and warm > 0:
        lines.append(f"time 0 is after {warm:g} step{'s' if warm != 1 else ''} of warm start")
    if race.status is not Status.SUCCESS:
        of = f" of {steps:g}" if isinstance(steps, (int, float)) else ""
        lines.append(f"unfinished: step {duration(race):g}{of} ({race.status.name.lower().replace('_', ' ')})")
    return "\n".join(filter(None, lines))


def _method_in_words(method: str) -> str:
    """``RMSProp(lr=0.002, beta2=0.99, bias_correction=True)`` as: RMSProp (η = 0.002, β₂ = 0.99, bias-corrected)."""
    name, _, inside = method.partition("(")
    words = _NAMES.get(name) or re.sub(r"(?<=[a-z])(?=[A-Z][a-z])", " ", name)
    told = []
    for setting in re.split(r", (?=[A-Za-z_]\w*=)", inside.removesuffix(")")):  # a value may contain commas
        name, _, value = setting.partition("=")
        if value.startswith("<"):  # a function; its address says nothing
            told.append(f"{_LETTERS.get(name, name)} scheduled")
        elif not _UNTOLD.match(setting):
            told.append(_SPOKEN.get(setting, f"{_LETTERS[name]} = {value}" if name in _LETTERS else setting))
    told = [re.sub(r"^steps_before=(\d+)$", r"after \1 steps", setting) for setting in told]
    return f"{words} ({', '.join(told)})" if any(told) else words
