"""What a macro step knows where it starts: loss and gradient, the last look at the eigenvectors, the critical frame."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from dvi.solvers.bending import Past
from dvi.solvers.critical import CRITICAL
from dvi.solvers.interval import UNKNOWN, WHOLE, Experience, Moments, Slope, Taken
from dvi.solvers.protocol import Flow, Frame, State
from dvi.solvers.watch import LOOSE, Approach, Coupling, Sighting, Watch, empty_frame

_LASTING = 3  # short steps in a row
_VAIN = 2  # followed steps in a row that do not pay
_MORE = 1.5  # by how much the rate is taken to be larger after a step that has failed


@dataclass(frozen=True)
class Stiffness:
    """How fast the force pulls back, where stages must follow the frame for it.

    Attributes:
        rate: per unit time, for which stages are chosen: at first as the change of the force over a frozen step shows,
            then as the right side has it.
        times: short steps with a frozen frame in a row that it has cost; the frame is followed from the third on.
        direction: the one along which it pulls back fastest [d] (None: not known).
        factor: by which the rate is larger than at the start of a step, as far as steps have failed by it.
        held: how long the last step with a frozen frame was.
        vain: followed steps in a row that cost more per unit time than such short ones, and do not grow.
    """

    rate: float
    times: int = _LASTING
    direction: Tensor | None = None
    factor: float = 1.0
    held: float = 0.0
    vain: int = 0

    @property
    def lasting(self) -> bool:
        """Is it to be followed?"""
        return self.times >= _LASTING

    def more(self) -> Stiffness:
        """What to take after a step that has failed: it may have had too few stages."""
        return replace(self, factor=_MORE * self.factor)

    def passed(self, pays: bool) -> Stiffness | None:
        """What to take next after a step that was accepted; nothing if following has not paid for some steps."""
        vain = 0 if pays else self.vain + 1
        return replace(self, factor=0.5 * (1 + self.factor), vain=vain) if vain < _VAIN else None


@dataclass(frozen=True)
class Here:
    """All that is known at the start of a step.

    Attributes:
        loss, g: there.
        seen, frame: the last look at the eigenvectors, and the critical frame then.
        slope: how they had changed since the look before it, if there was one.
        anchor: the weights for which the frame's T speaks (None: those of the frame).
        owed: moments of X since the look (None: it was made here).
        approach: where the eigenvalues in the frame are, and go (None: not known).
        until: the moment until which there is no need to look.
        coupling: which directions of the frame must stay in it, wherever their eigenvalues go (see ``gap.coupled``).
        experience: how far the model of the last interval was off at its end.
        taken: which third derivatives the last look took (by default all of them).
        past: what the last look leaves to learn from about how the force bends.
        stiffness: how fast the force pulls back, where that keeps steps short (None: it does not).
    """

    loss: float
    g: Tensor
    seen: Sighting
    frame: Frame
    slope: Slope | None = None
    anchor: Tensor | None = None
    owed: Moments | None = None
    approach: Approach | None = None
    experience: Experience = UNKNOWN
    until: float = np.inf
    coupling: Coupling = LOOSE
    taken: Taken = WHOLE
    past: Past | None = None
    stiffness: Stiffness | None = None

    @property
    def neighbour(self) -> bool:
        """Is there an eigenvector beyond the frame whose eigenvalue is less than 1 below 2?"""
        beyond = self.seen.eigenvalues[self.frame.k :]
        return bool(self.frame.k and len(beyond) and beyond[0] > CRITICAL - 1)


def evaluate(
    flow: Flow,
    watch: Watch,
    y: State,
    last: Sighting | None,
    h: float,
    known: tuple[float, Tensor] | None = None,
    coupling: Coupling = LOOSE,
) -> Here:
    """All that a step from y needs to know; ``known``: loss and gradient, if at hand."""
    if known is None:
        loss, g = flow.value_and_grad(y)
        known = float(loss), g
    if not flow.constrained:
        return Here(*known, watch.glance(flow, y, last), empty_frame(flow, y))
    seen = watch.look(flow, y, last, h, coupling=coupling)
    frame = critical_frame(flow, y, seen, watch.critical(seen, h, coupling=coupling))
    return Here(*known, seen, frame, coupling=coupling)


def critical_frame(flow: Flow, y: State, seen: Sighting, k: int, third: bool = True) -> Frame:
    """The frame of k critical eigenvectors; where oscillations act on ν inside a step, the eigenvalue is 2."""
    return replace(seen.frame(flow, y, k, third), on_edge=True)
