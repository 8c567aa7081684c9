"""The flow between breakpoints, as an ordinary differential equation.

While the directions at the edge stay the same, X is a smooth function of the state: it solves the CCP in the frame of
the k directions held at 2.  Such a stretch ends with an event: the next eigenvalue arrives at 2, or X changes its rank.
High order needs both events located, because steps across a breakpoint are of first order at best.

Baumgarte's term holds the constraint: γ gap + β[X] − α ⪰ 0 ⟂ X.  On the exact solution the gap is zero wherever X is
not, so the term changes nothing there.  Numerical drift off 2 decays at the rate γ.  γ does not depend on the step:
with γ of order 1/h the equation would be stiff across the constraint, and a method of order 4 would lose two orders.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from dvi.solvers import ccp
from dvi.solvers.eigen.block_method import CRITICAL, Eigenblock
from dvi.solvers.eigen.tracker import EigenTracker, SpectrumEstimate
from dvi.solvers.nodes import empty_frame, node
from dvi.solvers.protocol import Array, ConstrainedFlow, Frame, Node, Rate, State, host, like
from dvi.solvers.repair import Repair

#: An eigenvalue this close to 2 counts as having arrived, unless another distance is asked for.
ARRIVED = 1e-7
#: Baumgarte rate, per unit time.
GAMMA = 1.0
#: Eigenvalues this far apart have clear eigenvectors.
CLEAR = 1e-4
#: A direction that no longer oscillates is released when its eigenvalue is this far below 2 and its eigenvector is
#: clear.
RELEASED = 1e-4
#: Eigenvalues above this may arrive in a landing.
BAND = 0.05


@dataclass(frozen=True)
class Look:
    """The flow evaluated at a state, with k directions held.

    Attributes:
        loss, g, seen, X, rate: as in a :class:`~dvi.solvers.protocol.Node`.
        frame: the frame of the held directions.
        held: their eigenvectors [d, k]; ``values``: their eigenvalues [k], descending.
        next_eigenvalue: the largest of the others, the next to arrive.
        modes: the eigenvalues of X − S (each scaled), descending, with S = γ gap + β[X] − α.  Positive ones oscillate;
            one changes its sign when the rank of X changes.
        weakest: ‖½P⁻¹T[x vvᵀ]‖, the push on w (per unit time) of the weakest oscillation, along v with variance x.
    """

    loss: float
    g: Tensor
    seen: SpectrumEstimate
    frame: Frame
    held: Tensor
    values: Array
    next_eigenvalue: float
    X: Array
    modes: Array
    rate: Rate
    weakest: float = 0.0

    @property
    def rank(self) -> int:
        """How many directions oscillate."""
        return int((self.modes > 0).sum())


@dataclass
class Face:
    """Evaluates the flow with k directions held; keeps the eigenvectors to start the next search from.

    Args:
        flow: the flow.
        watch: the tracker of eigenpairs; its tolerance bounds the accuracy of X.
        held: eigenvectors [d, k] of the directions held at 2, at the start of the step.  At other states the same
            directions are found by overlap with these, not with the last ones found.  After a breakpoint that a trial
            step has overrun they are not the leading ones, and the result must not depend on the order of evaluations.
        seen: the last eigenpairs.
        repair: moves trial states that leave the domain of P back towards the start of the step.
        near: an eigenvalue this close to 2 has arrived.
    """

    flow: ConstrainedFlow
    watch: EigenTracker
    held: Tensor
    seen: SpectrumEstimate | None = None
    repair: Repair | None = None
    near: float = ARRIVED

    @property
    def k(self) -> int:
        """How many directions are held."""
        return int(self.held.shape[1])

    def look(self, y: State) -> Look:
        """The flow at y."""
        y = self.mend(y)
        loss, g = self.flow.value_and_grad(y)
        if not self.flow.constrained:
            self.seen = self.watch.update_leading(self.flow, y, self.seen)
            lin = self.flow.linearised(y, g, frame := empty_frame(self.flow, y))
            none, nothing = np.empty(0), np.zeros((0, 0))
            return Look(float(loss), g, self.seen, frame, self.held, none, -np.inf, nothing, none, lin.drift(None))
        self.seen = self.sight(y)
        block = self.seen.block
        mix, values, beside = self._recognise(block)
        following = float(beside.max(initial=-np.inf))
        held = block.V @ mix
        frame = self.flow.frame(y, held, block.AV @ mix)
        lin = self.flow.linearised(y, g, frame)
        X, modes, weakest = np.zeros((0, 0)), np.empty(0), 0.0
        if self.k:
            solved = ccp.solve(lin.alpha - GAMMA * lin.gap, lin.beta)
            self.flow.count_ccp()
            X = solved.X
            # X and S share their eigenvectors; scaled to one size, X − S shows both with their signs.
            size = np.linalg.norm(X) or 1.0
            dual = np.linalg.norm(solved.S) or 1.0
            modes = np.linalg.eigvalsh(X / size - solved.S / max(dual, float(np.abs(lin.alpha).max())))[::-1].copy()
            modes[np.abs(modes) < 1e-12] = 0.0
            if rank := int((modes > 0).sum()):
                variances, axes = np.linalg.eigh(X)
                v = axes[:, -rank]
                weakest = float(lin.kick(variances[-rank] * np.outer(v, v)).w.norm())
        rate = lin.drift(X)
        return Look(float(loss), g, self.seen, frame, held, values, following, X, modes, rate, weakest)

    def _recognise(self, block: Eigenblock) -> tuple[Tensor, Array, Array]:
        """The held directions among the eigenvectors: coefficients [m, k], eigenvalues [k], and those of the others.

        Close to an arrival the held and the arriving eigenvalue nearly coincide, and their eigenvectors are any
        rotation of each other.  Then the directions are those of the last evaluation at which they were distinct.
        """
        (overlap,) = host(block.V.T @ self.held)  # [m, k]
        values = block.eigenvalues
        chosen = sorted(np.argsort(-np.linalg.norm(overlap, axis=1), kind="stable")[: self.k].tolist())
        others = np.delete(np.arange(len(values)), chosen)
        distance = np.abs(values[chosen][:, None] - values[others][None, :])
        if not distance.size or distance.min() > CLEAR:
            mix = np.eye(len(values))[:, chosen]
            return like(mix, block.V), values[chosen], values[others]
        near = np.union1d(chosen, others[distance.min(axis=0) <= 10 * CLEAR])
        left, _, right = np.linalg.svd(overlap[near], full_matrices=True)
        k = self.k
        inside, beside = left[:, :k] @ right[:k], left[:, k:]
        mix = np.zeros((len(values), k))
        mix[near] = inside
        rest = np.append(np.linalg.eigvalsh(beside.T @ (values[near][:, None] * beside)), np.delete(values, near))
        held_values = np.sort(np.linalg.eigvalsh(inside.T @ (values[near][:, None] * inside)))[::-1].copy()
        return like(mix, block.V), held_values, rest

    def mend(self, y: State) -> State:
        """A trial state; if it has left the domain of P, it is moved back inside."""
        return y if self.repair is None else self.repair(y)

    def sight(self, y: State, down_to: float | None = None) -> SpectrumEstimate:
        """The eigenpairs at y: the held ones accurate, the next one as accurate as its distance from 2 requires.

        Args:
            y: the state.
            down_to: all eigenpairs above this are accurate.
        """
        A = self.flow.effective_hessian(y)
        subspace, seen = self.watch.subspace, self.seen
        if seen is None:
            block = subspace.start(A, y.w, CRITICAL - 0.5)
            return SpectrumEstimate(block, np.zeros(block.size), y.t, y.t)
        want, tol = self._sharpness(seen.eigenvalues) if down_to is None else (down_to, subspace.tol)
        block = subspace.follow(A, seen.block, want, tol)
        if (block.eigenvalues > want).sum() < self.k:  # a held one is falling faster than expected
            want = float(block.eigenvalues[: self.k].min()) - 0.2 * BAND
            block = subspace.follow(A, block, want, tol)
        surveyed = seen.surveyed
        if y.t - surveyed >= self.watch.survey_every:
            block, surveyed = subspace.survey(A, block, want, tol), y.t
        return SpectrumEstimate(block, np.zeros(block.size), y.t, surveyed)

    def _sharpness(self, values: Array) -> tuple[float, float]:
        """The eigenvalue above which eigenpairs must be accurate, and their residual.

        X depends on the held eigenvectors to first order and does not depend on the next one.  The next one must be
        known before it arrives, and be accurate when it arrives.
        """
        sharp = self.watch.subspace.tol
        following = float(values[self.k]) if len(values) > self.k else -np.inf
        if not self.k:
            return 0.5 * (CRITICAL + following), max(sharp, min(0.2, 0.15 * (CRITICAL - following)))
        if CRITICAL - following < BAND:
            return following - 0.2 * BAND, sharp
        return 0.5 * (min(CRITICAL, float(values[self.k - 1])) + max(following, 0.0)), sharp

    def next_value(self, y: State) -> float:
        """The next eigenvalue at y alone, accurate: all that the search for an arrival needs, for a few products."""
        y = self.mend(y)
        reach = CRITICAL - BAND if self.seen is None else float(self.seen.eigenvalues[: self.k + 1].min()) - 0.2 * BAND
        self.seen = self.sight(y, reach)
        return float(self._recognise(self.seen.block)[2].max(initial=-np.inf))

    def arrived(self, y: State) -> Tensor:
        """Eigenvectors to hold from here on: those held already, and those that have arrived at 2.

        They are counted, and that many leading eigenvectors are returned.  A held eigenvalue may have drifted off 2 by
        the error of the steps, further than a located arrival is from 2, but it must not be released.
        """
        self.seen = self.sight(y, CRITICAL - BAND)
        beside = self._recognise(self.seen.block)[2]
        return self.seen.block.V[:, : self.k + int((beside >= CRITICAL - self.near).sum())]

    def land(self, y: State, g: Tensor, h: float) -> tuple[State, Tensor]:
        """A step of h by linearised complementarity on all directions near 2; the end, and the directions at 2 there.

            X ⪰ 0   ⟂   gap + h (β[X] − α) ⪰ 0

        Args:
            y: the state, in the domain of P.
            g: the gradient there [d].
            h: unit times; the error is O(h²).
        """
        self.seen = self.sight(y, CRITICAL - BAND)
        block = self.seen.block
        m = max(self.k, int((block.eigenvalues >= CRITICAL - BAND).sum()))
        frame = self.flow.frame(y, block.V[:, :m], block.AV[:, :m])
        lin = self.flow.linearised(y, g, frame)
        solved = ccp.solve(lin.alpha - lin.gap / h, lin.beta)
        self.flow.count_ccp()
        end = self.mend(y.moved(lin.drift(solved.X), h))
        self.seen = self.sight(end, CRITICAL - BAND)
        closed = np.linalg.eigvalsh(solved.S) * h <= self.near  # the gap at the end, to first order
        at_edge = max(int(closed.sum()), int((self.seen.eigenvalues >= CRITICAL - self.near).sum()))
        return end, self.seen.block.V[:, :at_edge]

    def kept(self, look: Look) -> Tensor:
        """Eigenvectors to hold from here on: directions that have clearly left are released."""
        k = self.k
        while k > look.rank and CRITICAL - look.values[k - 1] > RELEASED:
            k -= 1
        return look.held[:, :k]

    def passed(self, after: Look) -> bool:
        """True if an eigenvalue passed 2."""
        return after.next_eigenvalue > CRITICAL + self.near

    def kink(self, before: Look, after: Look, h: float) -> float:
        """Upper bound for the error in w of a step of h that ignores a change of the rank of X within the step.

        X is continuous there but has a kink.  An embedded error estimate may miss a kink near an end of the step.
        Suppose the oscillation that ends (or begins) falls linearly to 0 within a fraction s of the step.  A step of
        order 4 integrates it by Simpson's rule, whose error is at most (1 − s)/4 of height times h.  A step of order 2
        uses the trapezoid rule, whose error is at most (1 − s)/2 of it.
        """
        r = max(before.rank, after.rank)
        if abs(before.rank - after.rank) != 1:
            return np.inf if before.rank != after.rank else 0.0
        on, off = (before, after) if before.rank == r else (after, before)
        a, b = float(on.modes[r - 1]), float(-off.modes[r - 1])
        return 0.5 * h * b / (a + b) * on.weakest

    def event(self, before: Look, after: Look) -> bool:
        """True if there was a breakpoint between two evaluations."""
        return self.passed(after) or before.rank != after.rank

    def sign(self, before: Look, now: Look) -> float:
        """A continuous function of the state that is positive until the first breakpoint after ``before``."""
        signs = [CRITICAL - now.next_eigenvalue]
        r = before.rank
        if r:
            signs.append(float(now.modes[r - 1]))  # loses the weakest oscillation
        if r < self.k:
            signs.append(-float(now.modes[r]))  # gains one among those held
        return min(signs)


def node_of(flow: ConstrainedFlow, look: Look, t: float) -> Node:
    """The node of an evaluation."""
    return node(flow, t, look.loss, look.g, look.seen, look.frame, look.X, t, look.rate)
