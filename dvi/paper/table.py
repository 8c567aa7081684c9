"""The table of the paper's experiments, ``experiments.toml``: one row a run, read and checked."""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Size = Literal["small", "full"]
SIZES: tuple[Size, ...] = ("small", "full")
TABLE = Path(__file__).with_name("experiments.toml")


@dataclass(frozen=True)
class Experiment:
    """A row of the table.

    Attributes:
        name: as in "fig14b"; figures: those that are drawn from it; panel: of the first of them.
        problem, method: what is run, by their names in the table.
        options: by size: ``lr``, ``steps``, and what else differs from the method's defaults, as in ``beta2``.
        runs: which processes, see :func:`dvi.compare`.
        record: what is recorded beside: "outputs" (of the network on a test example), "coordinates" (of ν and of the
            squared gradient), and the measures of :func:`dvi.compare`.
        warm_start: see :func:`dvi.compare`.
        note: what is not the paper's, or not known of it.
        infeasible: by size: why it cannot be run, if it cannot.
    """

    name: str
    figures: tuple[str, ...]
    panel: str
    problem: str
    method: str
    options: dict[str, dict[str, Any]]
    runs: tuple[str, ...]
    record: tuple[str, ...] = ()
    warm_start: int | str = "auto"
    note: str = ""
    infeasible: dict[str, str] | None = None

    def why_not(self, size: Size) -> str:
        """Why it cannot be run at a size; "" if it can."""
        return (self.infeasible or {}).get(size, "")


@dataclass(frozen=True)
class Table:
    """The whole table.

    Attributes:
        experiments: the rows by name.
        problems: by name and size, the task of :mod:`dvi.problems` and its arguments.
        methods: by name and size, the method of :mod:`dvi.methods` and its arguments.
        figures: numbers of all figures that have rows, in order.
    """

    experiments: dict[str, Experiment]
    problems: dict[str, dict[str, dict[str, Any]]]
    methods: dict[str, dict[str, dict[str, Any]]]

    @property
    def figures(self) -> list[str]:
        """Numbers of the figures that have rows."""
        return sorted({figure for row in self.experiments.values() for figure in row.figures}, key=int)

    def of_figure(self, figure: str | int) -> list[Experiment]:
        """The rows that a figure is drawn from, in the table's order.

        Raises:
            ValueError: if there is no such figure.
        """
        found = [row for row in self.experiments.values() if str(figure) in row.figures]
        if not found:
            raise ValueError(
                f"There are no experiments of figure {figure}; there are some of {', '.join(self.figures)}."
            )
        return found

    def chosen(self, words: Sequence[str]) -> list[Experiment]:
        """The rows that names stand for: "fig14b" for a row, "fig14" or "14" for those of a figure.

        Raises:
            ValueError: for a name that stands for nothing.
        """
        found: dict[str, Experiment] = {}
        for word in words:
            if word in self.experiments:
                found[word] = self.experiments[word]
                continue
            figure = word.removeprefix("fig")
            if not figure.isdigit() or figure not in self.figures:
                near = [name for name in self.experiments if figure and name.startswith(f"fig{figure}")]
                hint = f" There are {', '.join(near)}." if near else ""
                raise ValueError(
                    f"{word} is no experiment.{hint} Name a row, as in fig14b, or a figure, as in fig14; "
                    "`dvi paper list` has all."
                )
            found |= {row.name: row for row in self.of_figure(figure)}
        return list(found.values())


@functools.cache
def table() -> Table:
    """The paper's experiments."""
    return read(TABLE)


def read(path: Path) -> Table:
    """Read a table of experiments.

    Raises:
        ValueError: if a row is not complete or names what is not there.
    """
    content = tomllib.loads(path.read_text(encoding="utf-8"))
    defaults = content["defaults"]
    rows: dict[str, Experiment] = {}
    for given in content["experiment"]:
        row: dict[str, Any] = {**defaults, **given}
        options = {str(size): row.pop(size) for size in SIZES}
        row |= {key: tuple(row[key]) for key in ("figures", "runs", "record")}
        experiment = Experiment(**row, options=options)
        if experiment.name in rows:
            raise ValueError(f"{path}: {experiment.name} is there twice.")
        for what, known in (("problem", content["problem"]), ("method", content["method"])):
            if row[what] not in known:
                raise ValueError(f"{path}: {experiment.name} has {what} {row[what]!r}, which is not defined.")
        rows[experiment.name] = experiment
    return Table(rows, content["problem"], content["method"])
