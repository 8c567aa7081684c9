"""Moves trial states back into the domain of P."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dvi.solvers.protocol import SmoothFlow, State


@dataclass(frozen=True)
class Repair:
    """Moves trial states of a step from ``start`` back into the domain of P.

    An exact second moment never becomes negative.  But a stage of a second-order method may make a nearly zero one
    negative, however short the step.  Entries of ν that were positive at the start of the step and are not in the trial
    state are set to start · exp(−decay · h).  The exact flow of an average of squares cannot fall below that value.
    This is done only if P(ν) would otherwise not be positive definite.

    Args:
        flow, start: of the step.
        decay: the decay rate of ν there, per unit time, if known.  Then the decision needs no transfer from the device,
            provided that the device can tell whether P is positive definite.
    """

    flow: SmoothFlow
    start: State
    decay: float | None = None

    def __call__(self, y: State) -> State:
        """A trial state y; if it has left the domain of P, ν is moved back inside."""
        pairs = list(zip(pytree.tree_leaves(y.nu), pytree.tree_leaves(self.start.nu), strict=True))
        if not pairs:
            return y
        sound = None if self.decay is None else self.flow.sound(y)
        if sound is None:
            # Usually nothing must be moved; then P need not be computed just for this check.
            if not any(bool(((before > 0) & ~(now > 0)).any()) for now, before in pairs) or self.flow.in_domain(y):
                return y
            sound = torch.zeros((), dtype=torch.bool, device=y.w.device)
        decay = self.decay
        if decay is None:
            decay = self.flow.nu_decay(self.start, torch.zeros_like(self.start.w))
        left = float(np.exp(-decay * max(y.t - self.start.t, 0.0)))

        def back(now: Tensor, before: Tensor) -> Tensor:
            return torch.where(sound | (now > 0) | ~(before > 0), now, left * before)

        return State(y.w, pytree.tree_map(back, y.nu, self.start.nu), y.t)
