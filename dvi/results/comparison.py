"""The result of running several processes side by side."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dvi.results.averages import gaussian_average
from dvi.results.solution import Solution
from dvi.results.status import Status
from dvi.solvers.protocol import Array

if TYPE_CHECKING:
    from dvi.reports import Report


@dataclass
class Comparison:
    """Several processes from one start, on a common time grid.

    Attributes:
        t: the common time grid [n], unit times.
        runs: the solutions by name; also as attributes, ``race.discrete``, ``race.central``, ``race.stable``.
        distance: ‖w_a(t) − w_b(t)‖ [n] by pair of names, in weight space.  For the optimizer, w is the midpoint
            ¼(w_{t−1} + 2w_t + w_{t+1}), which removes an oscillation of period two to second order.
        status: how the comparison ended.
        notes: what the user should know about it.
        about: method, problem, integrator, versions, in words.
    """

    t: Array
    runs: dict[str, Solution]
    distance: dict[tuple[str, str], Array]
    status: Status
    notes: list[str] = field(default_factory=list)
    about: dict[str, Any] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Solution:
        runs = self.__dict__.get("runs", {})
        if name in runs:
            found: Solution = runs[name]
            return found
        raise AttributeError(f"this comparison has no {name!r}; its runs are {', '.join(runs) or 'none'}")

    def __repr__(self) -> str:
        return f"Comparison({', '.join(self.runs)}; t = 0 … {self.t[-1] if len(self.t) else 0:g}, {self.status.name})"

    def smoothed(self, name: str = "discrete", sigma: float = 50, of: str = "loss") -> Array:
        """A run's series averaged over time with a Gaussian of ``sigma`` unit times (paper, C.2).

        Args:
            name: the name of the run.
            sigma: standard deviation, unit times; the paper's is 50.
            of: "loss" or the name of one of the run's ``series``.
        """
        run = self.runs[name]
        values = run.loss if of == "loss" else run.series[of]
        return gaussian_average(run.t, values, sigma)

    def save(self, path: str | Path) -> None:
        """Write to an HDF5 file, atomically: an older file is replaced only by a complete one.

        Raises:
            StoreError: if the file cannot be written; an older one is then intact.
        """
        from dvi.storage.hdf5 import save

        save(self, path)

    def plot(self, path: str | Path | None = None, **options: Any) -> Any:
        """Draw the paper's figure (Figs. 2, 4, 6), save it to ``path`` if given, and return it.

        The options are those of :func:`dvi.plotting.plot_comparison`.
        """
        from dvi.plotting import plot_comparison

        return plot_comparison(self, path, **options)

    def report(self) -> Report:
        """The results for the optimizer, in numbers and in plain words: ``print(race.report())``."""
        from dvi.reports import report_of

        return report_of(self.runs, self.distance, self.t, self.about, tuple(self.notes))

    def _repr_html_(self) -> str:
        from dvi.reports.notebook import in_notebook

        return in_notebook(self)
