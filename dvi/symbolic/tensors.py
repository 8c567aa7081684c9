"""A stand-in for a tensor that records, as a sympy expression, what f and P do with it.

``f`` and ``P`` are written once, for torch tensors.  Called with a :class:`SymbolTensor` they run as they are: Python
operators and methods are the class's own, and ``torch.sqrt(x)`` and its kind reach it by ``__torch_function__``.  What
has no closed form here (a branch on a value, a function that is not in the table below) is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import sympy
import torch
from sympy import Expr, Integer, Rational
from torch import Tensor

from dvi.methods import SpecError
from dvi.symbolic.vectors import DIMENSION, Total


class UnknownOperationError(SpecError, AttributeError):
    """An operation without a symbolic counterpart; an AttributeError, too, so that ``hasattr`` says no."""


def number(x: float) -> Expr:
    """A Python number as the decimal fraction that it is written as (0.99 is 99/100)."""
    if isinstance(x, int):
        return Integer(int(x))
    if not math.isfinite(x):
        raise SpecError(f"{x} has no place in a closed form.")
    return Rational(repr(float(x)))


class SymbolTensor:
    """A scalar (``ndim`` 0) or the generic entry of a vector [d] (``ndim`` 1), as a sympy expression.

    Args:
        expr: the expression; see :mod:`dvi.symbolic.vectors` for how a vector is written.
        ndim: 0 or 1.
    """

    # What numpy and torch scalars on the left of an operator ask for.
    __array_ufunc__ = None
    dtype = torch.float64
    device = torch.device("cpu")
    requires_grad = False

    def __init__(self, expr: Expr, ndim: int) -> None:
        self.expr = expr
        self.ndim = ndim

    def __repr__(self) -> str:
        return f"{self.expr} [{'d' * self.ndim}]"

    # ---- shape ----------------------------------------------------------------------------------------

    @property
    def shape(self) -> tuple[SymbolTensor, ...]:
        """() or (d,)."""
        return (SymbolTensor(DIMENSION, 0),) * self.ndim

    def __len__(self) -> int:
        raise UnknownOperationError("len(…) of a vector of d weights is not a number here; write x.numel().")

    # ---- what has no symbolic counterpart -------------------------------------------------------------

    def __bool__(self) -> bool:
        raise SpecError(
            f"it branches on the value of {self.expr}; a closed form cannot depend on values. "
            "flow.linearise(w, nu) gives α and β in numbers."
        )

    def __float__(self) -> float:
        raise SpecError(
            f"it asks for the number that {self.expr} is (float(…), math.…); write it with torch functions."
        )

    __int__ = __index__ = __float__

    def __iter__(self) -> Any:
        raise UnknownOperationError("it takes a vector apart; only whole vectors have symbols.")

    def __getitem__(self, key: Any) -> Any:
        raise UnknownOperationError(
            f"it takes part of a vector ([{key!r}]); only whole vectors and scalars have symbols."
        )

    def _compare(self, other: Any) -> Any:
        raise SpecError(f"it compares {self.expr} with a value; a closed form cannot depend on values.")

    __lt__ = __le__ = __gt__ = __ge__ = _compare

    # ---- torch ----------------------------------------------------------------------------------------

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> SymbolTensor:
        out: SymbolTensor = _operation(getattr(func, "__name__", str(func)))(*args, **(kwargs or {}))
        return out

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        operation = _operation(name)
        return lambda *args, **kwargs: operation(self, *args, **kwargs)

    def __add__(self, other: Any) -> SymbolTensor:
        return _add(self, other)

    def __radd__(self, other: Any) -> SymbolTensor:
        return _add(other, self)

    def __sub__(self, other: Any) -> SymbolTensor:
        return _sub(self, other)

    def __rsub__(self, other: Any) -> SymbolTensor:
        return _sub(other, self)

    def __mul__(self, other: Any) -> SymbolTensor:
        return _entrywise(lambda a, b: a * b)(self, other)

    def __rmul__(self, other: Any) -> SymbolTensor:
        return _entrywise(lambda a, b: a * b)(other, self)

    def __truediv__(self, other: Any) -> SymbolTensor:
        return _entrywise(lambda a, b: a / b)(self, other)

    def __rtruediv__(self, other: Any) -> SymbolTensor:
        return _entrywise(lambda a, b: a / b)(other, self)

    def __pow__(self, other: Any) -> SymbolTensor:
        return _entrywise(sympy.Pow)(self, other)

    def __rpow__(self, other: Any) -> SymbolTensor:
        return _entrywise(sympy.Pow)(other, self)

    def __matmul__(self, other: Any) -> SymbolTensor:
        return _dot(self, other)

    def __neg__(self) -> SymbolTensor:
        return SymbolTensor(-self.expr, self.ndim)

    def __pos__(self) -> SymbolTensor:
        return self

    def __abs__(self) -> SymbolTensor:
        return SymbolTensor(sympy.Abs(self.expr), self.ndim)


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


def _entrywise(function: Callable[..., Expr]) -> Callable[..., SymbolTensor]:
    """An operation entry by entry; a scalar goes with every entry of a vector."""

    def operation(*args: Any) -> SymbolTensor:
        tensors = [symbolic(x) for x in args]
        return SymbolTensor(function(*(x.expr for x in tensors)), max(x.ndim for x in tensors))

    return operation


def _add(x: Any, y: Any, *, alpha: Any = 1) -> SymbolTensor:
    return _entrywise(lambda x, y, a: x + a * y)(x, y, alpha)


def _sub(x: Any, y: Any, *, alpha: Any = 1) -> SymbolTensor:
    return _entrywise(lambda x, y, a: x - a * y)(x, y, alpha)


def _sum(x: SymbolTensor, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> SymbolTensor:
    if keepdim or dim not in (None, 0, -1, (), (0,), (-1,), [0], [-1]):
        raise UnknownOperationError(f"it sums with dim={dim!r}, keepdim={keepdim!r}; only whole sums have symbols.")
    return SymbolTensor(Total(x.expr), 0) if x.ndim else x


def _mean(x: SymbolTensor, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> SymbolTensor:
    return _sum(x, dim, keepdim) / _numel(x)


def _norm(x: SymbolTensor, p: Any = 2, dim: Any = None, keepdim: bool = False, **_: Any) -> SymbolTensor:
    if isinstance(p, str) or (isinstance(p, (int, float)) and not 0 < p < math.inf):
        if p != "fro":
            raise UnknownOperationError(f"it takes the norm of order {p!r}, which is not smooth.")
        p = 2
    order = symbolic(p)
    return _sum(_entrywise(sympy.Abs)(x) ** order, dim, keepdim) ** (1 / order)


def _dot(x: Any, y: Any) -> SymbolTensor:
    x, y = symbolic(x), symbolic(y)
    if not (x.ndim and y.ndim):
        raise UnknownOperationError("it multiplies (@) a vector by a scalar.")
    return _sum(x * y)


def _numel(x: SymbolTensor) -> SymbolTensor:
    return SymbolTensor(DIMENSION if x.ndim else Integer(1), 0)


def _softplus(x: SymbolTensor, beta: Any = 1, threshold: Any = 20) -> SymbolTensor:
    return _entrywise(lambda x, b: sympy.log(1 + sympy.exp(b * x)) / b)(x, beta)


def _filled(value: Any) -> Callable[..., SymbolTensor]:
    return lambda x, **_: SymbolTensor(number(value), x.ndim)


_OPERATIONS: dict[str, Callable[..., Any]] = {
    "add": _add,
    "sub": _sub,
    "subtract": _sub,
    "rsub": lambda x, y: _sub(y, x),
    "sum": _sum,
    "mean": _mean,
    "norm": _norm,
    "vector_norm": _norm,
    "dot": _dot,
    "vdot": _dot,
    "inner": _dot,
    "matmul": _dot,
    "numel": _numel,
    "softplus": _softplus,
    "zeros_like": _filled(0),
    "ones_like": _filled(1),
    "full_like": lambda x, value, **_: SymbolTensor(symbolic(value).expr, x.ndim),
    "lerp": _entrywise(lambda x, y, a: x + a * (y - x)),
    "addcmul": lambda x, y, z, *, value=1: x + symbolic(value) * y * z,
    "addcdiv": lambda x, y, z, *, value=1: x + symbolic(value) * y / z,
    "clone": lambda x, **_: x,
    "contiguous": lambda x: x,
    "double": lambda x: x,
    "pow": _entrywise(sympy.Pow),
    "rpow": _entrywise(lambda x, y: y**x),
    "float_power": _entrywise(sympy.Pow),
    "mul": _entrywise(lambda x, y: x * y),
    "multiply": _entrywise(lambda x, y: x * y),
    "rmul": _entrywise(lambda x, y: x * y),
    "div": _entrywise(lambda x, y: x / y),
    "divide": _entrywise(lambda x, y: x / y),
    "truediv": _entrywise(lambda x, y: x / y),
    "true_divide": _entrywise(lambda x, y: x / y),
    "rdiv": _entrywise(lambda x, y: y / x),
    "rtruediv": _entrywise(lambda x, y: y / x),
    "neg": _entrywise(lambda x: -x),
    "negative": _entrywise(lambda x: -x),
    "square": _entrywise(lambda x: x**2),
    "reciprocal": _entrywise(lambda x: 1 / x),
    "sqrt": _entrywise(sympy.sqrt),
    "rsqrt": _entrywise(lambda x: 1 / sympy.sqrt(x)),
    "abs": _entrywise(sympy.Abs),
    "absolute": _entrywise(sympy.Abs),
    "sign": _entrywise(sympy.sign),
    "exp": _entrywise(sympy.exp),
    "exp2": _entrywise(lambda x: 2**x),
    "expm1": _entrywise(lambda x: sympy.exp(x) - 1),
    "log": _entrywise(sympy.log),
    "log1p": _entrywise(lambda x: sympy.log(1 + x)),
    "sigmoid": _entrywise(lambda x: 1 / (1 + sympy.exp(-x))),
    **{name: _entrywise(getattr(sympy, name)) for name in ("sin", "cos", "tan", "sinh", "cosh", "tanh", "asinh")},
    **{"radd": _add, "atan": _entrywise(sympy.atan), "arctan": _entrywise(sympy.atan)},
}


def _operation(name: str) -> Callable[..., Any]:
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


_SWITCHES = {"clamp", "clip", "clamp_min", "maximum", "minimum", "max", "min", "amax", "amin", "where", "relu", "round"}

__all__ = ["SymbolTensor", "UnknownOperationError", "number", "symbolic"]
