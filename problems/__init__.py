"""The losses that are minimised: their derivatives, toy problems with exact answers, networks and data."""

if __name__ != "dvi.problems":  # a second copy under another name would load every class twice
    raise ImportError("import dvi.problems, not problems")

from dvi.problems.catalogue.smooth import smoothed
from dvi.problems.catalogue.tasks import cifar10, digits, fashion, sorting
from dvi.problems.derivatives.safe import differentiable_layers
from dvi.problems.distributed.sharing import distribute
from dvi.problems.errors import DerivativeError, LossChangedError, NotFiniteError, ProblemError, RanksError
from dvi.problems.exact.berthier import TwoScales
from dvi.problems.exact.edge import Circle, MatrixSweep
from dvi.problems.exact.toy import Cubic, Quadratic, two_scales
from dvi.problems.ledger import Ledger
from dvi.problems.minibatch import ExampleProblem, MiniBatches
from dvi.problems.modules.module import ModuleProblem
from dvi.problems.networks.activations import BetaGELU
from dvi.problems.networks.cnn import CNN, PoolingCNN
from dvi.problems.networks.gpt import GPT
from dvi.problems.networks.mamba import Mamba
from dvi.problems.networks.mlp import MLP
from dvi.problems.networks.recurrent import LSTM, RNN
from dvi.problems.networks.resnet import ResNet
from dvi.problems.networks.vit import ViT
from dvi.problems.problem import Problem

__all__ = [
    "CNN",
    "GPT",
    "LSTM",
    "MLP",
    "RNN",
    "BetaGELU",
    "Circle",
    "Cubic",
    "DerivativeError",
    "ExampleProblem",
    "Ledger",
    "LossChangedError",
    "Mamba",
    "MatrixSweep",
    "MiniBatches",
    "ModuleProblem",
    "NotFiniteError",
    "PoolingCNN",
    "Problem",
    "ProblemError",
    "Quadratic",
    "RanksError",
    "ResNet",
    "TwoScales",
    "ViT",
    "cifar10",
    "differentiable_layers",
    "digits",
    "distribute",
    "fashion",
    "smoothed",
    "sorting",
    "two_scales",
]
