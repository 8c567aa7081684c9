"""What oscillates outside the block: one path of the optimizer's own deviation from the flow, for each pair.

Many directions hold a little of the oscillation each.  A covariance of all of them would be dense, but what the flow
asks of them are sums over directions, which one member shows almost as well as the average.  So a deviation D of
the optimizer is followed there, on batches of its own, by the linear part of the step:

    D⁺ = (1 − κ)(1 − γ) D − P⁻¹ Q[HD + e],      e = g_batch − g at w + d,

with D held outside the block.  HD comes with the pair w ± d that has D in it, so a path costs no gradient.

A run is compared with its own average over a window of time.  What wanders more slowly than the window is part of
that average, and no oscillation.  About an average over Gaussian weights of width σ, a direction that relaxes at a rate
λ and has the variance v keeps v(1 − exp(λ²σ²)·erfc(λσ)).  With the leak κ it keeps vλ/(λ + κ).  Both agree at λ = 1/σ
for the κ below; at λ = ½/σ the leak keeps 4 % more, and 2 % less at 3/σ.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from scipy.special import erfcx
from torch import Tensor

from dvi.compiler.decay import entrywise
from dvi.compiler.flows import CompiledFlow
from dvi.solvers.protocol import State


@dataclass(frozen=True)
class Path:
    """Deviations outside the block.

    Attributes:
        D: [d, m], one for each pair.
        filtered: the memory of the optimizer's filter for them; None without momentum.
    """

    D: Tensor
    filtered: Any

    @classmethod
    def start(cls, flow: CompiledFlow, y: State, m: int) -> Path:
        """Nothing has moved yet."""
        D = y.w.new_zeros(len(y.w), m)
        return cls(D, None if y.m is None else flow.calculus.metric.at(y.t).Q().initial(D))

    def step(self, flow: CompiledFlow, y: State, kick: Tensor, window: float) -> Path:
        """One step of the optimizer from y, whose gradients deviate by kick = HD + e [d, m]."""
        now, decay = flow.calculus.metric.at(y.t), flow.calculus.decay(y.t)
        m, filtered = (kick, None) if self.filtered is None else now.Q().step(kick, self.filtered)
        kept = self.D if decay is None else entrywise(1 - decay.gamma, self.D)
        return Path((1 - leak(window)) * kept - now.P(y.nu).solve(m), filtered)

    def outside(self, U: Tensor, PU: Tensor) -> Path:
        """The same without what lies in the block U [d, k], where PU is P̃U."""
        if not U.shape[1]:
            return self
        return Path(self.D - U @ torch.linalg.solve(U.T @ PU, PU.T @ self.D), self.filtered)


def leak(window: float) -> float:
    """κ, the share of D that is lost in each step: 0.747/window, at most 1."""
    left = erfcx(1.0)
    return float(min(1.0, left / (1 - left) / window))


__all__ = ["Path", "leak"]
