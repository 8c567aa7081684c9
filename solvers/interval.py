"""The interval between two looks at the eigenvectors: what is foreseen in it, and what is owed at its end.

A look costs a block of products with the Hessian and k to k(k+1)/2 third derivatives, a step some six gradients.  So
looks are made when they are needed, not at every step: in between T follows its slope from the look before, the gap is
linear in w, and the moments of X are kept, from which the next look makes up for what T has bent meanwhile.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from dvi.solvers.protocol import Array, Flow, Frame, State, host, like
from dvi.solvers.svec import skron
from dvi.solvers.watch import Sighting

#: How many intervals ahead the slopes of the last one are believed.
FARTHEST = 3.0
_SHARED = 0.5  # overlap from which on a direction counts as one of both frames
_GENTLE = 0.1  # a change of T, in parts of it, up to which its slope is believed where k has changed
_KNOWN = 0.9  # … and as the same vector, whose slope is then known


@dataclass(frozen=True)
class Slope:
    """How T and the eigenvectors changed from one look to the next, per unit time.

    Attributes:
        T: [n, d], in the later frame; zero for pairs of which one direction is new, and for all where k has changed and
            T has, much.
        V: eigenvectors [d, m]; zero for new ones.
        span: unit times between the two looks.
        known: projector [k, k] on the directions of which T's slope is known.
    """

    T: Tensor
    V: Tensor
    span: float
    known: Array

    @classmethod
    def between(cls, old: Frame, before: Sighting, new: Frame, seen: Sighting) -> Slope | None:
        """From the frames and sightings of two looks; None if they were made at the same time."""
        span = seen.t - before.t
        if span <= 0:
            return None
        V, V_old = seen.block.V, before.block.V
        (overlap,) = host(V_old.T @ V)
        known = np.linalg.norm(overlap, axis=0) > _KNOWN
        turned = like(partial_isometry(overlap), V)
        R = partial_isometry(overlap[: old.k, : new.k].T)
        both = R @ R.T
        if not old.k or not new.k:
            change = torch.zeros_like(new.T)
        else:
            change = like(skron(both), new.T) @ new.T - like(skron(R), new.T) @ old.T
            # Where directions come and go while T turns over, what those that stay had is no guide to what they will.
            if old.k != new.k and float(change.norm()) > _GENTLE * float(new.T.norm()):
                change, both = torch.zeros_like(new.T), np.zeros_like(both)
        return cls(change / span, (V - V_old @ turned) * like(known / span, V), span, both)

    def covers(self, X: Array) -> bool:
        """Is T's slope known wherever X oscillates (but for a quarter of it)?"""
        size = float(np.abs(X).sum())
        return float(np.abs(X - self.known @ X @ self.known).sum()) <= 0.25 * size


@dataclass(frozen=True)
class Moments:
    """∫X sʲ ds for j = 0, 1, 2, s the time since the last look; in that look's frame, [k, k] each."""

    zeroth: Array
    first: Array
    second: Array

    @classmethod
    def none(cls, k: int) -> Moments:
        """No oscillation so far."""
        return cls(*(np.zeros((k, k)) for _ in range(3)))

    def after(self, X: Array, s: float, h: float) -> Moments:
        """With X constant from s to s + h."""
        first, second = h * (s + h / 2), h * (s * s + s * h + h * h / 3)
        return Moments(self.zeroth + h * X, self.first + first * X, self.second + second * X)

    def bent(self, H: float, slope: Slope | None) -> Array:
        """The impulse on which what T is off at the end of an interval H, from its extrapolation, has acted.

        T is quadratic in time through the last three looks, and off by a part s(s + a)/H(H + a) of that at s, a the
        length of the interval before; where its slope is not known it is linear, and off by s/H.
        """
        linear: Array = self.first / H
        if slope is None:
            return linear
        quadratic = (self.second + slope.span * self.first) / (H * (H + slope.span))
        bent: Array = linear + slope.known @ (quadratic - linear) @ slope.known
        return bent


@dataclass(frozen=True)
class Taken:
    """Which third derivatives the last look took.

    Attributes:
        axes: those along these orthonormal directions of its frame, [k, k]; None: all.
        looks: how many looks it has been since all were taken.
        whole: when that was.
    """

    axes: Array | None = None
    looks: int = 0
    whole: float = np.nan


WHOLE = Taken()


@dataclass(frozen=True)
class Experience:
    """What the last interval taught: by how much its model was off, in units of what it grows like.

    Attributes:
        bend: displacement of w that the bend of T was worth, over tr ∫X s(s + a) ds (nan: not known).
        slip: displacement of w that brought the gap back to zero, over H².
        sag: by how much an effective eigenvalue was above 2 before that, over H².
        pull: the change of the force that was not foreseen, in parts of how far w had moved, over H².
    """

    bend: float = np.nan
    slip: float = np.nan
    sag: float = np.nan
    pull: float = np.nan

    #: What of the tolerance, tol·√H, a displacement that is owed may take; by how much 2 may be passed; what part of a
    #: displacement the force may give back.
    SHARE = 0.5
    SAG = 0.005
    PULL = 0.25

    def allows(self, tol: float, H: float, owed: Moments, slope: Slope) -> bool:
        """May the interval be H long, with these moments at its end?"""
        acted = float(np.trace(owed.second + slope.span * owed.first))
        bend = self.bend * acted if acted else 0.0
        budget = self.SHARE * tol * H**0.5
        slip, sag, pull = (H**2 * x for x in (self.slip, self.sag, self.pull))
        return bool(bend <= budget and slip <= budget and sag <= self.SAG and pull <= self.PULL)


UNKNOWN = Experience()


def ahead(frame: Frame, slope: Slope | None, s: float) -> Frame:
    """The frame a time s after its look: T extrapolated, where a slope is known."""
    if slope is None or not frame.k:
        return frame
    return replace(frame, T=frame.T + min(s, FARTHEST * slope.span) * slope.T)


def vectors_ahead(seen: Sighting, slope: Slope | None, t: float) -> Tensor | None:
    """The eigenvectors extrapolated to the time t; None without a slope."""
    if slope is None:
        return None
    return seen.block.V + min(t - seen.t, FARTHEST * slope.span) * slope.V


def basis_ahead(flow: Flow, y: State, frame: Frame, seen: Sighting, slope: Slope | None) -> Frame:
    """The frame with U (and HU = 2PU, as on the edge) where it will be at y; for what is recorded."""
    V = vectors_ahead(seen, slope, y.t)
    if V is None or not frame.k:
        return frame
    U = flow.basis(y, V[:, : frame.k])
    return replace(frame, U=U, HU=2 * flow.precondition(y, U))


def partial_isometry(overlap: Array) -> Array:
    """The rotation that an overlap of two frames stands for; zero on what they do not share."""
    left, size, right = np.linalg.svd(overlap, full_matrices=False)
    shared = size > _SHARED
    nearest: Array = left[:, shared] @ right[shared]
    return nearest
