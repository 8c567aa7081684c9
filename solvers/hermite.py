"""Dense output: the state inside a step from its ends and the rates there, to fourth order locally."""

from __future__ import annotations

from collections.abc import Callable

from dvi.solvers.protocol import Rate, State, combine


def hermite(a: State, b: State, slope_a: Rate, slope_b: Rate) -> Callable[[float], State]:
    """Cubic dense output between the ends of a step."""

    def at(t: float) -> State:
        h = b.t - a.t
        s = (t - a.t) / h
        w, nu = combine(
            [
                ((1 + 2 * s) * (1 - s) ** 2, (a.w, a.nu)),
                (s * (1 - s) ** 2 * h, (slope_a.w, slope_a.nu)),
                (s**2 * (3 - 2 * s), (b.w, b.nu)),
                (-(s**2) * (1 - s) * h, (slope_b.w, slope_b.nu)),
            ]
        )
        return State(w, nu, t)

    return at
