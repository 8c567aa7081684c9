"""The macro step: a central flow for about the price of training.

Between breakpoints the flow is smooth and mildly stiff (its Jacobian has spectrum in [−2, small], because the effective
sharpness is at most 2), so a stabilised explicit method can take steps of many units.  What is expensive, eigenvectors
and third derivatives, is made once per step; inside, the constraint is a model that is linear in w and exact in P(ν):

    1  the critical frame (U, T, M) at the start of the step, T extrapolated to its middle;
    2  RKC2 over the step on (w, ν, z): each stage costs one gradient and one CCP of Baumgarte type,
           X ⪰ 0  ⟂  γ gap + β[X] − α ⪰ 0,
       and z = ∫X dt collects the impulse;
    3  a new frame at the end, and the trapezoid rule for what T and HU changed meanwhile;
    4  the impulse is corrected, with either sign, so that the constraint holds at the end;
    5  X of the step is its impulse over h, stamped at the middle.

The step is controlled by an embedded estimate and by the size of the trapezoid correction, and ends where an eigenvalue
is predicted to arrive at 2.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dvi.solvers import ccp
from dvi.solvers.errors import DomainError, StepError
from dvi.solvers.hermite import hermite
from dvi.solvers.protocol import Array, Flow, Frame, Linearised, Node, Rate, State, StepResult, combine, host
from dvi.solvers.rkc import rkc, stages
from dvi.solvers.svec import skron, smat, svec
from dvi.solvers.watch import Sighting, Watch, empty_frame

_OVERSHOOT = 2.2  # an effective sharpness above this at the end of a step: the constraint's model failed, reject


@dataclass(frozen=True)
class Here:
    """All that is known at the start of a step."""

    loss: float
    g: Tensor
    seen: Sighting
    frame: Frame


@dataclass(frozen=True)
class MacroMemory:
    """What the macro step wants to be given back.

    Attributes:
        h: the next step to try; rejected: whether it follows a rejection (then it is not cut to land again).
        here: the evaluations at the current state.
        before: frame, eigenvectors and length of the last step, to extrapolate from.
    """

    h: float
    here: Here | None = None
    before: tuple[Frame, Tensor, float] | None = None


@dataclass(frozen=True)
class MacroStep:
    """Adaptive macro steps with an RKC2 inside; the default integrator.

    Args:
        tol: error allowed per step, in the norm of w; the error of a run falls about like tol^0.55.
        h_min, h_max: bounds on the step, unit times.
        h_start: first step; a random initialisation has a transient.
        watch: how the critical eigenpairs are followed.
        max_rejections: in a row, before giving up.

    Raises:
        ValueError: if tol is not positive or the bounds are not 0 < h_min ≤ h_start ≤ h_max.
    """

    tol: float = 1e-3
    h_min: float = 1 / 16
    h_max: float = 20.0
    h_start: float = 0.25
    watch: Watch = field(default_factory=lambda: Watch(survey_every=100.0))
    max_rejections: int = 25

    def __post_init__(self) -> None:
        if not self.tol > 0:
            raise ValueError(f"MacroStep(tol={self.tol}): tol must be positive; 1e-3 is the default.")
        if not 0 < self.h_min <= self.h_start <= self.h_max:
            raise ValueError("MacroStep: bounds on the step must satisfy 0 < h_min <= h_start <= h_max (unit times).")

    def init(self, flow: Flow, y: State) -> MacroMemory:
        """The first step is short."""
        return MacroMemory(self.h_start)

    def step(self, flow: Flow, memory: MacroMemory, y: State, h: float) -> StepResult:
        """One accepted step of at most h unit times.

        Raises:
            StepError: if a step of h_min still leaves the finite numbers or the domain of P.
        """
        here = memory.here or self._evaluate(flow, y, None, memory.h)
        size, landing = memory.h, True
        for _ in range(self.max_rejections):
            size = min(size, self.h_max)
            length = self._land(here.seen, size) if landing and flow.constrained else size
            length = h if length >= h * (1 - 1e-9) else (h / 2 if 1.6 * length > h else length)
            final = length <= self.h_min * 1.01 or h <= self.h_min
            try:
                tried = _Attempt(self, flow, memory, here, y, length, final).run()
            except DomainError as error:
                if final:
                    raise StepError(
                        f"MacroStep at t = {y.t:g}: a step of {length:g} still fails: {error} "
                        "Lower lr, warm-start with real optimizer steps, or lower h_min."
                    ) from error
                size, landing = max(self.h_min, length / 2), False
                continue
            if isinstance(tried, float):  # rejected: the step to try next
                size, landing = max(self.h_min, tried), False
                continue
            return self._accept(flow, here, y, length, size, tried)
        raise StepError(
            f"MacroStep at t = {y.t:g}: {self.max_rejections} rejections in a row. Loosen tol, or use Euler(0.25) to "
            "see what happens there."
        )

    def observe(self, flow: Flow, memory: MacroMemory, y: State) -> Node:
        """What is known at y; X is that of the last CCP of Baumgarte type."""
        here = memory.here or self._evaluate(flow, y, None, memory.h)
        lin = flow.linearised(y, here.g, here.frame)
        X = _multiplier(flow, lin, self.gamma(memory.h), None)
        return _node(flow, y.t, here, here.frame, X, y.t, lin.drift(X))

    # ---- inside ---------------------------------------------------------------------------------------

    @staticmethod
    def gamma(h: float) -> float:
        """Baumgarte rate: a gap is closed at this rate per unit time."""
        return 4 / max(h, 2.0)

    def _land(self, seen: Sighting, h: float) -> float:
        """Shorten the step so that it ends where the next eigenvalue is predicted to arrive at 2."""
        for value, rate in zip(seen.eigenvalues, seen.rates, strict=True):
            if value < 2 - 1e-3 and rate > 1e-7:
                arrival = (2 - value) / rate
                if arrival < h:
                    h = max(min(h, self.h_start), arrival)
                elif arrival < 1.7 * h:
                    h = max(min(h, self.h_start), arrival / 2)
        return h

    def _evaluate(
        self, flow: Flow, y: State, last: Sighting | None, h: float, known: tuple[float, Tensor] | None = None
    ) -> Here:
        if known is None:
            loss, g = flow.value_and_grad(y)
            known = float(loss), g
        if not flow.constrained:
            return Here(*known, self.watch.glance(flow, y, last), empty_frame(flow, y))
        seen = self.watch.look(flow, y, last, h)
        return Here(*known, seen, self._frame(flow, y, seen, h))

    def _frame(self, flow: Flow, y: State, seen: Sighting, h: float) -> Frame:
        """The critical frame; where oscillations act on ν inside a step, the eigenvalue is 2."""
        return replace(self.watch.frame(flow, y, seen, h), on_edge=True)

    def _accept(self, flow: Flow, here: Here, y: State, length: float, tried: float, new: _Accepted) -> StepResult:
        grown = length * float(np.clip(0.85 * (self.tol / max(new.error, 1e-300)) ** (1 / 3), 0.3, 2.0))
        # A step that was cut to land says little about the next one.
        cut = length < 0.7 * tried
        h = max(0.9 * tried, length) if cut and new.error <= 0.2 * self.tol else grown
        h = float(np.clip(h, self.h_min, self.h_max))
        before = (here.frame, here.seen.block.V, length)
        node = _node(flow, y.t, here, new.X_frame, new.X, y.t + 0.5 * length, new.rate)
        return StepResult(new.y, MacroMemory(h, new.here, before), node, hermite(y, new.y, new.rate, new.end_rate))


@dataclass(frozen=True)
class _Accepted:
    y: State
    here: Here
    X: Array
    X_frame: Frame
    rate: Rate
    end_rate: Rate
    error: float


@dataclass
class _Attempt:
    """One try of a macro step; ``run`` gives what was reached, or (a float) the step to try instead."""

    config: MacroStep
    flow: Flow
    memory: MacroMemory
    here: Here
    y: State
    h: float
    final: bool  # as short as allowed: accept whatever is finite

    def run(self) -> _Accepted | float:
        flow, y, h, tol = self.flow, self.y, self.h, self.config.tol
        frame = self._middle_frame()
        gamma = self.config.gamma(h)
        warm: list[ccp.CCPResult | None] = [None]

        def rate(at: dict[str, Any], g: Tensor | None = None) -> tuple[dict[str, Any], Array]:
            state = State(at["w"], at["nu"], at["t"])
            if g is None:
                g = flow.value_and_grad(state)[1]
            lin = flow.linearised(state, g, frame)
            X = _multiplier(flow, lin, gamma, warm)
            drift = lin.drift(X)
            return {"w": drift.w, "nu": drift.nu, "t": 1.0, "z": svec(X)}, X

        start = {"w": y.w, "nu": y.nu, "t": y.t, "z": np.zeros(frame.k * (frame.k + 1) // 2)}
        first, _ = rate(start, self.here.g)
        raw = rkc(lambda at: rate(at)[0], start, h, stages(h, self._radius()), first)
        end = State(raw["w"], raw["nu"], y.t + h)
        loss, g = flow.value_and_grad(end)
        last, X_end = rate({**raw, "t": end.t}, g)
        error = self._embedded_error(start, raw, first, last, g)
        if not np.isfinite(error):
            return self._retry(np.inf)
        if error > 4 * tol and not self.final:
            return self._retry(error)

        begin, finish = Rate(first["w"], first["nu"]), Rate(last["w"], last["nu"])
        if not flow.constrained:
            here = self.config._evaluate(flow, end, self.here.seen, h, (float(loss), g))
            return _Accepted(end, here, np.zeros((0, 0)), here.frame, begin, finish, error)

        seen = self.config.watch.look(flow, end, self.here.seen, h, self._guess())
        if seen.eigenvalues[0] > _OVERSHOOT and not self.final:
            return 0.5 * h
        new = self.config._frame(flow, end, seen, h)
        corrected = self._correct(end, g, new, raw["z"], frame, X_end)
        if corrected is None:
            return self._retry(np.inf)
        moved, Z, bend = corrected
        if bend > 4 * tol and not self.final:
            return self._retry(bend)
        if moved is not end:
            loss, g = flow.value_and_grad(moved)
            gap = flow.linearised(moved, g, new).gap
            new, seen = self._settled(moved, new, gap, seen)
        here = Here(float(loss), g, seen, new)
        return _Accepted(moved, here, Z / h, new, begin, finish, max(error, bend))

    def _radius(self) -> float:
        """Spectral radius of the flow's Jacobian: λ ≤ 2 in w, and ν's own decay."""
        top = float(self.here.seen.eigenvalues[0])
        # without a constraint the sharpness rises as it likes, and is known to a tenth only
        top *= 1.05 if self.flow.constrained else 1.2
        return max(2.1, top, 1.1 * self.flow.nu_decay(self.y, self.here.g))

    def _retry(self, error: float) -> float:
        if not np.isfinite(error):
            if self.final:
                raise DomainError("the state is not finite.")
            return 0.5 * self.h
        return float(self.h * np.clip(0.8 * (self.config.tol / error) ** (1 / 3), 0.2, 0.6))

    def _embedded_error(
        self, start: dict[str, Any], raw: dict[str, Any], first: dict[str, Any], last: dict[str, Any], g: Tensor
    ) -> float:
        """RKC's third-order estimate, in w; that of ν as the displacement of w it stands for."""
        h = self.h
        names = ("w", "nu")
        d = combine(
            [
                (0.8, {n: start[n] for n in names}),
                (-0.8, {n: raw[n] for n in names}),
                (0.4 * h, {n: first[n] for n in names}),
                (0.4 * h, {n: last[n] for n in names}),
            ]
        )
        error: float = torch.linalg.vector_norm(d["w"]).item()
        if not np.isfinite(error):
            return error
        end = State(raw["w"], raw["nu"], self.y.t + h)
        other = State(raw["w"], combine([(1.0, raw["nu"]), (0.5, d["nu"])]), end.t)
        try:
            shift = h * float(torch.linalg.vector_norm(self.flow.velocity(end, g) - self.flow.velocity(other, g)))
        except DomainError:
            return float("inf")
        return max(error, shift)

    # ---- frames ---------------------------------------------------------------------------------------

    def _middle_frame(self) -> Frame:
        """The frame at the start, T extrapolated to the middle of the step where the last step allows it."""
        frame, before = self.here.frame, self.memory.before
        if before is None or not frame.k or before[0].k != frame.k:
            return frame
        old, V_old, h_old = before
        R = _polar(host(self.here.seen.block.V[:, : frame.k].T @ V_old[:, : frame.k])[0])
        turned = torch.as_tensor(skron(R)).to(frame.T) @ old.T
        return replace(frame, T=frame.T + min(2.0, self.h / h_old / 2) * (frame.T - turned))

    def _guess(self) -> Tensor | None:
        """Eigenvectors extrapolated to the end of the step."""
        V, before = self.here.seen.block.V, self.memory.before
        if before is None or before[1].shape != V.shape:
            return None
        R = _polar(host(before[1].T @ V)[0])
        return V + min(2.0, self.h / before[2]) * (V - before[1] @ torch.as_tensor(R).to(V))

    # ---- the end of the step --------------------------------------------------------------------------

    def _correct(
        self, end: State, g: Tensor, new: Frame, z: Array, middle: Frame, X_end: Array
    ) -> tuple[State, Array, float] | None:
        """Trapezoid rule for the change of frame, then the signed correction of the impulse onto the constraint.

        Returns the corrected state, the impulse of the whole step in the new frame, and the size of the trapezoid
        correction in w; None if the correction leaves the domain of P.
        """
        flow, old = self.flow, self.here.frame
        if not new.k:
            return end, np.zeros((0, 0)), 0.0
        try:
            lin = flow.linearised(end, g, new)
            Z = Z_end = np.zeros((new.k, new.k))
            moved, bend = end, 0.0
            if old.k:
                R = self._transport(end, new, old)
                Z = R @ smat(z) @ R.T
                Z_end = R @ (self.h * X_end) @ R.T
                if z.any():
                    at_start, at_middle = (flow.linearised(end, g, frame).kick(smat(z)) for frame in (old, middle))
                    change = combine([(0.5, _pair(lin.kick(Z))), (0.5, _pair(at_start)), (-1.0, _pair(at_middle))])
                    bend = float(change[0].norm())
                    moved = _displaced(end, change)
                    if bend > 4 * self.config.tol and not self.final:
                        return moved, Z, bend
                    lin = flow.linearised(moved, g, new)
            # gap + β[Y − Z_end] ⪰ 0 ⟂ Y: the impulse that the end asks for against the one the stages were giving
            Y = ccp.solve(smat(lin.beta @ svec(Z_end)) - lin.gap, lin.beta).X
            flow.count_ccp()
            y = Y - Z_end
            if y.any():
                moved = _displaced(moved, _pair(lin.kick(y)))
                flow.velocity(moved, g)  # still in the domain?
        except DomainError:
            return None
        return moved, Z + y, bend

    def _transport(self, end: State, new: Frame, old: Frame) -> Array:
        """The rotation from the old frame to the new one: polar factor of U'ᵀPU, also when k changed."""
        return _polar(host(new.U.T @ self.flow.precondition(end, old.U))[0])

    def _settled(self, moved: State, new: Frame, gap: Array, seen: Sighting) -> tuple[Frame, Sighting]:
        """Frame and eigenvalues after the small displacement by the corrections, to first order."""
        M = 2 * host(new.U.T @ self.flow.precondition(moved, new.U))[0] - gap
        values = seen.eigenvalues.copy()
        values[: new.k] = 2 - np.linalg.eigvalsh(gap)
        elapsed = seen.t - self.y.t
        shift = (values - seen.eigenvalues) / elapsed
        block = replace(seen.block, eigenvalues=values)
        return replace(new, w=moved.w, M=0.5 * (M + M.T)), replace(seen, block=block, rates=seen.rates + shift)


def _multiplier(flow: Flow, lin: Linearised, gamma: float, warm: list[ccp.CCPResult | None] | None) -> Array:
    """X of Baumgarte type: γ gap + β[X] − α ⪰ 0 ⟂ X ⪰ 0."""
    alpha = lin.alpha
    if not len(alpha):
        return np.zeros((0, 0))
    solved = ccp.solve(alpha - gamma * lin.gap, lin.beta, warm=warm[0] if warm else None)
    flow.count_ccp()
    if warm:
        warm[0] = solved
    return solved.X


def _polar(A: Array) -> Array:
    """The nearest matrix with orthonormal rows or columns."""
    left, _, right = np.linalg.svd(A, full_matrices=False)
    nearest: Array = left @ right
    return nearest


def _pair(rate: Rate) -> tuple[Tensor, Any]:
    return rate.w, rate.nu


def _displaced(y: State, change: tuple[Tensor, Any]) -> State:
    w, nu = combine([(1.0, (y.w, y.nu)), (1.0, change)])
    return State(w, nu, y.t)


def _node(flow: Flow, t: float, here: Here, frame: Frame, X: Array, X_time: float, rate: Rate) -> Node:
    return Node(
        t=t,
        loss=here.loss,
        grad_sq=float(here.g @ here.g),
        eigenvalues=here.seen.shown if flow.constrained else here.seen.eigenvalues[:1],
        U=frame.U,
        HU=frame.HU,
        X=X,
        X_time=X_time,
        g=here.g,
        rate=rate,
    )
