"""Decoupled weight decay: w_{t+1} = (1 − γ)w_t − P⁻¹m_t, weight by weight.

The weights are then a state that forgets: w_{t+1} = w_t + f with f = −γw_t − P⁻¹m_t, ∂f/∂w = −γ.  How far they move in
a time h while m is held follows as for ν (:mod:`dvi.compiler.exact_rates`):

    w(t+h) = w(t) − ((1 − (1−γ)ʰ)/γ) (γw(t) + P⁻¹m),        dw/dt = (log(1−γ)/γ) (γw + P⁻¹m),

to leading order −(γw + P⁻¹m).  At h = 1 it is the optimizer's own step.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dvi.compiler import exact_rates


@dataclass(frozen=True)
class Decay:
    """γ, a tensor [d] or []."""

    gamma: Tensor

    @property
    def share(self) -> Tensor:
        """1 − γ/2: by P̃ = (c/2)P(I − Γ/2), the flow moves at κ(1 − γ/2) times the speed of its P̃."""
        return 1 - 0.5 * self.gamma

    def span(self, h: float) -> Tensor:
        """(1 − (1−γ)ʰ)/γ: for how long a push acts that is held over h; h itself where γ = 0."""
        return exact_rates.factor(-self.gamma, h)


def entrywise(factor: Tensor, V: Tensor) -> Tensor:
    """Factor ⊙ V for V [d] or [d, k]."""
    return factor[:, None] * V if factor.ndim and V.ndim > 1 else factor * V


__all__ = ["Decay", "entrywise"]
