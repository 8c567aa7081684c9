"""The central flow with mini-batch noise: batches keep the optimizer oscillating, also below the edge of stability.

The iterates are w + δ with E δ = 0 and E δδᵀ = Σ = UXUᵀ.  Let gᵢ and Hᵢ be the gradient and the Hessian of example i.
One step of the optimizer, which is also a step of the flow, gives

    w⁺ = (1−γ)w − P(ν)⁻¹ Q[∇L + ½∇³L[Σ]],
    ν⁺ = ν + f(ν, g) + ½∇²_g f[HΣH + N],
    X⁺ = (I−Λ) X (I−Λ) + UᵀNU,            N = φ ( cov gᵢ + cov Hᵢδ ).

With momentum, X is a part of the covariance of δ and the filter's memory.  :mod:`dvi.noise.companion` has the map of
this covariance, also with weight decay γ.  Outside the block, one path represents the oscillation
(:mod:`dvi.noise.path`).  :mod:`dvi.noise.epochs` treats batches in epochs.  The gradients at pairs w ± d, where d is a
member of the oscillation, give ½∇³L[Σ], both terms of N, and the averaged loss.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dvi.compiler.decay import entrywise
from dvi.compiler.flows import CentralFlow, Check, CompiledFlow
from dvi.interop.binding import MethodLike, bind
from dvi.methods import Nu
from dvi.noise.epochs import Epoch
from dvi.noise.path import Path
from dvi.noise.sampling import Sampling, generator
from dvi.noise.spread import Echo, Spread, combined, inside, noisy_start, spread, times
from dvi.problems import MiniBatches, Problem
from dvi.solvers.protocol import Array, State, host, like


@dataclass(frozen=True)
class Look:
    """What a flow with noise measures at a state; averages are over the oscillation.

    Attributes:
        loss, g: L(w), and ∇L(w) [d].
        force: the average of ∇L(w+δ) − ∇L(w) [d], to second order ½∇³L[Σ].
        N: UᵀNU [k, k].
        noise: tr N.
        rest: the average of L(w+δ) − L(w), less ½⟨H, Σ⟩ in the block.  A random pair gives it in expectation only.
        risen: the average of L(w+δ) − L(w) over the pairs that were tried.
        sloped: the average of ½δ·∇L(w+δ) over the same pairs.  For a quadratic loss it equals ``risen``.
        bend: ½∇²_g f[HΣH + N], like ν.
        HU, M: H times the block [d, k] and UᵀHU [k, k], updated along the pairs.  The gradients of a pair differ by
            2Hd, so the update costs nothing more.  HU changes in the span of P̃U only.
        outer: the part of HD [d, m] outside the block, where D are the paths; None without paths.
        kicks: the noise [d, m] that the paths' batches add to it; None without paths.
    """

    loss: float
    g: Tensor
    force: Tensor
    N: Array
    noise: float
    rest: float
    risen: float
    sloped: float
    bend: Nu
    HU: Tensor
    M: Array
    outer: Tensor | None
    kicks: Tensor | None


class NoisyFlow(CompiledFlow):
    """The central flow with mini-batch noise (docs/noise.md); :func:`noisy_flow` makes it.

    Attributes:
        batch_size: B.
        sampling: how batches are drawn, and the settings of the flow.
        batches: the problem's examples.
        factor: φ, the covariance of a batch's gradient divided by that of an example's gradient.
        parts: m, the number of batches in an epoch; 1 if batches are independent.
    """

    name = "noisy"
    constrained = False
    stepwise = True

    def __init__(
        self,
        problem: Problem,
        method: MethodLike,
        batch_size: int,
        sampling: Sampling,
        batches: MiniBatches,
        *,
        check: Check = True,
        max_gib: float = 4.0,
    ) -> None:
        super().__init__(problem, method, check=check, accuracy="second-order", max_gib=max_gib)
        self.batch_size, self.sampling, self.batches = batch_size, sampling, batches
        self.factor = sampling.factor(batch_size, self.batches.n)
        self.parts = batches.n // batch_size if sampling.epochs else 1
        self.initial = noisy_start(self, self.batches, self.factor)

    def cut(self, t: float) -> float:
        """Effective eigenvalues above this relax within the window: κ(1 − γ/2)λ + γ > 1/window, with the smallest γ."""
        decay = self.calculus.decay(t)
        return float(self._cut(t, np.array(0.0 if decay is None else float(decay.gamma.min()))))

    def cuts(self, t: float, V: Tensor) -> Array:
        """The same for each of k orthonormal eigenvectors V [d, k] of P̃^{−1/2}HP̃^{−1/2}: [k].

        If γ differs between weights, an eigenvector has their mean, weighted by the squares of its components.
        """
        decay = self.calculus.decay(t)
        gamma = np.zeros(V.shape[1])
        if decay is not None:
            (gamma,) = host(entrywise(decay.gamma, V.square()).sum(dim=0))
        return self._cut(t, gamma)

    def _cut(self, t: float, gamma: Array) -> Array:
        return (1 / self.sampling.window - gamma) / (self.calculus.speed(t) * (1 - gamma / 2))

    # ---- what a step needs -----------------------------------------------------------------------------

    def look(
        self,
        y: State,
        U: Tensor,
        HU: Tensor,
        M: Array,
        X: Array,
        path: Path | None = None,
        epoch: Epoch | None = None,
    ) -> Look:
        """Measure at y by pairs w ± d, where UXUᵀ is the oscillation's covariance in the block and a path is outside.

        Args:
            y: the state; its ν is from before the update with the gradient at y.
            U, HU: the block and H times it [d, k].
            M: UᵀHU [k, k].
            X: [k, k], positive semidefinite.
            path: the deviations outside the block, one for each pair; None if nothing oscillates there.
            epoch: how the batches of an epoch depend on one another; None if batches are independent.
        """
        loss, g = self.value_and_grad(y)
        turned = self.precondition(y, U)
        S = U.T @ turned
        echo = None if epoch is None else partial(epoch.echoed, U=U, turned=turned, S=S)
        members = self.members(U, X, y.t)
        draws = None if path is None else self.drawn(path, y.t)
        if not members.any() and (path is None or not bool(path.D.any())):
            return self._still(y, float(loss), g, U, HU, M, draws, echo)
        whole = self.sampling.pairs == "all"
        share = 1.0 if whole else 1.0 / members.shape[1]  # weight of each pair in the average
        centre = 1.0 - share * members.shape[1]  # weight of w itself in the average
        at = self._spread(y, y.w, g, U, None, echo) if abs(centre) > 1e-12 else None
        parts: list[tuple[float, Spread]] = [] if at is None else [(centre, at)]
        rest = risen = sloped = 0.0
        outer, kicks = [], []
        for j, c in enumerate(members.T):
            away = None if path is None else path.D[:, j]
            d = U @ like(c, U) if away is None else U @ like(c, U) + away
            which = None if draws is None else draws[j : j + 1]
            ahead = self._spread(y, y.w + d, g, U, which, echo)
            behind = self._spread(y, y.w - d, g, U, None, echo)
            parts += [(0.5 * share, ahead), (0.5 * share, behind)]
            Hd = 0.5 * (ahead.g - behind.g)
            seen = U.T @ Hd if away is None else U.T @ Hd - HU.T @ away
            slope, Mc = host(0.5 * (d @ Hd), seen)
            if c.any():
                before, M = M, _secant(M, c, Mc)
                HU = HU + turned @ torch.linalg.solve(S, like(M - before, U))
            if path is not None:
                HD = Hd - HU @ like(c, U)
                outer.append(HD - inside(HD, U, turned))
                kicks.append(ahead.kicks)
            up = 0.5 * (ahead.loss + behind.loss) - float(loss)
            risen, sloped = risen + share * up, sloped + share * float(slope)
            rest += share * (up - 0.5 * float(c @ M @ c))
        force = -g
        for weight, one in parts:
            force = force + weight * one.g
        N = self.factor * np.sum([weight * one.block for weight, one in parts], axis=0)
        return Look(
            loss=float(loss),
            g=g,
            force=force,
            N=0.5 * (N + N.T),
            noise=float(self.factor * sum(weight * one.total for weight, one in parts)),
            rest=rest,
            risen=risen,
            sloped=sloped,
            bend=self._bend(y, g, HU @ like(_root(X), HU), outer, parts),
            HU=HU,
            M=M,
            outer=torch.stack(outer, dim=1) if outer else None,
            kicks=torch.cat(kicks, dim=1) if kicks else None,
        )

    def _spread(self, y: State, w: Tensor, g: Tensor, U: Tensor, draws: Tensor | None, echo: Echo) -> Spread:
        """The spread of gradients at w; ν and the metric of the block are those at y."""
        return spread(self, self.batches, State(w, y.nu, y.t), g, U, draws, echo)

    def _still(
        self,
        y: State,
        loss: float,
        g: Tensor,
        U: Tensor,
        HU: Tensor,
        M: Array,
        draws: Tensor | None,
        echo: Echo,
    ) -> Look:
        """The measurement at a state where nothing oscillates."""
        seen = self._spread(y, y.w, g, U, draws, echo)
        outer, kicks = (None, None) if draws is None else (torch.zeros_like(seen.kicks), seen.kicks)
        bend, N = times(self.factor, seen.bend), self.factor * seen.block
        noise = self.factor * seen.total
        return Look(loss, g, torch.zeros_like(g), N, noise, 0.0, 0.0, 0.0, bend, HU, M, outer, kicks)

    def _bend(self, y: State, g: Tensor, inner: Tensor, outer: list[Tensor], parts: list[tuple[float, Spread]]) -> Nu:
        """½∇²_g f[HΣH + N]; the columns of ``inner`` [d, k] (block) and of ``outer`` [d] (paths) make up HΣH."""
        if self.calculus.stateless:
            return y.nu
        bend = combined([self.factor * weight for weight, _ in parts], [one.bend for _, one in parts])
        rows = torch.stack([*inner.T, *(one / len(outer) ** 0.5 for one in outer)])
        return pytree.tree_map(torch.add, bend, self.calculus.f_curvature_of(y.nu, y.t, g, rows))

    def updated(self, y: State, look: Look) -> Nu:
        """ν after the update at y: ν + f(ν, g) + ½∇²_g f[HΣH + N]."""
        if self.calculus.stateless:
            return y.nu
        f = self.calculus.metric.at(y.t).f(y.nu, look.g)
        return pytree.tree_map(lambda nu, change, bend: nu + change + bend, y.nu, f, look.bend)

    def members(self, U: Tensor, X: Array, t: float) -> Array:
        """Members of the oscillation in the block [k, pairs]: one along each principal direction, or random ones.

        A random member is U X^½ z, where z is the projection of a random vector of weights on the block.  So the member
        does not depend on the basis of the block, which rounding errors may rotate.
        """
        R = _root(X)
        if self.sampling.pairs == "all":
            kept: Array = R[:, np.square(R).sum(axis=0) > 0]
            return kept
        source = generator(self.sampling.seed, round(t))
        xi = torch.randn(len(U), self.sampling.pairs, generator=source, dtype=torch.float64).to(U)
        if not len(X):
            return np.zeros((0, self.sampling.pairs))
        overlap, z = host(U.T @ U, U.T @ xi)
        sizes, V = np.linalg.eigh(overlap)
        out: Array = _symmetric_root(X) @ (V / np.sqrt(sizes)) @ (V.T @ z)
        return out

    def drawn(self, path: Path, t: float) -> Tensor:
        """How often each example is in the batch of each path at t, divided by the batch size [m, n]."""
        n, D = self.batches.n, path.D
        own = replace(self.sampling, replicas=D.shape[1], seed=-1 - self.sampling.seed)  # not the runs' batches
        chosen = own.draw(self.batch_size, n, round(t)).to(D.device)
        ones = torch.full(chosen.shape, 1 / self.batch_size, dtype=D.dtype, device=D.device)
        return D.new_zeros(len(chosen), n).scatter_add_(1, chosen, ones)

    # ---- how far to trust it ---------------------------------------------------------------------------

    def multiplied(self, y: State, U: Tensor) -> Array:
        """How the noise grows with the oscillation, [k, k, k, k]: φ·cov(UᵀHᵢUx)_ad = Σ_bc [abcd] X_bc.

        The matrices Uᵀ(Hᵢ − H)U are computed from differences of the gradients of single examples; this costs 2k
        gradients.
        """
        k = U.shape[1]
        step = torch.finfo(U.dtype).eps ** (1 / 3) * max(1.0, float(torch.linalg.vector_norm(y.w)))
        total = np.zeros((k, k, k, k))
        columns = []
        for u in U.T:
            h = step / max(float(torch.linalg.vector_norm(u)), 1e-300)
            ends = [torch.cat([G @ U for _, G in self.batches.each(y.w + s * h * u)]) for s in (1.0, -1.0)]
            columns.append((ends[0] - ends[1]) / (2 * h))
        A = torch.stack(columns, dim=2)  # [n, k, k]
        A = A - A.mean(dim=0)
        A = 0.5 * (A + A.mT)
        flat = A.reshape(len(A), -1)
        (total,) = host(flat.T @ flat)
        return self.factor / len(A) * total.reshape(k, k, k, k)

    def outside(self, y: State, U: Tensor) -> float:
        """The share of a step's noise that falls outside the block: 1 − tr(UᵀNU)/tr(P⁻¹N), with UᵀPU = I."""
        P = self.calculus.P(y.nu, y.t)
        inside, total = 0.0, 0.0
        mean = self.problem.value_and_grad(y.w)[1]
        for _, G in self.batches.each(y.w):
            G = G - mean
            a, b = host((G @ U).square().sum(), (G * P.solve(G.T).T).sum())
            inside, total = inside + float(a), total + float(b)
        return 1 - inside / total if total > 0 else 0.0


def _root(X: Array) -> Array:
    """R with RRᵀ = X; its columns lie along X's eigenvectors, and negative eigenvalues count as zero."""
    size, V = np.linalg.eigh(X) if len(X) else (np.zeros(0), np.zeros((0, 0)))
    R: Array = V * np.sqrt(size.clip(min=0))
    return R


def _symmetric_root(X: Array) -> Array:
    size, V = np.linalg.eigh(X)
    R: Array = (V * np.sqrt(size.clip(min=0))) @ V.T
    return R


def _secant(M: Array, c: Array, y: Array) -> Array:
    """M after the smallest symmetric change that gives Mc = y (Powell's symmetric Broyden update)."""
    size = float(c @ c)
    r = (y - M @ c) / size
    M = M + np.outer(r, c) + np.outer(c, r) - float(c @ r) / size * np.outer(c, c)
    return 0.5 * (M + M.T)


def noisy_flow(
    problem: Problem,
    method: MethodLike,
    batch_size: int,
    sampling: Sampling | None = None,
    *,
    check: bool = True,
    max_gib: float = 4.0,
    **settings: Any,
) -> CompiledFlow:
    """Compile the central flow of a method on mini-batches.

    Args:
        problem: a problem that is made of examples: ``Problem.from_module``, or ``Problem.from_examples``.
        method, check, max_gib: as for :func:`dvi.central_flow`.
        batch_size: B, the number of examples in a batch.
        sampling: how batches are drawn, and the settings of the flow.
        settings: instead of ``sampling``, fields of :class:`dvi.Sampling`: ``replacement=True``, ``window=20``.

    Returns:
        a :class:`NoisyFlow`.  If a batch has all examples, there is no noise; the result is a :class:`dvi.CentralFlow`.

    Raises:
        ProblemError: if the problem has no examples, or if some examples count for more than others.
        SpecError: if the declaration of the method is wrong.
        ValueError: if the batch size or a setting is out of its range.
    """
    if sampling is not None and settings:
        raise ValueError("Give sampling=dvi.Sampling(…) or its fields, not both.")
    chosen = sampling or Sampling(**settings)
    problem, method = bind(problem, method)  # an optimizer of torch has its own start, penalty or sign
    batches: MiniBatches = problem.mini_batches(chosen.max_gib)
    chosen.check(batch_size, batches.n)
    if chosen.factor(batch_size, batches.n) == 0:
        flow = CentralFlow(problem, method, check=check, max_gib=max_gib)
        flow.name = "noisy"
        flow.notes.append("A batch has all examples, so there is no noise, and this is the central flow.")
        return flow
    return NoisyFlow(problem, method, batch_size, chosen, batches, check=check, max_gib=max_gib)


__all__ = ["Look", "NoisyFlow", "noisy_flow"]
