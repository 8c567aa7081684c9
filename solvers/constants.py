"""The constants of the macro step and of the eigen tracker: all in one place, each with its reason.

"Chosen on" names the problems on which a value was tried; what has only a reason was not tuned.  Digits stands for MLPs
of 3,466 weights on scikit-learn's digits, with gradient descent, RMSProp-Norm and RMSProp.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Constants:
    """Dimensionless numbers, and times in unit times.

    Attributes:
        at_edge: an effective eigenvalue is at the edge when it is this close to 2: far below what an oscillation shows.
        band: one within this of 2 is watched: its constraint is in the complementarity problem.  0.016 lost the order
            of the method (chosen on digits).
        overshoot: a step that ends with one this far above 2 is taken back: the model of the gap has failed.
        rough: a residual up to which a vector serves as an eigenvector for a while, and in unit steps.
        unknown_rate: dλ/dt while nothing is known.  Progressive sharpening is rarely faster.
        sudden: by how much an eigenvalue may speed up between two looks (chosen on a CNN on digits).  With 1 the first
            arrival is found 1.4 units early on an MLP.
        believed: for how many times as long as it took to measure them slopes are believed, and so how much longer than
            the last one an interval between updates may be.  With 2 they cost a quarter more (chosen on digits).
        allowed: error over the tolerance up to which a step is accepted; what is above 1 shortens the next one.
        margin: by how much the spectral radius that sets the number of stages may be underestimated, as a factor.
        safety, change: of the step controller, the usual ones; change: least and most from step to step.
        resolved: tolerance over the amplitude √tr Σ of the oscillation.  0.1, 0.3 and 1 take 64, 35 and 39 gradients a
            unit on a small transformer, with errors in w of .0055 at 0.3 and .021 at 1 on digits (chosen on a small
            transformer, digits).
        tolerances: bounds on that tolerance.
        sharp: residual of critical eigenvectors at a tolerance of 1e-3; it follows its root (chosen on digits).
        rest: a direction with less than this part of the largest variance is as good as at rest.
        whole: updates for each direction after which all pairs of third derivatives are taken (chosen on digits).
        unit_steps: taken before a longer step is tried again (chosen on a transformer with cross-entropy).
        window: unit times over which the budget is averaged; what unit steps cost is known only after so many.
        budget: gradients per unit time where none is given: ten times what a usual case costs.
        unit_ahead: part of a unit step for which eigenvalues' rates are believed (chosen on an MLP with cross-entropy).
    """

    at_edge: float = 1e-3
    band: float = 0.05
    overshoot: float = 0.2
    rough: float = 0.02
    unknown_rate: float = 0.2
    sudden: float = 4.0
    believed: float = 3.0
    allowed: float = 4.0
    margin: float = 1.1
    safety: float = 0.85
    change: tuple[float, float] = (0.3, 2.0)
    resolved: float = 0.3
    tolerances: tuple[float, float] = (1e-3, 1.0)
    sharp: float = 3e-3
    rest: float = 1e-2
    whole: float = 2.0
    unit_steps: float = 15.0
    window: float = 20.0
    budget: float = 100.0
    unit_ahead: float = 0.25

    @property
    def sag(self) -> float:
        """By how much an eigenvalue may exceed 2 between two updates of the model: a tenth of the band."""
        return 0.1 * self.band


CONSTANTS = Constants()
