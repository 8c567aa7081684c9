"""The flow between breakpoints, as an ordinary differential equation.

While the directions at the edge stay the same, X is a smooth function of the state: the solution of the CCP in the
frame of the k directions held at 2.  What ends such a stretch is an event: the next eigenvalue arrives at 2, or X
changes its rank.  High order needs both located (time-stepping across a breakpoint is of first order at best).

The constraint is held by Baumgarte's term, γ gap + β[X] − α ⪰ 0 ⟂ X: on the exact solution the gap is zero wherever X
is not, so the term changes nothing there, and numerical drift off 2 decays at the rate γ.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from dvi.solvers import ccp
from dvi.solvers.critical import CRITICAL
from dvi.solvers.protocol import Array, Flow, Frame, Node, Rate, State
from dvi.solvers.watch import Sighting, Watch, empty_frame

#: An eigenvalue this close to 2 is taken as having arrived; events are located more closely than that.
ARRIVED = 1e-7
#: A direction that no longer oscillates is let go when its eigenvalue is this far below 2 and its eigenvector is clear.
RELEASED = 1e-4


@dataclass(frozen=True)
class Look:
    """The flow evaluated at a state, k directions held.

    Attributes:
        gaps: signs that tell events, positive on the present stretch: (2 − λ_{k+1}, and the eigenvalues of X − S that
            would change sign with the rank of X; S = γ gap + β[X] − α).
    """

    loss: float
    g: Tensor
    seen: Sighting
    frame: Frame
    X: Array
    modes: Array
    rate: Rate

    @property
    def rank(self) -> int:
        """How many directions oscillate."""
        return int((self.modes > 0).sum())

    @property
    def next_eigenvalue(self) -> float:
        """λ_{k+1}, the next to arrive."""
        values = self.seen.eigenvalues
        return float(values[self.frame.k]) if len(values) > self.frame.k else -np.inf


@dataclass
class Face:
    """Evaluates the flow with k directions held; keeps the eigenvectors to start the next search from.

    Args:
        flow: the flow.
        watch: how eigenpairs are followed; its tolerance bounds the accuracy of X.
        k: directions held at 2.
        gamma: Baumgarte rate, per unit time.
        seen: the last sighting.
    """

    flow: Flow
    watch: Watch
    k: int
    gamma: float
    seen: Sighting | None = None

    def look(self, y: State) -> Look:
        """The flow at y."""
        loss, g = self.flow.value_and_grad(y)
        if not self.flow.constrained:
            self.seen = self.watch.glance(self.flow, y, self.seen)
            lin = self.flow.linearised(y, g, frame := empty_frame(self.flow, y))
            nothing = np.zeros((0, 0))
            return Look(float(loss), g, self.seen, frame, nothing, np.empty(0), lin.drift(None))
        self.seen = self.sight(y)
        block = self.seen.block
        frame = self.flow.frame(y, block.V[:, : self.k], block.AV[:, : self.k])
        lin = self.flow.linearised(y, g, frame)
        X, modes = np.zeros((0, 0)), np.empty(0)
        if self.k:
            solved = ccp.solve(lin.alpha - self.gamma * lin.gap, lin.beta)
            self.flow.count_ccp()
            X = solved.X
            # X and S share their eigenvectors; scaled to one size, X − S shows both with their signs.
            size = np.linalg.norm(X) or 1.0
            dual = np.linalg.norm(solved.S) or 1.0
            modes = np.linalg.eigvalsh(X / size - solved.S / max(dual, float(np.abs(lin.alpha).max())))[::-1].copy()
            modes[np.abs(modes) < 1e-12] = 0.0
        return Look(float(loss), g, self.seen, frame, X, modes, lin.drift(X))

    def sight(self, y: State) -> Sighting:
        """The k held eigenpairs and the next, all of them sharp."""
        want = CRITICAL - 0.5
        if self.seen is not None and len(self.seen.eigenvalues) > self.k:
            want = min(want, float(self.seen.eigenvalues[self.k]) - 1e-3)
        A = self.flow.effective_hessian(y)
        subspace = self.watch.subspace
        if self.seen is None:
            block = subspace.start(A, y.w, want)
            return Sighting(block, np.zeros(block.size), y.t, y.t)
        block = subspace.follow(A, self.seen.block, want)
        surveyed = self.seen.surveyed
        if y.t - surveyed >= self.watch.survey_every:
            block, surveyed = subspace.survey(A, block, want), y.t
        return Sighting(block, np.zeros(block.size), y.t, surveyed)

    def arrived(self, y: State) -> int:
        """How many eigenvalues are at 2 or above."""
        self.seen = self.sight(y)
        return int((self.seen.eigenvalues >= CRITICAL - ARRIVED).sum())

    def released(self, look: Look) -> int:
        """How many directions to hold from here on: those that have clearly left are let go."""
        k = self.k
        while k > look.rank and CRITICAL - look.seen.eigenvalues[k - 1] > RELEASED:
            k -= 1
        return k

    def with_k(self, k: int) -> Face:
        """The same with k directions held."""
        return replace(self, k=k)

    def event(self, before: Look, after: Look) -> bool:
        """Did a breakpoint pass between two looks?"""
        if after.next_eigenvalue > CRITICAL + ARRIVED:
            return True
        return before.rank != after.rank

    def sign(self, before: Look, now: Look) -> float:
        """A continuous function of the state that is positive until the first breakpoint after ``before``."""
        signs = [CRITICAL - now.next_eigenvalue]
        r = before.rank
        if r:
            signs.append(float(now.modes[r - 1]))  # loses the weakest oscillation
        if r < self.k:
            signs.append(-float(now.modes[r]))  # gains one among those held
        return min(signs)


def node_of(look: Look, t: float, constrained: bool = True) -> Node:
    """What a run records of a look."""
    return Node(
        t=t,
        loss=look.loss,
        grad_sq=float(look.g @ look.g),
        eigenvalues=look.seen.eigenvalues if constrained else look.seen.eigenvalues[:1],
        U=look.frame.U,
        HU=look.frame.HU,
        X=look.X,
        X_time=t,
        g=look.g,
        rate=look.rate,
    )
