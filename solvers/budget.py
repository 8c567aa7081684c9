"""What a run spends per unit time, counted over the last units: all integrators with a budget= ask here."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from dvi.solvers.constants import CONSTANTS
from dvi.solvers.protocol import Array


@dataclass(frozen=True)
class Spending:
    """Gradient equivalents of the last steps.

    Attributes:
        steps: (t, gradient equivalents), t the end of each, [n, 2].
    """

    steps: Array = field(default_factory=lambda: np.zeros((0, 2)))

    def after(self, t: float, cost: float) -> Spending:
        """With one more step, which ended at t; what is older than the window is forgotten."""
        return Spending(np.vstack([self._window(t), [[t, cost]]]))

    def per_unit_time(self, t: float) -> float:
        """On average over the window before t."""
        return float(self._window(t)[:, 1].sum()) / CONSTANTS.window

    def _window(self, t: float) -> Array:
        return self.steps[self.steps[:, 0] > t - CONSTANTS.window]
