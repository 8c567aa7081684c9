"""Chooses the length of the next step, or of the next interval between updates, from the error of the last."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dvi.solvers.constants import CONSTANTS


@dataclass(frozen=True)
class StepController:
    """The elementary controller: the error divided by the tolerance is taken to fall like h^order.

    Attributes:
        order: of that ratio.  An estimate of order h³ against a tolerance of order √h has 5/2.
    """

    order: float

    def factor(self, ratio: float, most: float = CONSTANTS.change[1]) -> float:
        """The factor by which the next step may be longer (at most ``most``) or must be shorter.

        Args:
            ratio: error over tolerance.
            most: the largest factor.  The least is ``change[0]``.
        """
        factor = CONSTANTS.safety * max(ratio, 1e-300) ** (-1 / self.order)
        return float(np.clip(factor, CONSTANTS.change[0], most))


__all__ = ["StepController"]
