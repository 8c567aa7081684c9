"""What minimises the loss: the (f, P) spec, preconditioners, one optimizer a file."""

if __name__ != "dvi.methods":  # a second copy under another name would load every class twice
    raise ImportError("import dvi.methods, not methods")

from dvi.methods.adam import Adam
from dvi.methods.errors import NotPositiveDefiniteError, SpecError
from dvi.methods.filter import Filter
from dvi.methods.gd import GradientDescent
from dvi.methods.heavy_ball import HeavyBall
from dvi.methods.nadam import NAdam
from dvi.methods.nesterov import Nesterov
from dvi.methods.preconditioners import Diagonal, Preconditioner, Scalar
from dvi.methods.quasi_hyperbolic import QuasiHyperbolic
from dvi.methods.rmsprop import RMSProp
from dvi.methods.rmsprop_norm import RMSPropNorm
from dvi.methods.spec import FunctionMethod, Hyperparameter, Method, Nu, as_method
from dvi.methods.validate import validate

__all__ = [
    "Adam",
    "Diagonal",
    "Filter",
    "FunctionMethod",
    "GradientDescent",
    "HeavyBall",
    "Hyperparameter",
    "Method",
    "NAdam",
    "Nesterov",
    "NotPositiveDefiniteError",
    "Nu",
    "Preconditioner",
    "QuasiHyperbolic",
    "RMSProp",
    "RMSPropNorm",
    "Scalar",
    "SpecError",
    "as_method",
    "validate",
]
