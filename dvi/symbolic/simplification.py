"""Expressions as a person would group them: a factor of hyperparameters, and a bracket."""

from __future__ import annotations

from collections.abc import Callable

import sympy
from sympy import Add, Dummy, Expr, Integer, Mul, Pow, Rational

from dvi.symbolic.vectors import changes

_LONG = 80  # operations

#: Letters of which it is known that 1 − β or 1 − βᵗ is positive.
_FRACTIONS = {"beta", "beta1", "beta2", "t", "tau"}


def tidy(e: Expr) -> Expr:
    """The same expression as a factor of hyperparameters such as (1−β₂)/β₂ times the rest, multiplied out if short."""
    if isinstance(e, Add):
        e = factored(e)
    outside, rest = outer(Mul(*map(_primitive, Mul.make_args(e))))
    brackets = [x for x in Mul.make_args(rest) if isinstance(x, Add)]
    if len(brackets) == 1:
        (bracket,) = brackets
        before = rest / bracket
        if not any(isinstance(x, Add) for x in sympy.preorder_traversal(before)):
            rest = Add(*(before * term for term in bracket.args))
        elif negative(before):
            rest = -before * Add(*(-term for term in bracket.args))
    of_beta = any(isinstance(x, sympy.log) for x in Mul.make_args(outside))  # log β is negative
    if isinstance(rest, Add) and (of_beta or all(negative(term) for term in rest.args)):
        outside, rest = -outside, -rest
    return outside * rest


def factored(e: Expr) -> Expr:
    """As a product; of a long expression, for which that would take minutes, only common factors are taken out."""
    logs = {x: Dummy() for x in e.atoms(sympy.log) if x.is_number}  # factor would write log 0.9 as 2 log 3 − log 10
    if logs:
        return factored(e.xreplace(logs)).xreplace({dummy: x for x, dummy in logs.items()})
    if e.count_ops() > _LONG:
        return sympy.factor_terms(e)
    try:
        return sympy.factor(e)
    except sympy.PolynomialError:
        return sympy.factor_terms(e)


def _primitive(e: Expr) -> Expr:
    """A factor without numbers that its terms share."""
    if not isinstance(e, Add):
        return e
    return sympy.factor_terms(e) if changes(e) else factored(e)


def each(e: Expr, function: Callable[[Expr], Expr]) -> Expr:
    """A linear function of a sum, term by term, each of them tidy: what was kept apart stays apart."""
    return Add(*(tidy(function(term)) for term in Add.make_args(e)))


def outer(e: Expr) -> tuple[Expr, Expr]:
    """A product as (the factor of hyperparameters that holds a sum, with all of their powers; the rest)."""
    outside, rest = Integer(1), Integer(1)
    for factor in Mul.make_args(e):
        base, exponent = factor.as_base_exp()
        if isinstance(base, Add) and not changes(base) and exponent.is_integer:
            flip = _sign(base) < 0
            outside *= Pow(-base if flip else base, exponent)
            rest *= (-1) ** exponent if flip else 1
        elif isinstance(factor, sympy.log) and not changes(factor):
            outside *= factor
        else:
            rest *= factor
    # what the outer factor is made of stays with it, as the β₂ of (1−β₂)/β₂
    for factor in Mul.make_args(rest):
        if factor.free_symbols and factor.free_symbols <= outside.free_symbols:
            outside, rest = outside * factor, rest / factor
    return outside, rest


def negative(e: Expr) -> bool:
    """Does it begin with a minus sign?"""
    return bool(e.as_coeff_Mul()[0].is_negative)


def separate(e: Expr) -> Expr:
    """√(v/(1−β₂ᵗ)) as √v/√(1−β₂ᵗ), which keeps derivatives short; right, since 1−β₂ᵗ is positive."""

    def root(base: Expr, exponent: Expr) -> Expr:
        factors = Mul.make_args(base)
        known = [
            x for x in factors if not changes(x) and {s.name for s in x.free_symbols} <= _FRACTIONS and _sign(x) > 0
        ]
        if exponent.is_integer or len(factors) == 1 or not known:
            return Pow(base, exponent)
        return Pow(Mul(*(x for x in factors if x not in known)), exponent) * Mul(*(_power(x, exponent) for x in known))

    return e.replace(Pow, root)


def _power(e: Expr, exponent: Expr) -> Expr:
    """(bᵐ)ⁿ = bᵐⁿ, for b > 0."""
    base, inner = e.as_base_exp()
    return Pow(base, inner * exponent)


def _sign(e: Expr) -> float:
    """Of hyperparameters, which lie between 0 and 1 where their sign is asked for, and clocks, which start from 1."""
    at = {s: Integer(1) if s.name in ("t", "tau") else Rational(1, 2) for s in e.free_symbols}
    return float(e.xreplace(at).evalf()) if not e.has(sympy.Function) else 1.0
