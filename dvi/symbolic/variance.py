"""The variance σ² of one oscillating direction, from its effect on P (paper, eqs. 4, 10, 20)."""

from __future__ import annotations

import sympy
from sympy import Add, Expr, Mul, Pow, Symbol

from dvi.symbolic.formulas import SymbolicSpec
from dvi.symbolic.simplification import each
from dvi.symbolic.vectors import Total, along, letters


def one_direction(spec: SymbolicSpec, P_free: Expr, P_pushed: Expr) -> tuple[Expr, Expr]:
    """(α, β) for U = u, with Hu = 2P̃u, so that σ² = α/β.

    For a scalar P, |u| = 1, and the sharpness S = 2p̃ = cp replaces ν.  Both are then multiplied by p/Q₁, which removes
    the fractions, as in eq. 10.

    Args:
        spec: the declaration.
        P_free: the rate of P̃ without oscillation, ∂P̃[ν̇₀] + ∂P̃/∂t.
        P_pushed: the rate that oscillation adds, ∂P̃[ν̇_Σ].
    """
    x, p, gain = letters(), spec.p, spec.gain
    if spec.diagonal:
        pushed = along(P_pushed, 2 * spec.edge * x.u)
        alpha = (
            -gain * Total(x.Tuu * x.g / p)
            - spec.decay * Total(x.Tuu * x.w)
            + each(P_free, lambda e: -2 * Total(x.u**2 * e))
        )
        return alpha, gain * Total(x.Tuu**2 / p) / 2 + each(pushed, lambda e: 2 * Total(x.u**2 * e))
    pushed = along(P_pushed, x.S * x.u).xreplace({Total(x.u**2): sympy.Integer(1)})
    edge, positive = at_sharpness(spec)
    twice = (2 * x.S / spec.threshold if edge else 2 * p) / gain
    lost = (twice * spec.decay / 2).xreplace(edge).xreplace(positive) * Total(x.dS * x.w)
    alpha = -Total(x.dS * x.g) - lost + each(P_free, lambda e: (-twice * e).xreplace(edge)).xreplace(positive)
    return alpha, Total(x.dS**2) / 2 + each(pushed, lambda e: (twice * e).xreplace(edge)).xreplace(positive)


def at_sharpness(spec: SymbolicSpec) -> tuple[dict[Expr, Expr], dict[Expr, Expr]]:
    """ν in terms of the sharpness, from S = 2p̃.  Both are empty unless ν is one scalar, apart from clocks.

    Returns:
        the value of ν by its symbol, and the values of the symbols in it, which are known to be positive, like
        √ν = ηS/2 − ε.
    """
    states = [leaf.symbol for leaf in spec.leaves if not leaf.clock]
    if len(states) != 1 or not spec.p.has(states[0]) or spec.p.has(Total):
        return {}, {}
    found = inverse(spec.edge, states[0], letters().S / 2)
    return ({}, {}) if found is None else ({states[0]: found[0]}, found[1])


def inverse(e: Expr, x: Symbol, value: Expr) -> tuple[Expr, dict[Expr, Expr]] | None:
    """The positive x with e = value > 0, or None: x must occur once, in operations that can be inverted."""
    positive: dict[Expr, Expr] = {}
    while e != x:
        held = [part for part in e.args if part.has(x)]
        if len(held) != 1:
            return None
        (part,) = held
        if isinstance(e, Add):
            value -= e - part
        elif isinstance(e, Mul):
            value /= e / part
        elif isinstance(e, Pow) and part == e.base:
            if not value.is_positive:
                value, positive = _named(value, positive)
            value = value ** (1 / e.exp)
        elif isinstance(e, sympy.exp):
            value = sympy.log(value)
        elif isinstance(e, sympy.log):
            value = sympy.exp(value)
        else:
            return None
        e = part
    return value, positive


def _named(value: Expr, positive: dict[Expr, Expr]) -> tuple[Expr, dict[Expr, Expr]]:
    name = sympy.Dummy(positive=True)
    return name, {**positive, name: value.xreplace(positive)}
