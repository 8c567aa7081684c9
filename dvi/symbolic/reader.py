"""A declaration read as formulas: f, P and Q called on symbols."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import sympy
import torch
from sympy import Expr, Symbol
from torch.utils import _pytree as pytree

from dvi.flows import MethodLike
from dvi.methods import Diagonal, Filter, Method, Scalar, SpecError, as_method
from dvi.methods.validate import leaves
from dvi.symbolic.formulas import Leaf, SymbolicSpec
from dvi.symbolic.simplification import factored, split_roots
from dvi.symbolic.tensors import SymbolTensor, number, symbolic
from dvi.symbolic.vectors import Level, Total, entry, letters

#: Names of hyperparameters in the paper, where they differ from the fields'.
PAPER = {"lr": "eta", "eps": "epsilon", "momentum": "beta", "share": "n"}

_SAMPLE = 11  # weights of the vector that init is called with, to see which parts of ν are like it


def read(method: MethodLike | type[Method], numeric: bool = False, inertial: bool | None = None) -> SymbolicSpec:
    """Call f, P and Q on symbols.

    Args:
        method, numeric: see :func:`dvi.derive`.
        inertial: is the letter m to be kept for the momentum?  If left out: where there is a filter.

    Raises:
        SpecError: if ν has parts that are neither scalars nor like w, P is neither ``Scalar`` nor ``Diagonal``, or f, P
            or Q does what has no closed form; if a method with numbers has no edge of period two.
    """
    spec, hyperparameters = _with_symbols(method, numeric)
    name = type(spec).__name__
    momentum, *numbers = _filter(method, spec)
    nu = _call(f"{name}.init(w)", lambda: _concrete(method, spec).init(torch.zeros(_SAMPLE, dtype=torch.float64)))
    parts = [_leaf(name, path, value) for path, value in leaves(nu)]
    structure = pytree.tree_structure(nu)
    used = {str(x.func if x.is_Function else x) for x in hyperparameters.values()} | set(vars(letters()))
    if not (momentum if inertial is None else inertial):
        used.discard("m")

    gradient: Any = SymbolTensor(letters().g, 1)  # it stands in for a tensor, as those in ν do

    def call_f(parts: list[Leaf]) -> tuple[Expr, ...]:
        change = _call(f"{name}.f(nu, g)", lambda: spec.f(_state(parts, structure), gradient))
        return _change(name, parts, structure, change)

    clocks = [x == 1 and not part.ndim for x, part in zip(call_f(parts), parts, strict=True)]
    scheduled = any(x.is_Function for x in hyperparameters.values())
    parts = _named(parts, clocks, used, scheduled)
    f = call_f(parts)
    P = _call(f"{name}.P(nu)", lambda: spec.P(_state(parts, structure)))
    if type(P) is not Scalar and type(P) is not Diagonal:
        raise SpecError(
            f"{name}.P(nu) is a {type(P).__name__}; only dvi.Scalar and dvi.Diagonal have closed forms here. "
            "flow.linearise(w, nu) gives α and β in numbers."
        )
    p = _call(f"{name}.P(nu)", lambda: symbolic(P.p))
    if isinstance(P, Scalar) and p.ndim:
        raise SpecError(f"{name}.P(nu): Scalar(p) takes a scalar; for a vector p write Diagonal(p).")
    return SymbolicSpec(
        method_of(method),
        tuple(parts),
        structure,
        f,
        split_roots(p.expr),
        isinstance(P, Diagonal),
        hyperparameters,
        momentum,
        *numbers,
    )


def _filter(method: MethodLike | type[Method], spec: Method) -> tuple[bool, Expr, Expr, Expr]:
    """Is there momentum, and its c, Q₁ and τ."""
    if not isinstance(method, type):
        as_method(method).at(0.0).Q().check()
    name = f"{type(spec).__name__}.Q()"
    Q = _call(name, spec.Q)
    # the coefficients first, so that a number among them is the fraction that it is written as
    Q = _call(name, lambda: Filter([symbolic(x) for x in Q.numerator], [symbolic(x) for x in Q.denominator]))
    if Q.order == 0 and sympy.expand(Q.numerator[0].expr - Q.denominator[0].expr) == 0:
        return False, sympy.Integer(2), sympy.Integer(1), sympy.Integer(0)
    return True, *(factored(sympy.factor(number.expr)) for number in (Q.threshold, Q.gain, Q.lag))


def method_of(method: MethodLike | type[Method]) -> Method | type[Method]:
    """A method, or a class of methods as it is.

    Raises:
        SpecError: if it is neither.
    """
    if isinstance(method, type):
        if issubclass(method, Method):
            return method
        raise SpecError(f"{method.__name__} is not a class of dvi.Method.")
    return as_method(method)


def _with_symbols(method: MethodLike | type[Method], numeric: bool) -> tuple[Method, dict[str, Expr]]:
    """A copy of the method whose hyperparameters are symbols, and these by field."""
    given = method_of(method)
    if isinstance(given, type):
        fields = {field.name: _default(field) for field in dataclasses.fields(given)}  # type: ignore[arg-type]
        spec: Method = object.__new__(given)
    else:
        fields, spec = given.hyperparameters(), copy.copy(given)
    symbols: dict[str, Expr] = {}
    for field, value in fields.items():
        shown = _hyperparameter(spec, field, value, numeric)
        if isinstance(shown, SymbolTensor) and not shown.expr.is_number:
            symbols[field] = shown.expr
        object.__setattr__(spec, field, shown)
    return spec, symbols


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else dataclasses.MISSING


def _hyperparameter(spec: Method, field: str, value: Any, numeric: bool) -> Any:
    """What f and P find in a field: a symbol, a number as a fraction, or what was there.

    A zero stays a zero (a term switched off), as do flags and whole numbers without a range of their own (counts).
    """
    name = PAPER.get(field, field)
    if name != field and name in (other.name for other in dataclasses.fields(spec)):  # type: ignore[arg-type]
        name = field
    if name in vars(letters()):
        name += "_0"  # this letter is taken
    positive = True if field in spec.ranges else None
    if value is dataclasses.MISSING:
        return SymbolTensor(Symbol(name, real=True, positive=positive), 0)
    if callable(value):
        t = letters().t
        if numeric:
            try:
                return symbolic(value(SymbolTensor(t, 0)))
            except Exception:  # whatever a user's function may raise on a symbol: it is then left unnamed, as η(t)
                pass
        return SymbolTensor(sympy.Function(name, real=True, positive=positive)(t), 0)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value == 0:
        return value
    if isinstance(value, int) and field not in spec.ranges:
        return value
    if numeric:
        return SymbolTensor(number(value), 0)
    return SymbolTensor(Symbol(name, real=True, positive=True if value > 0 else None), 0)


def _concrete(method: MethodLike | type[Method], spec: Method) -> Method:
    """What ``init`` is called on: the method as given, where it has numbers."""
    given = method_of(method)
    return spec if isinstance(given, type) else given


def _call(what: str, function: Callable[[], Any]) -> Any:
    """Call a user's function on symbols; what it raises is told as what it is."""
    try:
        return function()
    except SpecError as error:
        raise SpecError(f"{what} cannot be written in closed form: {error}") from None
    except Exception as error:  # torch, or the user's code, on an argument that is not a tensor
        raise SpecError(
            f"{what} cannot be called on symbols ({type(error).__name__}: {error}). It is to be made of operators and "
            "torch functions of ν, g and hyperparameters; flow.linearise(w, nu) gives α and β in numbers."
        ) from error


def _leaf(name: str, path: str, value: Any) -> Leaf:
    shape = list(value.shape)
    if shape not in ([], [_SAMPLE]):
        raise SpecError(
            f"{name}.init(w): ν{path} has shape {shape} for w of shape [{_SAMPLE}]; closed forms are for scalars and "
            "for vectors like w. flow.linearise(w, nu) gives α and β in numbers."
        )
    label = "_".join(part.strip("'\"") for part in path.strip("[]").split("][")) or "nu"
    if not label.isidentifier():
        label = f"nu{label}"
    return Leaf(label, entry(label) if shape else Level(label, real=True), len(shape))


def _named(parts: list[Leaf], clocks: list[bool], used: set[str], scheduled: bool) -> list[Leaf]:
    """The parts of ν with the paper's letters: ν where there is one, t for a clock (τ where schedules have taken t)."""
    alone = clocks.count(False) == 1
    single_clock = clocks.count(True) == 1
    named = []
    for part, clock in zip(parts, clocks, strict=True):
        label = part.name
        if clock:
            if single_clock:
                label = "t_nu" if scheduled else "t"
            symbol = Symbol(label, real=True, positive=True)
        else:
            label = "nu" if alone else f"nu_{label}" if label in used else label
            symbol = entry(label) if part.ndim else Level(label, real=True)
        named.append(Leaf(part.name, symbol, part.ndim, clock))
    return named


def _state(parts: list[Leaf], structure: pytree.TreeSpec) -> Any:
    return pytree.tree_unflatten([SymbolTensor(part.symbol, part.ndim) for part in parts], structure)


def _change(name: str, parts: list[Leaf], structure: pytree.TreeSpec, change: Any) -> tuple[Expr, ...]:
    if pytree.tree_structure(change) != structure:
        raise SpecError(f"{name}.f(nu, g) has another structure than ν; it returns the change of every part of ν.")
    out = []
    states = {part.symbol for part in parts if part.ndim}
    deltas = _call(f"{name}.f(nu, g)", lambda: [symbolic(delta) for delta in pytree.tree_leaves(change)])
    for part, x in zip(parts, deltas, strict=True):
        if x.ndim != part.ndim:
            kinds = ("a scalar", "a vector")
            raise SpecError(
                f"{name}.f(nu, g): the change of ν[{part.name!r}] is {kinds[x.ndim]}, ν[{part.name!r}] itself "
                f"{kinds[part.ndim]}."
            )
        summed = [total for total in x.expr.atoms(Total) if total.free_symbols & states]
        if summed:
            raise SpecError(
                f"{name}.f(nu, g): the change of ν[{part.name!r}] holds a sum over the entries of ν, so that "
                "(I + ∂f/∂ν)⁻¹ couples all coordinates and has no closed form. flow.linearise(w, nu) has it in numbers."
            )
        out.append(x.expr)
    return tuple(out)
