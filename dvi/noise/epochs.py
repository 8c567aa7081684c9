"""Batches that pass through all examples: their noise sums to zero over an epoch, which changes X, w and ν.

An epoch has m = n/B batches.  The noise of each has covariance N, and that of two of them −N/(m−1).  So the noise that
is still to come makes up for the sum s of what has come: after j batches,

    e_j = −s/(m−j) + ξ,      E ξξᵀ = N·m(m−j−1)/((m−1)(m−j)),      s⁺ = s + e_j,

which is a linear map once s is followed beside the deviation and the filter's memory.

The deviation δ is made of batches whose examples the present one excludes.  Let K_l be what the optimizer has made of a
unit of gradient after l more steps, (I − P⁻¹H)ˡP⁻¹ without momentum, and 𝓜 the mean over j < m of Σ_{l<j} K_l.  On
average over an epoch

    the gradient of a batch is larger by                1/(n(n−1)) Σᵢ Hᵢ 𝓜(gᵢ − g),
    and its covariance, beside HΣH + N, by              (H𝓜N + N𝓜ᵀH)/(m−1).

Outside the block one number stands for the eigenvalues in 𝓜.
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
    """The map of (z, s) at the batch number ``part`` of ``parts``, and which share of N is new noise."""
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
    """What an epoch remembers of its batches, in a block U [d, k] with S = UᵀP̃U.

    Attributes:
        parts: m.
        curved: the effective eigenvalue that stands for all directions outside the block.
        inside: 𝓜 in the block [k, k].
        outside: 𝓜P outside it.
        echo: the root of I + 2H𝓜/(m−1) on gradients in the block [k, k]; echo_outside: outside it.
    """

    parts: int
    curved: float
    inside: Array
    outside: float
    echo: Array
    echo_outside: float

    @classmethod
    def of(cls, flow: CompiledFlow, t: float, map: Companion, M: Array, parts: int, curved: float) -> Epoch:
        """For the map of a deviation in the block, where UᵀHU is M [k, k]."""
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
        """Gradients [c, d] whose spread has what the epoch adds to that of G [c, d]; turned is P̃U."""
        if not U.shape[1]:
            return self.echo_outside * G
        GU = G @ U
        change = like(self.echo, U) - self.echo_outside * torch.eye(len(S), dtype=S.dtype, device=S.device)
        more: Tensor = torch.linalg.solve(S, change @ GU.T).T @ turned.T
        return self.echo_outside * G + more

    def drift(self, flow: CompiledFlow, batches: MiniBatches, y: State, g: Tensor, U: Tensor) -> Tensor:
        """What epochs add to the average gradient [d] at y, where it is g; costs two gradients."""
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
    """The effective eigenvalue of H along the step that noise e [d] makes outside the block; costs an HVP."""
    P = flow.calculus.metric.at(y.t).P(y.nu)
    e = e - inside(e, U, flow.precondition(y, U))
    q = P.solve(e)
    bent, size = host(q @ flow.problem.hvp(y.w, q[:, None])[:, 0], q @ e)
    return max(0.0, float(bent / size)) if float(size) > 0 else 0.0


__all__ = ["Epoch", "curvature", "in_epoch", "memory"]
