"""The central flow with mini-batch noise: an optimizer whose batches keep it oscillating below the edge, too.

Iterates are w + δ with E δ = 0 and E δδᵀ = Σ = UXUᵀ, gᵢ and Hᵢ are the gradient and the Hessian of example i:

    w⁺ = (1−γ)w − P(ν)⁻¹ Q[∇L + ½∇³L[Σ]],
    ν⁺ = ν + f(ν, g) + ½∇²_g f[HΣH + N],
    X⁺ = (I−Λ) X (I−Λ) + UᵀNU,            N = φ ( cov gᵢ + cov Hᵢδ ),

one step of the optimizer at a time.  With momentum, X is a part of the covariance of (δ, the filter's memory), see
:mod:`dvi.noise.companion`, where weight decay γ is, too.  Pairs w ± d of the
oscillation give ½∇³L[Σ], both terms of N, and the averaged loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dvi.compiler.calculus import LossLeftDomainError
from dvi.compiler.decay import entrywise
from dvi.compiler.flows import CentralFlow, Check, CompiledFlow
from dvi.interop.binding import MethodLike, bind
from dvi.methods import Nu
from dvi.noise.sampling import Sampling, generator
from dvi.problems import MiniBatches, NotFiniteError, Problem
from dvi.solvers.protocol import Array, State, host, like


@dataclass(frozen=True)
class Spread:
    """What the gradients of single examples are at some weights.

    Attributes:
        loss: the mean of the losses; g: of the gradients [d].
        block: covariance of Uᵀgᵢ [k, k].
        total: the trace of the covariance of gᵢ.
        bend: ½∇²_g f[cov gᵢ], like ν; None for a method without state.
    """

    loss: float
    g: Tensor
    block: Array
    total: float
    bend: Nu


@dataclass(frozen=True)
class Look:
    """What a flow with noise sees at a state; averages are over the oscillation.

    Attributes:
        loss, g: L(w), and ∇L(w) [d].
        force: the average of ∇L(w+δ) − ∇L(w) [d], to second order ½∇³L[Σ].
        N: UᵀNU [k, k].
        noise: tr N.
        rest: the average of L(w+δ) − L(w) − ½δᵀHδ, the terms that ½⟨H, Σ⟩ leaves out; a random pair is the average in
            expectation only.
        drawn: ½δᵀHδ of the pairs that were tried, with H at w itself; beyond: what L(w+δ) − L(w) has beside it.
        bend: ½∇²_g f[HΣH + N], like ν.
        HU, M: H times the block [d, k] and UᵀHU [k, k], brought up to date along the pairs: their gradients differ by
            2Hd, which costs nothing more.
    """

    loss: float
    g: Tensor
    force: Tensor
    N: Array
    noise: float
    rest: float
    drawn: float
    beyond: float
    bend: Nu
    HU: Tensor
    M: Array


class NoisyFlow(CompiledFlow):
    """The central flow with mini-batch noise (docs/noise.md); :func:`noisy_flow` makes it.

    Attributes:
        batch_size: B.
        sampling: how batches are drawn, and how closely the flow looks.
        batches: the problem's examples.
        factor: φ, the covariance of a batch's gradient over that of an example's.
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
        self.initial = noisy_start(self, self.batches, self.factor)

    def cut(self, t: float) -> float:
        """Effective eigenvalues above this relax within the window, of whatever weights: κ(1 − γ/2)λ + γ > 1/window."""
        decay = self.calculus.decay(t)
        return float(self._cut(t, np.array(0.0 if decay is None else float(decay.gamma.min()))))

    def cuts(self, t: float, V: Tensor) -> Array:
        """The same for each of some orthonormal eigenvectors V [d, k] of P̃^{−1/2}HP̃^{−1/2}: [k].

        Where γ differs between weights, an eigenvector has a mean of them.
        """
        decay = self.calculus.decay(t)
        gamma = np.zeros(V.shape[1])
        if decay is not None:
            (gamma,) = host(entrywise(decay.gamma, V.square()).sum(dim=0))
        return self._cut(t, gamma)

    def _cut(self, t: float, gamma: Array) -> Array:
        return (1 / self.sampling.window - gamma) / (self.calculus.speed(t) * (1 - gamma / 2))

    # ---- what a step asks ------------------------------------------------------------------------------

    def look(self, y: State, U: Tensor, HU: Tensor, M: Array, X: Array, sought: Array | None = None) -> Look:
        """What is seen at y with oscillation covariance UXUᵀ, by pairs w ± d.

        Args:
            y: where; ν before the update that the gradient at y makes.
            U, HU: the block and H times it [d, k].
            M: UᵀHU [k, k].
            X: [k, k], positive semidefinite.
            sought: UᵀHU by products with H, without what pairs of finite size have made of it (default: M).
        """
        loss, g = self.value_and_grad(y)
        size, V = np.linalg.eigh(X) if len(X) else (np.zeros(0), np.zeros((0, 0)))
        R = V * np.sqrt(size.clip(min=0))
        z = self._tried(R, y.t)
        if not z.any():
            seen = spread(self, self.batches, y, g, U)
            bend = _times(self.factor, seen.bend)
            still = torch.zeros_like(g)
            N, noise = self.factor * seen.block, self.factor * seen.total
            return Look(float(loss), g, still, N, noise, 0.0, 0.0, 0.0, bend, HU, M)
        whole = self.sampling.pairs == "all"
        share = 1.0 if whole else 1.0 / z.shape[1]  # of each pair in the average
        centre = 1.0 - share * z.shape[1]  # of what is at w itself
        at = spread(self, self.batches, y, g, U) if abs(centre) > 1e-12 else None
        parts: list[tuple[float, Spread]] = [] if at is None else [(centre, at)]
        tried, start = [], M
        for c in z.T:
            d = U @ like(c, U)
            pair = [spread(self, self.batches, State(y.w + s * d, y.nu, y.t), g, U) for s in (1.0, -1.0)]
            parts += [(0.5 * share, one) for one in pair]
            Hd = 0.5 * (pair[0].g - pair[1].g)
            M, HU = _secant(M, HU, c, host(U.T @ Hd)[0], Hd)
            tried.append((c, 0.5 * (pair[0].loss + pair[1].loss) - float(loss)))
        H = start if sought is None else sought
        risen = share * sum(more for _, more in tried)
        rest = risen - share * sum(0.5 * float(c @ M @ c) for c, _ in tried)
        drawn = share * sum(0.5 * float(c @ H @ c) for c, _ in tried)
        mean = torch.zeros_like(g)
        for weight, one in parts:
            mean += weight * one.g
        force = mean - g
        N = self.factor * np.sum([weight * one.block for weight, one in parts], axis=0)
        noise = self.factor * sum(weight * one.total for weight, one in parts)
        bend = y.nu
        if not self.calculus.stateless:
            weights = [self.factor * weight for weight, _ in parts]
            bend = _combined(weights, [one.bend for _, one in parts])
            rows = (HU @ like(R, HU)).T.contiguous()
            bend = pytree.tree_map(torch.add, bend, self.calculus.f_curvature_of(y.nu, y.t, g, rows))
        return Look(float(loss), g, force, 0.5 * (N + N.T), float(noise), rest, drawn, risen - drawn, bend, HU, M)

    def updated(self, y: State, look: Look) -> Nu:
        """ν after the update at y: ν + f(ν, g) + ½∇²_g f[HΣH + N]."""
        if self.calculus.stateless:
            return y.nu
        f = self.calculus.metric.at(y.t).f(y.nu, look.g)
        return pytree.tree_map(lambda nu, change, bend: nu + change + bend, y.nu, f, look.bend)

    def _tried(self, R: Array, t: float) -> Array:
        """Members of the oscillation in the block [k, pairs]: all principal ones, or random ones."""
        if self.sampling.pairs == "all":
            kept: Array = R[:, np.square(R).sum(axis=0) > 0]
            return kept
        draw = torch.randn(R.shape[1], self.sampling.pairs, generator=generator(self.sampling.seed, round(t)))
        out: Array = R @ draw.double().numpy()
        return out

    # ---- when to trust it ------------------------------------------------------------------------------

    def multiplied(self, y: State, U: Tensor) -> Array:
        """How noise grows with the oscillation, [k, k, k, k]: φ·cov(UᵀHᵢUx)_ad = Σ_bc [abcd] X_bc.

        The matrices Uᵀ(Hᵢ − H)U are differences of the gradients of single examples; 2k gradients.
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


def spread(flow: CompiledFlow, batches: MiniBatches, y: State, g: Tensor, U: Tensor) -> Spread:
    """The spread of the gradients of single examples at y's weights.

    Args:
        flow: whose f is bent by it.
        batches: the examples.
        y: weights, and the ν and the time at which f is read.
        g: the gradient [d] at which f is read.
        U: the block [d, k].
    """
    calculus, n = flow.calculus, batches.n
    loss, mean, squares = y.w.new_zeros(()), torch.zeros_like(y.w), torch.zeros_like(y.w)
    projected: list[Tensor] = []
    bent: Nu = pytree.tree_map(torch.zeros_like, y.nu)
    coupled = not calculus.stateless and not calculus.local
    try:
        for losses, G in batches.each(y.w):
            loss, mean = loss + losses.sum() / n, mean + G.sum(dim=0) / n
            squares += torch.linalg.vector_norm(G, dim=0).square() / n
            projected.append(G @ U)
            if coupled:
                bent = _combined([1.0, 1.0 / n], [bent, calculus.f_curvature_of(y.nu, y.t, g, G)])
    except NotFiniteError as error:
        raise LossLeftDomainError(f"At t = {y.t:g}: {error}") from None
    variances = (squares - mean.square()).clamp(min=0)
    value, total, GU, mU = host(loss, variances.sum(), torch.cat(projected), U.T @ mean)
    GU = GU - mU
    if coupled:
        bent = _combined([1.0, -1.0], [bent, calculus.f_curvature_of(y.nu, y.t, g, mean[None])])
    elif not calculus.stateless:
        bent = calculus.f_curvature_at(y.nu, y.t, g, variances)
    return Spread(float(value), mean, GU.T @ GU / n, float(total), bent)


def noisy_start(flow: CompiledFlow, batches: MiniBatches, factor: float) -> State:
    """The flow's initial state, with ν as it is on average after a first update with a mini-batch's gradient."""
    y = flow.initial
    if flow.calculus.stateless or factor == 0:
        return y
    with flow.problem.ledger.paused():
        _, g = flow.problem.value_and_grad(y.w)
        before = State(y.w, flow.method.at(0.0).init(y.w), 0.0)
        bend = spread(flow, batches, before, g, y.w.new_zeros(len(y.w), 0)).bend
    nu = pytree.tree_map(lambda x, b: x + factor * b, y.nu, bend)
    return State(y.w, nu, y.t, y.m)


def _secant(M: Array, HU: Tensor, c: Array, y: Array, Hd: Tensor) -> tuple[Array, Tensor]:
    """M and HU, changed as little as it takes for Mc = y and HUc = Hd (M stays symmetric: Powell's update)."""
    size = float(c @ c)
    r = (y - M @ c) / size
    M = M + np.outer(r, c) + np.outer(c, r) - float(c @ r) / size * np.outer(c, c)
    x = like(c, HU)
    return 0.5 * (M + M.T), HU + torch.outer(Hd - HU @ x, x / size)


def _times(factor: float, tree: Nu) -> Nu:
    return pytree.tree_map(lambda x: factor * x, tree)


def _combined(weights: list[float], trees: list[Nu]) -> Nu:
    return pytree.tree_map(lambda *leaves: sum(c * x for c, x in zip(weights, leaves, strict=True)), *trees)


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
    """Compile the central flow of a method that takes mini-batches.

    Args:
        problem: one that is made of examples: ``Problem.from_module``, or ``Problem.from_examples``.
        method, check, max_gib: as for :func:`dvi.central_flow`.
        batch_size: B, the examples in a batch.
        sampling: how batches are drawn, and how closely the flow looks.
        settings: fields of :class:`dvi.Sampling` in its place: ``replacement=True``, ``window=20``.

    Returns:
        a :class:`NoisyFlow`; or, where the batch is all examples and there is no noise, the :class:`dvi.CentralFlow`.

    Raises:
        ProblemError: if the problem has no examples, or they do not count the same.
        SpecError: if the declaration is wrong.
        ValueError: if the batch size, or a setting, is out of its range; and for epochs, of whose flow only the real
            optimizer is there.
    """
    if sampling is not None and settings:
        raise ValueError("Give sampling=dvi.Sampling(…) or its fields, not both.")
    chosen = sampling or Sampling(**settings)
    if chosen.epochs:
        raise ValueError(
            "The flow of batches that pass through all examples in epochs is not there: their noise is correlated from "
            'one step to the next. Take independent batches, or run the optimizer itself (runs=("sgd",)).'
        )
    problem, method = bind(problem, method)  # the batches are of the loss that is minimised, from where it begins
    batches: MiniBatches = problem.mini_batches(chosen.max_gib)
    chosen.check(batch_size, batches.n)
    if chosen.factor(batch_size, batches.n) == 0:
        flow = CentralFlow(problem, method, check=check, max_gib=max_gib)
        flow.name = "noisy"
        flow.notes.append("A batch is all examples: there is no noise, and this is the central flow.")
        return flow
    return NoisyFlow(problem, method, batch_size, chosen, batches, check=check, max_gib=max_gib)


__all__ = ["Look", "NoisyFlow", "Spread", "noisy_flow", "noisy_start", "spread"]
