"""What is minimised: a loss, its derivatives, toy problems with exact answers, networks and data."""

if __name__ != "dvi.problems":  # a second copy under another name would load every class twice
    raise ImportError("import dvi.problems, not problems")

from dvi.problems.berthier import TwoScales
from dvi.problems.catalogue import digits, sorting
from dvi.problems.edge import Circle, MatrixSweep
from dvi.problems.errors import DerivativeError, LossChangedError, NotFiniteError, ProblemError
from dvi.problems.ledger import Ledger
from dvi.problems.module import ModuleProblem
from dvi.problems.networks import CNN, GPT, MLP, RNN, BetaGELU
from dvi.problems.problem import Problem
from dvi.problems.safe import differentiable_layers
from dvi.problems.smooth import smoothed
from dvi.problems.toy import Cubic, Quadratic, two_scales

__all__ = [
    "CNN",
    "GPT",
    "MLP",
    "RNN",
    "BetaGELU",
    "Circle",
    "Cubic",
    "DerivativeError",
    "Ledger",
    "LossChangedError",
    "MatrixSweep",
    "ModuleProblem",
    "NotFiniteError",
    "Problem",
    "ProblemError",
    "Quadratic",
    "TwoScales",
    "differentiable_layers",
    "digits",
    "smoothed",
    "sorting",
    "two_scales",
]
