"""Evaluates the closed forms in numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import sympy
from sympy import Derivative, Expr, Symbol
from torch.utils import _pytree as pytree

from dvi.methods import SpecError
from dvi.methods.schedules import value_and_slope
from dvi.solvers.protocol import Array
from dvi.solvers.svec import Triu, triu
from dvi.symbolic.formulas import Formulas, SymbolicSpec
from dvi.symbolic.vectors import letters


@dataclass(frozen=True, eq=False)
class Values:
    """The formulas in numbers, at one point of the flow.

    Attributes:
        alpha: α [k, k].
        beta: β [n, n] in svec order, n = k(k+1)/2.
        w: dw/dt [d].
        nu: dν/dt, of the structure of ν.
        sigma2: σ² for k = 1, else None.
        m: dm/dt [d] if the momentum is a state of the flow, else None.
    """

    alpha: Array
    beta: Array
    w: Array
    nu: Any
    sigma2: float | None
    m: Array | None = None


@dataclass(frozen=True, eq=False)
class Point:
    """The point at which the formulas are evaluated; :meth:`dvi.Derivation.evaluate` describes the fields."""

    g: Any
    nu: Any
    U: Any
    HU: Any
    T: Any
    X: Any = None
    t: float = 0.0
    m: Any = None
    w: Any = None

    def arrays(self) -> Point:
        """Every tensor as a float64 array; X = 0 if it is left out."""
        fields = ((field.name, getattr(self, field.name)) for field in dataclasses.fields(self))
        given = {name: pytree.tree_map(_array, value) for name, value in fields if value is not None}
        return Point(**{"X": np.zeros((given["U"].shape[1],) * 2), **given, "t": float(self.t)})


def _array(x: Any) -> Array:
    return np.asarray(x.detach().cpu() if hasattr(x, "detach") else x, dtype=np.float64)


def evaluate(formulas: Formulas, at: Point, hyperparameters: Mapping[str, float]) -> Values:
    """The formulas in numbers.

    Raises:
        SpecError: if a hyperparameter has no value, or a name is not that of a hyperparameter.
    """
    x, flow, leaves, at = letters(), formulas.flow, formulas.spec.leaves, at.arrays()
    size, k = at.U.shape
    index = triu(k)
    T = at.T / index.weight[:, None]  # svec has a factor √2 off the diagonal
    state = pytree.tree_leaves(at.nu)
    known: dict[Expr, Any] = {x.g: at.g, x.d: size, x.t: at.t}
    known |= {leaf.symbol: value for leaf, value in zip(leaves, state, strict=True)}
    known |= values_of(formulas.spec, at.t, hyperparameters)
    if formulas.spec.decay != 0:
        if at.w is None:
            raise SpecError("evaluate(…, w=…): the weights decay, so w is needed.")
        known[x.w] = at.w

    pairs = known | _pairs(at, T, index)
    alpha = value_of(formulas.alpha, pairs, (index.n, 1, 1))[:, 0, 0]
    beta = value_of(formulas.beta, pairs, (index.n, index.n, 1))[:, :, 0] * np.outer(index.weight, index.weight)

    D3L = np.einsum("ab,abi->i", at.X, T[index.position])
    oscillating = known | {x.D3L: D3L, x.HSH: ((at.HU @ at.X) * at.HU).sum(1), x.Sii: ((at.U @ at.X) * at.U).sum(1)}
    if flow.m is not None:
        oscillating[x.m] = at.g + D3L / 2 if at.m is None else at.m
    matrices = {"HSigmaH": (at.HU, at.X), "Sigma": (at.U, at.X)}
    rates = [
        value_of(flow.nu[leaf.name].rhs, oscillating, value.shape, matrices)
        for leaf, value in zip(leaves, state, strict=True)
    ]
    return Values(
        alpha=alpha[index.position],
        beta=beta,
        w=value_of(flow.w.rhs, oscillating, (size,)),
        nu=pytree.tree_unflatten(rates, pytree.tree_structure(at.nu)),
        sigma2=_sigma2(formulas, known, at) if k == 1 else None,
        m=None if flow.m is None else value_of(flow.m.rhs, oscillating, (size,)),
    )


def _pairs(at: Point, T: Array, index: Triu) -> dict[Expr, Array]:
    """The letters of α and β: the pair ab along the first axis, cd along the second, coordinates along the last."""
    x, U, HU = letters(), at.U.T, at.HU.T
    a, b, c, d = (index.rows, None), (index.columns, None), (None, index.rows), (None, index.columns)
    vectors = {x.U_a: U[a], x.U_b: U[b], x.U_c: U[c], x.U_d: U[d], x.HU_c: HU[c], x.HU_d: HU[d]}
    return vectors | {x.T_ab: T[:, None], x.T_cd: T[None]}


def _sigma2(formulas: Formulas, known: Mapping[Expr, Any], at: Point) -> float:
    x = letters()
    length = 1.0 if formulas.spec.diagonal else float(np.linalg.norm(at.U))
    u, Hu, T = at.U[:, 0] / length, at.HU[:, 0] / length, at.T[0] / length**2
    return float(value_of(formulas.sigma2, {**known, x.u: u, x.Tuu: T, x.dS: T, x.S: u @ Hu}, ()))


def values_of(spec: SymbolicSpec, t: float, given: Mapping[str, float]) -> dict[Expr, float]:
    """The value of every hyperparameter's symbol, and the slopes of schedules."""
    out: dict[Expr, float] = {}
    method, symbols = spec.method, spec.hyperparameters
    if unknown := set(given) - set(symbols):
        raise SpecError(f"no symbol for {', '.join(sorted(unknown))}; there are {', '.join(symbols)}.")
    for field, symbol in symbols.items():
        value = given.get(field, None if isinstance(method, type) else getattr(method, field))
        if value is None:
            raise SpecError(f"evaluate(…, {field}=…): {field} has no value; it was derived from a class.")
        slope = 0.0
        if callable(value):
            value, slope = value_and_slope(value, t)
        if symbol.is_Function:
            out[Derivative(symbol, letters().t)] = slope
        out[symbol] = float(value)
    return out


def value_of(
    e: Expr,
    known: Mapping[Expr, Any],
    shape: tuple[int, ...],
    matrices: Mapping[str, tuple[Array, Array]] | None = None,
) -> Array:
    """The value of an expression, broadcast to a shape.

    Args:
        e: the expression.
        known: the values of its symbols, the coordinates of vectors along the last axis.
        shape: of the result.
        matrices: (V [d, k], X [k, k]) by name, for the matrix VXVᵀ.
    """
    # schedules and their slopes become symbols; the slopes first, because they contain the schedules
    scalars = {key: Symbol(f"schedule_{i}") for i, key in enumerate(known) if not isinstance(key, Symbol)}
    flat = e.xreplace({key: v for key, v in scalars.items() if isinstance(key, Derivative)}).xreplace(scalars)
    given = {scalars.get(key, key): value for key, value in known.items()}
    given = {symbol: value for symbol, value in given.items() if symbol in flat.free_symbols}
    given |= {symbol: symbol.name for symbol in (letters().HSigmaH, letters().Sigma, letters().N)}

    def total(v: Any) -> Any:
        return np.sum(v, axis=-1, keepdims=True)

    def image(b: Any, name: str) -> Any:
        V, X = (matrices or {})[name]
        return V @ (X @ (V.T @ (b * np.ones(len(V)))))

    functions = {"Total": total, "Image": image, "Bilinear": lambda a, b, name: total(a * image(b, name))}
    evaluated = sympy.lambdify(list(given), flat, modules=[functions, "numpy"])(*given.values())
    value = np.asarray(evaluated, dtype=np.float64)
    if value.ndim > len(shape) and value.shape[-1] == 1:
        value = value[..., 0]  # a sum keeps an axis of length 1 in place of the coordinates
    return np.array(np.broadcast_to(value, shape))
