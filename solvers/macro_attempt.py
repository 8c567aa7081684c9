"""One try of a macro step (see :mod:`dvi.solvers.macro_step`): stages, new frame, corrections, error estimates."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dvi.solvers import ccp
from dvi.solvers.errors import DomainError
from dvi.solvers.protocol import Array, Flow, Frame, Linearised, Rate, State, combine, host, like, mended
from dvi.solvers.rkc import rkc, stages
from dvi.solvers.secant import Secant
from dvi.solvers.svec import skron, smat, svec
from dvi.solvers.watch import Sighting, Watch, empty_frame

#: What a step of h allows is h^(1/2) times tol; an estimate of order h³ then falls like h^(5/2).
SHARE = 0.5
ORDER = 1 / (3 - SHARE)
#: In units of tol: what a step may have before it is rejected.
ALLOWED = 4.0

_OVERSHOOT = 2.2  # an effective sharpness above this at the end of a step: the constraint's model failed, reject
_UNSEEN = 2.01  # … or above this, where nothing was constrained because the eigenvalues were taken on trust


@dataclass(frozen=True)
class Here:
    """All that is known at the start of a step; ``anchor``: the weights for which T speaks (default: the frame's)."""

    loss: float
    g: Tensor
    seen: Sighting
    frame: Frame
    anchor: Tensor | None = None


@dataclass(frozen=True)
class Accepted:
    """A step that was taken.

    Attributes:
        y: the state at its end; here: what is known there, to start the next step from.
        X: the impulse of the step over its length, in ``X_frame``.
        rate, end_rate: dy/dt at both ends.
        error: the larger of the embedded estimate and the trapezoid correction, in the norm of w, over √h.
    """

    y: State
    here: Here
    X: Array
    X_frame: Frame
    rate: Rate
    end_rate: Rate
    error: float


@dataclass(frozen=True)
class Corrected:
    """The end of a step after its corrections.

    Attributes:
        y: the state.
        Z: the impulse of the whole step in the new frame.
        bend: the size of the trapezoid correction in w, over √h.
        T: third derivatives of the new frame, and anchor: the weights for which they speak.
    """

    y: State
    Z: Array
    bend: float
    T: Tensor
    anchor: Tensor


@dataclass
class Attempt:
    """One try of a macro step; ``run`` gives what was reached, or (a float) the step to try instead."""

    flow: Flow
    watch: Watch
    tol: float
    before: tuple[Frame, Tensor, float] | None  # frame, eigenvectors and time of the last look but one
    here: Here
    y: State
    h: float
    final: bool  # as short as allowed: accept whatever is finite

    def run(self) -> Accepted | float:
        """What was reached, or the length of the step to try instead.

        Raises:
            DomainError: if a stage leaves the domain of the loss or of P.
        """
        flow, y, h, tol = self.flow, self.y, self.h, self.tol
        frame = middle_frame(self.here, self.before, self.h)
        gamma = baumgarte(h)
        warm: list[ccp.CCPResult | None] = [None]

        def rate(at: dict[str, Any], g: Tensor | None = None) -> tuple[dict[str, Any], Array]:
            state = mended(flow, State(at["w"], at["nu"], at["t"]), y)
            if g is None:
                g = flow.value_and_grad(state)[1]
            lin = flow.linearised(state, g, frame)
            X = multiplier(flow, lin, gamma, warm)
            drift = lin.drift(X)
            return {"w": drift.w, "nu": drift.nu, "t": 1.0, "z": svec(X)}, X

        start = {"w": y.w, "nu": y.nu, "t": y.t, "z": np.zeros(frame.k * (frame.k + 1) // 2)}
        first, _ = rate(start, self.here.g)
        raw = rkc(lambda at: rate(at)[0], start, h, stages(h, self._radius()), first)
        end = mended(flow, State(raw["w"], raw["nu"], y.t + h), y)
        raw["nu"] = end.nu
        loss, g = flow.value_and_grad(end)
        last, X_end = rate({**raw, "t": end.t}, g)
        error = self._embedded_error(start, raw, first, last, g) / h**SHARE
        if not np.isfinite(error):
            return self._retry(np.inf)
        if error > ALLOWED * tol and not self.final:
            return self._retry(error)

        begin, finish = Rate(first["w"], first["nu"]), Rate(last["w"], last["nu"])
        if not flow.constrained:
            here = evaluate(flow, self.watch, end, self.here.seen, h, (float(loss), g))
            return Accepted(end, here, np.zeros((0, 0)), here.frame, begin, finish, error)

        if not frame.k and self.watch.trusted(flow, end, self.here.seen, end.t + h):  # far from 2, for one more step
            here = replace(self.here, loss=float(loss), g=g)
            return Accepted(end, here, np.zeros((0, 0)), frame, begin, finish, error)
        seen = self.watch.look(flow, end, self.here.seen, h, extrapolated(self.here, self.before, end.t))
        on_trust = self.here.seen.t < y.t
        if seen.eigenvalues[0] > (_UNSEEN if on_trust else _OVERSHOOT) and not self.final:
            return 0.5 * h
        new = critical_frame(flow, self.watch, end, seen, h, frame.k)
        corrected = self._correct(end, g, new, raw["z"], frame, X_end)
        if corrected is None:
            return self._retry(np.inf)
        moved, Z, bend = corrected.y, corrected.Z, corrected.bend
        if bend > ALLOWED * tol and not self.final:
            return self._retry(bend)
        if moved is not end:
            loss, g = flow.value_and_grad(moved)
            gap = flow.linearised(moved, g, new).gap
            new, seen = settled(flow, moved, new, gap, seen, h)
        here = Here(float(loss), g, seen, replace(new, T=corrected.T), corrected.anchor)
        return Accepted(moved, here, Z / h, new, begin, finish, max(error, bend))

    def _radius(self) -> float:
        """Spectral radius of the flow's Jacobian: at most the effective sharpness in w, and ν's own decay."""
        seen = self.here.seen
        top = float(seen.eigenvalues[0])
        if not self.flow.constrained:  # it rises as it likes, and is known to a few percent, up to a unit ago
            top = max(2.1, 1.2 * top)
        elif self.here.frame.k or self.y.t + self.h > seen.until:
            top = max(2.1, 1.05 * top)
        else:  # far from 2 until then; a Ritz value is below the eigenvalue by its residual at most
            rise = self.watch.rise(seen, self.y.t + self.h)
            top = min(2.1, 1.1 * (top + float(seen.block.residuals[0]) + rise) + 0.1)
        return max(top, 1.1 * self.flow.nu_decay(self.y, self.here.g))

    def _retry(self, error: float) -> float:
        if not np.isfinite(error):
            if self.final:
                raise DomainError("the state is not finite.")
            return 0.5 * self.h
        return float(self.h * np.clip(0.8 * (self.tol / error) ** ORDER, 0.2, 0.6))

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

    # ---- the end of the step --------------------------------------------------------------------------

    def _correct(self, end: State, g: Tensor, new: Frame, z: Array, middle: Frame, X_end: Array) -> Corrected | None:
        """Trapezoid rule for the change of frame, then the signed correction of the impulse onto the constraint.

        None if the correction leaves the domain of P.
        """
        flow, old = self.flow, self.here.frame
        if not new.k:
            return Corrected(end, np.zeros((0, 0)), 0.0, new.T, end.w)
        try:
            lin = flow.linearised(end, g, new)
            Z = Z_end = np.zeros((new.k, new.k))
            moved, bend, secant = end, 0.0, None
            if old.k:
                R = transport(flow, end, new, old)
                Z = R @ smat(z) @ R.T
                Z_end = R @ (self.h * X_end) @ R.T
                if z.any():
                    at_start, at_middle = (flow.linearised(end, g, frame).kick(smat(z)) for frame in (old, middle))
                    bent = combine([(1.0, lin.kick(Z).parts), (-1.0, at_start.parts)])
                    change = combine([(0.5, bent), (1.0, at_start.parts), (-1.0, at_middle.parts)])
                    if old.k == new.k:
                        Py = flow.precondition(end, bent[0][:, None])[:, 0]
                        secant = Secant.of(
                            end.w - (old.w if self.here.anchor is None else self.here.anchor), bent[0], Py
                        )
                        change = combine([(1.0, change), (0.5 * secant.implicit(change[0]), bent)])
                    bend = float(change[0].norm()) / self.h**SHARE
                    moved = mended(flow, _displaced(end, change), self.y)
                    if bend > ALLOWED * self.tol and not self.final:
                        return Corrected(moved, Z, bend, new.T, end.w)
                    lin = flow.linearised(moved, g, new)
            # gap + β[Y − Z_end] ⪰ 0 ⟂ Y: the impulse that the end asks for against the one the stages were giving
            Y = ccp.solve(smat(lin.beta @ svec(Z_end)) - lin.gap, lin.beta).X
            flow.count_ccp()
            y = Y - Z_end
            if y.any():
                moved = mended(flow, _displaced(moved, lin.kick(y).parts), self.y)
                flow.velocity(moved, g)  # still in the domain?
        except DomainError:
            return None
        part = secant.part(moved.w - end.w) if secant else 0.0
        if not part:
            return Corrected(moved, Z + y, bend, new.T, end.w)
        # T was made before the corrections; what they change of it is a part of what the step has changed
        T = new.T + part * (new.T - like(skron(R), new.T) @ old.T)
        return Corrected(moved, Z + y, bend, T, moved.w)


def middle_frame(here: Here, before: tuple[Frame, Tensor, float] | None, h: float) -> Frame:
    """The frame at the start, T extrapolated to the middle of the step where the last step allows it."""
    frame = here.frame
    if before is None or not frame.k or before[0].k != frame.k:
        return frame
    old, V_old, t_old = before
    R = _polar(host(here.seen.block.V[:, : frame.k].T @ V_old[:, : frame.k])[0])
    turned = like(skron(R), frame.T) @ old.T
    return replace(frame, T=frame.T + min(2.0, h / (here.seen.t - t_old) / 2) * (frame.T - turned))


def extrapolated(here: Here, before: tuple[Frame, Tensor, float] | None, t: float) -> Tensor | None:
    """Eigenvectors extrapolated to the time t."""
    if before is None:
        return None
    seen, (_, V_old, t_old) = here.seen, before
    V = seen.block.V
    (overlap,) = host(V_old.T @ V)
    known = np.linalg.norm(overlap, axis=0) > 0.9  # the others were not in the block then
    change = (V - V_old @ like(_polar(overlap), V)) * like(known, V)
    return V + min(2.0, (t - seen.t) / (seen.t - t_old)) * change


def transport(flow: Flow, end: State, new: Frame, old: Frame) -> Array:
    """The rotation from the old frame to the new one: polar factor of U'ᵀPU, also when k changed."""
    return _polar(host(new.U.T @ flow.precondition(end, old.U))[0])


def settled(flow: Flow, moved: State, new: Frame, gap: Array, seen: Sighting, h: float) -> tuple[Frame, Sighting]:
    """Frame and eigenvalues after the small displacement by the corrections of a step of h, to first order."""
    M = 2 * host(new.U.T @ flow.precondition(moved, new.U))[0] - gap
    values = seen.eigenvalues.copy()
    values[: new.k] = 2 - np.linalg.eigvalsh(gap)
    shift = (values - seen.eigenvalues) / h
    block = replace(seen.block, eigenvalues=values)
    return replace(new, w=moved.w, M=0.5 * (M + M.T)), replace(seen, block=block, rates=seen.rates + shift)


def multiplier(flow: Flow, lin: Linearised, gamma: float, warm: list[ccp.CCPResult | None] | None) -> Array:
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


def _displaced(y: State, change: tuple[Tensor, Any]) -> State:
    w, nu = combine([(1.0, y.parts), (1.0, change)])
    return State(w, nu, y.t)


def baumgarte(h: float) -> float:
    """The rate at which a gap is closed, per unit time."""
    return 4 / max(h, 2.0)


def evaluate(
    flow: Flow,
    watch: Watch,
    y: State,
    last: Sighting | None,
    h: float,
    known: tuple[float, Tensor] | None = None,
) -> Here:
    """All that a step from y needs to know; ``known``: loss and gradient, if at hand."""
    if known is None:
        loss, g = flow.value_and_grad(y)
        known = float(loss), g
    if not flow.constrained:
        return Here(*known, watch.glance(flow, y, last), empty_frame(flow, y))
    seen = watch.look(flow, y, last, h)
    return Here(*known, seen, critical_frame(flow, watch, y, seen, h))


def critical_frame(flow: Flow, watch: Watch, y: State, seen: Sighting, h: float, held: int = 0) -> Frame:
    """The critical frame; where oscillations act on ν inside a step, the eigenvalue is 2."""
    return replace(watch.frame(flow, y, seen, h, held), on_edge=True)
