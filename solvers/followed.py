"""A macro step whose stages follow the critical frame, for forces that pull back fast.

Where w is pushed by the oscillation along several directions at once that pull it back at ten or a hundred per unit
time, what a frozen frame is wrong by, and is made up for at the end of a step, overshoots at any step worth the name.
But such a flow is no more than mildly stiff *if its right side is what it is where each stage is*: eigenvectors, gap
and third derivatives, that is the force itself.  Then more stages damp what is stiff (a rate of 60 over a step of
two units takes 24), and nothing is left to make up for: the gap is closed by Baumgarte's term alone.  How many stages,
a power method for the Jacobian of that right side tells, mostly one or two evaluations a step.

Baumgarte's term also holds back a direction that is about to arrive, by what it rises in 1/γ.  So γ is as large as the
stages bear anyway, a good part of the rate, and where a direction arrives too fast for that the step holds its frame.

A stage costs some block products with the Hessian and all third derivatives of the frame, some tens of gradients, where
a frozen one costs one, and sends the eigensolver's small matrices to the host.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from scipy.linalg import polar

from dvi.solvers import ccp
from dvi.solvers.critical import CRITICAL, Eigenblock
from dvi.solvers.errors import ConvergenceError
from dvi.solvers.gap import approaching, baumgarte, multiplier, transport
from dvi.solvers.here import Here, Stiffness, critical_frame
from dvi.solvers.interval import Slope, Taken
from dvi.solvers.macro_attempt import ALLOWED, OVERSHOOT, SHARE, Accepted, Attempt, Rejected, growth
from dvi.solvers.protocol import Array, Frame, Linearised, Rate, State, host, like
from dvi.solvers.rkc import rkc, stages
from dvi.solvers.svec import smat, svec
from dvi.solvers.thirds import tempered
from dvi.solvers.watch import AT_EDGE

_SAFE = 2.0  # the rate at the start of a step is not the largest in it
_MOST = 4000.0  # h times the rate, at most: 96 stages
_DAMPING = 5.0  # what is stiff is left with a quarter to 0.4 of itself by a step; with RKC's own 2/13 up to 0.95
_SOON = 40  # block products at a stage; where all is well it takes two to four
_LOOSE = 5.0  # eigenvectors of a stage, in parts of the watch's tolerance
_SHARP = 0.1 * _LOOSE  # … of the evaluations that are compared
_PROBE = 0.01  # how far apart these are, in units of tol: ten times as far the force has saturated
_FOUND = 1.02  # a rate that grows by less from one evaluation to the next is found
_AT_MOST = 6  # evaluations for it
_PULL = 0.5  # of the rate, at which a gap is closed
_HELD_BACK = 3 * AT_EDGE  # by that much below 2 a direction may be kept as it arrives
_LEAST = 0.01  # a step up to which a frozen frame does better
_STAGE = 0.5  # of the gradients of a step with a frozen frame: looser eigenvectors are found in fewer products
_PROBES = 2  # evaluations a step besides the stages


def _needed(here: Here, h: float) -> float:
    """The rate at which a gap must be closed lest directions that arrive within h, or soon after, be held back."""
    if here.approach is None:
        return 0.0
    below = CRITICAL - here.approach.values > _HELD_BACK  # one that is nearer can only be held back by less
    soon = here.approach.arrivals() < h + 1 / baumgarte(h)
    return float(here.approach.rates[below & soon].max(initial=0.0)) / _HELD_BACK


@dataclass
class Followed(Attempt):
    """One try of a macro step that follows its frame; it starts at a look."""

    def __post_init__(self) -> None:
        self._block: Eigenblock = self.here.seen.block
        self._warm: list[ccp.CCPResult | None] = [None]
        assert self.here.stiffness is not None  # or it does not suit
        self._stiffness: Stiffness = self.here.stiffness
        self._gamma = max(baumgarte(self.h), _PULL * self._stiffness.rate, _needed(self.here, self.h))

    @staticmethod
    def suits(here: Here, y: State, h: float) -> bool:
        """Is a step of h from y to be made like this?"""
        if here.stiffness is None or not here.stiffness.lasting or not here.frame.k or y.t != here.seen.t:
            return False
        silent = here.approach is not None and here.approach.none_within(h)
        return not silent and _needed(here, h) < max(baumgarte(h), here.stiffness.rate)

    def run(self) -> Accepted | Rejected:
        """What was reached, or the length of the step to try instead.

        Raises:
            DomainError: if a stage leaves the domain of the loss or of P.
        """
        flow, y, h, tol, here = self.flow, self.y, self.h, self.tol, self.here
        old = here.frame
        start = {"w": y.w, "nu": y.nu, "t": y.t, "z": np.zeros(old.k * (old.k + 1) // 2)}
        try:
            first, self._stiffness = self._begin(start)
            fast = max(self._radius(), _SAFE * self._stiffness.rate)
            if h * fast > _MOST and not self.final:  # with fewer stages it would be unstable
                return Rejected(0.8 * _MOST / fast, stiffness=self._stiffness)
            s = stages(h, min(fast, _MOST / h), _DAMPING)
            raw = rkc(self._stage, start, h, s, first, _DAMPING)
            end = self._repaired(State(raw["w"], raw["nu"], y.t + h))
            raw["nu"] = end.nu
            loss, g = flow.value_and_grad(end)
            guess = torch.cat([self._block.V, here.seen.block.V[:, self._block.size :]], dim=1)
            seen = self.watch.look(flow, end, here.seen, h, guess)
        except ConvergenceError:  # the stages have run away
            return self._again(0.5 * h)
        if seen.eigenvalues[0] > OVERSHOOT and not self.final:
            return self._again(0.5 * h)
        missed = float(seen.eigenvalues[0]) if seen.eigenvalues[0] > OVERSHOOT else 0.0
        new = critical_frame(flow, end, seen, self.watch.critical(seen, h, old.k))
        R = transport(flow, end, new, old)
        mean = R @ (smat(raw["z"]) / h) @ R.T
        self._warm = [None]  # that was in another basis
        lin = flow.linearised(end, g, new)
        X, finish = self._drift(lin)
        error = self._embedded_error(start, raw, first, {"w": finish.w, "nu": finish.nu}, g) / h**SHARE
        if not np.isfinite(error) or (error > ALLOWED * tol and not self.final):
            return self._again(self._retry(error).h)
        found = Here(
            float(loss),
            g,
            seen,
            new,
            slope=tempered(Slope.between(old, here.seen, new, seen), here, R, end.t),
            approach=approaching(flow, lin, seen.rates, 0.5 * h, X) if new.k else None,
            taken=Taken(whole=end.t),
            stiffness=self._kept(s, error),
        )
        return Accepted(end, found, mean, new, Rate(first["w"], first["nu"]), finish, error, missed=missed)

    def _kept(self, s: int, error: float) -> Stiffness | None:
        """With which stiffness to go on after a step of s stages; None if it is not what keeps steps short."""
        grown = growth(self.tol, error)
        pays = self.h > _STAGE * (s + _PROBES) * self._stiffness.held or grown >= 2
        return None if grown < 1 and not pays else self._stiffness.passed(pays)

    def _again(self, h: float) -> Rejected:
        """A shorter step, and more stages for its length; with a frozen frame if that has been tried."""
        return Rejected(h, stiffness=self._stiffness.more() if h > _LEAST else None)

    def _begin(self, start: dict[str, Any]) -> tuple[dict[str, Any], Stiffness]:
        """The right side where the step starts, and the rate there, by the power method from where it was left."""
        first = self._stage(start, _SHARP)
        block, warm, v = self._block, self._warm[0], self._stiffness.direction
        if v is None:
            rate, v = 0.0, self.watch.subspace.fresh(self.y.w, 1)[0][:, 0]
        else:
            rate = self._stiffness.rate / self._stiffness.factor
        largest = 0.0
        for _ in range(_AT_MOST):
            length = _PROBE * self.tol / float(v.norm())
            moved = self._stage({**start, "w": self.y.w + length * v}, _SHARP)
            self._block, self._warm = block, [warm]
            change = (moved["w"] - first["w"]) / length
            before, after = (float(x @ self.flow.precondition(self.y, x[:, None])[:, 0]) for x in (v, change))
            if after <= 0:  # the same everywhere
                break
            known, rate = max(rate, largest), (after / before) ** 0.5
            largest, v = max(largest, rate), change
            if rate < _FOUND * known:
                break
        return first, replace(self._stiffness, rate=largest * self._stiffness.factor, direction=v / v.norm())

    def _stage(self, at: dict[str, Any], sharp: float = _LOOSE) -> dict[str, Any]:
        """The flow's right side where a stage is."""
        state = self._repaired(State(at["w"], at["nu"], at["t"]))
        g = self.flow.gradient(state)
        X, rate = self._drift(self.flow.linearised(state, g, self._frame(state, sharp)))
        return {"w": rate.w, "nu": rate.nu, "t": 1.0, "z": svec(X)}

    def _drift(self, lin: Linearised) -> tuple[Array, Rate]:
        X = multiplier(self.flow, lin, self._gamma, self._warm)
        return X, lin.drift(X)

    def _frame(self, state: State, sharp: float) -> Frame:
        """The critical frame at a stage, turned to be as near as can be to the one at the start."""
        flow, old = self.flow, self.here.frame
        subspace = replace(self.watch.subspace, max_iterations=_SOON, tol=sharp * self.watch.subspace.tol)
        self._block = subspace.follow(flow.effective_hessian(state), self._block, np.inf, least=old.k)
        V, AV = self._block.V[:, : old.k], self._block.AV[:, : old.k]
        turn, _ = polar(host(flow.basis(state, V).T @ flow.precondition(state, old.U))[0])
        return replace(flow.frame(state, V @ like(turn, V), AV @ like(turn, V)), on_edge=True)
