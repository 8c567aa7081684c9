"""A macro step whose stages follow the critical frame, for forces that pull back fast.

Where w is pushed by the oscillation along several directions at once that pull it back at ten or a hundred per unit
time, what a frozen frame is wrong by, and is made up for at the end of a step, overshoots at any step worth the name.
But such a flow is no more than mildly stiff *if its right side is what it is where each stage is*: eigenvectors, gap,
and T along the axes of X, that is the force itself.  Then more stages damp what is stiff (a rate of 60 over a step of
one unit takes 10), and nothing is left to make up for: the gap is closed by Baumgarte's term alone.

A stage costs a block product or two with the Hessian and a contraction for each axis of the oscillation, some tens of
gradients, where a frozen one costs one, and sends the eigensolver's small matrices to the host.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from scipy.linalg import polar
from torch import Tensor

from dvi.solvers import ccp
from dvi.solvers.critical import Eigenblock
from dvi.solvers.errors import ConvergenceError
from dvi.solvers.gap import approaching, baumgarte, closing, coupled, multiplier, oscillating, transport
from dvi.solvers.here import Here, critical_frame
from dvi.solvers.interval import Slope, Taken, ahead
from dvi.solvers.macro_attempt import ALLOWED, OVERSHOOT, SHARE, Accepted, Attempt, Rejected
from dvi.solvers.protocol import Array, Frame, Linearised, Rate, State, host, like
from dvi.solvers.rkc import rkc, stages
from dvi.solvers.svec import smat, svec
from dvi.solvers.thirds import nearest, tempered

_SAFE = 1.2  # a secant sees a little less than the spectral radius
_MOST = 100.0  # h times the rate, at most: more stages would not help
_SOON = 20  # block products at a stage; where all is well it takes one to three
_LEAST = 0.01  # a step up to which a frozen frame does better
_GENTLE = 1.0  # h times the rate up to which a frozen frame will do


@dataclass
class Followed(Attempt):
    """One try of a macro step that follows its frame; it starts at a look."""

    def __post_init__(self) -> None:
        self._block: Eigenblock = self.here.seen.block
        self._X = np.zeros((self.here.frame.k, self.here.frame.k))  # of the last evaluation
        self._warm: list[ccp.CCPResult | None] = [None]

    @staticmethod
    def suits(here: Here, y: State, h: float) -> bool:
        """Is a step of h from y to be made like this?"""
        silent = here.approach is not None and here.approach.none_within(h)
        return (
            here.stiffness is not None
            and here.stiffness.lasting
            and here.frame.k > 0
            and y.t == here.seen.t
            and not silent
        )

    def run(self) -> Accepted | Rejected:
        """What was reached, or the length of the step to try instead.

        Raises:
            DomainError: if a stage leaves the domain of the loss or of P.
        """
        flow, y, h, tol, here = self.flow, self.y, self.h, self.tol, self.here
        assert here.stiffness is not None  # or it does not suit
        old = here.frame
        X, begin = self._drift(flow.linearised(y, here.g, old))
        s = stages(h, max(self._radius(), min(_SAFE * here.stiffness.rate, _MOST / h)))
        still = np.zeros(len(svec(X)))
        start = {"w": y.w, "nu": y.nu, "t": y.t, "z": still, "M": still}
        bent = host((old.T @ begin.w)[None])[0][0]
        first = {"w": begin.w, "nu": begin.nu, "t": 1.0, "z": svec(X), "M": bent}
        try:
            raw = rkc(self._stage, start, h, s, first)
        except ConvergenceError:  # the stages have run away
            return self._again(0.5 * h)
        end = self._repaired(State(raw["w"], raw["nu"], y.t + h))
        raw["nu"] = end.nu

        loss, g = flow.value_and_grad(end)
        guess = torch.cat([self._block.V, here.seen.block.V[:, self._block.size :]], dim=1)
        seen = self.watch.look(flow, end, here.seen, h, guess, here.coupling)
        if seen.eigenvalues[0] > OVERSHOOT and not self.final:
            return self._again(0.5 * h)
        missed = float(seen.eigenvalues[0]) if seen.eigenvalues[0] > OVERSHOOT else 0.0
        new = critical_frame(flow, end, seen, self.watch.critical(seen, h, old.k, here.coupling))
        R = transport(flow, end, new, old)
        mean = R @ (smat(raw["z"]) / h) @ R.T
        X, self._warm = self._X, [None]
        lin = flow.linearised(end, g, new)
        _, finish = self._drift(lin)
        last = {"w": finish.w, "nu": finish.nu}
        error = (
            max(self._embedded_error(start, raw, first, last, g), self._slip(end, g, lin, R, X, raw["M"])) / h**SHARE
        )
        if not np.isfinite(error) or (error > ALLOWED * tol and not self.final):
            return self._again(self._retry(error).h)
        stiffness = here.stiffness.after(error / tol)
        approach = approaching(flow, lin, seen.rates, 0.5 * h) if new.k else None
        found = Here(
            float(loss),
            g,
            seen,
            new,
            slope=tempered(Slope.between(old, here.seen, new, seen), here, R, end.t),
            approach=approach,
            coupling=coupled(lin, mean, max(h, 1.0)) if new.k else here.coupling,
            taken=Taken(whole=end.t),
            stiffness=stiffness if h * stiffness.rate > _GENTLE and h > _LEAST else None,
        )
        return Accepted(end, found, mean, new, begin, finish, error, missed=missed)

    def _again(self, h: float) -> Rejected:
        """A shorter step, and more stages for its length; with a frozen frame if that has been tried."""
        assert self.here.stiffness is not None
        return Rejected(h, stiffness=self.here.stiffness.after(np.inf) if h > _LEAST else None)

    def _stage(self, at: dict[str, Any]) -> dict[str, Any]:
        """The flow's right side where a stage is."""
        flow = self.flow
        state = self._repaired(State(at["w"], at["nu"], at["t"]))
        g = flow.gradient(state)
        frame = self._frame(state, at["M"])
        X, rate = self._drift(flow.linearised(state, g, frame))
        return {"w": rate.w, "nu": rate.nu, "t": 1.0, "z": svec(X), "M": host((frame.T @ rate.w)[None])[0][0]}

    def _drift(self, lin: Linearised) -> tuple[Array, Rate]:
        self._X = multiplier(self.flow, lin, baumgarte(self.h), self._warm)
        return self._X, lin.drift(self._X)

    def _frame(self, state: State, bent: Array) -> Frame:
        """The critical frame at a stage: T as it is there along the axes of X, M = UᵀHU changed by ``bent`` [n]."""
        flow, old = self.flow, self.here.frame
        subspace = replace(self.watch.subspace, max_iterations=_SOON)
        self._block = subspace.follow(flow.effective_hessian(state), self._block, np.inf, least=old.k)
        U = flow.basis(state, self._block.V[:, : old.k])
        T, axes = ahead(old, self.here.slope, state.t - self.y.t).T, oscillating(self._X)
        if axes.shape[1]:
            turn, _ = polar(host(U.T @ flow.precondition(state, old.U))[0])
            T = nearest(T, axes, flow.third_derivatives(state, U @ like(turn @ axes, U), squares=True))
        return replace(old, w=state.w, M=old.M + smat(bent), T=T)

    def _slip(self, end: State, g: Tensor, lin: Linearised, R: Array, X: Array, bent: Array) -> float:
        """How far w is from where the gap, of what oscillates, is as the stages had it."""
        axes = oscillating(R @ X @ R.T)
        if not axes.shape[1]:
            return 0.0
        old = self.here.frame
        (G,) = host(2 * old.U.T @ self.flow.precondition(end, old.U))
        opened = lin.gap - R @ (G - old.M - smat(bent)) @ R.T
        return self._worth(end, g, lin.kick(closing(lin, opened, axes)).parts, self.h)
