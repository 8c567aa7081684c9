"""Unit steps: one explicit step per step of the optimizer, where the oscillation's force is too stiff to resolve.

There, a finer step would resolve a feature many times smaller than the oscillation itself, which the optimizer does not
see.  A unit step takes X from the constraint at its end, as Euler's method does, but with averaged third derivatives:

    T̄ ← ½ (T + R T̄),    X ⪰ 0  ⟂  gap/dt + β[X] − α ⪰ 0,    dt = 1,

where R is the transport from the last frame (new directions take T itself).  The average damps alternating errors: the
largest stable rate of the force rises from 2 to 6 per unit time.  Above that rate the effective sharpness overshoots.
While it still rises, dt is halved, until half the budget is spent.

Where the effective sharpness S exceeds 2, Euler's method itself is unstable, as the optimizer is: in a step of one unit
it multiplies a displacement along the direction by 1 − S.  In the flow the displacement decays.  So w decays along the
frame's directions at the rates of their eigenvalues, exactly.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from dvi.solvers import ccp
from dvi.solvers.constants import CONSTANTS
from dvi.solvers.eigen.block_method import CRITICAL
from dvi.solvers.eigen.tracker import EigenTracker, SpectrumEstimate
from dvi.solvers.errors import StepError
from dvi.solvers.macro.model import third_derivatives, transport
from dvi.solvers.nodes import node
from dvi.solvers.protocol import Array, ConstrainedFlow, Frame, Node, Rate, State, like
from dvi.solvers.repair import Repair
from dvi.solvers.svec import skron


@dataclass(frozen=True)
class UnitMemory:
    """The state of unit steps between two calls.

    Attributes:
        spectrum: the eigenpairs of the last step.
        frame, X: the last frame, with the averaged T, and the oscillation in it [k, k].
        begin, until: when unit steps began, and when to try a longer step again.
        dt: the next step, at most one unit.
        partial: number of steps since all third derivatives were computed.
    """

    spectrum: SpectrumEstimate
    frame: Frame
    X: Array
    begin: float
    until: float
    dt: float = 1.0
    partial: int = 0


def unit_step(
    flow: ConstrainedFlow, tracker: EigenTracker, memory: UnitMemory, y: State, h: float, shortest: float = 0.0
) -> tuple[State, UnitMemory, Node]:
    """One step of at most one unit: its end, the memory there, and the node at its beginning.

    Args:
        flow, tracker, memory, y: the flow, how its eigenpairs are followed, the memory, and the state.
        h: the longest step asked for.
        shortest: the shortest step allowed, unless h is shorter.

    Raises:
        StepError: if the result is not finite.
    """
    loss, g = flow.value_and_grad(y)
    # Overshooting makes the eigenvalues' rates noisy: they are believed for a part of the step only.
    soon = CONSTANTS.unit_ahead * memory.dt
    now = tracker.update(flow, y, memory.spectrum, soon)
    above, dt = now.eigenvalues[0] - CRITICAL, memory.dt
    if above < CONSTANTS.band:
        dt = min(1.0, 2 * dt)
    elif above > CONSTANTS.overshoot and now.eigenvalues[0] > memory.spectrum.eigenvalues[0]:
        dt = 0.5 * dt  # what falls already needs no shorter steps
    dt = max(dt, shortest)
    h = h if h <= dt * (1 + 1e-9) else dt
    k = tracker.critical(now, soon)
    frame = now.frame(flow, y, k, third=False)
    R = transport(flow, y, frame, memory.frame)
    X, before = R @ memory.X @ R.T, like(skron(R), frame.U) @ memory.frame.T
    same = k == memory.frame.k and np.trace(R @ R.T) > k - 0.5
    partial = memory.partial + 1 if k > 1 and same and X.any() and memory.partial < CONSTANTS.whole * k else 0
    T = third_derivatives(flow, y, frame, before, np.linalg.eigh(X)[1] if partial else None)
    frame = replace(frame, T=T + 0.5 * (before - like(skron(R @ R.T), T) @ T))
    lin = flow.linearised(y, g, frame)
    X = np.zeros((k, k))
    if k:
        try:
            X = ccp.solve(lin.alpha - lin.gap / h, lin.beta).X
        except ccp.CCPError:
            # With H times U a direction below the edge may cost β its monotony: take what holds once it is at the edge.
            frame = replace(frame, on_edge=True)
            lin = flow.linearised(y, g, frame)
            X = ccp.solve(lin.alpha - lin.gap / h, lin.beta).X
        flow.count_ccp()
    rate = _decaying(flow, y, lin.drift(X), frame, now.eigenvalues[:k], h)
    end = Repair(flow, y)(y.moved(rate, h))
    if not bool(end.w.isfinite().all()):
        raise StepError(f"At t = {y.t:g} a step of one unit left the finite numbers, and shorter ones cost too much.")
    seen = node(flow, y.t, float(loss), g, now, frame, X, y.t, rate)
    return end, replace(memory, spectrum=now, frame=frame, X=X, dt=dt, partial=partial), seen


def _decaying(flow: ConstrainedFlow, y: State, rate: Rate, frame: Frame, values: Array, h: float) -> Rate:
    """The mean rate over a step of h in which w decays along the frame's directions, at the rates ``values`` [k]."""
    if not len(values):
        return rate
    part = -np.expm1(-values * h) / (values * h)
    along = frame.U.T @ flow.precondition(y, rate.w[:, None])
    return replace(rate, w=rate.w + (frame.U @ (like(part[:, None] - 1, rate.w) * along))[:, 0])
