"""One try of a macro step (see :mod:`dvi.solvers.macro_step`): stages, new frame, corrections, error estimates."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dvi.solvers import ccp
from dvi.solvers.bending import Bending, Change, Past, displaced
from dvi.solvers.errors import DomainError
from dvi.solvers.gap import anchored, approaching, baumgarte, coupled, multiplier, oscillating, settled, transport
from dvi.solvers.here import Here, Stiffness, critical_frame, evaluate
from dvi.solvers.interval import FARTHEST, UNKNOWN, Experience, Moments, Slope, ahead, basis_ahead, vectors_ahead
from dvi.solvers.protocol import Array, Flow, Frame, Linearised, Rate, State, combine, like
from dvi.solvers.repair import Repair
from dvi.solvers.rkc import rkc, stages
from dvi.solvers.svec import skron, smat, svec
from dvi.solvers.thirds import tempered, with_thirds
from dvi.solvers.watch import LOOSE, Watch

#: What a step of h allows is h^(1/2) times tol; an estimate of order h³ then falls like h^(5/2).
SHARE = 0.5
ORDER = 1 / (3 - SHARE)
#: In units of tol: what a step may have before it is rejected.
ALLOWED = 4.0

#: A change of the oscillation's force that was not foreseen, in parts of how far w has moved, that counts as an error
#: of tol.  It is a lower bound of h times the rate at which the force pulls back, whatever the size of the step; where
#: nothing is stiff it is below 0.1.
PULL = 0.5

TINY = 0.1  # a step that ends with a look, so short that following the frame in longer ones is cheaper
OVERSHOOT = 2.2  # an effective sharpness above this at the end of a step: the constraint's model failed, reject
_UNSEEN = 2.01  # … or above this, where nothing was constrained because the eigenvalues were taken on trust


@dataclass(frozen=True)
class Accepted:
    """A step that was taken.

    Attributes:
        y: the state at its end; here: what is known there, to start the next step from.
        X: the impulse of the step over its length, in ``X_frame``, with its share of the interval's correction.
        rate, end_rate: dy/dt at both ends.
        error: the embedded estimate, or in an interval of one step the correction for T's bend, if that is larger, in
            the norm of w, over √h; or what the change of the force stands for (``PULL``).
        bend: these two in an interval of several steps, over the root of its length: too late to take them back.
        missed: an effective sharpness far above 2 at the end, where no shorter step could be tried; else 0.
    """

    y: State
    here: Here
    X: Array
    X_frame: Frame
    rate: Rate
    end_rate: Rate
    error: float
    bend: float = 0.0
    missed: float = 0.0


@dataclass(frozen=True)
class Rejected:
    """A step that was not taken.

    Attributes:
        h: the length to try instead.
        pulled: because of how the force had changed; a direction that is missing in the frame may be why.
        stiffness: with which to follow the frame then (None: it is to be frozen).
    """

    h: float
    pulled: bool = False
    stiffness: Stiffness | None = None


@dataclass(frozen=True)
class Corrected:
    """The end of a step after its corrections.

    Attributes:
        y: the state.
        X: the mean of X over the step, in the new frame.
        bend: the size of the correction for T's bend, in the norm of w, over the root of the interval's length.
        pull: the change of the force that was not foreseen, over the displacement; in the norm of P.
        T: third derivatives of the new frame, and anchor: the weights for which they speak.
        experience: what the interval taught.
        past: what the next look may learn from (None: nothing).
        stiffness: how fast the force pulls back, as far as its change over the interval tells (None: slowly).
    """

    y: State
    X: Array
    bend: float
    pull: float
    T: Tensor
    anchor: Tensor
    experience: Experience = UNKNOWN
    past: Past | None = None
    stiffness: Stiffness | None = None

    def error(self, tol: float) -> float:
        """The bend, or what the change of the force stands for, if that is more."""
        return max(self.bend, (self.pull / PULL) ** 2 * tol)


@dataclass
class Attempt:
    """One try of a macro step; ``run`` gives what was reached, or that it was not accepted."""

    flow: Flow
    watch: Watch
    tol: float
    here: Here
    y: State
    h: float
    final: bool  # as short as allowed: accept whatever is finite
    closing: bool = True  # look at the eigenvectors at its end, needed or not

    @property
    def since(self) -> float:
        """Unit times since the last look."""
        return self.y.t - self.here.seen.t

    @property
    def _anchor(self) -> Tensor:
        """The weights for which the frame's T speaks."""
        return self.here.frame.w if self.here.anchor is None else self.here.anchor

    @cached_property
    def _decay(self) -> float:
        return self.flow.nu_decay(self.y, self.here.g)

    @cached_property
    def _repaired(self) -> Repair:
        return Repair(self.flow, self.y, self._decay)

    def run(self) -> Accepted | Rejected:
        """What was reached, or the length of the step to try instead.

        Raises:
            DomainError: if a stage leaves the domain of the loss or of P.
        """
        flow, y, h, tol = self.flow, self.y, self.h, self.tol
        frame = ahead(self.here.frame, self.here.slope, self.since + h / 2)
        gamma = baumgarte(h)
        warm: list[ccp.CCPResult | None] = [None]

        # The Baumgarte term closes a gap over a part of the step: where none is at the edge it would push too early.
        silent = self.here.approach is not None and self.here.approach.none_within(h)

        def rate(at: dict[str, Any], g: Tensor | None = None) -> tuple[dict[str, Any], Array, Linearised]:
            state = State(at["w"], at["nu"], at["t"])
            if g is None:
                state = self._repaired(state)
                g = flow.gradient(state)
            lin = flow.linearised(state, g, frame)
            X = np.zeros_like(lin.alpha) if silent else multiplier(flow, lin, gamma, warm)
            drift = lin.drift(X)
            return {"w": drift.w, "nu": drift.nu, "t": 1.0, "z": svec(X)}, X, lin

        start = {"w": y.w, "nu": y.nu, "t": y.t, "z": np.zeros(frame.k * (frame.k + 1) // 2)}
        first, _, _ = rate(start, self.here.g)
        raw = rkc(lambda at: rate(at)[0], start, h, stages(h, self._radius()), first)
        end = self._repaired(State(raw["w"], raw["nu"], y.t + h))
        raw["nu"] = end.nu
        loss, g = flow.value_and_grad(end)
        last, X_end, lin = rate({**raw, "t": end.t}, g)
        error = self._embedded_error(start, raw, first, last, g) / h**SHARE
        if not np.isfinite(error):
            return self._retry(np.inf)
        if error > ALLOWED * tol and not self.final:
            return self._retry(error)

        begin, finish = Rate(first["w"], first["nu"]), Rate(last["w"], last["nu"])
        if not flow.constrained:
            here = evaluate(flow, self.watch, end, self.here.seen, h, (float(loss), g))
            return Accepted(end, here, np.zeros((0, 0)), here.frame, begin, finish, error)

        owed = (self.here.owed or Moments.none(frame.k)).after(smat(raw["z"]) / h, self.since, h)
        until = self._wait(end, error, owed, X_end, lin)
        if until > end.t:
            here = replace(self.here, loss=float(loss), g=g, until=until)
            if frame.k:
                here = self._carried(here, end, lin, owed)
            shown = basis_ahead(flow, y, frame, self.here.seen, self.here.slope)
            return Accepted(end, here, smat(raw["z"]) / h, shown, begin, finish, error)
        guess = vectors_ahead(self.here.seen, self.here.slope, end.t)
        seen = self.watch.look(flow, end, self.here.seen, h, guess, self.here.coupling)
        on_trust = silent if frame.k else self.since > 0
        if seen.eigenvalues[0] > (_UNSEEN if on_trust else OVERSHOOT) and not self.final:
            return Rejected(0.5 * h)
        missed = float(seen.eigenvalues[0]) if seen.eigenvalues[0] > OVERSHOOT else 0.0
        held = self.watch.critical(seen, h, frame.k, self.here.coupling)
        new = critical_frame(flow, end, seen, held, third=False)
        R = transport(flow, end, new, self.here.frame)
        new, taken = with_thirds(flow, end, new, seen, self.here, R, X_end)
        corrected = self._correct(end, g, new, R, owed, X_end)
        if corrected is None:
            return self._retry(np.inf)
        moved, bend = corrected.y, corrected.error(tol)
        if not self.since:  # the bend of one step; that of several is for the next interval to learn from
            if bend > ALLOWED * tol and not self.final:
                return replace(self._retry(bend), pulled=corrected.pull > PULL)
            error = max(error, bend)
        approach, coupling, kept = None, LOOSE, None
        if self.here.stiffness and self.here.stiffness.lasting:  # held for once, because a direction arrives
            kept = self.here.stiffness.passed(False)
        if moved is not end:
            loss, g = flow.value_and_grad(moved)
        if new.k:
            lin = flow.linearised(moved, g, new)
            # what was seen from look to look is the rate in the middle of the interval
            approach = approaching(flow, lin, seen.rates, 0.5 * (self.since + h))
            # as if of one unit at least: what is let go where steps are short would come back as they grow
            coupling = coupled(lin, corrected.X, max(h, 1.0))
            new, seen = settled(flow, moved, new, lin.gap, seen, self.since + h)
        new = replace(new, T=corrected.T)
        slope = tempered(Slope.between(self.here.frame, self.here.seen, new, seen), self.here, R, end.t)
        here = Here(
            float(loss),
            g,
            seen,
            new,
            slope=slope,
            anchor=corrected.anchor,
            approach=approach,
            experience=corrected.experience,
            coupling=coupling,
            taken=taken,
            past=corrected.past,
            stiffness=kept or (corrected.stiffness if h <= TINY and not self.since else None),
        )
        return Accepted(moved, here, corrected.X, new, begin, finish, error, bend if self.since else 0.0, missed)

    def _wait(self, end: State, error: float, owed: Moments, X: Array, lin: Linearised) -> float:
        """The moment until which the next step may go before the next look; the end of this one if it may not."""
        here, k = self.here, self.here.frame.k
        if not k:
            trusted = self.watch.trusted(self.flow, end, here.seen, end.t + self.h)
            return np.inf if trusted else end.t
        if self.closing or here.slope is None or not here.slope.covers(owed.zeroth):
            return end.t
        following = self.h * growth(self.tol, error)
        elapsed = self.since + self.h
        span = elapsed + following
        fits = (
            span <= FARTHEST * here.slope.span
            and float(np.linalg.eigvalsh(lin.gap)[0]) > -here.experience.SAG
            and here.experience.allows(self.tol, span, owed.after(X, elapsed, following), here.slope)
            and self.watch.quiet(self.flow, end, here.seen, k, end.t + following)
        )
        return end.t + following if fits else end.t

    def _carried(self, here: Here, end: State, lin: Linearised, owed: Moments) -> Here:
        """The frame of the last look, its gap carried on to the end: from there on w moves along another T."""
        frame = anchored(self.flow, end, here.frame, lin.gap)
        before = np.empty(0) if here.approach is None else here.approach.rates
        approach = approaching(self.flow, lin, before, self.h)
        return replace(here, frame=frame, anchor=self._anchor, owed=owed, approach=approach)

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
        return max(top, 1.1 * self._decay)

    def _retry(self, error: float) -> Rejected:
        if not np.isfinite(error):
            if self.final:
                raise DomainError("the state is not finite.")
            return Rejected(0.5 * self.h)
        return Rejected(float(self.h * np.clip(0.8 * (self.tol / error) ** ORDER, 0.2, 0.6)))

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
        try:
            return max(error, self._worth(State(raw["w"], raw["nu"], self.y.t + h), g, (d["w"], d["nu"]), h))
        except DomainError:
            return float("inf")

    # ---- the end of the step --------------------------------------------------------------------------

    def _correct(self, end: State, g: Tensor, new: Frame, R: Array, owed: Moments, X_end: Array) -> Corrected | None:
        """What the change of frame owes since the last look, then the signed correction of the impulse to the gap.

        None if that leaves the domain of P.
        """
        flow, old, slope = self.flow, self.here.frame, self.here.slope
        H = self.since + self.h
        if not new.k:
            return Corrected(end, np.zeros((0, 0)), 0.0, 0.0, new.T, end.w)
        bending: Bending | None = None
        past: Past | None = None
        stiffness: Stiffness | None = None
        try:
            lin = flow.linearised(end, g, new)
            X = Z_end = np.zeros((new.k, new.k))
            moved, bend, pull, experience = end, 0.0, 0.0, self.here.experience
            if old.k:
                S = R.T @ R  # of a direction that has left nothing is known, and nothing is taken back
                X = R @ (owed.zeroth - (self.here.owed.zeroth if self.here.owed else 0.0)) @ R.T / self.h
                Z_end = R @ (H * X_end) @ R.T
                if owed.zeroth.any():
                    last = self.here.past
                    if old.k == new.k and np.trace(S) > old.k - 0.5:
                        bending = Bending(flow, end, g, new, lin, self._critical(lin, R, X_end), R @ owed.zeroth @ R.T)
                        w, T = (self._anchor, old.T) if last is None else (last.w, last.T)
                        bending.add(end.w - w, new.T - like(skron(R), T) @ T)
                    # Where the force pulls back strongly the trapezoid rule, which is stable; else T's bend is known.
                    late = owed.bent(H, None if bending and bending.stiff else slope)
                    foreseen = flow.linearised(end, g, ahead(old, slope, H))
                    change = combine([(1.0, lin.kick(R @ late @ R.T).parts), (-1.0, foreseen.kick(S @ late @ S).parts)])
                    if bending:
                        pull = bending.pull(foreseen.kick(owed.zeroth))
                        if last is not None and last.reversed_by(change[0]):  # there is more than one stiff direction
                            bending.add(last.step, like(skron(R), last.turn) @ last.turn)
                        change = bending.implicit(change)
                        if bending.stiff:
                            times = self.here.stiffness.times if self.here.stiffness else 0
                            stiffness = Stiffness(-float(bending.secant.rates.min()) / H, times + 1, held=H)
                        past = bending.past(change[0])
                    size = self._worth(end, g, change, H)
                    bend = size / H**SHARE
                    acted = float(np.trace(owed.second + slope.span * owed.first)) if slope else np.nan
                    experience = replace(experience, bend=size / acted if acted > 0 else np.nan)
                    moved = self._repaired(displaced(end, change))
                    so_far = Corrected(moved, X, bend, pull, new.T, end.w)
                    if so_far.error(self.tol) > ALLOWED * self.tol and not self.final and not self.since:
                        return so_far
                    lin = flow.linearised(moved, g, new)
            # gap + β[Y − Z_end] ⪰ 0 ⟂ Y: the impulse that the end asks for against the one the stages were giving
            Y = ccp.solve(smat(lin.beta @ svec(Z_end)) - lin.gap, lin.beta).X
            flow.count_ccp()
            y, slip = Y - Z_end, 0.0
            if y.any():
                kick = lin.kick(y)
                slip = self._worth(end, g, kick.parts, H)
                moved = self._repaired(displaced(moved, kick.parts))
                flow.velocity(moved, g)  # still in the domain?
            sag = max(0.0, -float(np.linalg.eigvalsh(lin.gap)[0]))
            experience = replace(experience, slip=slip / H**2, sag=sag / H**2, pull=pull / H**2)
        except DomainError:
            return None
        T, anchor = new.T, end.w
        if bending and bending.stiff:  # T was made before the corrections
            T, anchor = bending.turned(moved.w - end.w), moved.w
        return Corrected(moved, X + y / H, bend, pull, T, anchor, experience, past, stiffness)

    def _critical(self, lin: Linearised, R: Array, X: Array) -> Array:
        """As many directions of the new frame as oscillate, those with the least gaps [k, a]."""
        critical: Array = np.linalg.eigh(lin.gap)[1][:, : oscillating(R @ X @ R.T).shape[1]]
        return critical

    def _worth(self, y: State, g: Tensor, change: Change, H: float) -> float:
        """How far a change of (w, ν) moves w: by itself, and by what half of its ν does to P over H unit times."""
        size = float(change[0].norm())
        if not pytree.tree_leaves(y.nu):
            return size
        other = State(y.w, combine([(1.0, y.nu), (0.5, change[1])]), y.t)
        return max(size, H * float((self.flow.velocity(y, g) - self.flow.velocity(other, g)).norm()))


def growth(tol: float, error: float) -> float:
    """By how much the next step may be longer than one with this error estimate."""
    return float(np.clip(0.85 * (tol / max(error, 1e-300)) ** ORDER, 0.3, 2.0))
