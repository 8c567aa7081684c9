"""A substitute for a tensor that records the operations of f and P as a sympy expression.

``f`` and ``P`` are written once, for torch tensors, and run unchanged on a :class:`SymbolTensor`.  numpy's mixin sends
Python's operators to ``__array_ufunc__``, and torch's functions go to ``__torch_function__``.  Both find the operation
by name in one table.  Operations without a closed form are refused by name: a branch on a value, or a function that is
not in the table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import sympy
import torch
from numpy.lib.mixins import NDArrayOperatorsMixin
from sympy import Expr, Integer, Rational
from torch import Tensor

from dvi.methods import SpecError
from dvi.symbolic.vectors import DIMENSION, Total


class UnknownOperationError(SpecError, AttributeError):
    """An operation without a symbolic counterpart.  It is also an AttributeError, so that ``hasattr`` gives False."""


def number(x: float) -> Expr:
    """A Python number as the decimal fraction that was written (0.99 is 99/100)."""
    if isinstance(x, int):
        return Integer(int(x))
    if not math.isfinite(x):
        raise SpecError(f"{x} has no place in a closed form.")
    return Rational(repr(float(x)))


class SymbolTensor(NDArrayOperatorsMixin):
    """A scalar (``ndim`` 0) or the generic entry of a vector [d] (``ndim`` 1), as a sympy expression.

    Args:
        expr: the expression; :mod:`dvi.symbolic.vectors` says how a vector is written.
        ndim: 0 or 1.
    """

    dtype = torch.float64
    device = torch.device("cpu")
    requires_grad = False
    # A symbol differs from every number.  A hyperparameter of 0 is not a symbol, so that ``eps == 0`` is right.
    __eq__, __ne__, __hash__ = object.__eq__, object.__ne__, object.__hash__

    def __init__(self, expr: Expr, ndim: int) -> None:
        self.expr = expr
        self.ndim = ndim

    def __repr__(self) -> str:
        return f"{self.expr} [{'d' * self.ndim}]"

    @property
    def shape(self) -> tuple[SymbolTensor, ...]:
        """() or (d,)."""
        return (SymbolTensor(DIMENSION, 0),) * self.ndim

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *args: Any, out: Any = None, **kwargs: Any) -> SymbolTensor:
        """Operators.  ``x += y`` requests an addition in place (``out``); as for a number, x becomes a new object."""
        return _operation(ufunc.__name__)(*args, **kwargs)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> SymbolTensor:
        return _operation(getattr(func, "__name__", str(func)))(*args, **(kwargs or {}))

    def __getattr__(self, name: str) -> Any:
        """A method of tensors."""
        if name.startswith("__"):
            raise AttributeError(name)
        operation = _operation(name)
        return lambda *args, **kwargs: operation(self, *args, **kwargs)

    # ---- what has no symbolic counterpart -------------------------------------------------------------

    def __len__(self) -> int:
        raise UnknownOperationError("len(…) of a vector of d weights is not a number here; write x.numel().")

    def __bool__(self) -> bool:
        raise SpecError(
            f"it branches on the value of {self.expr}; a closed form cannot depend on values. "
            "flow.linearise(w, nu) gives α and β in numbers."
        )

    def __float__(self) -> float:
        raise SpecError(
            f"it needs the value of {self.expr} as a number (float(…), math.…); write it with torch functions."
        )

    __int__ = __index__ = __float__

    def __iter__(self) -> Any:
        raise UnknownOperationError("it uses single entries of a vector; only whole vectors have symbols.")

    def __getitem__(self, key: Any) -> Any:
        raise UnknownOperationError(
            f"it takes part of a vector ([{key!r}]); only whole vectors and scalars have symbols."
        )


def symbolic(x: Any) -> SymbolTensor:
    """A number, a one-element tensor or a SymbolTensor as the latter.

    Raises:
        SpecError: for anything else.
    """
    if isinstance(x, SymbolTensor):
        return x
    if isinstance(x, Tensor) and x.ndim == 0:
        x = x.item()
    if isinstance(x, (int, float)):
        return SymbolTensor(number(x), 0)
    what = f"a tensor of shape {list(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
    raise SpecError(f"it combines ν, g or a hyperparameter with {what}, which has no symbol.")


# ---- the table of operations ---------------------------------------------------------------------------


def _entrywise(function: Callable[..., Expr]) -> Callable[..., SymbolTensor]:
    """An operation entry by entry; a scalar is combined with every entry of a vector."""

    def operation(*args: Any, **kwargs: Any) -> SymbolTensor:
        tensors = [symbolic(x) for x in args]
        given = {key: symbolic(x).expr for key, x in kwargs.items()}
        return SymbolTensor(function(*(x.expr for x in tensors), **given), max(x.ndim for x in tensors))

    return operation


def _sum(x: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> SymbolTensor:
    if keepdim or dim not in (None, 0, -1, (), (0,), (-1,), [0], [-1]):
        raise UnknownOperationError(f"it sums with dim={dim!r}, keepdim={keepdim!r}; only whole sums have symbols.")
    return SymbolTensor(Total(x.expr), 0) if x.ndim else x


def _mean(x: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> SymbolTensor:
    mean: SymbolTensor = _sum(x, dim, keepdim) / _numel(x)
    return mean


def _norm(x: Any, p: Any = 2, dim: Any = None, keepdim: bool = False, **_: Any) -> SymbolTensor:
    if p == "fro":
        p = 2
    if isinstance(p, str) or (isinstance(p, (int, float)) and not 0 < p < math.inf):
        raise UnknownOperationError(f"it takes the norm of order {p!r}, which is not smooth.")
    order = symbolic(p)
    norm: SymbolTensor = _sum(abs(x) ** order, dim, keepdim) ** (1 / order)
    return norm


def _dot(x: Any, y: Any) -> SymbolTensor:
    x, y = symbolic(x), symbolic(y)
    if not (x.ndim and y.ndim):
        raise UnknownOperationError("it multiplies (@) a vector by a scalar.")
    return _sum(x * y)


def _numel(x: SymbolTensor) -> SymbolTensor:
    return SymbolTensor(DIMENSION if x.ndim else Integer(1), 0)


def _full_like(x: SymbolTensor, value: Any, **_: Any) -> SymbolTensor:
    return SymbolTensor(symbolic(value).expr, x.ndim)


def _same(x: SymbolTensor, **_: Any) -> SymbolTensor:
    return x


def _comparison(x: Any, y: Any) -> SymbolTensor:
    raise SpecError(f"it compares {symbolic(x).expr} with a value; a closed form cannot depend on values.")


# Operations by their names in numpy and torch.
_NAMED: dict[str, Callable[..., SymbolTensor]] = {
    "add radd": _entrywise(lambda x, y, alpha=1: x + alpha * y),
    "sub subtract": _entrywise(lambda x, y, alpha=1: x - alpha * y),
    "rsub": _entrywise(lambda x, y, alpha=1: y - alpha * x),
    "mul multiply rmul": _entrywise(lambda x, y: x * y),
    "div divide truediv true_divide": _entrywise(lambda x, y: x / y),
    "rdiv rtruediv": _entrywise(lambda x, y: y / x),
    "pow power float_power": _entrywise(sympy.Pow),
    "rpow": _entrywise(lambda x, y: y**x),
    "neg negative": _entrywise(lambda x: -x),
    "abs absolute": _entrywise(sympy.Abs),
    "square": _entrywise(lambda x: x**2),
    "reciprocal": _entrywise(lambda x: 1 / x),
    "sqrt": _entrywise(sympy.sqrt),
    "rsqrt": _entrywise(lambda x: 1 / sympy.sqrt(x)),
    "exp2": _entrywise(lambda x: 2**x),
    "expm1": _entrywise(lambda x: sympy.exp(x) - 1),
    "log1p": _entrywise(lambda x: sympy.log(1 + x)),
    "sigmoid": _entrywise(lambda x: 1 / (1 + sympy.exp(-x))),
    "softplus": _entrywise(lambda x, beta=1, threshold=20: sympy.log(1 + sympy.exp(beta * x)) / beta),
    **{name: _entrywise(getattr(sympy, name)) for name in ("sign", "exp", "log", "sin", "cos", "tan")},
    **{name: _entrywise(getattr(sympy, name)) for name in ("sinh", "cosh", "tanh", "asinh", "atan")},
    "arctan": _entrywise(sympy.atan),
    "lerp": _entrywise(lambda x, y, weight: x + weight * (y - x)),
    "addcmul": _entrywise(lambda x, y, z, value=1: x + value * y * z),
    "addcdiv": _entrywise(lambda x, y, z, value=1: x + value * y / z),
    "positive clone contiguous double": _same,
    "sum": _sum,
    "mean": _mean,
    "norm vector_norm": _norm,
    "dot vdot inner matmul": _dot,
    "numel": _numel,
    "full_like": _full_like,
    "zeros_like": lambda x, **_: _full_like(x, 0),
    "ones_like": lambda x, **_: _full_like(x, 1),
    "less less_equal greater greater_equal lt le gt ge": _comparison,
}
_OPERATIONS = {name: operation for names, operation in _NAMED.items() for name in names.split()}
_SWITCHES = {"clamp", "clip", "clamp_min", "maximum", "minimum", "max", "min", "amax", "amin", "where", "relu", "round"}


def _operation(name: str) -> Callable[..., SymbolTensor]:
    plain = name[2:-2] if name.startswith("__") and name.endswith("__") else name
    plain = plain.removeprefix("linalg_").removeprefix("special_")
    if plain in _OPERATIONS:
        return _OPERATIONS[plain]
    if plain.endswith("_") and plain[:-1] in _OPERATIONS:
        raise UnknownOperationError(f"{name}() changes its argument in place; f and P return new tensors.")
    why = ", which has no derivative where it switches" if plain in _SWITCHES else ""
    raise UnknownOperationError(
        f"it uses {name}{why}; there is no symbolic form of that. flow.linearise(w, nu) gives α and β in numbers."
    )


__all__ = ["SymbolTensor", "UnknownOperationError", "number", "symbolic"]
