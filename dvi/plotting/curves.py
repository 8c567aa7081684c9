"""Further panels of the paper's figures: observations along a run, and several runs side by side.

A panel of curves gets its lines one by one, and can have an inset with the beginning.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from dvi.plotting.panels import DECADES, Panel, averaged, duration, fit, learning_rate, line, recorded, usable
from dvi.plotting.style import EDGES, EVERY, Look, of_flow
from dvi.results.comparison import Comparison
from dvi.results.solution import Solution
from dvi.solvers.eigen.block_method import CRITICAL
from dvi.solvers.protocol import Array

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: The look of the largest stable learning rate along the central flow.
LIMIT: Look = ("largest stable learning rate 2/S", {"color": "#e08214", "lw": 1.2, "ls": (0, (4, 1.6))})


@dataclass(frozen=True)
class Curve:
    """Values [n] at times [n], and the look of their line."""

    t: Array
    values: Array
    look: Look


def curves(
    title: str,
    label: str,
    lines: Sequence[Curve],
    *,
    remark: str = "",
    zero: bool = False,
    log: bool = True,
    decades: float = DECADES,
    inset: float | None = None,
    xlabel: str = "time (optimizer steps)",
) -> Panel | None:
    """A panel of curves; None if there is no number to draw.

    Args:
        title, label, remark, xlabel: see :class:`Panel`.
        lines: the curves; later ones are drawn on top.
        zero: let a linear axis begin at zero if that wastes no more than half of it.
        log, decades: whether the axis may be logarithmic, and from how many decades on it is.
        inset: the last time of an inset with the beginning.
    """
    lines = [curve for curve in lines if len(usable(curve.values))]
    if not lines:
        return None

    def draw(axes: Axes) -> None:
        for curve in lines:
            line(axes, curve.t, curve.values, curve.look)
        fit(axes, usable(*(curve.values for curve in lines)), zero=zero, log=log, decades=decades)
        if inset is not None:
            _inset(axes, lines, inset)

    return Panel(title, label, draw, remark, xlabel)


def _inset(axes: Axes, lines: Sequence[Curve], until: float) -> None:
    """The beginning of all curves, in the corner that falling curves leave empty."""
    place = (0.19, 0.13, 0.26, 0.32) if axes.get_yscale() == "log" else (0.62, 0.6, 0.37, 0.37)
    corner = axes.inset_axes(place)
    shown = [replace(c, t=c.t[c.t <= until], values=np.asarray(c.values)[c.t <= until]) for c in lines]
    for curve in shown:
        label, options = curve.look
        line(corner, curve.t, curve.values, ("_" + label, options))
    fit(corner, usable(*(curve.values for curve in shown)), zero=False)
    corner.set_xlim(min(float(c.t[0]) for c in shown), until)
    corner.tick_params(labelsize="x-small", which="both")
    corner.minorticks_off()
    for side in ("top", "right"):
        corner.spines[side].set_visible(True)


def with_edges(race: Comparison, panel: Panel, timed: bool = True) -> Panel:
    """The panel with dotted red lines at the times when one direction, and then several, start to oscillate.

    Args:
        race: the runs; the times are those of the central flow.
        panel: the panel.
        timed: whether the legend shows the times, which are then the same for all panels.
    """
    entered = (
        [(t, k) for t, kind, k in race.runs["central"].breakpoints if kind == "enter"] if "central" in race.runs else []
    )
    times = [next((t for t, k in entered if k >= least), None) for least in (1, 2)]

    def draw(axes: Axes) -> None:
        panel.draw(axes)
        for t, what in zip(times, ("edge of stability", "several directions"), strict=True):
            if t is not None:
                axes.axvline(
                    t,
                    label=f"{what}, from step {t:.3g}" if timed else "edge of stability: one direction, several",
                    **EDGES,
                )

    return replace(panel, draw=draw, until=duration(race) or 1)


def most_moving(race: Comparison) -> tuple[int, ...] | None:
    """The index (after that of time) of the observed network output that moves most."""
    values = next((run.series["outputs"] for run in race.runs.values() if "outputs" in run.series), None)
    if values is None or not len(values):
        return None
    return tuple(map(int, np.unravel_index(int(np.argmax(np.ptp(values, axis=0))), values.shape[1:])))


def output(race: Comparison, sigma: float, which: tuple[int, ...] | None = None) -> Panel | None:
    """A network output on a test example, and the central flow's prediction of its time average.

    ``which`` is the output that moves most, unless it is given.
    """
    which = which or most_moving(race)
    if which is None:
        return None
    return averaged(race, sigma, "outputs", "network output", "output (on a test example)", which=which, log=False)


def coordinate_weight(race: Comparison, sigma: float, index: int) -> Panel | None:
    """One of the observed weights."""
    return averaged(race, sigma, "coordinate_w", "one weight", "wᵢ", which=(index,), log=False)


def coordinate_nu(race: Comparison, index: int = 0) -> Panel | None:
    """ν at one of the observed coordinates."""
    values = recorded(race, "coordinate_nu", (index,))
    lines = [
        Curve(race.runs[name].t, known, (EVERY[0], EVERY[1] | {"lw": 3.0}) if name == "discrete" else of_flow(name))
        for name, known in values.items()
    ]
    return curves("ν of one weight", "νᵢ (units of loss²/w²)", lines)


def coordinate_gradient(race: Comparison, sigma: float, index: int = 0) -> Panel | None:
    """The squared gradient at one of the observed coordinates."""
    label = "(∂ᵢL)² (units of loss²/w²)"
    return averaged(race, sigma, "coordinate_grad_sq", "squared gradient there", label, which=(index,))


def learning_rate_and_limit(race: Comparison) -> Panel | None:
    """The effective learning rate of a method with the same one for all weights, and the largest stable one, 2/S(w)."""
    panel, central = learning_rate(race), race.runs.get("central")
    if panel is None or central is None:
        return panel
    limit = CRITICAL / top_curvature(central)

    def draw(axes: Axes) -> None:
        panel.draw(axes)
        line(axes, central.t, limit, LIMIT)
        # without the edge of stability, the stable flow's learning rate would dominate the axis
        shown = [rate for name, rate in recorded(race, "effective_lr").items() if name != "stable"]
        fit(axes, usable(limit, *shown), zero=True)

    return replace(panel, draw=draw, remark="")


def top_curvature(run: Solution) -> Array:
    """S(w) [n] along a run: measured, or computed from the effective sharpness of a method with one learning rate."""
    if "sharpness" in run.series:
        return run.series["sharpness"]
    leading = run.eigenvalues[:, 0] if run.eigenvalues.size else np.full(len(run.t), np.nan)
    found: Array = leading / run.series["effective_lr"]
    return found
