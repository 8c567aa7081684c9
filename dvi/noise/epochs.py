"""Batches in epochs, each of which passes through all examples: noise that sums to zero changes X, w and ν.

An epoch has m = n/B batches.  The noise of one batch has covariance N.  The noises of two batches are correlated, with
covariance −N/(m−1).  So the noise of later batches compensates for the sum s of earlier noise.  After j batches,

    e_j = −s/(m−j) + ξ,      E ξξᵀ = N·m(m−j−1)/((m−1)(m−j)),      s⁺ = s + e_j.

This is a linear map of s, the deviation and the filter's memory together.

Earlier batches of the epoch contribute to the deviation δ, and the present batch contains none of their examples.  A
gradient e has changed δ by −K_l e after l more steps; without momentum K_l = (I − P⁻¹H)ˡP⁻¹.  Let 𝓜 be the mean over
j < m of Σ_{l<j} K_l.  On average over an epoch

    the gradient of a batch is larger by                1/(n(n−1)) Σᵢ Hᵢ 𝓜(gᵢ − g),
    and its covariance, beside HΣH + N, by              (H𝓜N + N𝓜ᵀH)/(m−1).

Outside the block, one number replaces all eigenvalues in 𝓜.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dvi.compiler.flows import CompiledFlow
from dvi.noise.companion import Companion
from dvi.noise.spread import inside
from dvi.problems import MiniBatches
from dvi.solvers.protocol import Array, State, host, like


def in_epoch(map: Companion, part: int, parts: int) -> tuple[Companion, float]:
    """The map of (z, s) at batch number ``part`` of ``parts``, and the factor of N that gives the covariance of ξ."""
    k, size = map.G.shape[1], len(map.F)
    pull = 1 / (parts - part)
    F, G = np.zeros((size + k, size + k)), np.vstack([map.G, np.eye(k)])
    F[:size, :size] = map.F
    F[size:, size:] = np.eye(k)
    F[:, size:] -= pull * G
    return Companion(F, G), parts * (parts - part - 1) * pull / (parts - 1)


def memory(map: Companion, parts: int) -> Array:
    """𝓜 in a frame [k, k]."""
    k = map.G.shape[1]
    response, moved, total = -map.G, np.zeros((k, k)), np.zeros((k, k))
    for _ in range(parts - 1):
        moved = moved + response[:k]
        total = total + moved
        response = map.F @ response
    return total / parts


@dataclass(frozen=True)
class Epoch:
    """How the batches of an epoch depend on one another, in a block U [d, k] with S = UᵀP̃U.

    Attributes:
        parts: m.
        curved: one effective eigenvalue for all directions outside the block.
        inside: 𝓜 in the block [k, k].
        outside: 𝓜P outside the block, a number.
        echo: the square root of I + 2H𝓜/(m−1), for gradients in the block [k, k].
        echo_outside: the same outside the block, a number.
    """

    parts: int
    curved: float
    inside: Array
    outside: float
    echo: Array
    echo_outside: float

    @classmethod
    def of(cls, flow: CompiledFlow, t: float, map: Companion, M: Array, parts: int, curved: float) -> Epoch:
        """At time t, from the map of a deviation in the block and M = UᵀHU [k, k] there."""
        from scipy.linalg import sqrtm

        decay = flow.calculus.decay(t)
        kept = None if decay is None else np.array([[1 - float(decay.gamma.mean())]])
        alone = Companion.of(flow.calculus.metric.at(t).Q(), np.array([[curved]]), np.eye(1), kept)
        within, outside = memory(map, parts), float(memory(alone, parts)[0, 0])
        A = 2 / (parts - 1) * M @ within
        echo = np.real(sqrtm(np.eye(len(M)) + A)) if len(M) else A
        more = 2 / (parts - 1) * curved * outside
        return cls(parts, curved, within, outside, echo, float(np.sqrt(max(0.0, 1 + more))))

    def echoed(self, G: Tensor, U: Tensor, turned: Tensor, S: Tensor) -> Tensor:
        """Gradients [c, d] with the covariance of G [c, d] and the epoch's correction; turned is P̃U, S is UᵀP̃U."""
        if not U.shape[1]:
            return self.echo_outside * G
        GU = G @ U
        change = like(self.echo, U) - self.echo_outside * torch.eye(len(S), dtype=S.dtype, device=S.device)
        more: Tensor = torch.linalg.solve(S, change @ GU.T).T @ turned.T
        return self.echo_outside * G + more

    def drift(self, flow: CompiledFlow, batches: MiniBatches, y: State, g: Tensor, U: Tensor) -> Tensor:
        """What epochs add to the average gradient [d] at y, where the full gradient is g; costs two gradients."""
        P, n = flow.calculus.metric.at(y.t).P(y.nu), batches.n
        turned, within = flow.precondition(y, U), like(self.inside, U)
        found, done = torch.zeros_like(y.w), 0
        size = torch.finfo(y.w.dtype).eps ** 0.5 * max(1.0, float(torch.linalg.vector_norm(y.w)))
        for _, G in batches.each(y.w):
            C = G - g
            rest = C.T - inside(C.T, U, turned)
            V = C @ U @ within.T @ U.T + self.outside * P.solve(rest.contiguous()).T
            h = size / max(float(torch.linalg.vector_norm(V, dim=1).max()), torch.finfo(V.dtype).tiny)
            chosen = torch.arange(done, done + len(G), device=y.w.device)[:, None]
            _, moved = batches.batches(y.w + h * V, chosen)
            found, done = found + (moved - G).sum(dim=0) / h, done + len(G)
        return found / (n * (n - 1))


def curvature(flow: CompiledFlow, y: State, e: Tensor, U: Tensor) -> float:
    """The effective eigenvalue of H along the step that noise e [d] causes outside the block; costs one HVP."""
    P = flow.calculus.metric.at(y.t).P(y.nu)
    e = e - inside(e, U, flow.precondition(y, U))
    q = P.solve(e)
    bent, size = host(q @ flow.problem.hvp(y.w, q[:, None])[:, 0], q @ e)
    return max(0.0, float(bent / size)) if float(size) > 0 else 0.0


__all__ = ["Epoch", "curvature", "in_epoch", "memory"]
