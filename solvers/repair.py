"""Trial states set back into the domain of P."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dvi.solvers.protocol import Flow, State


@dataclass(frozen=True)
class Repair:
    """Trial states of a step from ``start``, set back where they have left the domain of P.

    A second moment never becomes negative, but a stage of a method of second order may make it so where it is nearly
    zero, however short the step.  Entries of ν that were positive at the start of the step and are not in the trial
    state are set to what mere forgetting would have left of them, start · exp(−decay · h), which the exact flow of an
    average of squares cannot fall below.  This is done where, and only where, P(ν) would not be positive definite
    otherwise; whether it is, is decided on the device.
    """

    flow: Flow
    start: State
    decay: float  # per unit time

    @classmethod
    def towards(cls, flow: Flow, start: State) -> Repair:
        """With the decay of ν where there is no gradient."""
        return cls(flow, start, flow.nu_decay(start, torch.zeros_like(start.w)))

    def __call__(self, y: State) -> State:
        """A trial state y, or where it has left the domain of P, the same with ν set back inside."""
        if not pytree.tree_leaves(y.nu):
            return y
        inside = self.flow.in_domain(y)
        left = float(np.exp(-self.decay * max(y.t - self.start.t, 0.0)))

        def back(now: Tensor, before: Tensor) -> Tensor:
            return torch.where(inside | (now > 0) | ~(before > 0), now, left * before)

        return State(y.w, pytree.tree_map(back, y.nu, self.start.nu), y.t)
