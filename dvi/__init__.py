"""Central flows: what an optimizer at the edge of stability does on average.

>>> import dvi
>>> problem = dvi.problems.digits(network="mlp", loss="mse", n=100, width=16)
>>> method = dvi.methods.GradientDescent(lr=0.1)
>>> flow = dvi.central_flow(problem, method)
>>> solution = dvi.solve(flow, steps=3, progress=False)
>>> solution.status.name, len(solution.t)
('SUCCESS', 4)
"""

__version__ = "0.1.0"

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dvi import methods, problems, solvers
from dvi.compiler.ablated import AblatedFlow, ablated_flow
from dvi.compiler.flows import CentralFlow, CentralMap, StableFlow, central_flow, central_map, stable_flow
from dvi.compiler.linearised import Linearisation
from dvi.compiler.optimizer import Discrete, discrete
from dvi.methods import (
    Blocks,
    Dense,
    Diagonal,
    Filter,
    Kronecker,
    Method,
    NotPositiveDefiniteError,
    Preconditioner,
    Scalar,
    SpecError,
    from_torch,
)
from dvi.noise.flow import NoisyFlow, noisy_flow
from dvi.noise.optimizer import MiniBatchOptimizer, minibatch
from dvi.noise.sampling import Sampling
from dvi.problems import DerivativeError, Problem, ProblemError, RanksError, distribute
from dvi.reports import Report
from dvi.results.comparison import Comparison
from dvi.results.run_error import RunError
from dvi.results.solution import Solution
from dvi.results.status import Status
from dvi.runs.comparing import compare
from dvi.runs.solving import solve
from dvi.solvers import (
    CCPError,
    ConvergenceError,
    Euler,
    MacroStep,
    MemoryLimitError,
    RungeKutta,
    SemiImplicit,
    TorchDiffEq,
)
from dvi.solvers.protocol import State
from dvi.stationarity.api import StationaryPoint, duality, stationary
from dvi.stationarity.flow import Quasistatic, StationaryFlow, stationary_flow
from dvi.storage.files import StoreError
from dvi.storage.hdf5 import load

if TYPE_CHECKING:
    from dvi.symbolic import Derivation, derive


def __getattr__(name: str) -> Any:
    if name in ("Derivation", "derive", "symbolic"):  # loaded on request, because sympy is slow to import
        symbolic = import_module("dvi.symbolic")
        return symbolic if name == "symbolic" else getattr(symbolic, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "AblatedFlow",
    "Blocks",
    "CCPError",
    "CentralFlow",
    "CentralMap",
    "Comparison",
    "ConvergenceError",
    "Dense",
    "Derivation",
    "DerivativeError",
    "Diagonal",
    "Discrete",
    "Euler",
    "Filter",
    "Kronecker",
    "Linearisation",
    "MacroStep",
    "MemoryLimitError",
    "Method",
    "MiniBatchOptimizer",
    "NoisyFlow",
    "NotPositiveDefiniteError",
    "Preconditioner",
    "Problem",
    "ProblemError",
    "Quasistatic",
    "RanksError",
    "Report",
    "RunError",
    "RungeKutta",
    "Sampling",
    "Scalar",
    "SemiImplicit",
    "Solution",
    "SpecError",
    "StableFlow",
    "State",
    "StationaryFlow",
    "StationaryPoint",
    "Status",
    "StoreError",
    "TorchDiffEq",
    "ablated_flow",
    "central_flow",
    "central_map",
    "compare",
    "derive",
    "discrete",
    "distribute",
    "duality",
    "from_torch",
    "load",
    "methods",
    "minibatch",
    "noisy_flow",
    "problems",
    "solve",
    "solvers",
    "stable_flow",
    "stationary",
    "stationary_flow",
]
