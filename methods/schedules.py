"""A hyperparameter as a function of time: its value and its slope, both wanted by the flow (C.7)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Schedule = Callable[[Any], Any]  # t ↦ value; t in unit times


def value_and_slope(schedule: Schedule, t: float) -> tuple[float, float]:
    """The schedule's value and dvalue/dt at t.

    The slope is exact (forward differentiation) where the schedule is made of torch operations or operators, and a
    central difference where it is not (``math.cos``, a table look-up): t is at most some 10⁵ and schedules vary over
    units or more, so a step of 1e-3 leaves a relative error of about 1e-9, half of rounding, half of curvature.

    Raises:
        SpecError: if the schedule's value is not a number.
    """
    from dvi.methods.errors import SpecError

    try:
        value = float(schedule(t))
    except (TypeError, ValueError, RuntimeError, AttributeError):
        try:  # a schedule written with torch.cos(t) wants a tensor
            value = float(schedule(torch.tensor(t, dtype=torch.float64, device="cpu")))
        except (TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise SpecError(f"A schedule must map a time to a number; at t = {t:g} it raised: {error}") from error
    return value, _slope(schedule, t)


def _slope(schedule: Schedule, t: float) -> float:
    exact = _forward_slope(schedule, t)
    if exact is not None and exact != 0.0:
        return exact
    # A zero may be a constant, or a schedule that left torch on the way (torch.tensor(math.cos(t))).
    step = 1e-3
    try:
        return (float(schedule(t + step)) - float(schedule(t - step))) / (2 * step)
    except (TypeError, ValueError, RuntimeError, AttributeError):
        return exact or 0.0


def _forward_slope(schedule: Schedule, t: float) -> float | None:
    time = torch.tensor(t, dtype=torch.float64, device="cpu")
    try:
        tangent = torch.func.jvp(schedule, (time,), (torch.ones_like(time),))[1]
    except Exception:  # whatever a user's function may raise on a tensor: the difference quotient does not need it
        return None
    return float(tangent) if isinstance(tangent, Tensor) else None
