"""The result of a run."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dvi.problems import Ledger
from dvi.results.status import Status
from dvi.solvers.protocol import Array

if TYPE_CHECKING:
    from dvi.reports import Report


@dataclass
class Cost:
    """The cost of a run, as counts that do not depend on the machine.

    Attributes:
        t: recorded times [m].
        counts: the cumulative ledger after the steps that begin at these times.
        ledger: the totals.
    """

    t: Array
    counts: list[dict[str, int]]
    ledger: Ledger

    def __repr__(self) -> str:
        return f"Cost({self.ledger!r}, {self.ledger.gradient_equivalents:.0f} gradient equivalents)"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "ledger":
            raise AttributeError(name)
        return getattr(self.ledger, name)

    def per_unit_time(self, t0: float | None = None, t1: float | None = None) -> float:
        """Gradient equivalents per unit time between two times (the whole run by default).

        The evaluations of a step count between its beginning and its end, and the first search for eigenvectors counts
        with the first step.  Observations at the end of the run are in the totals only.

        Raises:
            ValueError: unless t1 > t0, or if the run ended before its first step.
        """
        if not len(self.t):
            raise ValueError("per_unit_time: the run ended before its first step, so it has no cost per unit time.")
        t0 = self.t[0] if t0 is None else t0
        t1 = self.t[-1] if t1 is None else t1
        if not t1 > t0:
            raise ValueError(f"per_unit_time({t0}, {t1}): the second time must be later.")
        # the counts at t[i] are those after the step that begins at t[i]
        after = [Ledger(**counts, weights=self.ledger.weights).gradient_equivalents for counts in self.counts]
        spent = [0.0, *after[:-1]]
        return float((np.interp(t1, self.t, spent) - np.interp(t0, self.t, spent)) / (t1 - t0))


@dataclass
class Solution:
    """One process: the optimizer, its central flow or its stable flow.

    Times are unit times (1 = one optimizer step), counted from the end of the warm start.

    Attributes:
        name: "discrete", "central", "stable".
        t: recorded times [n].
        loss: L(w(t)) [n]; for the optimizer, at the iterates.
        predicted_loss: the time average of the optimizer's loss that the flow predicts, L + ½⟨H, Σ⟩ (eq. 7) [n];
            NaN for the optimizer.
        eigenvalues: effective eigenvalues [n, m], descending, NaN where they were not computed.
        X: oscillation covariance in the basis of critical eigenvectors, a list of [k, k].
        w: weights [d] at the end.
        nu: the optimizer's state at the end.
        breakpoints: (t, "enter" | "leave", k): directions that start or stop oscillating.
        status: how the run ended; ``str(status)`` is a sentence with advice.
        ledger: the cost, see :class:`Cost`.
        series: further quantities by name, each [n, …]: ``grad_sq``, ``predicted_grad_sq``, ``trace`` (tr Σ),
            ``effective_lr``, ``loss_rate`` (dL/dt, Prop. 1), ``step_length`` (optimizer: ‖w_{t+1} − w_t‖) and
            ``next_term`` (see :meth:`dvi.runs.observables.Observer.next_term`; NaN where it was not measured).  On
            request also ``coordinate_grad_sq``, ``outputs`` with their ``predicted_*``, ``coordinate_nu``,
            ``coordinate_w``, ``w``, and the series of :mod:`dvi.runs.measures`.
        notes: what the user should know about this run.
        about: method, problem, integrator, versions, in words.
    """

    name: str
    t: Array
    loss: Array
    predicted_loss: Array
    eigenvalues: Array
    X: list[Array]
    w: Tensor
    nu: Any
    breakpoints: list[tuple[float, str, int]]
    status: Status
    ledger: Cost
    series: dict[str, Array] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    about: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        end = f"t = {self.t[0]:g} … {self.t[-1]:g}" if len(self.t) else "no time recorded"
        loss = f", loss {self.loss[-1]:.4g}" if len(self.loss) else ""
        return f"Solution({self.name}: {end}{loss}, {len(self.breakpoints)} breakpoints, {self.status.name})"

    def __getstate__(self) -> dict[str, Any]:
        """Store tensors as bytes; torch's own handles between processes are lost if the sender ends."""
        buffer = io.BytesIO()
        torch.save((self.w, self.nu), buffer)
        return {**self.__dict__, "w": None, "nu": None, "tensors": buffer.getvalue()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore from :meth:`__getstate__`, with tensors on their former device."""
        state = dict(state)
        tensors = io.BytesIO(state.pop("tensors"))
        self.__dict__.update(state)
        self.w, self.nu = torch.load(tensors, weights_only=False)  # part of a pickle, which can run code anyway

    @property
    def k(self) -> Array:
        """The number of oscillating directions at the recorded times [n]."""
        times = np.array([b[0] for b in self.breakpoints])
        counts = np.array([0] + [b[2] for b in self.breakpoints])
        out: Array = counts[np.searchsorted(times, self.t, side="right")]
        return out

    def save(self, path: str | Path) -> None:
        """Write to an HDF5 file, atomically: an older file is replaced only by a complete one.

        Raises:
            StoreError: if the file cannot be written; an older one is then intact.
        """
        from dvi.storage.hdf5 import save

        save(self, path)

    def plot(self, path: str | Path | None = None, **options: Any) -> Any:
        """Draw loss, effective eigenvalues and other series, save the figure to ``path`` if given, and return it."""
        from dvi.plotting import plot_solution

        return plot_solution(self, path, **options)

    def report(self) -> Report:
        """The results for the optimizer, in numbers and in plain words: ``print(solution.report())``."""
        from dvi.reports import report_of

        return report_of({self.name: self}, about=self.about, notes=tuple(self.notes))

    def _repr_html_(self) -> str:
        from dvi.reports.notebook import in_notebook

        return in_notebook(self)
