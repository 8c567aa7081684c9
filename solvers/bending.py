"""What the end of an interval learns about how the force of oscillations bends; see :mod:`dvi.solvers.secant`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dvi.solvers.gap import closing
from dvi.solvers.protocol import Array, Flow, Frame, Linearised, Rate, State, combine, host
from dvi.solvers.secant import Secant

#: Of (w, ν).
Change = tuple[Tensor, Any]

_REVERSED = -0.8  # cosine between two corrections in a row up to which the second one takes the first one back


def displaced(y: State, change: Change) -> State:
    """The state with that change, at the same moment."""
    w, nu = combine([(1.0, y.parts), (1.0, change)])
    return State(w, nu, y.t)


@dataclass(frozen=True)
class Past:
    """What a look leaves for the next one to learn from.

    Attributes:
        w, T: where T was looked at [d], before the corrections, and what was seen there [n, d].
        correction: of w [d], for the change of T.
        step, turn: the displacement of w [d] and the change of T [n, d] since the look before.
    """

    w: Tensor
    T: Tensor
    correction: Tensor
    step: Tensor
    turn: Tensor

    def reversed_by(self, c: Tensor) -> bool:
        """Does the correction c [d] take the last one back?"""
        inner, size = float(self.correction @ c), float(self.correction.norm() * c.norm())
        return inner < _REVERSED * size


@dataclass
class Bending:
    """Displacements of w, and how T and the force changed over them, the last one first.

    What is learned of the force is its part along the constraint: X takes the rest back, and across it T may turn a
    hundred times faster.

    Attributes:
        flow, end, g: where that is learned, and the gradient there.
        frame, lin: the frame of the look, and the flow linearised with it.
        critical: those directions of the frame that are at the edge [k, a].
        impulse: ∫X dt of the interval, in that frame [k, k].
        steps [d], turns [n, d], forces: the displacements, and the changes of T and of what the impulse does to (w, ν).
    """

    flow: Flow
    end: State
    g: Tensor
    frame: Frame
    lin: Linearised
    critical: Array
    impulse: Array
    steps: list[Tensor] = field(default_factory=list)
    turns: list[Tensor] = field(default_factory=list)
    forces: list[Change] = field(default_factory=list)
    secant: Secant = field(init=False)  # from what has been added

    @cached_property
    def now(self) -> Rate:
        """What the impulse does to (w, ν)."""
        return self.lin.kick(self.impulse)

    def add(self, step: Tensor, turn: Tensor) -> None:
        """Over a displacement T changed by ``turn``."""
        then = self.flow.linearised(self.end, self.g, replace(self.frame, T=self.frame.T - turn)).kick(self.impulse)
        self.steps.append(step)
        self.turns.append(turn)
        self.forces.append(self.along(combine([(1.0, self.now.parts), (-1.0, then.parts)])))
        Y = torch.stack([force[0] for force in self.forces], dim=1)
        self.secant = Secant.of(torch.stack(self.steps, dim=1), Y, self.flow.precondition(self.end, Y))

    @property
    def stiff(self) -> bool:
        """Does the force pull back so strongly that it matters?"""
        return self.secant.stiff

    def along(self, change: Change) -> Change:
        """What is left of a change of (w, ν) once the constraint has taken its part back."""
        if not self.critical.shape[1]:
            return change
        opened = self.flow.linearised(displaced(self.end, change), self.g, self.frame).gap - self.lin.gap
        back = self.lin.kick(closing(self.lin, opened, self.critical))
        left: Change = combine([(1.0, change), (1.0, back.parts)])
        return left

    def pull(self, foreseen: Rate) -> float:
        """What of the force was not foreseen in parts of how far w moved; where it rests, of a tenth of the force."""
        both = torch.stack([self.now.w - foreseen.w, self.steps[0], 0.1 * self.now.w], dim=1)
        (squares,) = host((both * self.flow.precondition(self.end, both)).sum(dim=0, keepdim=True))
        size = squares[0].clip(0.0)
        return float(np.sqrt(size[0] / size[1:].max())) if size[1:].any() else 0.0

    def implicit(self, change: Change) -> Change:
        """A change of (w, ν), and half of what the force changes by over that."""
        parts = zip(self.secant.implicit(change[0]), self.forces, strict=True)
        both: Change = combine([(1.0, change), *((0.5 * part, force) for part, force in parts)])
        return both

    def turned(self, d: Tensor) -> Tensor:
        """T [n, d] after a displacement d [d] more: what that changes is parts of what the others have."""
        T = self.frame.T
        for part, turn in zip(self.secant.parts(d), self.turns, strict=True):
            T = T + part * turn
        return T

    def past(self, correction: Tensor) -> Past:
        """For the next look."""
        return Past(self.end.w, self.frame.T, correction, self.steps[0], self.turns[0])
