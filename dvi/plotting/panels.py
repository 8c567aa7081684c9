"""The panels of a picture, each with when it is shown, what a reader should know about it, and how it is drawn."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from dvi.compare import Comparison
from dvi.plotting.curves import HUGE, differ, inner_average, leading, recorded, top, usable, varies
from dvi.plotting.style import AVERAGED, DOTS, EVERY, LAYERS, PREDICTED, Look, Style, of_flow, rank
from dvi.solvers.critical import CRITICAL
from dvi.solvers.protocol import Array

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_RASTER = 20_000  # points of one line above which a vector file holds it as an image
_DECADES = 1.5  # a loss that spans more is drawn on a logarithmic axis


class Panel(ABC):
    """One panel of a comparison."""

    title: str
    label: str  # of the vertical axis, with units

    def __init__(self, race: Comparison, style: Style) -> None:
        self.race, self.style = race, style
        self.layers = sorted(race.runs.items(), key=lambda item: rank(item[0], LAYERS))

    def recorded(self, name: str) -> list[Array]:
        """A quantity by its name, for every run."""
        return [recorded(run, name) for _, run in self.layers]

    @property
    def remark(self) -> str:
        """What stands below the title."""
        return ""

    @property
    @abstractmethod
    def filled(self) -> bool:
        """Whether there is something to draw."""

    @abstractmethod
    def draw(self, axes: Axes) -> None:
        """Draw the lines and set the vertical limits."""


def choose(race: Comparison, style: Style) -> list[Panel]:
    """The panels there is something to draw in; of those that stand for one another, the first."""
    places = ((Loss,), (Eigenvalues,), (Distances, Gradient), (LearningRate, Oscillations))
    panels: list[Panel] = []
    for place in places:
        candidates = [panel(race, style) for panel in place]
        panels += [panel for panel in candidates if panel.filled][:1]
    return panels


# ---- quantities that the flow predicts the average of ---------------------------------------------------


class _Averaged(Panel):
    """A quantity of the optimizer, its time average, the flows' values and their prediction of the average."""

    quantity: str

    @property
    def filled(self) -> bool:
        return any(len(usable(values)) for values in self.recorded(self.quantity))

    def draw(self, axes: Axes) -> None:
        for (name, run), values in zip(self.layers, self.recorded(self.quantity), strict=True):
            if name == "discrete":
                _line(axes, run.t, values, EVERY)
                _line(axes, run.t, inner_average(run, values, self.style.sigma), AVERAGED)
            else:
                _line(axes, run.t, values, of_flow(name))
        for (_, run), values in zip(self.layers, self.recorded(self.quantity), strict=True):
            predicted = recorded(run, "predicted_" + self.quantity)
            if differ(predicted, values):
                _line(axes, run.t, predicted, PREDICTED)
        _fit(axes, self.recorded(self.quantity), zero=True)


class Loss(_Averaged):
    """The train loss."""

    title = "train loss"
    label = "train loss L (units of the loss)"
    quantity = "loss"

    @property
    def remark(self) -> str:
        """The formula of the prediction, if it differs from the flow's own loss."""
        pairs = zip(self.recorded("predicted_loss"), self.recorded("loss"), strict=True)
        predicts = any(differ(predicted, loss) for predicted, loss in pairs)
        return "dashed: L + ½⟨H, Σ⟩ predicts the time average" if predicts else ""


class Gradient(_Averaged):
    """The squared norm of the gradient."""

    title = "squared gradient norm"
    label = "‖∇L‖² (units of loss²/w²)"
    quantity = "grad_sq"


# ---- eigenvalues ----------------------------------------------------------------------------------------


class Eigenvalues(Panel):
    """Effective eigenvalues, with a tick at every breakpoint."""

    title = "effective eigenvalues"
    label = "effective eigenvalue (critical: 2)"

    @property
    def filled(self) -> bool:
        """Whether any was looked at."""
        return any(np.isfinite(run.eigenvalues).any() for _, run in self.layers)

    @property
    def remark(self) -> str:
        """What the ticks mean."""
        ticks = any(run.breakpoints for _, run in self.layers)
        return "ticks: breakpoints (long: enter, short: leave)" if ticks else ""

    def draw(self, axes: Axes) -> None:
        """Draw the eigenvalues, the critical one, and the breakpoints; the stable flow's may leave the panel."""
        axes.axhline(CRITICAL, color="0.6", lw=0.6, zorder=1.2, label="_threshold")
        alone = len(self.layers) == 1
        tops, seen = [1.25 * CRITICAL], [CRITICAL]
        for name, run in self.layers:
            t, table = leading(run, 1 if name == "stable" else self.style.leading)
            if not table.size:
                continue
            if name == "discrete":
                spacing = float(np.median(np.diff(t))) if len(t) > 1 else 1.0
                label, options = f"optimizer, every {spacing:g} steps", DOTS
            else:
                label, options = of_flow(name)
            for j, column in enumerate(table.T):
                _line(axes, t, column, ("_" if j else label, {"zorder": 2.2} | options))
            if name != "stable" or alone:
                tops.append(top(table, 99.5 if name == "discrete" else 100.0))
            seen.extend(table[np.isfinite(table)])
        high = max(tops) if alone else min(max(tops), 2 * CRITICAL)
        low = float(np.percentile(seen, 1))
        axes.set_ylim(max(0.0, min(0.75 * CRITICAL, low) - 0.08), 1.06 * high)
        if "stable" in self.race.runs:
            self._beyond(axes, *leading(self.race.runs["stable"], 1))
        across = axes.get_xaxis_transform()
        for name, run in self.layers:
            colour = of_flow(name)[1]["color"]
            for kind, length in (("enter", 0.055), ("leave", 0.028)):
                times = [b[0] for b in run.breakpoints if b[1] == kind]
                if times:
                    axes.vlines(times, 1 - length, 1, colors=colour, lw=0.8, transform=across, label="_" + kind)

    def _beyond(self, axes: Axes, t: Array, table: Array) -> None:
        """Say how far the stable flow's sharpness goes where it leaves the panel."""
        high = axes.get_ylim()[1]
        outside = t[(table > high).any(axis=1)]
        if not len(outside):
            return
        right = outside[0] < 0.6 * t[-1]
        axes.annotate(
            f"stable flow: up to {np.nanmax(table):.3g} ↑",
            (float(outside[0]), high),
            xytext=(5 if right else -5, -10),
            textcoords="offset points",
            ha="left" if right else "right",
            va="top",
            fontsize=self.style.small,
            color="0.25",
            bbox={"fc": "white", "ec": "none", "alpha": 0.85, "pad": 1.0},
        )


# ---- distances and what is adapted ----------------------------------------------------------------------


class Distances(Panel):
    """Distances in weight space from the optimizer to each flow, or between the flows where it did not run."""

    title = "distance in weight space"
    label = "distance ‖w − w′‖ (units of w)"

    @property
    def filled(self) -> bool:
        """Whether any distance is known."""
        return any(np.isfinite(values).any() for values in self.race.distance.values())

    @property
    def remark(self) -> str:
        """Between whom the distances are."""
        if "discrete" in self.race.runs:
            return "from the optimizer to each flow; pale: ‖w$_{t+1}$ − w$_t$‖"
        return "between " + " and ".join(of_flow(name)[0] for name in next(iter(self.race.distance)))

    def draw(self, axes: Axes) -> None:
        """Draw the distances, and the optimizer's own step length for scale."""
        tops = []
        optimizer = self.race.runs.get("discrete")
        if optimizer is not None:
            step = recorded(optimizer, "step_length")
            _line(axes, optimizer.t, step, EVERY)
            tops.append(top(step, 99.5))
        for pair, values in reversed(self.race.distance.items()):
            flows = [name for name in pair if name != "discrete"]
            if optimizer is not None and len(flows) == 2:
                continue  # says nothing about the optimizer
            label, options = of_flow(flows[0])
            _line(axes, self.race.t, values, (label if len(flows) == 1 else "_", options))
            tops.append(top(values))
        _from_zero(axes, tops)


class LearningRate(Panel):
    """The effective learning rate of a method that adapts it."""

    title = "effective learning rate"
    label = "learning rate (units of w²/loss)"
    remark = "harmonic mean over weights"

    @property
    def filled(self) -> bool:
        """Whether it is adapted."""
        return any(varies(values) for values in self.recorded("effective_lr"))

    def draw(self, axes: Axes) -> None:
        """Draw that of every process, the optimizer's as a pale band behind the flows'."""
        rates = self.recorded("effective_lr")
        for (name, run), values in zip(self.layers, rates, strict=True):
            band = (EVERY[0], EVERY[1] | {"lw": 3.0})
            _line(axes, run.t, values, band if name == "discrete" else of_flow(name))
        _fit(axes, rates, zero=False)


class Oscillations(Panel):
    """The trace of the oscillations' covariance."""

    title = "size of the oscillations"
    label = "tr Σ (units of w²)"
    remark = "trace of their covariance Σ"

    @property
    def filled(self) -> bool:
        """Whether anything oscillated."""
        return any(usable(values).any() for values in self.recorded("trace"))

    def draw(self, axes: Axes) -> None:
        """Draw the optimizer's and its average, and the flows'; bursts may leave the panel for the averages' sake."""
        tops = []
        for (name, run), values in zip(self.layers, self.recorded("trace"), strict=True):
            if name == "discrete":
                mean = inner_average(run, values, self.style.sigma)
                _line(axes, run.t, values, EVERY)
                _line(axes, run.t, mean, AVERAGED)
                tops.append(min(2.5 * top(mean), top(values)))
            elif usable(values).any():
                _line(axes, run.t, values, PREDICTED)
                tops.append(top(values))
        _from_zero(axes, tops)


# ---- lines and limits -----------------------------------------------------------------------------------


def _line(axes: Axes, t: Array, values: Array, look: Look) -> None:
    """Draw a line, if there is a number to draw; a long one is an image inside a vector file."""
    n = min(len(t), len(values))
    values = np.where(np.abs(values[:n]) < HUGE, values[:n], np.nan)
    label, options = look
    if np.isfinite(values).any():
        axes.plot(t[:n], values, label=label, rasterized=n > _RASTER, **options)


def _from_zero(axes: Axes, tops: Iterable[float]) -> None:
    axes.set_ylim(0, 1.05 * (max(tops, default=0.0) or 1.0))


def _fit(axes: Axes, drawn: Sequence[Array], zero: bool) -> None:
    """Choose a logarithmic axis where values span decades; else from zero, if that wastes no more than half."""
    known = usable(np.concatenate(drawn))
    low, high = float(known.min()), float(known.max())
    if low > 0 and high / low > 10**_DECADES:
        axes.set_yscale("log")
        return
    room = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    axes.set_ylim(0.0 if zero and 0 <= low < 0.5 * high else low - room, high + room)


__all__ = ["Panel", "choose"]
