"""The work–precision diagram: error in w against gradient equivalents per unit time."""

from __future__ import annotations

import math
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

STYLES = {  # marker and line alone distinguish them
    "macro step": ("o", "-", "black"),
    "macro step, differences": ("s", "--", "black"),
    "Euler": ("^", ":", "0.35"),
    "macro step, mixed": ("v", "", "#35978f"),
    "Runge–Kutta 4": ("D", "-.", "0.35"),
    "paper's scheme": ("*", "", "0.0"),
}


def work_precision(cases: dict[str, dict[str, Any]]) -> Figure | None:
    """One panel for each case with swept tolerances; None if there is no such case."""
    panels = {name: about for name, about in cases.items() if _is_swept(about["rows"])}
    if not panels:
        return None
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4.4 * columns, 4.0 * rows), layout="constrained")
    handles: dict[str, Any] = {}
    first: Any = None
    for i, (name, about) in enumerate(panels.items()):
        axes = figure.add_subplot(rows, columns, i + 1, sharex=first, sharey=first)
        first = first or axes
        for family, (marker, line, colour) in STYLES.items():
            points = sorted(
                (row["canonical"], row["error_w"])
                for row in about["rows"]
                if row["family"] == family
                and row.get("canonical")
                and row.get("error_w")
                and row["status"] == "SUCCESS"
            )
            if points:
                size = 11 if marker == "*" else 6
                (handles[family],) = axes.loglog(
                    *zip(*points, strict=True), marker=marker, linestyle=line, color=colour, markersize=size,
                    markerfacecolor="white" if marker in "s^" else colour, label=family,
                )  # fmt: skip
        axes.set_title(name.removesuffix(" (short hard run)"), fontsize=10)
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(True, which="major", color="0.9")
        axes.set_xlabel("gradient equivalents per unit time")
        axes.set_ylabel("largest error in w")
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure


def _is_swept(rows: list[dict[str, Any]]) -> bool:
    """Whether a case has a curve to draw: a short run with macro steps at four tolerances."""
    rows = [row for row in rows if row["kind"] == "hard"]
    return len({row["knob"] for row in rows if row["family"] == "macro step" and "error_w" in row}) >= 4
