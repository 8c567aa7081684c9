"""The solvers of the torchdiffeq library between breakpoints, its event search at them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dvi.solvers.critical import CRITICAL
from dvi.solvers.errors import DomainError, StepError
from dvi.solvers.face import ARRIVED, Face, Look, node_of
from dvi.solvers.hermite import hermite
from dvi.solvers.protocol import Flow, Node, State, StepResult
from dvi.solvers.runge_kutta import FaceMemory, sharp_watch, to_lattice
from dvi.solvers.watch import Watch

#: The library's methods that choose their steps; the others take fixed ones (of 1/4 unit time unless told otherwise).
ADAPTIVE = ("dopri8", "dopri5", "bosh3", "fehlberg2", "adaptive_heun")


@dataclass(frozen=True)
class TorchDiffEq:
    """Windows of the flow integrated by ``torchdiffeq.odeint``; breakpoints located by ``odeint_event``.

    Args:
        method: a method of torchdiffeq: "dopri5", "dopri8", "bosh3", "adaptive_heun", "fehlberg2", "rk4", …
        rtol, atol: its tolerances.
        window: unit times integrated at a time, from multiple to multiple; inside, the result is interpolated.
        options: further options of the method.
        watch: how eigenpairs are followed (default: as sharply as the tolerances ask for).

    Raises:
        ValueError: if a tolerance or the window is not positive.
    """

    method: str = "dopri5"
    rtol: float = 1e-6
    atol: float = 1e-8
    window: float = 1.0
    options: tuple[tuple[str, Any], ...] = ()
    watch: Watch = None  # type: ignore[assignment]  # made from the tolerances

    def __post_init__(self) -> None:
        if not (self.rtol > 0 and self.atol > 0 and self.window > 0):
            raise ValueError("TorchDiffEq: rtol, atol and window must be positive (window in unit times).")
        if self.watch is None:
            object.__setattr__(self, "watch", sharp_watch(min(self.rtol, self.atol)))

    def init(self, flow: Flow, y: State) -> FaceMemory:
        """The directions at 2 already."""
        face = Face(flow, self.watch, y.w.new_zeros(len(y.w), 0))
        if not flow.constrained:
            return FaceMemory(face.held, self.watch.glance(flow, y, None), self.window)
        held = face.arrived(y)
        assert face.seen is not None
        return FaceMemory(held, face.seen, self.window)

    def horizon(self, memory: FaceMemory) -> float:
        """How near the end decides about a step."""
        return 1.001 * self.window

    def step(self, flow: Flow, memory: FaceMemory, y: State, h: float) -> StepResult:
        """One window, or to the next breakpoint.

        Raises:
            StepError: if the library's solver fails.
        """
        size = min(to_lattice(y.t, self.window), h)
        face = Face(flow, self.watch, memory.held, memory.seen, y)
        begin = face.look(y)
        end = self._integrate(face, y, size)
        after = face.look(end)
        arriving = False
        if flow.constrained and face.event(begin, after):
            end = self._to_event(face, y, begin, end)
            after = face.look(end)
            arriving = after.next_eigenvalue >= CRITICAL - ARRIVED
        held = face.arrived(end) if arriving else face.kept(after)
        assert face.seen is not None
        dense = hermite(y, end, begin.rate, after.rate)
        return StepResult(end, FaceMemory(held, face.seen, size), node_of(flow, begin, y.t), dense)

    def observe(self, flow: Flow, memory: FaceMemory, y: State) -> Node:
        """What a window from y would begin with."""
        face = Face(flow, self.watch, memory.held, memory.seen)
        return node_of(flow, face.look(y), y.t)

    # ---- the library's side -----------------------------------------------------------------------------

    def _integrate(self, face: Face, y: State, size: float) -> State:
        from torchdiffeq import odeint

        flat, state_of = _flatten(y)
        times = torch.tensor([0.0, size], dtype=torch.float64, device=y.w.device)
        settings = self._settings()
        if self.method in ADAPTIVE:
            # The library would step past the end and interpolate back, over breakpoints and, where the solution is
            # smooth, with steps that are unstable at an effective sharpness of 2.
            settings["options"] = {"step_t": times[1:], "max_step": size, **settings["options"]}
        out = self._call(lambda: odeint(self._field(face, state_of), flat, times, **settings), y)
        return face.mend(state_of(size, tuple(x[-1] for x in out)))

    def _to_event(self, face: Face, y: State, begin: Look, end: State) -> State:
        """The state at the first breakpoint after y, which lies before ``end``."""
        from torchdiffeq import odeint_event

        flat, state_of = _flatten(y)

        def sign(t: Tensor, x: tuple[Tensor, ...]) -> Tensor:
            s = float(t)
            return y.w.new_tensor(face.sign(begin, begin if s == 0 else face.look(state_of(s, x))))

        if face.sign(begin, begin) <= 0:  # it lies at the start itself: a short step shows what follows
            return self._integrate(face, y, min(1e-6, end.t - y.t))
        zero = torch.zeros((), dtype=torch.float64, device=y.w.device)
        t, _ = self._call(
            lambda: odeint_event(self._field(face, state_of), flat, zero, event_fn=sign, **self._settings()), y
        )
        # The library's step ran through the breakpoint, so its interpolant is off there: a few secants on integrations
        # that end where the breakpoint is thought to be.
        s, before = float(t), (0.0, face.sign(begin, begin))
        for _ in range(6):
            end = self._integrate(face, y, s)
            now = (s, face.sign(begin, face.look(end)))
            closer = now[1] * (now[0] - before[0]) / (now[1] - before[1]) if now[1] != before[1] else 0.0
            if abs(closer) < 1e-10 or not 0 < s - closer <= 2 * float(t):
                break
            s, before = s - closer, now
        return end

    def _field(self, face: Face, state_of: Callable[..., State]) -> Callable[[Tensor, Any], tuple[Tensor, ...]]:
        def rate(t: Tensor, x: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            found = face.look(state_of(float(t), x)).rate
            return (found.w, *pytree.tree_leaves(found.nu))

        return rate

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


def _flatten(y: State) -> tuple[tuple[Tensor, ...], Callable[[float, tuple[Tensor, ...]], State]]:
    """The state as the tuple of tensors that torchdiffeq integrates, and the way back (time counted from y)."""
    leaves, spec = pytree.tree_flatten(y.nu)

    def state_of(s: float, x: tuple[Tensor, ...]) -> State:
        return State(x[0], pytree.tree_unflatten(list(x[1:]), spec), y.t + s)

    return (y.w, *leaves), state_of
