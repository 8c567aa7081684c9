"""Cubic Hermite interpolation between the ends of a step, from values and slopes there; locally of fourth order."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from dvi.solvers.protocol import Array, Rate, State, combine

Number = TypeVar("Number", float, Array)


def basis(s: Number, h: Number) -> tuple[Number, Number, Number, Number]:
    """Weights of (value, slope) at the start and (value, slope) at the end, at the fraction s of a step h."""
    return (1 + 2 * s) * (1 - s) ** 2, s * (1 - s) ** 2 * h, s**2 * (3 - 2 * s), -(s**2) * (1 - s) * h


def hermite(a: State, b: State, slope_a: Rate, slope_b: Rate) -> Callable[[float], State]:
    """Dense output between the ends of a step."""

    def at(t: float) -> State:
        h = b.t - a.t
        weights = basis((t - a.t) / h, h)
        parts = (a.parts, slope_a.parts, b.parts, slope_b.parts)
        w, nu = combine(list(zip(weights, parts, strict=True)))
        return State(w, nu, t)

    return at
