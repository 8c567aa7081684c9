"""The defect: the error in w that the model has caused over an interval, measured at the end, and its correction.

    δ = ∫ (F − F̂) dt

F̂ is the flow with the model of the last update.  δ has two causes.  First, T did not change as predicted.  The moments
of X, times the error of T, correct that; the correction is exact if T is quadratic in time.  Second, a gap remains.  A
*signed* correction of the impulse closes it.  A one-sided correction overshoots after an entry and leaves the
eigenvalue below 2 for tens of units.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dvi.solvers import ccp
from dvi.solvers.constants import CONSTANTS
from dvi.solvers.macro.model import Moments, StepContext, displaced
from dvi.solvers.macro.stage import SHARE, Pass, displacement
from dvi.solvers.protocol import Array, ConstrainedFlow, Frame, State, combine
from dvi.solvers.svec import smat, svec


@dataclass(frozen=True)
class Corrected:
    """The end of an interval after its corrections.

    Attributes:
        y: the state.
        X: mean of X over the last step, in the new frame, with its share of the correction.
        bend: the part of the defect that comes from T, in the norm of w, divided by the root of the interval's length
            H.
        slip: the same for the correction of the impulse.
        sag: how far an effective eigenvalue was above 2 before the correction.
        measured: whether something has oscillated, so that there was a defect to measure.
    """

    y: State
    X: Array
    bend: float = 0.0
    slip: float = 0.0
    sag: float = 0.0
    measured: bool = False

    def ratio(self, tol: float) -> float:
        """The defect divided by what an interval may leave: the tolerance, and an eigenvalue slightly above 2."""
        return max(self.bend / tol, self.slip / tol, self.sag / CONSTANTS.sag)


def correct(
    flow: ConstrainedFlow, context: StepContext, step: Pass, moments: Moments, new: Frame, R: Array
) -> Corrected:
    """Correct the model's error at the end of an interval.

    Args:
        context: the model, as it was in the interval's last step.
        step: that step.
        moments: moments of X over the interval.
        new, R: the new frame, with T, and the rotation from the old frame to it [k', k].

    Raises:
        DomainError: if the corrected state is outside the domain of P.
    """
    if not new.k:
        return Corrected(step.y, np.zeros((0, 0)))
    y, g = step.y, step.g
    H = y.t - context.spectrum.t
    lin = flow.linearised(y, g, new)
    X, rest = R @ step.mean @ R.T, H * (R @ step.X @ R.T)
    bend, measured = 0.0, False
    if moments.zeroth.any():
        S = R.T @ R  # of a direction that has left nothing is known, and nothing is taken back
        late = moments.bent(H, context.slope)
        foreseen = flow.linearised(y, g, context.ahead(H)).kick(S @ late @ S)
        change = combine([(1.0, lin.kick(R @ late @ R.T).parts), (-1.0, foreseen.parts)])
        bend, measured = displacement(flow, y, g, change, H) / H**SHARE, True
        if not np.isfinite(bend):
            return Corrected(y, X, bend)
        y = step.repaired(displaced(y, change))
        lin = flow.linearised(y, g, new)
    sag = max(0.0, -float(np.linalg.eigvalsh(lin.gap)[0]))
    # gap + β[Z − rest] ⪰ 0 ⟂ Z: the impulse that the end asks for against the one the stages were giving
    impulse = ccp.solve(smat(lin.beta @ svec(rest)) - lin.gap, lin.beta).X - rest
    flow.count_ccp()
    slip = 0.0
    if impulse.any():
        kick = lin.kick(impulse)
        slip = displacement(flow, y, g, kick.parts, H) / H**SHARE
        y = step.repaired(displaced(y, kick.parts))
        flow.velocity(y, g)  # still in the domain?
    return Corrected(y, X + impulse / H, bend, slip, sag, measured)
