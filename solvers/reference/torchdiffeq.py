"""The solvers of the torchdiffeq library between breakpoints, and its event search at them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dvi.solvers.eigen.block_method import CRITICAL
from dvi.solvers.eigen.tracker import EigenTracker
from dvi.solvers.errors import DomainError, StepError
from dvi.solvers.hermite import hermite
from dvi.solvers.numbers import with_numbers
from dvi.solvers.protocol import ConstrainedFlow, State
from dvi.solvers.reference.active_set import Face, Look
from dvi.solvers.reference.breakpoints import (
    APPROACH,
    LONGEST_LANDING,
    SHORTEST,
    BreakpointIntegrator,
    FaceMemory,
    find_arrival,
    initial_memory,
    landing_time,
    may_land,
    nearness,
    sharp_watch,
    to_lattice,
)

#: The library's methods that choose their steps; the others take fixed ones (of 1/4 unit time unless told otherwise).
ADAPTIVE = ("dopri8", "dopri5", "bosh3", "fehlberg2", "adaptive_heun")


#: A window with directions held that takes more evaluations than this is assumed to meet an arrival.
PATIENCE = 60


class Impatience(Exception):
    """A window took too many evaluations."""


@dataclass
class Field:
    """The right-hand side in the form of torchdiffeq: (s, tuple of tensors) ↦ tuple of tensors, s counted from a state.

    Args:
        face: the directions held.
        start: the state at s = 0.
        begin: the evaluation there, which is not repeated; nor is the last one.
        patience: evaluations after which :class:`Impatience` is raised.
    """

    face: Face
    start: State
    begin: Look
    patience: int | None = None
    count: int = 0
    last: tuple[State, Look] | None = None

    def __post_init__(self) -> None:
        leaves, self._spec = pytree.tree_flatten(self.start.nu)
        self.flat = (self.start.w, *leaves)

    def state(self, s: float, x: tuple[Tensor, ...]) -> State:
        """The state that a tuple of tensors represents."""
        return State(x[0], pytree.tree_unflatten(list(x[1:]), self._spec), self.start.t + s)

    @property
    def steps(self) -> int:
        """The estimated number of steps: the library's methods of high order evaluate at least five times each."""
        return max(1, self.count // 6)

    def look(self, y: State) -> Look:
        """The flow at y; the last evaluation if y is its state."""
        if self.last is not None and _same(self.last[0], y):
            return self.last[1]
        return self.face.look(y)

    def __call__(self, s: Tensor, x: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The rate at a state, flat."""
        y = self.state(float(s), x)
        if float(s) == 0 and _same(y, self.start):
            found = self.begin
        else:
            self.count += 1
            if self.patience is not None and self.count > self.patience:
                raise Impatience
            found = self.face.look(y)
            self.last = (y, found)
        return (found.rate.w, *pytree.tree_leaves(found.rate.nu))


def _same(a: State, b: State) -> bool:
    """Equal up to rounding: the library evaluates just before the end of a step and interpolates there."""
    if abs(a.t - b.t) > 4 * np.spacing(max(1.0, abs(b.t))):
        return False
    parts = zip(pytree.tree_leaves(a.parts), pytree.tree_leaves(b.parts), strict=True)
    return all(bool((x - y).norm() <= 256 * torch.finfo(x.dtype).eps * y.norm()) for x, y in parts)


@dataclass(frozen=True)
class TorchDiffEq(BreakpointIntegrator):
    """Integrates the flow in windows with ``torchdiffeq.odeint`` and locates breakpoints with ``odeint_event``.

    Args:
        method: a method of torchdiffeq: "dopri5", "dopri8", "bosh3", "adaptive_heun", "fehlberg2", "rk4", …
        rtol, atol: its tolerances.
        window: unit times integrated at a time, from multiple to multiple; inside, the result is interpolated.
        options: further options of the method.
        watch: the tracker of eigenpairs (default: as accurate as the tolerances require).

    Raises:
        ValueError: if a tolerance or the window is not positive.
    """

    method: str = "dopri5"
    rtol: float = 1e-6
    atol: float = 1e-8
    window: float = 1.0
    options: tuple[tuple[str, Any], ...] = ()
    watch: EigenTracker = None  # type: ignore[assignment]  # made from the tolerances

    def __post_init__(self) -> None:
        with_numbers(self)
        if not (self.rtol > 0 and self.atol > 0 and self.window > 0):
            raise ValueError("TorchDiffEq: rtol, atol and window must be positive (window in unit times).")
        if self.watch is None:
            object.__setattr__(self, "watch", sharp_watch(self.rtol))

    def tolerance(self, y: State) -> float:
        """The error in the norm of w that the tolerances allow (the library's norm is the root of the mean square)."""
        return float(self.atol * len(y.w) ** 0.5 + self.rtol * torch.linalg.vector_norm(y.w).item())

    def init(self, flow: ConstrainedFlow, y: State) -> FaceMemory:
        """The directions at 2 already."""
        return initial_memory(flow, self.watch, y, nearness(self.tolerance(y)), self.window)

    def horizon(self, memory: FaceMemory) -> float:
        """A larger h than this would not change the step."""
        return 1.001 * max(self.window, LONGEST_LANDING)

    def precision(self, y: State) -> tuple[float, float]:
        """How close to 2 an arrival is located, and the longest landing (unit times)."""
        tol = self.tolerance(y)
        return nearness(tol), landing_time(tol)

    def advance(
        self, face: Face, y: State, begin: Look, memory: FaceMemory, h: float, longest: float
    ) -> tuple[State, Look, float] | None:
        """One window, or to the next breakpoint: the end, the evaluation there, and the library's step.

        None if a landing must do it.

        Raises:
            StepError: if the library's solver fails.
        """
        size, first, tol = min(to_lattice(y.t, self.window), h, longest), memory.h, self.tolerance(y)
        while True:
            field = Field(face, y, begin, PATIENCE if face.k else None)
            try:
                end = self._integrate(field, size, first)
            except Impatience:
                # there is an arrival ahead, before which the held directions turn ever faster: come closer
                if may_land(face, begin, landing_time(tol), size):
                    return None
                size *= 0.5 * APPROACH
                continue
            after = field.look(end)
            following = 2 * size / field.steps  # the library does not say how long a step it would have tried next
            if not face.flow.constrained:
                return end, after, following
            if face.passed(after) and face.k:
                dense = hermite(y, end, begin.rate, after.rate)
                located = find_arrival(face, dense, begin, after, y.t, size)
                if may_land(face, begin, landing_time(tol), located):
                    return None
                size = max(APPROACH * located, SHORTEST)
            elif face.passed(after) or face.kink(begin, after, size) > tol:
                end = self._to_event(face, y, begin, after, size, first)
                return end, face.look(end), following
            else:
                return end, after, following

    # ---- the library's side -----------------------------------------------------------------------------

    def _integrate(self, field: Field, size: float, first: float) -> State:
        from torchdiffeq import odeint

        y = field.start
        times = torch.tensor([0.0, size], dtype=torch.float64, device=y.w.device)
        settings = self._settings()
        if self.method in ADAPTIVE:
            # The library would step past the end and interpolate back: over breakpoints and, where the solution is
            # smooth, with steps that are unstable at an effective sharpness of 2.
            steps = {"step_t": times[1:], "max_step": size, "first_step": min(first, size)}
            settings["options"] = steps | settings["options"]
        out = self._call(lambda: odeint(field, field.flat, times, **settings), y)
        return field.face.mend(field.state(size, tuple(x[-1] for x in out)))

    def _to_event(self, face: Face, y: State, begin: Look, after: Look, size: float, first: float) -> State:
        """The state at the first breakpoint after y, less than ``size`` later."""
        from torchdiffeq import odeint_event

        arrival = face.passed(after)

        def sign_at(s: float, state: State) -> float:
            if arrival:
                return CRITICAL - (begin.next_eigenvalue if s == 0 else face.next_value(state))
            return face.sign(begin, begin if s == 0 else face.look(state))

        def sign(t: Tensor, x: tuple[Tensor, ...]) -> Tensor:
            return y.w.new_tensor(sign_at(float(t), field.state(float(t), x)))

        if sign_at(0.0, y) <= 0:  # it lies at the start: a short step shows what follows
            return self._integrate(Field(face, y, begin), min(SHORTEST, size), first)
        zero = torch.zeros((), dtype=torch.float64, device=y.w.device)
        field = Field(face, y, begin)
        settings = self._settings()
        if self.method in ADAPTIVE:
            settings["options"] = {"max_step": size, "first_step": min(first, size)} | settings["options"]
        t, _ = self._call(lambda: odeint_event(field, field.flat, zero, event_fn=sign, **settings), y)
        # The library's step ran through the breakpoint, so its interpolant is wrong there.  A few secant steps follow,
        # on integrations that end at the estimated breakpoint; the first one starts just before it.
        s, earlier = float(t), None
        for _ in range(6):
            field = Field(face, y, begin)
            end = self._integrate(field, s, first)
            now = (s, sign_at(s, end))
            if arrival and abs(now[1]) <= face.near:
                break
            if earlier is None:
                dense = hermite(y, end, begin.rate, field.look(end).rate)
                earlier = (0.9 * s, sign_at(0.9 * s, dense(y.t + 0.9 * s)))
            closer = now[1] * (now[0] - earlier[0]) / (now[1] - earlier[1]) if now[1] != earlier[1] else 0.0
            if abs(closer) < 1e-10 or not 0 < s - closer <= 2 * float(t):
                break
            s, earlier = s - closer, now
        return end

    def _settings(self) -> dict[str, Any]:
        options = dict(self.options)
        if self.method not in ADAPTIVE:
            options = {"step_size": 0.25} | options
        return {"method": self.method, "rtol": self.rtol, "atol": self.atol, "options": options}

    def _call(self, run: Callable[[], Any], y: State) -> Any:
        try:
            with torch.no_grad():
                return run()
        except (AssertionError, DomainError) as error:  # the library fails with bare asserts (step underflow)
            raise StepError(
                f"torchdiffeq's {self.method} failed at t = {y.t:g}: {error or 'step size underflow'}. "
                "Loosen rtol and atol, or use MacroStep."
            ) from error
