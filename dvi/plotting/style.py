"""The style of figures: a label with its colour, width and dash for every kind of line, and matplotlib's settings.

The optimizer is blue, its central flow black, and the stable flow grey.  Lines also differ in width, dash and
brightness, so that they can be distinguished by colour-blind readers and in black-and-white print.
"""

from __future__ import annotations

from typing import Any

#: A label, and matplotlib's options for a line.  The same label means the same line in every panel.
Look = tuple[str, dict[str, Any]]

EVERY: Look = ("optimizer, every step", {"color": "#a9cdec", "lw": 0.6})
AVERAGED: Look = ("optimizer, averaged (σ)", {"color": "#3b82c4", "lw": 2.4, "solid_capstyle": "round"})
PREDICTED: Look = ("predicted time average", {"color": "#b2182b", "lw": 1.2, "ls": (0, (4, 1.6))})
PREDICTED_NOISY: Look = ("predicted with noise", {"color": "#1b7837", "lw": 1.2, "ls": (0, (4, 1.6))})
FLOWS: dict[str, Look] = {
    "central": ("central flow", {"color": "black", "lw": 1.1}),
    "map": ("central map", {"color": "#e08214", "lw": 1.1, "ls": (0, (7, 1, 1, 1))}),
    "stable": ("stable flow", {"color": "#8c8c8c", "lw": 1.3, "ls": (0, (1.2, 1.2))}),
    "sgd": ("optimizer on mini-batches, averaged", {"color": "#3b82c4", "lw": 2.4, "solid_capstyle": "round"}),
    "noisy": ("flow with mini-batch noise", {"color": "#1b7837", "lw": 1.3}),
    "ablated": ("ablated flow", {"color": "0.45", "lw": 1.0, "ls": (0, (6, 2, 1, 2, 1, 2))}),
}
DOTS: dict[str, Any] = {"ls": "none", "marker": "o", "ms": 1.9, "mew": 0, "color": "#3b82c4", "alpha": 0.6}
ONSET: dict[str, Any] = {"color": "0.45", "ls": (0, (1, 2))}

EDGES: dict[str, Any] = {"color": "#d62728", "ls": (0, (1, 2)), "lw": 0.8, "zorder": 0.5}

#: Colours of runs side by side, as for several learning rates: blue, orange, green, purple, brown, pink.
COLOURS = ["#1f77b4", "#ff7f0e", "#2ca02c", "#9467bd", "#8c564b", "#e377c2"]

#: Labels in the order of the legend; other labels follow.
LEGEND = [label for label, _ in (EVERY, AVERAGED, PREDICTED, PREDICTED_NOISY, *FLOWS.values())]
#: Processes from the bottom to the top of a panel; other processes are on top.
LAYERS = ["sgd", "discrete", "stable", "map", "central"]


def of_flow(name: str) -> Look:
    """The look of a flow by its name."""
    return FLOWS.get(name, (f"{name} flow", {"color": "0.45", "lw": 1.0, "ls": "-."}))


def rank(item: str, order: list[str]) -> int:
    """The position of an item in an order, for sorting; items that are not in it come last."""
    return order.index(item) if item in order else len(order)


def settings(font: float) -> dict[str, Any]:
    """Matplotlib's settings for a picture, on top of its defaults; ``font`` in points."""
    ticks = {"major.size": 3.0, "minor.size": 1.8, "major.width": 0.6, "minor.width": 0.4, "labelsize": font - 1}
    return {
        "font.size": font,
        "figure.titlesize": font + 1,
        "axes.formatter.use_mathtext": True,
        "axes.formatter.limits": (-3, 4),
        "axes.linewidth": 0.6,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlelocation": "left",
        "axes.titlesize": font,
        "axes.titleweight": "bold",
        "legend.fontsize": font - 0.7,
        "legend.frameon": False,
        **{f"{axis}tick.{name}": value for axis in "xy" for name, value in ticks.items()},
    }
