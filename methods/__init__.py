"""The methods that minimise the loss: the declaration (f, P), preconditioners, and one optimizer a file."""

if __name__ != "dvi.methods":  # a second copy under another name would load every class twice
    raise ImportError("import dvi.methods, not methods")

from dvi.methods.errors import NotPositiveDefiniteError, SpecError
from dvi.methods.filter import Filter
from dvi.methods.interop.as_optimizer import AsOptimizer
from dvi.methods.interop.from_torch import FromTorch, from_torch
from dvi.methods.interop.grouped import Grouped
from dvi.methods.optimizers.adafactor import Adafactor
from dvi.methods.optimizers.adagrad import AdaGrad
from dvi.methods.optimizers.adagrad_norm import AdaGradNorm
from dvi.methods.optimizers.adam import Adam
from dvi.methods.optimizers.adamw import AdamW
from dvi.methods.optimizers.gd import GradientDescent
from dvi.methods.optimizers.heavy_ball import HeavyBall
from dvi.methods.optimizers.nadam import NAdam
from dvi.methods.optimizers.nesterov import Nesterov
from dvi.methods.optimizers.normalized import NormalizedGD
from dvi.methods.optimizers.preconditioned import Preconditioned
from dvi.methods.optimizers.quasi_hyperbolic import QuasiHyperbolic
from dvi.methods.optimizers.rmsprop import RMSProp
from dvi.methods.optimizers.rmsprop_centred import CentredRMSProp
from dvi.methods.optimizers.rmsprop_norm import RMSPropNorm
from dvi.methods.optimizers.shampoo import Shampoo
from dvi.methods.preconditioners.base import Preconditioner, Scaled
from dvi.methods.preconditioners.blocks import Blocks
from dvi.methods.preconditioners.dense import Dense
from dvi.methods.preconditioners.diagonal import Diagonal, Scalar
from dvi.methods.preconditioners.kronecker import Kronecker
from dvi.methods.spec import FunctionMethod, Hyperparameter, Method, Nu, as_method
from dvi.methods.timetable import Timetable
from dvi.methods.validation import validate

__all__ = [
    "AdaGrad",
    "AdaGradNorm",
    "Adafactor",
    "Adam",
    "AdamW",
    "AsOptimizer",
    "Blocks",
    "CentredRMSProp",
    "Dense",
    "Diagonal",
    "Filter",
    "FromTorch",
    "FunctionMethod",
    "GradientDescent",
    "Grouped",
    "HeavyBall",
    "Hyperparameter",
    "Kronecker",
    "Method",
    "NAdam",
    "Nesterov",
    "NormalizedGD",
    "NotPositiveDefiniteError",
    "Nu",
    "Preconditioned",
    "Preconditioner",
    "QuasiHyperbolic",
    "RMSProp",
    "RMSPropNorm",
    "Scalar",
    "Scaled",
    "Shampoo",
    "SpecError",
    "Timetable",
    "as_method",
    "from_torch",
    "validate",
]
