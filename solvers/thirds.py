"""Which third derivatives a look takes anew.

T of k directions is k(k+1)/2 contractions of ∇³L, most of what a look costs.  But w is pushed by T[X] alone: by T[q, q]
along the k axes q of the oscillation.  The others only say how X answers to the gap.  There T as extrapolated from
earlier looks serves, as an old Jacobian serves Newton's method: what that leaves of the gap, the next look sees and
makes up for, and by how much it was off bounds the interval between looks.  So T is taken along the axes of X, and
whole once in 2k looks; where a direction is new, or has just arrived; and where nothing oscillates.  Where vectors turn
so fast that a neighbour is held with them (:func:`dvi.solvers.gap.coupled`), once in k looks, and at each if k is 2 or
the force has lately changed unforeseen.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from torch import Tensor

from dvi.solvers.critical import CRITICAL
from dvi.solvers.gap import oscillating
from dvi.solvers.here import Here
from dvi.solvers.interval import Slope, Taken, ahead
from dvi.solvers.protocol import Array, Flow, Frame, State, like
from dvi.solvers.svec import outer, skron
from dvi.solvers.watch import AT_EDGE, Sighting

_LAST = 2  # for so many looks for each direction a T that has followed its slopes is believed
_LAST_TURNING = 1  # … where they turn towards a neighbour that is held with them
_FORESEEN = 0.1  # in parts of how far w moved, what of the force may have changed unforeseen there
_ASIDE = 0.5  # a direction is new, or at rest, whose part outside what is known, or oscillates, is larger


def with_thirds(
    flow: Flow, end: State, new: Frame, seen: Sighting, here: Here, R: Array, X: Array
) -> tuple[Frame, Taken]:
    """The frame of a look with its third derivatives, and which of them were taken.

    Args:
        flow, end: where the look is made.
        new: the frame there, without T.
        seen: the eigenvalues there.
        here: what the last look knew.
        R: the rotation from its frame to the new one, [k', k].
        X: oscillation covariance at the end, in the last look's frame, [k, k].
    """
    axes = _axes(new.k, seen, here, R, X)
    if axes is None:
        return replace(new, T=flow.third_derivatives(end, new.U)), Taken(whole=end.t)
    foreseen = like(skron(R), new.U) @ ahead(here.frame, here.slope, end.t - here.seen.t).T
    squares = flow.third_derivatives(end, new.U @ like(axes, new.U), squares=True)
    return replace(new, T=nearest(foreseen, axes, squares)), Taken(axes, here.taken.looks + 1, here.taken.whole)


def tempered(slope: Slope | None, here: Here, R: Array, t: float) -> Slope | None:
    """The slope of T at t, where the last look did not take all of it.

    By what it was off there, it had come to be off since all were taken, and not in the last interval alone.
    """
    if slope is None or here.slope is None or here.taken.axes is None:
        return slope
    S = like(outer(R @ here.taken.axes), slope.T)
    turn = slope.T - like(skron(R), slope.T) @ here.slope.T
    late = 1 - (t - here.seen.t) / (t - here.taken.whole)
    return replace(slope, T=slope.T - late * (turn - S.T @ (S @ turn)))


def nearest(T: Tensor, axes: Array, squares: Tensor) -> Tensor:
    """The T [n, d] nearest to a given T with T[q, q] = ``squares`` [m, d] for orthonormal q, columns of axes [k, m]."""
    S = like(outer(axes), T)
    return T + S.T @ (squares - S @ T)


def _axes(k: int, seen: Sighting, here: Here, R: Array, X: Array) -> Array | None:
    """The axes of the oscillation in the new frame [k, k]; None where all third derivatives are needed."""
    if k < 2 or here.slope is None or not X.any():
        return None
    turning = here.coupling.bound > 0
    if here.taken.looks >= (_LAST_TURNING if turning else _LAST) * k:
        return None
    # Of two, what would be left out is the very pair that turns, to save a third.
    if turning and (k == 2 or not here.experience.pull * here.slope.span**2 < _FORESEEN):
        return None
    X = R @ X @ R.T
    active, Q = oscillating(X), np.linalg.eigh(X)[1]
    new = np.eye(k) - R @ here.slope.known @ R.T
    arrived = np.eye(k)[:, seen.eigenvalues[:k] > CRITICAL - AT_EDGE]
    aside = np.hstack([new, arrived - active @ (active.T @ arrived)])
    return None if np.linalg.norm(aside, 2) > _ASIDE else Q
