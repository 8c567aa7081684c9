"""The stored runs of a figure, from which figures and tables are made."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dvi.paper.making import CIFAR10, make_method, make_problem, spec_of
from dvi.paper.table import Experiment, Size, table
from dvi.problems import ModuleProblem
from dvi.results.comparison import Comparison
from dvi.storage.files import StoreError
from dvi.storage.hdf5 import load
from dvi.sweeps.records import Record, records, result_path

#: The folder of all runs, with one folder inside for each size.
RUNS = Path("runs") / "paper"


@dataclass(frozen=True)
class Stored:
    """A row of the table with its run.

    Attributes:
        row: the experiment.
        size: the size of the run.
        record: how the run ended and what it cost.
        race: the result: a :class:`dvi.Comparison` with the row's ``runs``.
    """

    row: Experiment
    size: Size
    record: Record
    race: Comparison

    @property
    def spec(self) -> dict[str, Any]:
        """The description of the run as plain data, see :func:`dvi.paper.making.spec_of`."""
        return spec_of(self.row, self.size)

    @property
    def options(self) -> dict[str, Any]:
        """The options of the row: lr, steps, beta2, activation …"""
        return self.row.options[self.size]

    def problem(self, device: str = "cpu", cifar10: Path = CIFAR10) -> ModuleProblem:
        """Build the problem anew."""
        return make_problem(self.spec, device, cifar10)

    def method(self) -> Any:
        """Build the method anew."""
        return make_method(self.spec)


def folder_of(size: Size, folder: Path | None = None) -> Path:
    """The folder of the runs of a size: the given one, or runs/paper/SIZE."""
    return RUNS / size if folder is None else Path(folder)


def runs_of(figure: str | int, size: Size = "small", folder: Path | None = None) -> dict[str, Stored]:
    """The stored runs that a figure is drawn from, by the names of their rows, in the table's order.

    A run that failed is included up to its failure (``record.state`` is then "failed", and ``record.message`` says
    why).  Runs that were never made or are not finished are left out, and so are runs whose row has changed since.

    Args:
        figure: the number of the figure.
        size: the size of the runs.
        folder: the folder of the runs (default: runs/paper/SIZE).

    Raises:
        ValueError: if the table has no experiments of that figure.
        StoreError: if there is no run of the figure; the message has the command that makes them.
    """
    rows = table().of_figure(figure)
    where = folder_of(size, folder)
    found = {}
    for row, record in zip(rows, records(where, [row.name for row in rows]), strict=True):
        if record.complete and is_of(row, size, record):
            found[row.name] = Stored(row, size, record, load(result_path(where, row.name)))
    if not found:
        raise StoreError(
            f"No run of figure {figure} is in {where} yet. Make them: dvi paper run fig{figure} --size {size}"
        )
    return found


def missing(figure: str | int, size: Size = "small", folder: Path | None = None) -> list[str]:
    """The rows of a figure whose runs are not complete; rows that cannot be run at this size are left out."""
    rows = [row for row in table().of_figure(figure) if not row.why_not(size)]
    states = records(folder_of(size, folder), [row.name for row in rows])
    pairs = zip(rows, states, strict=True)
    return [row.name for row, record in pairs if not (record.complete and is_of(row, size, record))]


def is_of(row: Experiment, size: Size, record: Record) -> bool:
    """Whether a record belongs to a run with the present numbers of the row, which may have changed since."""
    made = {name: value for name, value in record.spec.items() if name != "device"}
    return bool(made == json.loads(json.dumps(spec_of(row, size))))


__all__ = ["RUNS", "Stored", "folder_of", "is_of", "missing", "runs_of"]
