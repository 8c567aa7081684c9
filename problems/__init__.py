"""What is minimised: a loss, its derivatives, toy problems with exact answers, networks and data."""

if __name__ != "dvi.problems":  # a second copy under another name would load every class twice
    raise ImportError("import dvi.problems, not problems")

from dvi.problems.catalogue.networks import CNN, GPT, MLP, RNN, BetaGELU
from dvi.problems.catalogue.smooth import smoothed
from dvi.problems.catalogue.tasks import digits, sorting
from dvi.problems.derivatives.safe import differentiable_layers
from dvi.problems.errors import DerivativeError, LossChangedError, NotFiniteError, ProblemError
from dvi.problems.exact.berthier import TwoScales
from dvi.problems.exact.edge import Circle, MatrixSweep
from dvi.problems.exact.toy import Cubic, Quadratic, two_scales
from dvi.problems.ledger import Ledger
from dvi.problems.minibatch import ExampleProblem, MiniBatches
from dvi.problems.module import ModuleProblem
from dvi.problems.problem import Problem

__all__ = [
    "CNN",
    "GPT",
    "MLP",
    "RNN",
    "BetaGELU",
    "Circle",
    "Cubic",
    "DerivativeError",
    "ExampleProblem",
    "Ledger",
    "LossChangedError",
    "MatrixSweep",
    "MiniBatches",
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
