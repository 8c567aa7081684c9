"""The constants of the macro step and of the eigen tracker: all in one place, each with its reason.

"Chosen on" names the problems on which a value was tried.  A constant with only a reason was not tuned.  "Digits"
stands for MLPs of 3,466 weights on scikit-learn's digits, with gradient descent, RMSProp-Norm and RMSProp.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Constants:
    """Dimensionless numbers, and times in unit times.

    Attributes:
        at_edge: an effective eigenvalue this close to 2 is at the edge.  The distance is far below the effect of an
            oscillation.
        band: an effective eigenvalue within this distance of 2 is watched: its constraint enters the complementarity
            problem.  With 0.016 the method lost its order (chosen on digits).
        overshoot: a step is rejected if it ends with an effective eigenvalue this far above 2: the model of the gap has
            failed.
        rough: a vector with a residual up to this serves as an eigenvector for a while, and in unit steps.
        unknown_rate: dλ/dt assumed before any measurement.  Progressive sharpening is rarely faster.
        sudden: factor by which an eigenvalue may speed up between two updates (chosen on a CNN on digits).  With 1 the
            first arrival is found 1.4 units early on an MLP.
        believed: measured slopes are extrapolated over this many times the interval of their measurement.  So it also
            limits the growth of the intervals between updates.  With 2 they cost a quarter more (chosen on digits).
        allowed: error over the tolerance up to which a step is accepted; an error above 1 shortens the next step.
        margin: factor by which the spectral radius, which sets the number of stages, may be underestimated.
        safety, change: those of the step controller; change is the least and the greatest factor between steps.
        resolved: tolerance over the amplitude √tr Σ of the oscillation.  With 0.1, 0.3 and 1 a small transformer takes
            64, 35 and 39 gradients a unit.  On digits the error in w is .0055 at 0.3 and .021 at 1 (chosen on a small
            transformer, digits).
        tolerances: bounds on that tolerance.
        sharp: residual of critical eigenvectors at a tolerance of 1e-3; it scales with the square root of the tolerance
            (chosen on digits).
        rest: a direction with less than this part of the largest variance counts as at rest.
        whole: number of updates per direction after which all pairs of third derivatives are computed (chosen on
            digits).
        unit_steps: number of unit steps before a longer step is tried again (chosen on a transformer with
            cross-entropy).
        window: unit times over which the budget is averaged.  The cost of unit steps is known only after that time.
        budget: gradients per unit time if the user gives none: ten times the cost of a usual case.
        unit_ahead: part of a unit step over which rates of eigenvalues are extrapolated (chosen on an MLP with
            cross-entropy).
        reach: an eigenvalue more than this below 2 is not sought; nothing rises so far in one step.
        far: residual of the leading eigenvector if it is far from 2, over its distance from 2; and its greatest value.
            An arrival is predicted from it, and it only has to be told apart.
        beside: a residual is small if it is at most this part of an eigenvalue, or of its distance from 2.
        steps: an update far from 2 is due after this many steps at the latest, since steps are short when something
            moves fast.
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
    reach: float = 1.2
    far: tuple[float, float] = (0.15, 0.2)
    beside: float = 0.05
    steps: float = 6.0

    @property
    def sag(self) -> float:
        """By how much an eigenvalue may exceed 2 between two updates of the model: a tenth of the band."""
        return 0.1 * self.band


CONSTANTS = Constants()
