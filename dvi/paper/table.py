"""The table of the paper's experiments, ``experiments.toml``, with a row per run; it is read and checked here."""

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
        name: the name of the row, as in "fig14b".
        figures: the figures that are drawn from it.
        panel: its panel in the first of these figures.
        problem, method: their names in the table.
        options: for each size, ``lr``, ``steps``, and whatever differs from the defaults, such as ``beta2``.
        runs: the processes, see :func:`dvi.compare`.
        record: additional records: "outputs" (of the network on a test example), "coordinates" (of ν and of the
            squared gradient), and measures of :func:`dvi.compare`.
        warm_start: see :func:`dvi.compare`.
        note: values that differ from the paper's, or that the paper does not give.
        infeasible: for the sizes at which it cannot be run, the reason.
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
        figures: the numbers of all figures that have rows, in order.
    """

    experiments: dict[str, Experiment]
    problems: dict[str, dict[str, dict[str, Any]]]
    methods: dict[str, dict[str, dict[str, Any]]]

    @property
    def figures(self) -> list[str]:
        """The numbers of all figures that have rows, in order."""
        return sorted({figure for row in self.experiments.values() for figure in row.figures}, key=int)

    def of_figure(self, figure: str | int) -> list[Experiment]:
        """The rows that a figure is drawn from, in the table's order.

        Raises:
            ValueError: if there is no such figure.
        """
        found = [row for row in self.experiments.values() if str(figure) in row.figures]
        if not found:
            raise ValueError(
                f"There are no experiments of figure {figure}. Figures with experiments: {', '.join(self.figures)}."
            )
        return found

    def chosen(self, words: Sequence[str]) -> list[Experiment]:
        """The rows with the given names: "fig14b" is one row, "fig14" or "14" are all rows of a figure.

        Raises:
            ValueError: if a name is neither a row nor a figure.
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
                    f"{word} is not an experiment.{hint} Name a row, as in fig14b, or a figure, as in fig14; "
                    "`dvi paper list` shows all."
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
        ValueError: if a name occurs twice, or if a row names a problem or a method that is not defined.
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
            raise ValueError(f"{path}: {experiment.name} occurs twice.")
        for what, known in (("problem", content["problem"]), ("method", content["method"])):
            if row[what] not in known:
                raise ValueError(f"{path}: {experiment.name} has {what} {row[what]!r}, which is not defined.")
        rows[experiment.name] = experiment
    return Table(rows, content["problem"], content["method"])
