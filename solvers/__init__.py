"""The numerics of a flow on a semidefinite constraint: CCP, critical subspace, integrators."""

if __name__ != "dvi.solvers":  # a second copy under another name would load every class twice
    raise ImportError("import dvi.solvers, not solvers")

from dvi.solvers import ccp, svec
from dvi.solvers.ccp import CCPError, CCPResult
from dvi.solvers.eigen.block_method import CriticalSubspace, Eigenblock
from dvi.solvers.eigen.tracker import EigenTracker, SpectrumEstimate
from dvi.solvers.errors import BudgetError, ConvergenceError, DomainError, MemoryLimitError, SolverError, StepError
from dvi.solvers.integrator import IntegratorBase
from dvi.solvers.macro import MacroStep
from dvi.solvers.protocol import (
    ConstrainedFlow,
    Flow,
    Frame,
    InertialFlow,
    Integrator,
    Node,
    Rate,
    SmoothFlow,
    State,
    StepResult,
)
from dvi.solvers.reference.euler import Euler
from dvi.solvers.reference.runge_kutta import RungeKutta
from dvi.solvers.reference.torchdiffeq import TorchDiffEq
from dvi.solvers.second_order.semi_implicit import SemiImplicit

#: The earlier name of :class:`EigenTracker`.
Watch = EigenTracker

__all__ = [
    "BudgetError",
    "CCPError",
    "CCPResult",
    "ConstrainedFlow",
    "ConvergenceError",
    "CriticalSubspace",
    "DomainError",
    "EigenTracker",
    "Eigenblock",
    "Euler",
    "Flow",
    "Frame",
    "InertialFlow",
    "Integrator",
    "IntegratorBase",
    "MacroStep",
    "MemoryLimitError",
    "Node",
    "Rate",
    "RungeKutta",
    "SemiImplicit",
    "SmoothFlow",
    "SolverError",
    "SpectrumEstimate",
    "State",
    "StepError",
    "StepResult",
    "TorchDiffEq",
    "Watch",
    "ccp",
    "svec",
]
