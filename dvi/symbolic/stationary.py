"""The stationary ν at fixed weights, in closed form."""

from __future__ import annotations

from collections.abc import Sequence

import sympy
from sympy import Eq, Expr

from dvi.symbolic.formulas import SymbolicSpec
from dvi.symbolic.simplification import factored
from dvi.symbolic.vectors import directional


def stationary(spec: SymbolicSpec, curvature: Sequence[Expr]) -> dict[str, Eq]:
    """Solve 0 = f + ``curvature`` (½∇²_g f[HΣH]) for each part of ν in which f is affine."""
    out = {}
    for leaf, f, bend in zip(spec.leaves, spec.f, curvature, strict=True):
        nu, change = leaf.symbol, f + bend
        if not f.has(nu):
            continue  # it is a sum that never forgets
        slope = factored(directional(change, {nu: sympy.Integer(1)}))
        if slope.has(nu):
            out[leaf.name] = Eq(factored(change), 0, evaluate=False)
        else:
            rest = factored(change.xreplace({nu: sympy.Integer(0)}))
            out[leaf.name] = Eq(nu, factored(-rest / slope), evaluate=False)
    return out


__all__ = ["stationary"]
