"""Fine solutions, stored on disk, and the distance between two of them."""

from __future__ import annotations

import hashlib
import pickle
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from cases import Case

import dvi
from dvi.solvers import CriticalSubspace, EigenTracker
from dvi.solvers.protocol import Array, Integrator, State


@dataclass
class Reference:
    """A fine solution on the unit grid.

    Attributes:
        w: weights [n, d].
        t, trace, predicted_loss: times (unit times), tr Σ and predicted loss, each [n].
        breakpoints: as in :class:`dvi.Solution`.
        status: how the run ended.
        doubt: largest distance in w to a second fine solution.
        doubt_X: mean difference in tr Σ, relative to its maximum (short runs: to Euler 1/16).
    """

    t: Array
    w: Array
    trace: Array
    predicted_loss: Array
    breakpoints: list[tuple[float, str, int]]
    status: str
    doubt: float = float("nan")
    doubt_X: float = float("nan")


def fine_watch() -> EigenTracker:
    """An eigensolver with a far smaller tolerance than a run needs."""
    return EigenTracker(CriticalSubspace(tol=1e-5), survey_every=50.0)


def reference(case: Case, start: State, folder: Path) -> Reference:
    """The fine solution of a case, read from the folder, or computed and stored there.

    It takes fine macro steps (tol 1e-6, 1e-5 for whole runs).  For short runs, an independent solution bounds the
    error: the extrapolation 2 w(1/16) − w(1/8) of Euler's steps.  For whole runs this is too expensive, so macro steps
    at ten times the tolerance are compared.
    """
    short = case.kind == "hard"
    key = f"{case.name}|{case.kind}|{case.steps}|{case.method!r}|{float(start.w.norm()):.10e}"
    path = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.pickle"
    if path.exists():
        with path.open("rb") as file:
            stored: Reference = pickle.load(file)
        return stored
    tol = 1e-6 if short else 1e-5
    found = _fine(case, start, dvi.MacroStep(tol, h_min=1 / 256, watch=fine_watch()))
    if short:
        coarse, fine = (_fine(case, start, dvi.Euler(dt)) for dt in (1 / 8, 1 / 16))
        n = min(len(coarse.t), len(fine.t))
        other, trace = 2 * fine.w[:n] - coarse.w[:n], fine.trace[:n]
    else:
        second = _fine(case, start, dvi.MacroStep(10 * tol, watch=fine_watch()))
        other, trace = second.w, second.trace
    n = min(len(found.t), len(other))
    found.doubt = float(np.linalg.norm(found.w[:n] - other[:n], axis=1).max())
    found.doubt_X = float(np.abs(found.trace[:n] - trace[:n]).mean() / max(found.trace.max(), 1e-300))
    folder.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        pickle.dump(found, file)
    return found


def _fine(case: Case, start: State, integrator: Integrator) -> Reference:
    flow = dvi.central_flow(case.make("autodiff"), case.method, check=False)
    solution = dvi.solve(flow, case.steps, integrator=integrator, start=start, save=("w",), progress=False, throw=False)
    return Reference(
        solution.t,
        solution.series["w"],
        solution.series["trace"],
        solution.predicted_loss,
        solution.breakpoints,
        solution.status.name,
    )
