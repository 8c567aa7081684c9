"""What minimises the loss: the (f, P) spec, preconditioners, one optimizer a file."""

if __name__ != "dvi.methods":  # a second copy under another name would load every class twice
    raise ImportError("import dvi.methods, not methods")

from dvi.methods.adafactor import Adafactor
from dvi.methods.adagrad import AdaGrad
from dvi.methods.adagrad_norm import AdaGradNorm
from dvi.methods.adam import Adam
from dvi.methods.blocks import Blocks
from dvi.methods.dense import Dense
from dvi.methods.errors import NotPositiveDefiniteError, SpecError
from dvi.methods.filter import Filter
from dvi.methods.gd import GradientDescent
from dvi.methods.heavy_ball import HeavyBall
from dvi.methods.kronecker import Kronecker
from dvi.methods.nadam import NAdam
from dvi.methods.nesterov import Nesterov
from dvi.methods.normalized import NormalizedGD
from dvi.methods.preconditioned import Preconditioned
from dvi.methods.preconditioners import Diagonal, Preconditioner, Scalar, Scaled
from dvi.methods.quasi_hyperbolic import QuasiHyperbolic
from dvi.methods.rmsprop import RMSProp
from dvi.methods.rmsprop_centred import CentredRMSProp
from dvi.methods.rmsprop_norm import RMSPropNorm
from dvi.methods.shampoo import Shampoo
from dvi.methods.spec import FunctionMethod, Hyperparameter, Method, Nu, as_method
from dvi.methods.timetable import Timetable
from dvi.methods.validate import validate

__all__ = [
    "AdaGrad",
    "AdaGradNorm",
    "Adafactor",
    "Adam",
    "Blocks",
    "CentredRMSProp",
    "Dense",
    "Diagonal",
    "Filter",
    "FunctionMethod",
    "GradientDescent",
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
    "validate",
]
