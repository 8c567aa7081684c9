"""A hyperparameter as a function of time: its value and its slope, both wanted by the flow (C.7)."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dvi.methods.errors import SpecError

Schedule = Callable[[Any], Any]  # t ↦ value; t in unit times


def value_and_slope(schedule: Schedule, t: float) -> tuple[float, float]:
    """The schedule's value and dvalue/dt at t.

    The slope is exact (forward differentiation) where it agrees with a central difference.  Where it does not, as in a
    schedule made of ``math`` functions, which leave torch's differentiation without a word, the difference is taken:
    schedules vary over units of time or more, so a step of 1e-3 leaves an error of about 1e-7 relative.

    Raises:
        SpecError: if the schedule's value is not a number.
    """
    value = _number(schedule, t)
    step = 1e-3
    difference = (_number(schedule, t + step) - _number(schedule, t - step)) / (2 * step)
    exact = _forward_slope(schedule, t)
    if exact is not None and abs(exact - difference) <= 1e-5 * abs(difference) + 1e-8 * abs(value):
        return value, exact
    return value, difference


def _number(schedule: Schedule, t: float) -> float:
    """The value at t of a schedule that wants a number, or else a tensor (``torch.cos(t)``)."""
    try:
        return float(schedule(t))
    except (TypeError, ValueError, RuntimeError, AttributeError):
        try:
            return float(schedule(torch.tensor(t, dtype=torch.float64, device="cpu")))
        except (TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise SpecError(f"A schedule must map a time to a number; at t = {t:g} it raised: {error}") from error


def _forward_slope(schedule: Schedule, t: float) -> float | None:
    time = torch.tensor(t, dtype=torch.float64, device="cpu")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch about its own first use of forward differentiation
            tangent = torch.func.jvp(schedule, (time,), (torch.ones_like(time),))[1]
    except Exception:  # whatever a user's function may raise on a tensor: the difference quotient does not need it
        return None
    return float(tangent) if isinstance(tangent, Tensor) else None
