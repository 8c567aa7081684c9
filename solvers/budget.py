"""What a run has spent per unit time over the last few units.  All integrators with a budget= use this count."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from dvi.solvers.constants import CONSTANTS
from dvi.solvers.protocol import Array


@dataclass(frozen=True)
class Spending:
    """Gradient equivalents of the last steps.

    Attributes:
        steps: one row (t, gradient equivalents) per step, [n, 2]; t is the end of the step.
    """

    steps: Array = field(default_factory=lambda: np.zeros((0, 2)))

    def after(self, t: float, cost: float) -> Spending:
        """The record with one more step, which ended at t; steps older than the window are dropped."""
        return Spending(np.vstack([self._window(t), [[t, cost]]]))

    def per_unit_time(self, t: float) -> float:
        """Mean cost per unit time over the window that ends at t; of a younger run, what it will be at least."""
        return float(self._window(t)[:, 1].sum()) / CONSTANTS.window

    def since(self, begin: float) -> float:
        """Spent in the steps that ended after that time, as far as they are in the window."""
        return float(self.steps[self.steps[:, 0] > begin, 1].sum())

    def _window(self, t: float) -> Array:
        return self.steps[self.steps[:, 0] > t - CONSTANTS.window]
