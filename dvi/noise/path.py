"""The oscillation outside the block: for each pair, one path of the optimizer's deviation from the flow.

Many directions contain a little of the oscillation each.  A covariance of all of them would be dense.  But the flow
needs only sums over directions, and one member of the oscillation shows these almost as well as the average.  So the
flow follows one deviation D of the optimizer outside the block, on its own batches, by the linear part of the step:

    D⁺ = (1 − κ)(1 − γ) D − P⁻¹ Q[HD + e],      e = g_batch − g at w + d.

The part of D inside the block is removed after each step.  The pair w ± d contains D and so gives HD.  Therefore a path
costs no gradient.

A run is compared with its own average over a window of time.  Motion that is slower than the window is part of that
average and is no oscillation.  Take an average with a Gaussian of width σ, and a direction that relaxes at the rate λ
and has variance v.  About the average it has the variance v(1 − exp(λ²σ²)·erfc(λσ)).  With the leak κ it has
vλ/(λ + κ).  For the κ below, the two agree at λ = 1/σ.  The second is 4 % larger at λ = ½/σ and 2 % smaller at 3/σ.
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
        D: [d, m], one column for each pair.
        filtered: the memory of the optimizer's filter for D; None without momentum.
    """

    D: Tensor
    filtered: Any

    @classmethod
    def start(cls, flow: CompiledFlow, y: State, m: int) -> Path:
        """The path at the beginning, D = 0."""
        D = y.w.new_zeros(len(y.w), m)
        return cls(D, None if y.m is None else flow.calculus.metric.at(y.t).Q().initial(D))

    def step(self, flow: CompiledFlow, y: State, kick: Tensor, window: float) -> Path:
        """One step of the optimizer from y, with gradients that deviate by kick = HD + e [d, m]."""
        now, decay = flow.calculus.metric.at(y.t), flow.calculus.decay(y.t)
        m, filtered = (kick, None) if self.filtered is None else now.Q().step(kick, self.filtered)
        kept = self.D if decay is None else entrywise(1 - decay.gamma, self.D)
        return Path((1 - leak(window)) * kept - now.P(y.nu).solve(m), filtered)

    def outside(self, U: Tensor, PU: Tensor) -> Path:
        """The path without its part in the block U [d, k]; PU is P̃U."""
        if not U.shape[1]:
            return self
        return Path(self.D - U @ torch.linalg.solve(U.T @ PU, PU.T @ self.D), self.filtered)


def leak(window: float) -> float:
    """κ, the share of D that is lost in each step: 0.747/window, at most 1."""
    left = erfcx(1.0)
    return float(min(1.0, left / (1 - left) / window))


__all__ = ["Path", "leak"]
