"""The closed forms in numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import sympy
from sympy import Derivative, Expr, Symbol
from torch.utils import _pytree as pytree

from dvi.methods import SpecError
from dvi.methods.schedules import value_and_slope
from dvi.solvers.protocol import Array
from dvi.solvers.svec import triu
from dvi.symbolic.vectors import letters

if TYPE_CHECKING:
    from dvi.symbolic.derivation import Derivation


@dataclass(frozen=True, eq=False)
class Values:
    """α [k, k], β [n, n] in svec (n = k(k+1)/2), dw/dt [d], dν/dt like ν, and σ² for k = 1 (else None).

    dm/dt [d] where the momentum is a state of the flow.
    """

    alpha: Array
    beta: Array
    w: Array
    nu: Any
    sigma2: float | None
    m: Array | None = None


def evaluate(
    d: Derivation,
    g: Any,
    nu: Any,
    U: Any,
    HU: Any,
    T: Any,
    X: Any,
    t: float,
    m: Any,
    hyperparameters: Mapping[str, float],
) -> Values:
    """See :meth:`dvi.Derivation.evaluate`."""
    x = letters()
    g, U, HU, T = map(_array, (g, U, HU, T))
    size, k = U.shape
    X = np.zeros((k, k)) if X is None else _array(X)
    index = triu(k)
    rows, columns, weight = index.rows, index.columns, index.weight
    state = [_array(leaf) for leaf in pytree.tree_leaves(nu)]
    known: dict[Expr, Any] = {x.g: g, x.d: size, x.t: t}
    known |= {leaf.symbol: value for leaf, value in zip(d.spec.leaves, state, strict=True)}
    known |= _hyperparameters(d, t, hyperparameters)

    T_pair = T / weight[:, None]  # svec carries √2 off the diagonal
    # pair ab along the first axis, pair cd along the second, coordinates last
    pairs: dict[Expr, Any] = {x.T_ab: T_pair[:, None], x.T_cd: T_pair[None]}
    pairs |= {x.U_a: U.T[rows, None], x.U_b: U.T[columns, None], x.U_c: U.T[None, rows], x.U_d: U.T[None, columns]}
    pairs |= {x.HU_c: HU.T[None, rows], x.HU_d: HU.T[None, columns]}
    alpha = _value(d.alpha, known | pairs, (index.n, 1, 1))[:, 0, 0]
    beta = _value(d.beta, known | pairs, (index.n, index.n, 1))[:, :, 0] * np.outer(weight, weight)

    matrices = {"HSigmaH": (HU, X), "Sigma": (U, X)}
    moved = known | {
        x.D3L: np.einsum("ab,abi->i", X, T_pair[index.position]),
        x.HSH: ((HU @ X) * HU).sum(1),
        x.Sii: ((U @ X) * U).sum(1),
    }
    if d.flow.m is not None:
        moved[x.m] = g + moved[x.D3L] / 2 if m is None else _array(m)
    rates = [
        _value(d.flow.nu[leaf.name].rhs, moved, value.shape, matrices)
        for leaf, value in zip(d.spec.leaves, state, strict=True)
    ]
    return Values(
        alpha=alpha[index.position],
        beta=beta,
        w=_value(d.flow.w.rhs, moved, (size,)),
        nu=pytree.tree_unflatten(rates, pytree.tree_structure(nu)),
        sigma2=_sigma2(d, known, U[:, 0], HU[:, 0], T[0]) if k == 1 else None,
        m=None if d.flow.m is None else _value(d.flow.m.rhs, moved, (size,)),
    )


def _sigma2(d: Derivation, known: dict[Expr, Any], u: Array, Hu: Array, T: Array) -> float:
    x = letters()
    length = 1.0 if d.spec.diagonal else float(np.linalg.norm(u))
    u, Hu, T = u / length, Hu / length, T / length**2
    one = {x.u: u, x.Tuu: T, x.dS: T, x.S: u @ Hu}
    return float(_value(d.sigma2, known | one, ()))


def _array(x: Any) -> Array:
    return np.asarray(x.detach().cpu() if hasattr(x, "detach") else x, dtype=np.float64)


def _hyperparameters(d: Derivation, t: float, given: Mapping[str, float]) -> dict[Expr, float]:
    """The value of every hyperparameter's symbol, and the slopes of schedules."""
    out: dict[Expr, float] = {}
    method = d.spec.method
    unknown = set(given) - set(d.spec.hyperparameters)
    if unknown:
        raise SpecError(f"no symbol for {', '.join(sorted(unknown))}; there are {', '.join(d.spec.hyperparameters)}.")
    for field, symbol in d.spec.hyperparameters.items():
        value = given.get(field, None if isinstance(method, type) else getattr(method, field))
        if value is None:
            raise SpecError(f"evaluate(…, {field}=…): {field} has no value; it was derived from a class.")
        if callable(value):
            value, out[Derivative(symbol, letters().t)] = value_and_slope(value, t)
        elif symbol.is_Function:
            out[Derivative(symbol, letters().t)] = 0.0
        out[symbol] = float(value)
    return out


def _value(
    e: Expr,
    known: Mapping[Expr, Any],
    shape: tuple[int, ...],
    matrices: Mapping[str, tuple[Array, Array]] | None = None,
) -> Array:
    """The expression with the symbols' values, vectors along the last axis; to the shape asked for.

    Args:
        e: the expression.
        known: the values.
        shape: of the result.
        matrices: by name, (V [d, k], X [k, k]) for VXVᵀ.
    """
    # schedules and their slopes become symbols, the slopes first, since they hold the schedules
    scalars = {key: Symbol(f"schedule_{i}") for i, key in enumerate(known) if not isinstance(key, Symbol)}
    flat = e.xreplace({key: v for key, v in scalars.items() if isinstance(key, Derivative)}).xreplace(scalars)
    given = {scalars.get(key, key): value for key, value in known.items()}
    given = {symbol: value for symbol, value in given.items() if symbol in flat.free_symbols}
    given |= {symbol: symbol.name for symbol in (letters().HSigmaH, letters().Sigma)}

    def total(v: Any) -> Any:
        return np.sum(v, axis=-1, keepdims=True)

    def image(b: Any, name: str) -> Any:
        V, X = (matrices or {})[name]
        return V @ (X @ (V.T @ (b * np.ones(len(V)))))

    functions = {"Total": total, "Image": image, "Bilinear": lambda a, b, name: total(a * image(b, name))}
    evaluated = sympy.lambdify(list(given), flat, modules=[functions, "numpy"])(*given.values())
    return _shaped(np.asarray(evaluated, dtype=np.float64), shape)


def _shaped(value: Array, shape: tuple[int, ...]) -> Array:
    """A sum comes with an axis of length 1 where the coordinates were."""
    if value.ndim > len(shape) and value.shape[-1] == 1:
        value = value[..., 0]
    return np.array(np.broadcast_to(value, shape))
