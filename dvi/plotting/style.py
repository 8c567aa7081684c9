"""How a picture looks: a label with its colour, width and dash for every kind of line, and matplotlib's settings.

The optimizer is blue, its central flow black, the stable flow grey; they differ in width, dash and brightness, too, so
the picture survives a black-and-white printer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

#: A label, and matplotlib's options for a line.  The same label means the same line in every panel.
Look = tuple[str, dict[str, Any]]

BLUE, PALE, GREY, RED = "#3b82c4", "#a9cdec", "#8c8c8c", "#b2182b"

EVERY: Look = ("optimizer, every step", {"color": PALE, "lw": 0.6})
AVERAGED: Look = ("optimizer, averaged (σ)", {"color": BLUE, "lw": 2.4, "solid_capstyle": "round"})
PREDICTED: Look = ("central flow’s predicted time average", {"color": RED, "lw": 1.2, "ls": (0, (4, 1.6))})
CENTRAL: Look = ("central flow", {"color": "black", "lw": 1.1})
STABLE: Look = ("stable flow", {"color": GREY, "lw": 1.3, "ls": (0, (1.2, 1.2))})
MAP: Look = ("central map", {"color": "#1b7837", "lw": 1.1, "ls": (0, (5, 1))})
OTHERS: tuple[dict[str, Any], ...] = (
    {"color": "0.45", "lw": 1.0, "ls": "-."},
    {"color": "0.45", "lw": 1.0, "ls": (0, (6, 2, 1, 2, 1, 2))},
)

DOTS: dict[str, Any] = {"ls": "none", "marker": "o", "ms": 1.9, "mew": 0, "color": BLUE, "alpha": 0.6, "zorder": 1.5}
ONSET: dict[str, Any] = {"color": "0.45", "ls": (0, (1, 2))}

#: Labels in the order of the legend; others follow.
LEGEND = tuple(label for label, _ in (EVERY, AVERAGED, PREDICTED, CENTRAL, MAP, STABLE))
#: Processes from the bottom to the top of a panel; others lie on top.
LAYERS = ("discrete", "stable", "map", "central")

SETTINGS: dict[str, Any] = {
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


@dataclass(frozen=True)
class Style:
    """What the panels ask of the call: σ of the averages (unit times), font size (points), how many eigenvalues."""

    sigma: float
    font: float
    leading: int

    @property
    def small(self) -> float:
        """Font size of tick labels and remarks."""
        return self.font - 1.0


def of_flow(name: str) -> Look:
    """The look of a flow by its name; flows without a look of their own share two, by their letters."""
    known = {"central": CENTRAL, "map": MAP, "stable": STABLE}
    return known.get(name) or (f"{name} flow", OTHERS[sum(map(ord, name)) % len(OTHERS)])


def rank(item: str, order: Sequence[str]) -> int:
    """Where an item stands in an order, to sort by; those that are not in it come last."""
    return order.index(item) if item in order else len(order)


__all__ = [
    "AVERAGED",
    "DOTS",
    "EVERY",
    "LAYERS",
    "LEGEND",
    "ONSET",
    "PREDICTED",
    "SETTINGS",
    "Look",
    "Style",
    "of_flow",
    "rank",
]
