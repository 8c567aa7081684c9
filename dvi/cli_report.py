"""What the shell commands say and draw about a result."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

import dvi


def say(text: str) -> None:
    """Tell the user something that went wrong."""
    print(f"dvi: {text}", file=sys.stderr)


def report(result: dvi.Comparison | dvi.Solution) -> list[str]:
    """Return a table of the runs, the distances between them at the end, and the notes, as lines."""
    runs = result.runs if isinstance(result, dvi.Comparison) else {result.name: result}
    distance = result.distance if isinstance(result, dvi.Comparison) else {}
    lines = [f"{'':10}{'until step':>12}{'train loss':>12}{'predicted':>12}{'oscillating':>13}{'cost':>9}"]
    lines += [_row(name, run) for name, run in runs.items()]
    lines.append("(predicted: the optimizer's time average; cost: gradients' worth of work per optimizer step)")
    lines += [
        f"distance {a}–{b} in weight space: {values[-1]:.4g} at the end, at most {values.max():.4g}"
        for (a, b), values in distance.items()
        if len(values)
    ]
    return lines + [f"note: {note}" for note in result.notes]


def _row(name: str, run: dvi.Solution) -> str:
    if not len(run.t):
        return f"{name:10}{'nothing recorded':>24}"
    t, loss, predicted = run.t[-1], run.loss[-1], run.predicted_loss[-1]
    shown = "–" if np.isnan(predicted) or predicted == loss else f"{predicted:.4g}"
    oscillating = str(run.k[-1]) if name not in ("discrete", "stable") else "–"
    cost = run.ledger.per_unit_time() if len(run.ledger.t) > 1 else np.nan
    return f"{name:10}{t:>12g}{loss:>12.4g}{shown:>12}{oscillating:>13}{cost:>9.3g}"


def draw(result: dvi.Comparison | dvi.Solution, path: Path, **options: Any) -> Path:
    """Draw the paper's picture into a file."""
    from dvi.plot import plot_comparison, plot_solution

    if isinstance(result, dvi.Comparison):
        plot_comparison(result, path, **options)
    else:
        plot_solution(result, path, **options)
    return path


def picture_path(path: Path) -> Path:
    """The path of a picture, once it was seen that one can be written there."""
    from dvi.plot import picture

    return picture(path)


@contextmanager
def hushed(quiet: bool) -> Iterator[None]:
    """Hold back the library's warnings, which are notes of the result, too."""
    logger = logging.getLogger("dvi")
    before = logger.level
    logger.setLevel(logging.ERROR if quiet else before)
    try:
        yield
    finally:
        logger.setLevel(before)


__all__ = ["draw", "hushed", "picture_path", "report", "say"]
