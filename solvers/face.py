"""The flow between breakpoints, as an ordinary differential equation.

While the directions at the edge stay the same, X is a smooth function of the state: the solution of the CCP in the
frame of the k directions held at 2.  What ends such a stretch is an event: the next eigenvalue arrives at 2, or X
changes its rank.  High order needs both located (time-stepping across a breakpoint is of first order at best).

The constraint is held by Baumgarte's term, γ gap + β[X] − α ⪰ 0 ⟂ X: on the exact solution the gap is zero wherever X
is not, so the term changes nothing there, and numerical drift off 2 decays at the rate γ.  γ does not depend on the
step: a γ of order 1/h would make the equation stiff across the constraint, and cost order 4 two of its orders.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from dvi.solvers import ccp
from dvi.solvers.critical import CRITICAL, Eigenblock
from dvi.solvers.protocol import Array, Flow, Frame, Node, Rate, State, host, like, mended
from dvi.solvers.watch import Sighting, Watch, empty_frame, node

#: An eigenvalue this close to 2 is taken as having arrived; events are located more closely than that.
ARRIVED = 1e-7
#: Baumgarte rate, per unit time.
GAMMA = 1.0
#: Eigenvalues this far apart have clear eigenvectors.
CLEAR = 1e-4
#: A direction that no longer oscillates is let go when its eigenvalue is this far below 2 and its eigenvector is clear.
RELEASED = 1e-4


@dataclass(frozen=True)
class Look:
    """The flow evaluated at a state, k directions held.

    Attributes:
        loss, g, seen, X, rate: as in a :class:`~dvi.solvers.protocol.Node`.
        frame: the frame of the held directions.
        held: their eigenvectors [d, k]; ``values``: their eigenvalues [k], descending.
        next_eigenvalue: the largest among the others, the next to arrive.
        modes: the eigenvalues of X − S (each scaled), descending, S = γ gap + β[X] − α: positive ones oscillate, and
            one changes its sign when the rank of X changes.
    """

    loss: float
    g: Tensor
    seen: Sighting
    frame: Frame
    held: Tensor
    values: Array
    next_eigenvalue: float
    X: Array
    modes: Array
    rate: Rate

    @property
    def rank(self) -> int:
        """How many directions oscillate."""
        return int((self.modes > 0).sum())


@dataclass
class Face:
    """Evaluates the flow with k directions held; keeps the eigenvectors to start the next search from.

    Args:
        flow: the flow.
        watch: how eigenpairs are followed; its tolerance bounds the accuracy of X.
        held: eigenvectors [d, k] of the directions held at 2, where the step began.  Elsewhere the same directions
            are found by overlap: behind a breakpoint that a trial step has overrun, they are not the leading ones.
        seen: the last sighting.
        start: where the step began; trial states that leave the domain of P are set back towards it.
    """

    flow: Flow
    watch: Watch
    held: Tensor
    seen: Sighting | None = None
    start: State | None = None

    @property
    def k(self) -> int:
        """How many directions are held."""
        return int(self.held.shape[1])

    def look(self, y: State) -> Look:
        """The flow at y."""
        y = self.mend(y)
        loss, g = self.flow.value_and_grad(y)
        if not self.flow.constrained:
            self.seen = self.watch.glance(self.flow, y, self.seen)
            lin = self.flow.linearised(y, g, frame := empty_frame(self.flow, y))
            none, nothing = np.empty(0), np.zeros((0, 0))
            return Look(float(loss), g, self.seen, frame, self.held, none, -np.inf, nothing, none, lin.drift(None))
        self.seen = self.sight(y)
        block = self.seen.block
        mix, values, following = self._recognise(block)
        held = block.V @ mix
        frame = self.flow.frame(y, held, block.AV @ mix)
        lin = self.flow.linearised(y, g, frame)
        X, modes = np.zeros((0, 0)), np.empty(0)
        if self.k:
            solved = ccp.solve(lin.alpha - GAMMA * lin.gap, lin.beta)
            self.flow.count_ccp()
            X = solved.X
            # X and S share their eigenvectors; scaled to one size, X − S shows both with their signs.
            size = np.linalg.norm(X) or 1.0
            dual = np.linalg.norm(solved.S) or 1.0
            modes = np.linalg.eigvalsh(X / size - solved.S / max(dual, float(np.abs(lin.alpha).max())))[::-1].copy()
            modes[np.abs(modes) < 1e-12] = 0.0
        return Look(float(loss), g, self.seen, frame, held, values, following, X, modes, lin.drift(X))

    def _recognise(self, block: Eigenblock) -> tuple[Tensor, Array, float]:
        """The held directions among the eigenvectors: coefficients [m, k], eigenvalues [k], and the next eigenvalue.

        Close to an arrival the held and the arriving eigenvalue nearly coincide, and their eigenvectors are any
        rotation of each other; the directions then are what the last clear look saw of them.
        """
        (overlap,) = host(block.V.T @ self.held)  # [m, k]
        values = block.eigenvalues
        chosen = sorted(np.argsort(-np.linalg.norm(overlap, axis=1), kind="stable")[: self.k].tolist())
        others = np.delete(np.arange(len(values)), chosen)
        distance = np.abs(values[chosen][:, None] - values[others][None, :])
        if not distance.size or distance.min() > CLEAR:
            mix = np.eye(len(values))[:, chosen]
            self.held = block.V[:, chosen]
            return like(mix, block.V), values[chosen], float(values[others].max(initial=-np.inf))
        near = np.union1d(chosen, others[distance.min(axis=0) <= 10 * CLEAR])
        left, _, right = np.linalg.svd(overlap[near], full_matrices=True)
        k = self.k
        inside, beside = left[:, :k] @ right[:k], left[:, k:]
        mix = np.zeros((len(values), k))
        mix[near] = inside
        rest = np.append(np.linalg.eigvalsh(beside.T @ (values[near][:, None] * beside)), np.delete(values, near))
        held_values = np.sort(np.linalg.eigvalsh(inside.T @ (values[near][:, None] * inside)))[::-1].copy()
        return like(mix, block.V), held_values, float(rest.max(initial=-np.inf))

    def mend(self, y: State) -> State:
        """A trial state, set back into the domain of P where it has left it."""
        return y if self.start is None else mended(self.flow, y, self.start)

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

    def arrived(self, y: State) -> Tensor:
        """Eigenvectors of all eigenvalues at 2 or above: what is to be held from here on, at a start or an arrival."""
        self.seen = self.sight(y)
        return self.seen.block.V[:, : int((self.seen.eigenvalues >= CRITICAL - ARRIVED).sum())]

    def kept(self, look: Look) -> Tensor:
        """Eigenvectors of what is to be held from here on: directions that have clearly left are let go."""
        k = self.k
        while k > look.rank and CRITICAL - look.values[k - 1] > RELEASED:
            k -= 1
        return look.held[:, :k]

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


def node_of(flow: Flow, look: Look, t: float) -> Node:
    """What a run records of a look."""
    return node(flow, t, look.loss, look.g, look.seen, look.frame, look.X, t, look.rate)
