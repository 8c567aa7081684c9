"""The macro step: a central flow for about the price of training.

Between breakpoints the flow is smooth and mildly stiff (its Jacobian has spectrum in [−2, small], because the effective
sharpness is at most 2), so a stabilised explicit method can take steps of many units.  What is expensive, a *look* at
the eigenvectors and third derivatives, is made when it is needed, every few steps once a run is settled; in between the
constraint is a model that is linear in w and exact in P(ν):

    1  the critical frame (U, T, M) of the last look, T extrapolated by its slope since the look before;
    2  RKC2 over the step on (w, ν, z): each stage costs one gradient and one CCP of Baumgarte type,
           X ⪰ 0  ⟂  γ gap + β[X] − α ⪰ 0,
       and z = ∫X dt collects the impulse;
    3  on with the same frame (:mod:`dvi.solvers.interval`), or a look: what T has bent meanwhile is made up for;
    4  there the impulse is corrected, with either sign, so that the constraint holds;
    5  X of the step is its impulse over h, stamped at the middle.

The step is controlled by an embedded estimate, and by how far the force of the oscillation changes unforeseen; it ends
where an eigenvalue is predicted to arrive at 2; how long an interval between looks may be, the last one teaches.  An
eigenvector towards which the critical ones turn fast is held with them, wherever its eigenvalue is
(:func:`dvi.solvers.gap.coupled`).  Where the force pulls back so fast that steps become tiny, stages follow the frame
instead of holding it (:mod:`dvi.solvers.followed`).  Errors may be tol·√h: with the same tol for every step, the many
short ones of a first transient would make nearly all of the error, which the flow then carries along.  Far from 2
there is no frame, and no eigenvectors are sought while none can have come near it (``Sighting.until``).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from dvi.solvers.critical import CriticalSubspace
from dvi.solvers.errors import DomainError, StepError
from dvi.solvers.followed import Followed
from dvi.solvers.gap import baumgarte, multiplier
from dvi.solvers.here import Here, evaluate
from dvi.solvers.hermite import hermite
from dvi.solvers.macro_attempt import ALLOWED, SHARE, Accepted, Attempt, Rejected, growth
from dvi.solvers.numbers import with_numbers
from dvi.solvers.protocol import Flow, Node, State, StepResult
from dvi.solvers.watch import Coupling, Watch, landing_at, node

#: In units of tol: an error estimate from which on a step that is no longer than its error makes no sense.
SENSELESS = 100.0


@dataclass(frozen=True)
class MacroMemory:
    """What the macro step wants to be given back.

    Attributes:
        h: the next step to try.
        here: what is known at the current state.
    """

    h: float
    here: Here | None = None


@dataclass(frozen=True)
class MacroStep:
    """Adaptive macro steps with an RKC2 inside; the default integrator.

    Args:
        tol: error allowed in a step of one unit time, in the norm of w (tol·√h in a step of h); the error of a run
            falls about like tol^0.55.
        h_min, h_max: bounds on the step, unit times.
        h_start: first step; a random initialisation has a transient.
        watch: how the critical eigenpairs are followed (default: as sharply as tol asks for).
        max_rejections: in a row, before giving up.

    Raises:
        ValueError: if tol is not positive or the bounds are not 0 < h_min ≤ h_start ≤ h_max.
    """

    tol: float = 1e-3
    h_min: float = 1 / 256
    h_max: float = 20.0
    h_start: float = 0.25
    watch: Watch | None = None
    max_rejections: int = 25

    def __post_init__(self) -> None:
        with_numbers(self)
        if not self.tol > 0:
            raise ValueError(f"MacroStep(tol={self.tol}): tol must be positive; 1e-3 is the default.")
        if not 0 < self.h_min <= self.h_start <= self.h_max:
            raise ValueError("MacroStep: bounds on the step must satisfy 0 < h_min <= h_start <= h_max (unit times).")

    @property
    def following(self) -> Watch:
        """How the critical eigenpairs are followed."""
        if self.watch is not None:
            return self.watch
        sharp = 3e-3 * min(1.0, (self.tol / 1e-3) ** 0.5)
        # Of 200 look-arounds with eight products (d = 3,000) all find an eigenvalue 0.5 above ten others, 95 % one 0.2
        # above them.
        return Watch(CriticalSubspace(tol=sharp, krylov=8), survey_every=100.0, survey_soonest=25.0)

    def init(self, flow: Flow, y: State) -> MacroMemory:
        """The first step is short."""
        return MacroMemory(self.h_start)

    def horizon(self, memory: MacroMemory) -> float:
        """How near the end decides about a step: it is reached in two steps rather than in a long and a tiny one."""
        return 1.7 * min(memory.h, self.h_max)

    def step(self, flow: Flow, memory: MacroMemory, y: State, h: float) -> StepResult:
        """One accepted step of at most h unit times.

        Raises:
            StepError: if a step of h_min still leaves the finite numbers or the domain of P, or has an error estimate
                above 100 tol that exceeds its own length.  With a smaller excess it is taken, and ``strain`` tells.
        """
        watch = self.following
        here = memory.here or evaluate(flow, watch, y, None, memory.h)
        size, landing = memory.h, True
        for attempt in range(self.max_rejections):
            size = min(size, self.h_max)
            length = size
            if landing and flow.constrained:
                room = here.until - y.t
                if not here.frame.k:  # with nothing held a step is long, and nothing else would make it look around
                    room = min(room, max(watch.due(here.seen) - y.t, self.h_start))
                followed = here.frame.k if Followed.suits(here, y, size) else 0
                length = landing_at(here.seen, y.t, min(size, room), self.h_start, here.approach, followed)
            length = h if length >= h * (1 - 1e-9) else (h / 2 if 1.6 * length > h else length)
            final = length <= self.h_min * 1.01 or h <= self.h_min
            closing = length >= h * (1 - 1e-9) or not landing
            try:
                kind = Followed if Followed.suits(here, y, length) else Attempt
                tried = kind(flow, watch, self.tol, here, y, length, final, closing).run()
            except DomainError as error:
                if final:
                    raise StepError(
                        f"MacroStep at t = {y.t:g}: a step of {length:g} still fails: {error} "
                        "Lower lr, warm-start with real optimizer steps, or lower h_min."
                    ) from error
                size, landing = max(self.h_min, length / 2), False
                continue
            if isinstance(tried, Rejected) and kind is Followed:
                here, size = replace(here, stiffness=tried.stiffness), max(self.h_min, tried.h)
                continue
            if isinstance(tried, Rejected):
                size, landing = max(self.h_min, tried.h), False
                # What was taken on trust may be why: look.  With directions held, the step's own error comes first.
                if flow.constrained and here.seen.t < y.t and (not here.frame.k or attempt):
                    here = evaluate(flow, watch, y, here.seen, size, (here.loss, here.g), here.coupling)
                elif tried.pulled and not here.coupling.bound and here.neighbour:
                    here = evaluate(flow, watch, y, here.seen, size, (here.loss, here.g), Coupling(here.frame.k + 1))
                continue
            self._require_sense(y, length, tried)
            return self._accept(flow, here, y, length, size, tried)
        raise StepError(
            f"MacroStep at t = {y.t:g}: {self.max_rejections} rejections in a row. Loosen tol, or use Euler(0.25) to "
            "see what happens there."
        )

    def observe(self, flow: Flow, memory: MacroMemory, y: State) -> Node:
        """What is known at y, eigenvalues after a look if need be; X is that of the last CCP of Baumgarte type."""
        here = memory.here or evaluate(flow, self.following, y, None, memory.h)
        if flow.constrained and here.seen.t < y.t:
            here = evaluate(flow, self.following, y, here.seen, memory.h, (here.loss, here.g))
        lin = flow.linearised(y, here.g, here.frame)
        X = multiplier(flow, lin, baumgarte(memory.h), None)
        return node(flow, y.t, here.loss, here.g, here.seen, here.frame, X, y.t, lin.drift(X))

    # ---- inside ---------------------------------------------------------------------------------------

    def _accept(self, flow: Flow, here: Here, y: State, length: float, tried: float, new: Accepted) -> StepResult:
        grown = length * growth(self.tol, new.error)
        # A step that was cut to land says little about the next one; if that is too long, it costs its stages only.
        h = max(0.9 * tried, grown) if length < 0.7 * tried else grown
        h = float(np.clip(h, self.h_min, self.h_max))
        middle = y.t + 0.5 * length
        largest = max(new.error, new.bend)
        strain = largest / self.tol if largest > ALLOWED * self.tol else 0.0
        begin = node(flow, y.t, here.loss, here.g, here.seen, new.X_frame, new.X, middle, new.rate, here.approach)
        inside = hermite(y, new.y, new.rate, new.end_rate)
        return StepResult(new.y, MacroMemory(h, new.here), begin, inside, strain, new.missed)

    def _require_sense(self, y: State, length: float, new: Accepted) -> None:
        """Refuse a step, as short as allowed, whose error estimate is both far above tol and longer than the step."""
        error, moved = new.error * length**SHARE, float((new.y.w - y.w).norm())
        if new.error > SENSELESS * self.tol and error > moved:
            raise StepError(
                f"MacroStep at t = {y.t:g}: a step of {length:g} moves w by {moved:.2g} with an error estimate of "
                f"{error:.2g}, {new.error / self.tol:.0f} times what tol allows. Lower h_min, lower lr, or use "
                "Euler(0.25) to see what happens there."
            )
