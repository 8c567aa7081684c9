"""Reads a declaration as formulas: f, P, Q and decay are called on symbols."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import sympy
import torch
from sympy import Expr, Symbol
from torch.utils import _pytree as pytree

from dvi.interop.binding import MethodLike
from dvi.interop.binding import read as read_method
from dvi.methods import Diagonal, Filter, Grouped, Method, Scalar, SpecError
from dvi.methods.validation import leaves
from dvi.symbolic.formulas import Leaf, SymbolicSpec
from dvi.symbolic.simplification import factored, split_roots
from dvi.symbolic.tensors import SymbolTensor, number, symbolic
from dvi.symbolic.vectors import Level, Total, entry, letters

#: The paper's names of hyperparameters, if they differ from the names of the fields.
PAPER = {"lr": "eta", "eps": "epsilon", "momentum": "beta", "share": "n", "weight_decay": "lambda"}

_SAMPLE = 11  # size of the vector on which init is called, to see which parts of ν are vectors
_IN_NUMBERS = "flow.linearise(w, nu) gives α and β in numbers."


def read(method: MethodLike | type[Method], numeric: bool = False, inertial: bool | None = None) -> SymbolicSpec:
    """Call f, P and Q on symbols.

    Args:
        method: see :func:`dvi.derive`.
        numeric: see :func:`dvi.derive`.
        inertial: is the letter m reserved for the momentum?  By default it is if the method has a filter.

    Raises:
        SpecError: if f, P or Q has no closed form.  If a part of ν is neither a scalar nor like w, or P is neither
            ``Scalar`` nor ``Diagonal``.  If the first instability of a method with numbers is not of period two.
    """
    given = _of_one_group(method_of(method), numeric)
    spec, hyperparameters = _with_symbols(given, numeric)
    name = type(spec).__name__
    momentum, threshold, gain, lag = _filter(given, spec)
    used = {str(x.func if x.is_Function else x) for x in hyperparameters.values()} | set(vars(letters()))
    if not (momentum if inertial is None else inertial):
        used.discard("m")

    start = spec if isinstance(given, type) else given  # init makes tensors, so it needs numbers
    nu = _call(f"{name}.init(w)", lambda: start.init(torch.zeros(_SAMPLE, dtype=torch.float64)))
    structure = pytree.tree_structure(nu)
    parts = [_leaf(name, path, value) for path, value in leaves(nu)]
    changes = _change(spec, parts, structure)
    clocks = [change == 1 and not part.ndim for change, part in zip(changes, parts, strict=True)]
    scheduled = any(x.is_Function for x in hyperparameters.values())
    parts = _named(parts, clocks, used, scheduled)
    p, diagonal = _preconditioner(spec, parts, structure)
    decay = _decay(spec)
    return SymbolicSpec(
        method=given,
        leaves=tuple(parts),
        structure=structure,
        f=_change(spec, parts, structure),
        p=p,
        diagonal=diagonal,
        hyperparameters=hyperparameters,
        momentum=momentum,
        threshold=factored(threshold * (2 - decay) / 2) if decay != 0 else threshold,
        gain=gain,
        lag=lag,
        decay=decay,
    )


def method_of(method: MethodLike | type[Method]) -> Method | type[Method]:
    """A method, made from a triple if necessary; a class of methods stays as it is.

    Raises:
        SpecError: if it is neither.
    """
    if not isinstance(method, type):
        return read_method(method)
    if not issubclass(method, Method):
        raise SpecError(f"{method.__name__} is not a class of dvi.Method.")
    return method


def _of_one_group(method: Method | type[Method], numeric: bool) -> Method | type[Method]:
    """The method of one parameter group; its letters stand for those of any other group."""
    if not isinstance(method, Grouped):
        return method
    alike = {(type(part), part.scheduled) for part in method.methods}
    if len(method.methods) > 1 and (numeric or len(alike) > 1):
        raise SpecError(
            f"{method}: each group has its own formulas. Derive one of them: dvi.derive(method.methods[0], …), where "
            "method = dvi.from_torch(optimizer)."
        )
    return method.methods[0]


def _call(what: str, function: Callable[[], Any]) -> Any:
    """Call a user's function on symbols; errors name the part of the declaration that failed."""
    try:
        return function()
    except SpecError as error:
        raise SpecError(f"{what} cannot be written in closed form: {error}") from None
    except Exception as error:  # torch, or the user's code, on an argument that is not a tensor
        raise SpecError(
            f"{what} cannot be called on symbols ({type(error).__name__}: {error}). It must consist of operators and "
            f"torch functions of ν, g and hyperparameters; {_IN_NUMBERS}"
        ) from error


# ---- hyperparameters -----------------------------------------------------------------------------------


def _with_symbols(given: Method | type[Method], numeric: bool) -> tuple[Method, dict[str, Expr]]:
    """A copy of the method whose hyperparameters are symbols, and these symbols by field."""
    if isinstance(given, type):
        spec: Method = object.__new__(given)
        fields = {field.name: _default(field) for field in dataclasses.fields(given)}  # type: ignore[arg-type]
    else:
        spec, fields = copy.copy(given), given.hyperparameters()
    symbols: dict[str, Expr] = {}
    for field, value in fields.items():
        shown = _hyperparameter(spec, field, value, numeric)
        if isinstance(shown, SymbolTensor) and not shown.expr.is_number:
            symbols[field] = shown.expr
        object.__setattr__(spec, field, shown)
    return spec, symbols


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _hyperparameter(spec: Method, field: str, value: Any, numeric: bool) -> Any:
    """The value of a field for f and P: a symbol, a number as a fraction, or the old value.

    A zero stays a zero, because it removes a term.  Flags stay flags.  Whole numbers without a range of their own stay
    numbers, because they count something.
    """
    letter = _letter(spec, field)
    positive = True if field in spec.ranges else None
    if value is dataclasses.MISSING:
        return SymbolTensor(Symbol(letter, real=True, positive=positive), 0)
    if callable(value):
        t = letters().t
        if numeric:
            with suppress(Exception):  # a user's function may raise anything on a symbol; it then becomes η(t)
                return symbolic(value(SymbolTensor(t, 0)))
        return SymbolTensor(sympy.Function(letter, real=True, positive=positive)(t), 0)
    counts = isinstance(value, int) and field not in spec.ranges
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value == 0 or counts:
        return value
    symbol = number(value) if numeric else Symbol(letter, real=True, positive=True if value > 0 else None)
    return SymbolTensor(symbol, 0)


def _letter(spec: Method, field: str) -> str:
    """The paper's name of a hyperparameter, unless another field or a letter of the derivation has this name."""
    fields = {other.name for other in dataclasses.fields(spec)}  # type: ignore[arg-type]
    name = PAPER.get(field, field)
    name = field if name in fields else name
    return f"{name}_0" if name in {"nu", *vars(letters())} else name


# ---- the filter, the state, f and P --------------------------------------------------------------------


def _filter(given: Method | type[Method], spec: Method) -> tuple[bool, Expr, Expr, Expr]:
    """Whether there is momentum, and its c, Q₁ and τ."""
    if not isinstance(given, type):
        given.at(0.0).Q().check()
    name = f"{type(spec).__name__}.Q()"
    Q = _call(name, spec.Q)
    # the coefficients first, so that a number among them becomes the fraction that was written
    Q = _call(name, lambda: Filter([symbolic(x) for x in Q.numerator], [symbolic(x) for x in Q.denominator]))
    if Q.order == 0 and sympy.expand(Q.numerator[0].expr - Q.denominator[0].expr) == 0:
        return False, sympy.Integer(2), sympy.Integer(1), sympy.Integer(0)
    threshold, gain, lag = (factored(sympy.factor(x.expr)) for x in (Q.threshold, Q.gain, Q.lag))
    return True, threshold, gain, lag


def _decay(spec: Method) -> Expr:
    """The weight decay γ, called on symbols; 0 if there is none."""
    name = f"{type(spec).__name__}.decay()"
    declared = _call(name, spec.decay)
    if declared is None:
        return sympy.Integer(0)
    if isinstance(declared, (list, tuple)) or (isinstance(declared, torch.Tensor) and declared.ndim):
        raise SpecError(
            f"{name} differs between weights, but closed forms need one γ for all. Derive the method with one γ; its "
            f"formulas hold weight by weight (shapes=None). {_IN_NUMBERS}"
        )
    return factored(_call(name, lambda: symbolic(declared)).expr)


def _leaf(name: str, path: str, value: Any) -> Leaf:
    """A part of ν, with a label made from its path."""
    shape = list(value.shape)
    if shape not in ([], [_SAMPLE]):
        raise SpecError(
            f"{name}.init(w): ν{path} has shape {shape} for w of shape [{_SAMPLE}]; closed forms need scalars "
            f"or vectors like w. {_IN_NUMBERS}"
        )
    label = "_".join(part.strip("'\"") for part in path.strip("[]").split("][")) or "nu"
    label = label if label.isidentifier() else f"nu{label}"
    return Leaf(label, _symbol(label, len(shape)), len(shape))


def _symbol(label: str, ndim: int) -> Symbol:
    return entry(label) if ndim else Level(label, real=True)


def _named(parts: Sequence[Leaf], clocks: Sequence[bool], used: set[str], scheduled: bool) -> list[Leaf]:
    """The parts of ν with the paper's letters: ν if there is one part, t for a clock (t_ν if schedules use t)."""
    alone = {clock: clocks.count(clock) == 1 for clock in (False, True)}
    short = {False: "nu", True: "t_nu" if scheduled else "t"}
    named = []
    for part, clock in zip(parts, clocks, strict=True):
        label = short[clock] if alone[clock] else f"nu_{part.name}" if part.name in used else part.name
        symbol = Symbol(label, real=True, positive=True) if clock else _symbol(label, part.ndim)
        named.append(Leaf(part.name, symbol, part.ndim, clock))
    return named


def _state(parts: Sequence[Leaf], structure: pytree.TreeSpec) -> Any:
    return pytree.tree_unflatten([SymbolTensor(part.symbol, part.ndim) for part in parts], structure)


def _change(spec: Method, parts: Sequence[Leaf], structure: pytree.TreeSpec) -> tuple[Expr, ...]:
    """The change f of every part of ν, called on symbols."""
    name = f"{type(spec).__name__}.f(nu, g)"
    gradient: Any = SymbolTensor(letters().g, 1)  # it replaces a tensor, like the parts of ν
    change = _call(name, lambda: spec.f(_state(parts, structure), gradient))
    if pytree.tree_structure(change) != structure:
        raise SpecError(f"{name} has another structure than ν; it must return the change of every part of ν.")
    changes = _call(name, lambda: [symbolic(x) for x in pytree.tree_leaves(change)])
    vectors = {part.symbol for part in parts if part.ndim}
    for part, x in zip(parts, changes, strict=True):
        if x.ndim != part.ndim:
            kinds = ("a scalar", "a vector")
            raise SpecError(
                f"{name}: the change of ν[{part.name!r}] is {kinds[x.ndim]}, "
                f"ν[{part.name!r}] itself {kinds[part.ndim]}."
            )
        if any(total.free_symbols & vectors for total in x.expr.atoms(Total)):
            raise SpecError(
                f"{name}: the change of ν[{part.name!r}] contains a sum over the entries of ν, so that (I + ∂f/∂ν)⁻¹ "
                "couples all coordinates and has no closed form. flow.linearise(w, nu) has it in numbers."
            )
    return tuple(x.expr for x in changes)


def _preconditioner(spec: Method, parts: Sequence[Leaf], structure: pytree.TreeSpec) -> tuple[Expr, bool]:
    """The p of P, called on symbols, and whether P = diag(p)."""
    name = f"{type(spec).__name__}.P(nu)"
    P = _call(name, lambda: spec.P(_state(parts, structure)))
    if type(P) is not Scalar and type(P) is not Diagonal:
        raise SpecError(
            f"{name} is a {type(P).__name__}; only dvi.Scalar and dvi.Diagonal have closed forms here. {_IN_NUMBERS}"
        )
    p = _call(name, lambda: symbolic(P.p))
    if isinstance(P, Scalar) and p.ndim:
        raise SpecError(f"{name}: Scalar(p) takes a scalar; for a vector p write Diagonal(p).")
    return split_roots(p.expr), isinstance(P, Diagonal)
