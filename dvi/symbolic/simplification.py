"""How expressions are simplified: common factors are taken out, and the shortest form is kept."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import sympy
from sympy import Add, Dummy, Expr, Integer, Mul, Pow, Rational

#: Hyperparameters between 0 and 1 and clocks, which start from 1, by name: 1 − β and 1 − βᵗ are positive.
_FRACTIONS, _CLOCKS = {"beta", "beta1", "beta2"}, {"t", "t_nu"}
_LONG = 80  # operations; sympy.factor may take minutes on an expression with more


def factored(e: Expr) -> Expr:
    """The shortest form of an expression among itself, itself with common factors taken out, and a product."""
    if isinstance(e, Mul):  # one factor at a time, since sympy.factor would multiply them out first
        return _positive(Mul(*map(factored, e.args)))
    if not isinstance(e, Add):
        return e
    logs = {x: Dummy() for x in e.atoms(sympy.log) if x.is_number}  # factor would write log 0.9 as 2 log 3 − log 10
    flat = e.xreplace(logs)
    forms = [flat, sympy.factor_terms(flat)]
    if flat.count_ops() <= _LONG:
        with suppress(sympy.PolynomialError):  # a function of which sympy makes no polynomials
            forms.append(sympy.factor(flat))
    shortest = min(reversed(forms), key=lambda form: form.count_ops())
    return _positive(shortest).xreplace({dummy: x for x, dummy in logs.items()})


def _positive(e: Expr) -> Expr:
    """The product with 1 − β for each factor β − 1, and x + y − z for each factor z − x − y."""
    sign, factors = 1, []
    for factor in Mul.make_args(e):
        base, exponent = factor.as_base_exp()
        if exponent.is_odd and isinstance(base, Add):
            balance = sum(-1 if negative(term) else 1 for term in base.args)
            if balance < 0 or (balance == 0 and base.as_coeff_Add()[0].is_negative):
                sign, factor = -sign, (-base) ** exponent
        factors.append(factor)
    number, rest = Mul(*factors).as_coeff_Mul()
    number *= sign  # sympy would multiply a number into a sum
    return Mul(number, rest, evaluate=False) if isinstance(rest, Add) and abs(number) != 1 else number * rest


def negative(e: Expr) -> bool:
    """Does the expression begin with a minus sign?"""
    return bool(e.as_coeff_Mul()[0].is_negative)


def each(e: Expr, function: Callable[[Expr], Expr]) -> Expr:
    """A linear function of a sum, term by term, each simplified: terms that were kept apart stay apart."""
    return Add(*(factored(function(term)) for term in Add.make_args(e)))


def split_roots(e: Expr) -> Expr:
    """√(v/(1−β₂ᵗ)) as √v/√(1−β₂ᵗ), which keeps derivatives short; right, since 1−β₂ᵗ is positive."""

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
