"""Trial states set back into the domain of P."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dvi.solvers.protocol import SmoothFlow, State


@dataclass(frozen=True)
class Repair:
    """Trial states of a step from ``start``, set back where they have left the domain of P.

    A second moment never becomes negative, but a stage of a method of second order may make it so where it is nearly
    zero, however short the step.  Entries of ν that were positive at the start of the step and are not in the trial
    state are set to what mere forgetting would have left of them, start · exp(−decay · h), which the exact flow of an
    average of squares cannot fall below.  This is done where, and only where, P(ν) would not be positive definite
    otherwise.

    Args:
        flow, start: of the step.
        decay: how fast ν forgets there, per unit time, if it is known; then all is decided on the device, where the
            device can tell whether P is positive definite.
    """

    flow: SmoothFlow
    start: State
    decay: float | None = None

    def __call__(self, y: State) -> State:
        """A trial state y, or where it has left the domain of P, the same with ν set back inside."""
        pairs = list(zip(pytree.tree_leaves(y.nu), pytree.tree_leaves(self.start.nu), strict=True))
        if not pairs:
            return y
        sound = None if self.decay is None else self.flow.sound(y)
        if sound is None:
            # Nothing to set back is the usual case; then P need not be made only to be looked at.
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
