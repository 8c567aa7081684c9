"""Runge–Kutta–Chebyshev steps: explicit, second order, stable over a long stretch of the negative real axis.

With s stages, the stability interval is about 0.65 s².  The work for a step h on a mildly stiff problem of spectral
radius ρ therefore grows like √(hρ), not like hρ.  Source: Sommeijer, Shampine and Verwer (1997), RKC2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from dvi.solvers.protocol import Array, combine

_DAMPING = 2 / 13  # a little damping, about 5 %, keeps the stability region from pinching at the axis


@dataclass(frozen=True)
class Chebyshev:
    """Coefficients of the s-stage method."""

    s: int
    w1: float
    w0: float
    b: Array
    a: Array
    reach: float  # the real stability boundary


@cache
def chebyshev(s: int) -> Chebyshev:
    """The s-stage method, s ≥ 2."""
    w0 = 1 + _DAMPING / s**2
    T, dT, ddT = np.zeros(s + 1), np.zeros(s + 1), np.zeros(s + 1)
    T[0], T[1], dT[1] = 1.0, w0, 1.0
    for j in range(2, s + 1):
        T[j] = 2 * w0 * T[j - 1] - T[j - 2]
        dT[j] = 2 * T[j - 1] + 2 * w0 * dT[j - 1] - dT[j - 2]
        ddT[j] = 4 * dT[j - 1] + 2 * w0 * ddT[j - 1] - ddT[j - 2]
    w1 = dT[s] / ddT[s]
    b = np.zeros(s + 1)
    b[2:] = ddT[2:] / dT[2:] ** 2
    b[:2] = b[2]
    return Chebyshev(s, w1, w0, b, 1 - b * T, float((w0 + 1) * ddT[s] / dT[s]))


def stages(h: float, radius: float) -> int:
    """The smallest number of stages that is stable for a step h and a spectral radius."""
    s = 2
    while chebyshev(s).reach < h * radius:
        s += 1
    return s


def rkc(f: Callable[[Any], Any], y: Any, h: float, s: int, f0: Any) -> Any:
    """One step of s stages for the pytree y, given f0 = f(y).  It evaluates f another s − 1 times."""
    c = chebyshev(s)
    before, now = y, combine([(1.0, y), (c.b[1] * c.w1 * h, f0)])
    for j in range(2, s + 1):
        mu, nu = 2 * c.b[j] * c.w0 / c.b[j - 1], -c.b[j] / c.b[j - 2]
        slope = 2 * c.b[j] * c.w1 / c.b[j - 1]
        after = combine([(1 - mu - nu, y), (mu, now), (nu, before), (slope * h, f(now)), (-c.a[j - 1] * slope * h, f0)])
        before, now = now, after
    return now
