"""Simplifies expressions: takes common factors out, and keeps the shortest form."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import sympy
from sympy import Add, Dummy, Expr, Integer, Mul, Pow, Rational

#: Hyperparameters between 0 and 1 and clocks, which start from 1, by name: 1 − β and 1 − βᵗ are positive.
_FRACTIONS, _CLOCKS = {"beta", "beta1", "beta2"}, {"t", "t_nu"}
_LONG = 80  # operations; sympy.factor may take minutes on an expression with more


def factored(e: Expr) -> Expr:
    """The expression with each of its factors in the shortest form, and with the usual signs."""
    number, product = e.as_coeff_Mul()
    factors = []
    for part in Mul.make_args(product):  # one by one, because sympy.factor would multiply them out first
        factors += Mul.make_args(_shortest(part) if isinstance(part, Add) else part)
    for i, factor in enumerate(factors):
        base, exponent = factor.as_base_exp()
        if exponent.is_odd and isinstance(base, Add) and _begins_with_minus(base):
            number, factors[i] = -number, (-base) ** exponent
    number, rest = number * Mul(*(x for x in factors if x.is_Number)), Mul(*(x for x in factors if not x.is_Number))
    # sympy would multiply the number into a sum
    return Mul(number, rest, evaluate=False) if isinstance(rest, Add) and abs(number) != 1 else number * rest


def _shortest(e: Add) -> Expr:
    """The shortest of a sum, the sum with common factors taken out, and a product."""
    logs = {x: Dummy() for x in e.atoms(sympy.log) if x.is_number}  # factor would write log 0.9 as 2 log 3 − log 10
    flat = e.xreplace(logs)
    forms = [sympy.factor_terms(flat), flat]
    if flat.count_ops() <= _LONG:
        with suppress(sympy.PolynomialError):  # a function that sympy cannot treat as a polynomial
            forms.insert(0, sympy.factor(flat))
    return min(forms, key=lambda form: form.count_ops()).xreplace({dummy: x for x, dummy in logs.items()})


def _begins_with_minus(e: Add) -> bool:
    """Does the sum look better with the other sign, as 1 − β for β − 1, or x + y − z for z − x − y?"""
    balance = sum(-1 if negative(term) else 1 for term in e.args)
    return balance < 0 or (balance == 0 and bool(e.as_coeff_Add()[0].is_negative))


def negative(e: Expr) -> bool:
    """Does the expression begin with a minus sign?"""
    return bool(e.as_coeff_Mul()[0].is_negative)


def each(e: Expr, function: Callable[[Expr], Expr]) -> Expr:
    """Apply a linear function to a sum term by term, and simplify each term; separate terms stay separate."""
    return Add(*(factored(function(term)) for term in Add.make_args(e)))


def split_roots(e: Expr) -> Expr:
    """√(v/(1−β₂ᵗ)) as √v/√(1−β₂ᵗ), which keeps derivatives short; this is right, because 1−β₂ᵗ is positive."""

    def split(base: Expr, exponent: Expr) -> Expr:
        rest, positive = Integer(1), Integer(1)
        for factor in Mul.make_args(base):
            inner, power = factor.as_base_exp()
            if _known_positive(inner):
                positive *= inner ** (power * exponent)
            else:
                rest *= factor
        return rest**exponent * positive

    return e.replace(Pow, split)


def _known_positive(e: Expr) -> bool:
    values = {s: Integer(1) if s.name in _CLOCKS else Rational(1, 2) for s in e.free_symbols}
    return {s.name for s in values} <= _FRACTIONS | _CLOCKS and bool(e.xreplace(values).is_positive)
