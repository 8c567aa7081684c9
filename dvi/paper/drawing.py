"""The functions that draw the figures, by figure number."""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dvi.paper.stored import Stored, missing, runs_of
from dvi.paper.table import Size

logger = logging.getLogger("dvi")

#: A function that draws a figure.  It gets the stored runs by the names of their rows and returns a matplotlib figure.
Drawer = Callable[[dict[str, Stored]], Any]

_DRAWERS: dict[str, Drawer] = {}


def draws(*figures: str | int) -> Callable[[Drawer], Drawer]:
    """Register a function that draws these figures.

    The function is given the runs of its figure (:func:`dvi.paper.stored.runs_of`) and returns a matplotlib figure.
    """

    def register(drawer: Drawer) -> Drawer:
        _DRAWERS.update({str(figure): drawer for figure in figures})
        return drawer

    return register


def drawers() -> dict[str, Drawer]:
    """The functions by figure number; those of ``dvi.paper.figures`` are registered when that module is imported."""
    if find_spec("dvi.paper.figures"):
        import_module("dvi.paper.figures")
    return dict(_DRAWERS)


def draw(figure: str | int, out: Path, size: Size = "small", folder: Path | None = None) -> Path:
    """Draw a figure from its stored runs into a file, whose ending determines the format.

    If runs are missing, the figure is drawn without them.  A warning names them and the command that makes them.

    Raises:
        ValueError: if there is no such figure, or if no function draws it.
        StoreError: if there is no run of it.
    """
    drawer = drawers().get(str(figure))
    stored = runs_of(figure, size, folder)
    if drawer is None:
        raise ValueError(
            f"No function draws figure {figure}. There are functions for {', '.join(sorted(drawers(), key=int))}."
        )
    from dvi.plotting import picture

    if absent := missing(figure, size, folder):
        where = "" if folder is None else f" --folder {folder}"
        logger.warning(
            "Figure %s is drawn without %s. These runs are not made yet, or were made with other numbers (then add "
            "--overwrite). Make them: dvi paper run %s --size %s%s",
            *(figure, ", ".join(absent), " ".join(absent), size, where),
        )
    drawer(stored).savefig(picture(out), dpi=150)
    return out


__all__ = ["Drawer", "draw", "drawers", "draws"]
