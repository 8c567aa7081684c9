"""The numerics of a flow on a semidefinite constraint: CCP, critical subspace, integrators."""

if __name__ != "dvi.solvers":  # a second copy under another name would load every class twice
    raise ImportError("import dvi.solvers, not solvers")

from dvi.solvers import ccp, critical, svec
from dvi.solvers.ccp import CCPError, CCPResult
from dvi.solvers.critical import CriticalSubspace, Eigenblock
from dvi.solvers.errors import ConvergenceError, DomainError, MemoryLimitError, SolverError, StepError
from dvi.solvers.euler import Euler
from dvi.solvers.macro_step import MacroStep
from dvi.solvers.protocol import Flow, Frame, Integrator, Node, Rate, State, StepResult
from dvi.solvers.runge_kutta import RungeKutta
from dvi.solvers.semi_implicit import SemiImplicit
from dvi.solvers.torchdiffeq import TorchDiffEq
from dvi.solvers.watch import Sighting, Watch

__all__ = [
    "CCPError",
    "CCPResult",
    "ConvergenceError",
    "CriticalSubspace",
    "DomainError",
    "Eigenblock",
    "Euler",
    "Flow",
    "Frame",
    "Integrator",
    "MacroStep",
    "MemoryLimitError",
    "Node",
    "Rate",
    "RungeKutta",
    "SemiImplicit",
    "Sighting",
    "SolverError",
    "State",
    "StepError",
    "StepResult",
    "TorchDiffEq",
    "Watch",
    "ccp",
    "critical",
    "svec",
]
