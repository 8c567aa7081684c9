"""One step of the flow with noise: the optimizer's own step with the force of the oscillation, and that of X."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from dvi.compiler.decay import entrywise
from dvi.noise.companion import Companion, remembered
from dvi.noise.epochs import Epoch, curvature, in_epoch
from dvi.noise.flow import Look, NoisyFlow
from dvi.noise.path import Path
from dvi.solvers.eigen.block_method import CriticalSubspace, Eigenblock
from dvi.solvers.errors import StepError
from dvi.solvers.integrator import IntegratorBase
from dvi.solvers.protocol import Array, Flow, Node, Rate, State, StepResult, host

#: The results of single pairs are averaged over at least this many steps, whatever the window.
_FEW = 10.0
#: Share of the newest value in the curvature outside the block; each value comes from a few random vectors only.
_RENEWED = 0.2
_REMEDY = "take larger batches or a smaller lr"


class ChaosError(StepError):
    """The oscillation is too large for the terms that the flow keeps, because the runs are chaotic."""


@dataclass(frozen=True)
class NoisyNode(Node):
    """What was measured at one moment.  The attributes here belong to flows with noise only.

    Attributes:
        rest: the averaged loss, less L + ½⟨H, Σ⟩.
        noise: tr N.  On average, the squared norm of a mini-batch's gradient exceeds that of the gradient by it.
        D, HD: the paths outside the block [d, m], and the part of H times them outside it; None without paths.
        taylor: the next Taylor term of the averaged loss divided by the one that is kept, averaged over the window.
        radius: the spectral radius of the map of X; NaN if it was not computed.
        outside: the share of a step's noise that falls outside the block; NaN if it was not computed.
        lowest: the smallest effective eigenvalue in the block.
    """

    rest: float = 0.0
    noise: float = 0.0
    D: Tensor | None = None
    HD: Tensor | None = None
    taylor: float = np.nan
    radius: float = np.nan
    outside: float = np.nan
    lowest: float = np.nan

    @property
    def oscillation(self) -> tuple[Tensor, Array]:
        """The block and the paths [d, k + m], and their covariance: X for the block and 1/m for each of the m paths."""
        if self.D is None:
            return self.U, self.X
        k, m = self.k, self.D.shape[1]
        X = np.zeros((k + m, k + m))
        X[:k, :k], X[range(k, k + m), range(k, k + m)] = self.X, 1 / m
        return torch.cat([self.U, self.D], dim=1), X


@dataclass(frozen=True)
class Block:
    """The directions in which the oscillation is followed by its covariance.

    Attributes:
        found: the eigenpairs of the last search; the leading ones span the block.
        U: the block [d, k], with UᵀP̃U = I at the time of the search.
        HU, M: H times the block [d, k], and UᵀHU [k, k]; both are updated along the pairs.
        t: the time of the search.
        sought: the number of eigenpairs that the next search begins with.
    """

    found: Eigenblock
    U: Tensor
    HU: Tensor
    M: Array
    t: float
    sought: int


@dataclass(frozen=True)
class NoisyMemory:
    """What a step passes to the next.

    Attributes:
        block: the directions.
        Z: covariance of x and of the memories of the filter and the epoch, in the block.
        path: the deviations outside the block; None with ``pairs="all"``.
        look: what was measured at the present state.
        risen, sloped: averages over the window of the attributes of :class:`Look` with these names.
        began: the time at which the run began, in unit times.
        epoch: how the batches of an epoch depend on one another; None if batches are independent.
        drift: what epochs add to the average gradient [d]; None if batches are independent.
        curved: the effective eigenvalue outside the block, if batches come in epochs.
        checked: the time at which ``radius`` and ``outside`` were last computed.
        radius, outside: see :class:`NoisyNode`.
    """

    block: Block
    Z: Array
    path: Path | None
    look: Look
    risen: float
    sloped: float
    began: float
    epoch: Epoch | None = None
    drift: Tensor | None = None
    curved: float = 0.0
    checked: float = field(default=-np.inf)
    radius: float = field(default=np.nan)
    outside: float = field(default=np.nan)

    @property
    def kept(self) -> float:
        """The rise of the loss to second order, estimated from below.

        Along a pair the loss rises by as² + bs⁴.  At the ends, s = 1, it has risen by a + b, and ½δ·∇L is a + 2b.  So a
        is 2·risen − sloped.  If the loss levels off, this polynomial does not describe it, and the smaller ``sloped``
        is taken.
        """
        return min(2 * self.risen - self.sloped, self.sloped)

    def taylor(self, window: float, t: float) -> float:
        """The next Taylor term of the averaged loss over the one that is kept; NaN until the averages are filled."""
        if t < self.began + max(window, _FEW) - 1e-9 or self.risen == self.sloped == 0:
            return np.nan
        return abs(self.sloped - self.risen) / self.kept if self.kept > 0 else np.inf


@dataclass(frozen=True)
class NoisyStep(IntegratorBase):
    """The integrator of :class:`dvi.NoisyFlow` only.  It takes whole steps, and the flow has its settings."""

    def accepts(self, flow: Flow) -> str:
        """Why it cannot drive the flow; "" for the flow with noise, which is the only one it drives."""
        return "" if isinstance(flow, NoisyFlow) else "NoisyStep drives dvi.noisy_flow only: leave integrator out."

    @property
    def fixed_steps(self) -> bool:
        """True: every step is one step of the optimizer."""
        return True

    def horizon(self, memory: NoisyMemory) -> float:
        """1: a step is a whole step of the optimizer, wherever the run ends."""
        return 1.0

    def restart(self, flow: Flow, memory: NoisyMemory, y: State) -> NoisyMemory:
        """The same memory: a jump of a schedule changes P only, and the next step uses the new P."""
        return memory

    def init(self, flow: Flow, y: State) -> NoisyMemory:
        """The memory at the start, with X = 0, because all runs start from one point."""
        flow = cast(NoisyFlow, flow)
        block = search(flow, y, None)
        k = len(block.M)
        size = _copies(flow, y) * k
        pairs = flow.sampling.pairs
        path = None if pairs == "all" else Path.start(flow, y, pairs)
        epoch = self._epoch(flow, block, y, 0.0)
        look = flow.look(y, block.U, block.HU, block.M, np.zeros((k, k)), path, epoch)  # no pair is tried
        memory = NoisyMemory(block, np.zeros((size, size)), path, look, 0.0, 0.0, y.t, epoch)
        return self._drifting(flow, memory, y)

    def step(self, flow: Flow, memory: NoisyMemory, y: State, h: float) -> StepResult:
        """One step of the optimizer.

        Raises:
            ChaosError: if the oscillation is too large for the terms that the flow keeps.
            StepError: if less than a whole step is requested.
        """
        if h < 1 - 1e-6:
            raise StepError("The flow with noise takes whole steps only: make steps a whole number.")
        flow = cast(NoisyFlow, flow)
        memory = self._trusted(flow, memory, y)
        self._refuse_chaos(flow, memory, y)
        block, look = memory.block, memory.look
        node = self._node(flow, memory, y)
        velocity, filtered = _stride(flow, memory, y)
        w = y.w + velocity
        Z = memory.Z
        if len(block.M):
            map, share = _map(flow, block, y), 1.0
            if flow.parts > 1:
                map, share = in_epoch(map, round(y.t - memory.began) % flow.parts, flow.parts)
            Z = map.step(Z, share * look.N)
            if not np.isfinite(Z).all():
                raise ChaosError(f"After t = {y.t:g} the oscillation has grown without bound: {_REMEDY}")
        after = State(w, y.nu, y.t + 1, filtered)
        moved = after.t >= block.t + flow.sampling.every - 1e-9
        epoch = memory.epoch
        if moved:
            block, Z = self._moved(flow, after, block, Z)
            epoch = self._epoch(flow, block, after, memory.curved)
        k, path = len(block.M), memory.path
        if path is not None and look.outer is not None and look.kicks is not None:
            path = path.step(flow, y, look.outer + look.kicks, flow.sampling.window)
            path = path.outside(block.U, flow.precondition(after, block.U))
        seen = flow.look(after, block.U, block.HU, block.M, Z[:k, :k], path, epoch)
        after = replace(after, nu=flow.updated(after, seen))
        block = replace(block, HU=seen.HU, M=seen.M)
        part = 1 / max(flow.sampling.window, _FEW)
        following = replace(
            memory,
            block=block,
            Z=Z,
            path=path,
            epoch=epoch,
            look=seen,
            risen=(1 - part) * memory.risen + part * seen.risen,
            sloped=(1 - part) * memory.sloped + part * seen.sloped,
        )
        if moved:
            following = self._drifting(flow, following, after)

        def inside(t: float) -> State:
            s = min(max(t - y.t, 0.0), 1.0)
            return y if s == 0 else after if s == 1 else State(y.w + s * (w - y.w), y.nu, t)

        return StepResult(after, following, node, inside)

    def observe(self, flow: Flow, memory: NoisyMemory, y: State) -> Node:
        """The node at y, with which the next step would begin."""
        flow = cast(NoisyFlow, flow)
        return self._node(flow, self._trusted(flow, memory, y), y)

    # ---- inside ----------------------------------------------------------------------------------------

    def _node(self, flow: NoisyFlow, memory: NoisyMemory, y: State) -> NoisyNode:
        block, look = memory.block, memory.look
        k = len(block.M)
        return NoisyNode(
            t=y.t,
            loss=look.loss,
            grad_sq=float(look.g @ look.g),
            eigenvalues=block.found.eigenvalues,
            U=block.U,
            HU=block.HU,
            X=memory.Z[:k, :k],
            X_time=y.t,
            g=look.g,
            rate=Rate(_stride(flow, memory, y)[0], y.nu),
            rest=look.rest,
            noise=look.noise,
            D=None if memory.path is None else memory.path.D,
            HD=look.outer,
            taylor=memory.taylor(flow.sampling.window, y.t),
            radius=memory.radius,
            outside=memory.outside,
            lowest=float(block.M.diagonal().min(initial=np.inf)) if k else np.nan,
        )

    def _moved(self, flow: NoisyFlow, y: State, block: Block, Z: Array) -> tuple[Block, Array]:
        """The block of a new search, and the covariance in its frame."""
        new = search(flow, y, block)
        PU = flow.precondition(y, block.U)
        over, S = host(new.U.T @ PU, block.U.T @ PU)
        k, into = len(block.M), len(new.M)
        copies = _copies(flow, y)
        # x is a vector in the frame, but the filter remembers gradients: g = PU(UᵀPU)⁻¹ĝ
        turn = np.zeros((copies * into, copies * k))
        gradients = over @ np.linalg.inv(S) if k else over
        for i in range(copies):
            turn[i * into : (i + 1) * into, i * k : (i + 1) * k] = gradients if i else over
        Z = turn @ Z @ turn.T
        return new, 0.5 * (Z + Z.T)

    def _drifting(self, flow: NoisyFlow, memory: NoisyMemory, y: State) -> NoisyMemory:
        """The memory with a new drift: what batches in epochs add to the average gradient from here on."""
        if memory.epoch is None:
            return memory
        block, look, curved = memory.block, memory.look, memory.curved
        if look.kicks is not None:
            now = float(np.mean([curvature(flow, y, e, block.U) for e in look.kicks.T]))
            curved = now if memory.drift is None else curved + _RENEWED * (now - curved)
        epoch = self._epoch(flow, block, y, curved)
        assert epoch is not None
        drift = epoch.drift(flow, flow.batches, y, look.g, block.U)
        return replace(memory, epoch=epoch, drift=drift, curved=curved)

    def _epoch(self, flow: NoisyFlow, block: Block, y: State, curved: float) -> Epoch | None:
        if flow.parts == 1:
            return None
        return Epoch.of(flow, y.t, _map(flow, block, y), block.M, flow.parts, curved)

    def _trusted(self, flow: NoisyFlow, memory: NoisyMemory, y: State) -> NoisyMemory:
        """The memory with new values of ``radius`` and ``outside``, if these are due."""
        every = flow.sampling.trust_every
        if not every or y.t < memory.checked + every - 1e-9:
            return memory
        block = memory.block
        radius = 0.0
        if len(block.M):
            radius = _map(flow, block, y).radius(flow.multiplied(y, block.U))
        return replace(memory, checked=y.t, radius=radius, outside=flow.outside(y, block.U))

    def _refuse_chaos(self, flow: NoisyFlow, memory: NoisyMemory, y: State) -> None:
        ratio = memory.taylor(flow.sampling.window, y.t)
        if not np.isfinite(memory.risen + memory.sloped):
            ratio = np.inf
        if ratio > flow.sampling.trust:
            raise ChaosError(
                f"At t = {y.t:g} the oscillation is so large that the next Taylor terms of the averaged loss are "
                f"{ratio:.2g} times the one that the flow keeps (½⟨H, Σ⟩ = {memory.kept:.3g}). Runs with batches of "
                f"{flow.batch_size} jump about here, and no flow in w and Σ describes them: {_REMEDY}, or raise trust= "
                "to continue."
            )


def _stride(flow: NoisyFlow, memory: NoisyMemory, y: State) -> tuple[Tensor, Any]:
    """The optimizer's step −γw − P⁻¹m [d] with the force of the oscillation, and the filter's memory after it."""
    now, g = flow.calculus.metric.at(y.t), memory.look.g + memory.look.force
    if memory.drift is not None:
        g = g + memory.drift
    P = now.P(y.nu)
    flow.calculus.require(P, y.t, memory.look.g)
    m, filtered = (g, None) if y.m is None else now.Q().step(g, y.m)
    decay = flow.calculus.decay(y.t)
    return -P.solve(m) if decay is None else -P.solve(m) - decay.gamma * y.w, filtered


def _copies(flow: NoisyFlow, y: State) -> int:
    """The number of vectors in the state of a deviation: itself, and those that filter and epoch remember."""
    return 1 + remembered(flow.calculus.metric.at(y.t).Q()) + (flow.parts > 1)


def _map(flow: NoisyFlow, block: Block, y: State) -> Companion:
    """The map of the oscillation in the block for a step from y."""
    now, decay, U = flow.calculus.metric.at(y.t), flow.calculus.decay(y.t), block.U
    PU = now.P(y.nu).apply(U)
    if decay is None:
        (S,) = host(U.T @ PU)
        kept = None
    else:
        S, kept = host(U.T @ PU, PU.T @ entrywise(1 - decay.gamma, U))
        kept = 0.5 * (kept + kept.T)
    return Companion.of(now.Q(), block.M, 0.5 * (S + S.T), kept)


def search(flow: NoisyFlow, y: State, last: Block | None) -> Block:
    """The directions at y that relax within the window; the leading ones if there are more than ``max_directions``."""
    most = min(flow.sampling.max_directions, len(y.w))
    method = CriticalSubspace(tol=flow.sampling.tol, seed=flow.sampling.seed)
    A = flow.effective_hessian(y)
    if last is None:
        found, sought = method.start(A, y.w, np.inf), min(4, most)
    else:
        found, sought = last.found, last.sought
    while True:
        found = method.follow(A, found, np.inf, least=sought)
        relaxes = found.eigenvalues[:sought] > flow.cuts(y.t, found.V[:, :sought])
        above = int(np.logical_and.accumulate(relaxes).sum())  # with weight decay, cuts differ between directions
        if above < sought or sought == most:
            break
        sought = min(most, sought + (4 if last is None else 2))
        if last is not None:
            break
    k = min(above, most)
    frame = flow.frame(y, found.V[:, :k], found.AV[:, :k], third=False)
    spare = sought if above >= sought - 2 else max(1, above + 1)
    return Block(found, frame.U, frame.HU, frame.M, y.t, spare)


__all__ = ["Block", "ChaosError", "NoisyMemory", "NoisyNode", "NoisyStep", "search"]
