"""A hyperparameter as a function of time: the optimizer's values at whole steps, and their reading by a flow (C.7).

The optimizer's step from t to t + 1 uses only the value at the whole number t.  A flow also reads the function between
whole numbers, one unit [t, t + 1] at a time.  If the function jumps within a unit, the optimizer first uses the new
value at t + 1.  So the flow jumps at t + 1; until then it continues the function from before the jump.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dvi.methods.errors import ScheduleError, SpecError

#: A jump of a table by less than this fraction of its values is below its resolution, and is smoothed.
FINE = 0.01
#: One change of a table belongs to a trend if it is at most this many times the change before it, or after it.
STEADY = 2.0
#: A change between two neighbouring numbers t is a jump if it is more than this fraction of the value.
ROUNDING = 1e-9
#: A kink counts if the slope changes by more than this fraction of the value, per unit time.
KINK = 1e-4

_STEP = 1e-3  # of difference quotients, unit times: schedules vary over units of time or more


@dataclass(frozen=True)
class Table:
    """A schedule with one value a step: ``values[t]`` for the step from t to t + 1.

    Raises:
        SpecError: if it is empty, or an entry is not a number.
    """

    values: tuple[float, ...] = field(repr=False)

    @staticmethod
    def of(values: Iterable[Any], name: str) -> Table:
        """The table of a list, a tuple, an array or a tensor with one axis."""
        try:
            table = Table(tuple(as_number(x) for x in values))
        except (TypeError, ValueError) as error:
            raise SpecError(f"{name}: a table of values, one a step, must be made of numbers: {error}.") from error
        if not table.values:
            raise SpecError(f"{name}: a table of values, one a step, must not be empty.")
        return table

    def __call__(self, t: Any) -> float:
        """The value in the step that t lies in."""
        i = int(t)
        if not 0 <= i < len(self.values):
            raise IndexError(f"the table has {len(self.values)} values, for the steps 0 to {len(self.values) - 1}")
        return self.values[i]

    def __repr__(self) -> str:
        shown = [f"{x:.4g}" for x in self.values]
        return f"[{', '.join(shown if len(shown) <= 4 else [*shown[:2], '…', shown[-1]])}]"


def as_number(value: Any) -> float:
    """The number that a Python, NumPy or torch scalar is.

    Raises:
        TypeError, ValueError: if it is not a number (text never is).
    """
    if isinstance(value, (str, bytes, bytearray)):
        raise TypeError(f"{value!r} is text")
    if value is None:
        raise TypeError("it gave None")
    if isinstance(value, Tensor):
        value = value.detach()
    if getattr(value, "shape", ()) not in ((), (1,)):
        raise TypeError(f"it gave an array of shape {tuple(value.shape)}")
    return float(value.item() if hasattr(value, "item") else value)


def as_schedule(value: Any, name: str) -> Any:
    """A table if ``value`` is a sequence of numbers; anything else unchanged."""
    one_axis = isinstance(value, (np.ndarray, Tensor)) and value.ndim == 1
    return Table.of(value, name) if one_axis or isinstance(value, (list, tuple)) else value


def value_and_slope(schedule: Callable[[Any], Any], t: float) -> tuple[float, float]:
    """The schedule's value and dvalue/dt at t; at a jump or a kink, those on its right.

    Raises:
        SpecError: if the schedule's value is not a number.
    """
    end = float(len(schedule.values)) if isinstance(schedule, Table) else math.inf
    read = Schedule(schedule, "A schedule", end)
    return read.ask(t), read.slope(t)


@dataclass(frozen=True)
class Unit:
    """A schedule between two whole numbers s and s + 1 (or the end of the run, if that comes first).

    Attributes:
        first: its value at s.
        last, final: the time until which the flow follows it (the unit's end, or just before the first jump), and its
            value there.
        following: its value at the unit's end; None if it has none, which is possible only at the end of the run.
        broken: True if it jumps in between.
        flat: True if it is constant from s to ``last``.
        head, tail, bend: its slope in the first and in the last quarter, and the change of slope per unit time.
    """

    first: float
    last: float
    final: float
    following: float | None
    broken: bool
    flat: bool
    head: float = 0.0
    tail: float = 0.0
    bend: float = 0.0


class Schedule:
    """A user's function of time, called only for 0 ≤ t ≤ end, and read as the optimizer uses it.

    Args:
        function: t ↦ value.
        name: its name in errors.
        end: unit times; later times get the value at the end.
    """

    def __init__(self, function: Callable[[Any], Any], name: str = "A schedule", end: float = math.inf) -> None:
        self.function, self.name, self.end = function, name, end
        self._whole: dict[int, float] = {}
        self._units: dict[int, Unit] = {}
        self._trends: dict[int, bool] = {}

    # ---- the user's function --------------------------------------------------------------------------------

    def ask(self, t: float) -> float:
        """The function's value at t.

        Raises:
            SpecError: if it raises anything, or gives something that is not a finite number.
        """
        try:
            value = self._call(t)
        except Exception as error:  # whatever a user's function may raise
            hint = ""
            if isinstance(error, TypeError) and "indices" in str(error):
                hint = " A table with one value a step may be given as it is, lr=[…], without a function."
            raise ScheduleError(f"{self._at(t)} raised {type(error).__name__}: {error}.{hint}") from error
        if not math.isfinite(value):
            raise ScheduleError(f"{self._at(t)} gave {value}: it must be finite.")
        return value

    def _at(self, t: float) -> str:
        return f"{self.name}: a schedule must map a time to a number; at t = {t:.12g} it"

    def _call(self, t: float) -> float:
        try:
            return as_number(self.function(t))
        except (TypeError, AttributeError) as error:  # it may be written for tensors: torch.cos(t)
            try:
                return as_number(self.function(torch.tensor(t, dtype=torch.float64, device="cpu")))
            except Exception:
                raise error from None

    def whole(self, s: int) -> float:
        """The value at a whole number, which the optimizer uses.

        Raises:
            SpecError: see :meth:`ask`; or if the function gives another value than before.
        """
        if s not in self._whole:
            self._whole[s] = self.ask(float(s))
        return self._whole[s]

    def asked_again(self, s: int) -> float:
        """The same value from a new call, compared with the first."""
        known, now = self.whole(s), self.ask(float(s))
        if now != known:
            raise ScheduleError(
                f"{self.name}: the schedule gave two values at t = {s}, {known:.12g} and {now:.12g}. It must depend on "
                "t alone. Where it draws random numbers or counts its calls, give a table instead, with one value a "
                "step: lr=[…]."
            )
        return now

    # ---- unit by unit ---------------------------------------------------------------------------------------

    def unit(self, s: int) -> Unit:
        """The function between s and s + 1."""
        if s not in self._units:
            self._units[s] = self._looked_at(s)
        return self._units[s]

    def _looked_at(self, s: int) -> Unit:
        top = min(s + 1.0, self.end)
        first = self.asked_again(s)
        following, last = self._at_top(s, top), top
        try:
            if following is None:
                last = float(np.nextafter(top, s))
                self.ask(last)
            x, y = self._sampled(s, last, first, following)
        except ScheduleError:
            if top < self.end:
                raise
            # the last unit: the value that the optimizer uses serves
            return Unit(first, float(s), first, following, broken=True, flat=True)
        for _ in range(16):  # as many jumps as a unit may have, each earlier than the one before
            change = [abs(b - a) for a, b in pairwise(y)]
            i = change.index(max(change))
            before = self._jump(x[i], x[i + 1], y[i], y[i + 1]) if change[i] > 0 else None
            if before is None:
                break
            last = before
            x, y = self._sampled(s, last, first, None)
        slopes = [4 * (b - a) / max(last - s, 1e-9) for a, b in pairwise(y)]
        bend = max(abs(b - a) for a, b in pairwise(slopes))
        flat = all(value == first for value in y)
        return Unit(first, last, y[-1], following, last < top, flat, head=slopes[0], tail=slopes[-1], bend=bend)

    def _at_top(self, s: int, top: float) -> float | None:
        try:
            return self.whole(s + 1) if top == s + 1 else self.ask(top)
        except ScheduleError:
            if top < self.end:
                raise
            return None  # a function for 0 ≤ t < end

    def _sampled(self, s: float, last: float, first: float, final: float | None) -> tuple[list[float], list[float]]:
        """Five times from s to ``last`` and the values there; the values at the ends may be known already."""
        if last <= s:
            return [s] * 5, [first] * 5
        inside = [s + part * (last - s) for part in (0.25, 0.5, 0.75)]
        final = self.ask(last) if final is None else final
        return [s, *inside, last], [first, *map(self.ask, inside), final]

    def _jump(self, low: float, high: float, below: float, above: float) -> float | None:
        """The last number before a jump between two times; None if the function is continuous there."""
        enough = 0.4 * abs(above - below)  # for a continuous function the remaining change gets smaller and smaller
        before = float(np.nextafter(high, low))
        if before > low:
            value = self.ask(before)
            if abs(above - value) >= enough:  # where most jumps are: at a whole number
                low, below = before, value
        while low < (middle := 0.5 * (low + high)) < high:
            value = self.ask(middle)
            if abs(value - below) > abs(above - value):
                high, above = middle, value
            else:
                low, below = middle, value
            if abs(above - below) < enough:
                return None
        return low if abs(above - below) > ROUNDING * max(abs(above), abs(below)) else None

    def trend(self, s: int) -> bool:
        """True if the unit belongs to a table whose values change steadily: the change at its end is then spread over
        it.
        """
        if s not in self._trends:
            self._trends[s] = s < self.end and self._is_trend(s)
        return self._trends[s]

    def _is_trend(self, s: int) -> bool:
        unit = self.unit(s)
        change = self._change(s)
        if not unit.broken or not unit.flat or change is None:
            return False
        if abs(change) <= FINE * max(abs(unit.first), abs(unit.first + change)):
            return True
        return any(
            beside is not None and beside * change > 0 and abs(change) <= STEADY * abs(beside)
            for beside in (self._change(s - 1), self._change(s + 1))
        )

    def _change(self, s: int) -> float | None:
        """The change of a table at the end of a unit; None if there is no table, or if it has ended."""
        if s < 0 or s + 1 > self.end:
            return None
        unit = self.unit(s)
        return None if unit.following is None or not unit.flat else unit.following - unit.first

    def jumps(self, t: int) -> bool:
        """True if a flow jumps at the whole number t."""
        if not 1 <= t <= self.end:
            return False
        unit = self.unit(t - 1)
        return unit.broken and unit.following is not None and not self.trend(t - 1)

    def bends(self, t: int) -> bool:
        """True if there is a kink at the whole number t."""
        if not 1 <= t <= self.end - 1:
            return False
        before, after = self.unit(t - 1), self.unit(t)
        if before.broken or after.last <= t + 0.5:
            return False
        return abs(after.head - before.tail) > max(before.bend, after.bend) * 4 + KINK * abs(after.first)

    # ---- as a flow reads it ---------------------------------------------------------------------------------

    def value(self, t: float, left: bool = False) -> float:
        """The value at t; at a jump the one on its right, or on its left."""
        t, s, unit = self._place(t, left)
        if unit is None:
            return self.whole(s)
        if unit.following is not None and self.trend(s):
            return unit.first + (t - s) * (unit.following - unit.first)
        if unit.flat:
            return unit.first
        return unit.final if t >= unit.last else self.ask(t)

    def slope(self, t: float, left: bool = False) -> float:
        """dvalue/dt at t; at a jump or a kink the one on its right, or on its left, as at the end."""
        left = left or t >= self.end
        t, s, _ = self._place(t, left)
        unit = self.unit(s)
        if unit.following is not None and self.trend(s):
            return unit.following - unit.first
        if unit.flat or t > unit.last + ROUNDING:
            return 0.0
        return self._slope(min(t, unit.last), float(s), unit.last, left)

    def _place(self, t: float, left: bool) -> tuple[float, int, Unit | None]:
        """The time within 0 … end, the number of its unit, and that unit (None at a whole number, where it is not
        needed).
        """
        t = min(max(t, 0.0), self.end)
        s = math.floor(t)
        if t > s:
            return t, s, self.unit(s)
        if s > 0 and (left or (t == self.end and self.unit(s - 1).following is None)):
            return t, s - 1, self.unit(s - 1)
        return t, s, None

    def _slope(self, t: float, low: float, high: float, left: bool) -> float:
        """The slope of the function at t, from its values between ``low`` and ``high``.

        Forward differentiation gives the exact slope; it is used if it agrees with a difference quotient.  It does not
        agree for schedules made of ``math`` functions, through which torch silently does not differentiate.  Then the
        quotient is used, with a relative error of about 1e-7.
        """
        h = min(_STEP, 0.25 * (high - low))
        if h < 1e-9:
            return 0.0
        value = self.ask(t)
        if t - h < low:
            quotient = self._one_sided(t, value, h)
        elif t + h > high:
            quotient = self._one_sided(t, value, -h)
        else:
            quotient = (self.ask(t + h) - self.ask(t - h)) / (2 * h)
            turn, closer = (self._turn(t, value, step) for step in (h, 0.5 * h))
            if turn > 1e-6 * abs(value) and closer > 0.75 * turn:  # the turn of a smooth function halves with the step
                return self._one_sided(t, value, -1e-6 if left else 1e-6)
        exact = _forward_slope(self.function, t)
        if exact is not None and abs(exact - quotient) <= 1e-5 * abs(quotient) + 1e-8 * abs(value):
            return exact
        return quotient

    def _one_sided(self, t: float, value: float, h: float) -> float:
        return (4 * self.ask(t + h) - self.ask(t + 2 * h) - 3 * value) / (2 * h)

    def _turn(self, t: float, value: float, h: float) -> float:
        """The difference between the slopes on both sides."""
        return abs(self.ask(t + h) - 2 * value + self.ask(t - h)) / h


def _forward_slope(schedule: Callable[[Any], Any], t: float) -> float | None:
    time = torch.tensor(t, dtype=torch.float64, device="cpu")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch about its own first use of forward differentiation
            tangent = torch.func.jvp(schedule, (time,), (torch.ones_like(time),))[1]
    except Exception:  # whatever a user's function may raise on a tensor: the difference quotient does not need it
        return None
    return float(tangent) if isinstance(tangent, Tensor) else None
