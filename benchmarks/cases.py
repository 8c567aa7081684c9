"""The benchmarked problems, which are small enough for one core, and the integrators that run on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from paper_scheme import PaperScheme

import dvi
from dvi.methods import GradientDescent, Method, RMSProp, RMSPropNorm
from dvi.problems import digits, sorting
from dvi.solvers.protocol import Integrator

Backend = Literal["autodiff", "finite-difference"]
Kind = Literal["hard", "whole"]

ADAM_LIKE = {"eps": 1e-8, "bias_correction": True}


@dataclass(frozen=True)
class Case:
    """A problem, a method and a span of time.

    Args:
        kind: "hard" is a short run from a random initialisation, which reaches EOS early and has several breakpoints;
            it begins with the automatic warm start if the initialisation is above the edge.  "whole" is a run of 1,000
            steps from initialisation.
        make: derivatives ↦ problem.
        steps: length in unit times.
        quick: whether ``--quick`` runs it.
        sweep: whether all tolerances and steps run on it, or only the core entries.
    """

    name: str
    kind: Kind
    make: Callable[[Backend], dvi.Problem]
    method: Method
    steps: int
    quick: bool = False
    sweep: bool = False

    @property
    def title(self) -> str:
        """The name and the kind of the run."""
        return f"{self.name} ({'short hard run' if self.kind == 'hard' else 'whole run'})"


def _mlp(loss: str) -> Callable[[Backend], dvi.Problem]:
    return lambda backend: digits("mlp", loss, n=300, width=32, derivatives=backend)


def _cnn(loss: str) -> Callable[[Backend], dvi.Problem]:
    return lambda backend: digits("cnn", loss, n=60, width=4, derivatives=backend)


def _transformer(loss: str) -> Callable[[Backend], dvi.Problem]:
    return lambda backend: sorting("transformer", loss, n=60, width=12, depth=1, length=6, derivatives=backend)


CASES: tuple[Case, ...] = (
    Case("MLP, MSE, GD 0.3", "hard", _mlp("mse"), GradientDescent(0.3), 80, quick=True, sweep=True),
    Case("MLP, MSE, RMSProp 1e-3", "hard", _mlp("mse"), RMSProp(1e-3, 0.99, **ADAM_LIKE), 100, quick=True, sweep=True),
    Case("MLP, MSE, RMSProp-Norm 0.1", "hard", _mlp("mse"), RMSPropNorm(0.1, 0.99, **ADAM_LIKE), 100),
    Case("MLP, CE, RMSProp 1e-3", "hard", _mlp("ce"), RMSProp(1e-3, 0.99, **ADAM_LIKE), 100, sweep=True),
    Case("CNN, MSE, RMSProp 1e-3", "hard", _cnn("mse"), RMSProp(1e-3, 0.99, **ADAM_LIKE), 80),
    Case("transformer, MSE, RMSProp 1e-3", "hard", _transformer("mse"), RMSProp(1e-3, 0.99, **ADAM_LIKE), 80),
    Case("transformer, CE, RMSProp 1e-3", "hard", _transformer("ce"), RMSProp(1e-3, 0.99, **ADAM_LIKE), 80),
    Case("MLP, MSE, GD 0.2", "whole", _mlp("mse"), GradientDescent(0.2), 1000),
    Case("MLP, MSE, RMSProp 5e-4", "whole", _mlp("mse"), RMSProp(5e-4, 0.99, **ADAM_LIKE), 1000),
)


@dataclass(frozen=True)
class Entry:
    """An integrator in the benchmarks: its name, its configuration, and the backend of derivatives.

    Args:
        family: entries of one family form one curve of the work–precision diagram.
        knob: tol or dt.
        pairwise: third derivatives are computed for one pair at a time, with nothing shared between pairs.
        core: runs on every short case; other entries run only on swept cases.
        whole: the number of unit times of a whole run that it covers; expensive entries show their cost on a part.
        limit: CPU seconds after which it is stopped.
    """

    name: str
    family: str
    knob: float
    integrator: Integrator
    derivatives: Backend = "autodiff"
    pairwise: bool = False
    core: bool = False
    whole: int = 0
    limit: float = 600.0

    def runs_on(self, case: Case, quick: bool) -> bool:
        """Whether the entry is part of a case's table."""
        if case.kind == "whole":
            return self.whole > 0
        return self.core or (case.sweep and not quick)

    def steps(self, case: Case) -> int:
        """The length of its run in unit times."""
        return min(case.steps, self.whole) if case.kind == "whole" else case.steps


def macro(tol: float, derivatives: Backend = "autodiff", core: bool = False, whole: int = 0) -> Entry:
    """The macro step at a tolerance."""
    suffix = {"autodiff": "", "mixed": ", mixed", "finite-difference": ", differences"}[derivatives]
    family = f"macro step{suffix}"
    return Entry(f"{family}, tol {tol:.0e}", family, tol, dvi.MacroStep(tol), derivatives, core=core, whole=whole)


def euler(dt: float, core: bool = False, whole: int = 0) -> Entry:
    """Euler with the library's block eigensolver, at its default tolerance."""
    return Entry(f"Euler {dt:g}", "Euler", dt, dvi.Euler(dt), core=core, whole=whole)


def runge_kutta(tol: float, limit: float) -> Entry:
    """The classical method with located breakpoints."""
    return Entry(f"Runge–Kutta 4, tol {tol:.0e}", "Runge–Kutta 4", tol, dvi.RungeKutta(4, tol), limit=limit)


PAPER, PAPER_CVXOPT = "paper's scheme", "paper's scheme, CVXOPT"
EULER = "Euler 0.25"

ENTRIES: tuple[Entry, ...] = (
    macro(3e-3, whole=1000),
    macro(1e-3, core=True, whole=1000),
    macro(3e-4, core=True, whole=1000),
    macro(1e-4, core=True, whole=1000),
    macro(1e-5),
    macro(1e-3, "mixed", core=True, whole=1000),
    macro(3e-3, "finite-difference", whole=1000),
    macro(1e-3, "finite-difference", core=True, whole=1000),
    macro(3e-4, "finite-difference", core=True, whole=1000),
    macro(1e-4, "finite-difference"),
    macro(1e-5, "finite-difference"),
    euler(0.5),
    euler(0.25, core=True, whole=250),
    euler(0.125),
    runge_kutta(1e-4, limit=60.0),
    Entry(PAPER, PAPER, 0.25, PaperScheme(), pairwise=True, core=True, whole=250),
    Entry(PAPER_CVXOPT, PAPER_CVXOPT, 0.25, PaperScheme(ccp="CVXOPT"), pairwise=True),
)
