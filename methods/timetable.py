"""All schedules of a method over a run: their values at a time, and the times between which they are continuous."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor

from dvi.methods.errors import ScheduleError
from dvi.methods.schedules import Schedule
from dvi.methods.spec import Method

_SAME = 1e-9  # unit times: two times that differ by less than this differ by rounding


class Timetable:
    """The schedules of a method, as a flow reads them.

    A run asks for them only between 0 and its end (:meth:`survey`), stretch by stretch (:meth:`stretch`).  At a jump,
    the values on its left end one stretch, and the values on its right begin the next.

    Args:
        method: the declaration.
    """

    def __init__(self, method: Method) -> None:
        self.method = method
        self.names = method.scheduled
        self._open = {name: method.schedule(name) for name in self.names}
        self._run = self._open
        self._active = self._open
        self._until = math.inf
        self._corners: list[tuple[float, bool]] = []

    # ---- a run ----------------------------------------------------------------------------------------------

    def survey(self, start: float, end: float, whole: bool = False) -> None:
        """Check all schedules from ``start`` to ``end`` (unit times) before a run begins.

        Args:
            start, end: of the run.
            whole: True for the optimizer, which asks only for whole times.

        Raises:
            SpecError: if one fails, leaves its range, or gives two values at one time.
        """
        self._run = {name: self.method.schedule(name, end) for name in self.names}
        self._corners = []
        first, last = math.floor(start), math.ceil(end)
        try:
            for name, schedule in self._run.items():
                for s in range(first, last):
                    value = schedule.asked_again(s) if whole else schedule.unit(s).first
                    self.method.check_range(name, value, at=s)
        except ScheduleError as error:
            raise ScheduleError(
                f"{error} (This run goes from t = {start:g} to {end:g}; a warm start comes before. It asks for every t "
                f"in between, and can do without a value at t = {end:g} itself.)"
            ) from error.__cause__
        if not whole and self.names:
            for t in range(first + 1, last + 1):
                jump = any(schedule.jumps(t) for schedule in self._run.values())
                if jump or any(schedule.bends(t) for schedule in self._run.values()):
                    self._corners.append((float(t), jump))

    @contextmanager
    def stretch(self, t: float) -> Iterator[tuple[float, bool]]:
        """Read the schedules in the stretch of the run that begins at t or contains t.

        Returns the time of the next jump or kink (∞ if there is none), and whether it is a jump.
        """
        i = bisect_right(self._corners, t + _SAME, key=lambda corner: corner[0])
        corner, jump = self._corners[i] if i < len(self._corners) else (math.inf, False)
        self._active, self._until = self._run, corner
        try:
            yield corner, jump
        finally:
            self._active, self._until = self._open, math.inf

    def changes(self, t: float) -> str:
        """The jumps at t in words: the names, the values before and after."""
        words = [
            f"{name} from {schedule.value(t, left=True):.4g} to {schedule.value(t):.4g}"
            for name, schedule in self._run.items()
            if schedule.jumps(round(t))
        ]
        return ", ".join(words)

    # ---- values ---------------------------------------------------------------------------------------------

    def at(self, t: float, centred: bool = False) -> Method:
        """The method with the values of its schedules at t.

        Args:
            t: unit times.
            centred: read tables half a unit late, so that ∫ dt is the optimizer's sum.  This is for flows of first
                order; those of second order read all schedules at :meth:`clock`.
        """
        places = self._places(t, centred)
        return self.method.with_values(t, {name: schedule.value(s, left) for name, schedule, s, left, _ in places}, {})

    def moving(self, t: float, centred: bool = False) -> Callable[[Tensor], Method]:
        """The method at t as a function of a zero-valued tensor dt, to first order in dt.

        Schedules are read here, and not when the function is called: inside a transform, reading them takes longer.
        """
        values, slopes = {}, {}
        for name, schedule, place, left, moves in self._places(t, centred):
            values[name] = schedule.value(place, left)
            slopes[name] = schedule.slope(place, left) if moves else 0.0
        return lambda dt: self.method.with_values(t, values, slopes, dt)

    def _places(self, t: float, centred: bool) -> Iterator[tuple[str, Schedule, float, bool, bool]]:
        """For each schedule its name, the time at which it is read, from which side, and whether it moves with t."""
        for name, schedule in self._active.items():
            left = t >= self._until - _SAME
            place, moves = self._until if left else t, True
            if centred and (late := self.clock(t)) != t and schedule.unit(math.floor(late)).flat:
                place, left, moves = late, False, late == t - 0.5
            yield name, schedule, place, left, moves

    def clock(self, t: float) -> float:
        """Half a unit before t, but not before the last jump: the optimizer's value at step s belongs to time s + ½."""
        if t < 0.5 or not self.names:
            return max(0.0, t - 0.5)
        last = math.ceil(t - _SAME) - 1 if t >= self._until - _SAME else math.floor(t + _SAME)
        if t - last < 0.5 and any(schedule.jumps(last) for schedule in self._active.values()):
            return float(last)
        return t - 0.5
