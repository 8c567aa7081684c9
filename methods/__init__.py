"""What minimises the loss: the (f, P) spec, preconditioners, one optimizer a file."""

if __name__ != "dvi.methods":  # a second copy under another name would load every class twice
    raise ImportError("import dvi.methods, not methods")

from dvi.methods.errors import NotPositiveDefiniteError, SpecError
from dvi.methods.gd import GradientDescent
from dvi.methods.preconditioners import Diagonal, Preconditioner, Scalar
from dvi.methods.rmsprop import RMSProp
from dvi.methods.rmsprop_norm import RMSPropNorm
from dvi.methods.spec import FunctionMethod, Hyperparameter, Method, Nu, as_method
from dvi.methods.validate import validate

__all__ = [
    "Diagonal",
    "FunctionMethod",
    "GradientDescent",
    "Hyperparameter",
    "Method",
    "NotPositiveDefiniteError",
    "Nu",
    "Preconditioner",
    "RMSProp",
    "RMSPropNorm",
    "Scalar",
    "SpecError",
    "as_method",
    "validate",
]
