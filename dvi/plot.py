"""The paper's picture of a run (Figs. 2, 4, 6): train loss, effective eigenvalues, distances, and what is adapted.

One legend stands below the panels, off the curves: a line means the same process in all of them.

Figures are made without pyplot: no window, no global list of figures, no backend to choose.  Only the style is set
through matplotlib's settings, for as long as a figure is being made.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dvi.captions import caption
from dvi.compare import Comparison
from dvi.curves import duration, time_average
from dvi.looks import LEGEND, ONSET, SETTINGS, Style, rank
from dvi.panels import Panel, choose
from dvi.solution import Solution

try:
    import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FuncFormatter
except ImportError as error:
    raise ImportError("Drawing needs matplotlib: pip install 'dvi-flows[plot]'.") from error

#: Rows, columns, and the height of the figure per width, by the number of panels.
_LAYOUTS = {0: (1, 1, 0.72), 1: (1, 1, 0.72), 2: (1, 2, 0.52), 3: (1, 3, 0.42), 4: (2, 2, 0.84)}


class Picture(Figure):
    """A matplotlib figure that shows itself in a notebook, without pyplot."""

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
    if sigma is None:
        sigma = min(50.0, duration(race.runs) / 10) or 1.0
    for name, value, unit in (
        ("sigma", sigma, ", in unit times (the paper's is 50)"),
        ("leading", leading, ""),
        ("width", width, ", in inches"),
        ("font_size", font_size, ", in points"),
    ):
        if not value > 0:
            raise ValueError(f"{name}={value!r} must be positive{unit}.")
    style = Style(float(sigma), float(font_size), int(leading))
    settings: Any = SETTINGS | {"font.size": style.font}
    with matplotlib.rc_context(settings):
        figure = _draw(race, style, width, caption(race) if title is None else title)
        if path is not None:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, dpi=200, facecolor="white")
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


# ---- the figure -----------------------------------------------------------------------------------------


def _draw(race: Comparison, style: Style, width: float, title: str) -> Figure:
    panels = choose(race, style)
    rows, columns, height = _LAYOUTS[len(panels)]
    figure = Picture(figsize=(width, width * height), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    layout: Any = figure.get_layout_engine()
    layout.set(w_pad=0.05, h_pad=0.05, wspace=0.05, hspace=0.05)
    by_rank = sorted(race.runs, key=lambda name: name != "central")  # the central flow's edge, if it is there
    onset = next((b[0] for name in by_rank for b in race.runs[name].breakpoints if b[1] == "enter"), None)
    first: Axes | None = None
    for i, panel in enumerate(panels):
        axes = figure.add_subplot(rows, columns, i + 1, sharex=first)
        first = first or axes
        panel.draw(axes)
        for start, end in race.runs["central"].about.get("unit_steps", []) if "central" in race.runs else []:
            axes.axvspan(start, end, color="0.93", linewidth=0, zorder=0)  # where it was too stiff for longer steps
        if onset is not None:
            axes.axvline(onset, lw=0.7, zorder=0.5, label="_onset", **ONSET)
        axes.set_xlim(0, duration(race.runs) or 1)
        row = panels[i - i % columns :][:columns]
        _dress(axes, panel, "abcd"[i], room=any(other.remark for other in row))
    if not panels:
        axes = figure.add_subplot()
        axes.set_axis_off()
        axes.text(0.5, 0.5, "Nothing recorded yet.", ha="center", va="center", fontsize=style.font)
    _legend(figure, onset, style)
    if title:
        figure.suptitle(title, fontsize=style.font + 1, linespacing=1.35)
    return figure


def _dress(axes: Axes, panel: Panel, letter: str, room: bool) -> None:
    """Labels, ticks and the panel's title, with ``room`` for a remark below if its row has any."""
    style = panel.style
    axes.set_xlabel("time (optimizer steps)", fontsize=style.font)
    axes.set_ylabel(panel.label, fontsize=style.font)
    for which, width, length in (("major", 0.6, 3.0), ("minor", 0.4, 1.8)):
        axes.tick_params(which=which, width=width, length=length, labelsize=style.small, colors="black")
    for name, spine in axes.spines.items():
        spine.set_linewidth(0.6)
        spine.set_visible(name in ("left", "bottom"))
    _scale(axes)
    pad = 4 + (1.3 * style.small if room else 0)
    axes.set_title(f"({letter}) {panel.title}", loc="left", fontsize=style.font, fontweight="bold", pad=pad + 3)
    if panel.remark:
        axes.annotate(
            panel.remark,
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


def _legend(figure: Figure, onset: float | None, style: Style) -> None:
    """One legend for all panels, below them: a line means the same process everywhere."""
    found: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    if not found:
        return
    if onset is not None:
        found[f"edge of stability, from step {onset:.3g}"] = Line2D([], [], lw=0.9, **ONSET)
    labels = sorted(found, key=lambda label: rank(label, LEGEND))
    columns = min(len(labels), 3 if len(labels) != 4 else 2)
    figure.legend(
        _by_rows([found[label] for label in labels], columns),
        _by_rows([label.replace("σ", f"σ = {style.sigma:.3g} steps") for label in labels], columns),
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


__all__ = ["Picture", "plot_comparison", "plot_solution", "time_average"]
