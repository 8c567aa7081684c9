"""When to update the model, and which parts.

An update costs a block of products with the Hessian and k to k(k+1)/2 third derivatives; a step costs about six
gradients.  So the model is updated only when needed.  The defect at the end of one interval determines how long the
next may be, by the same controller that chooses the step.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from dvi.solvers import ccp
from dvi.solvers.constants import CONSTANTS
from dvi.solvers.eigen.block_method import CRITICAL
from dvi.solvers.eigen.tracker import Approach, EigenTracker, SpectrumEstimate
from dvi.solvers.macro.defect import Corrected
from dvi.solvers.macro.model import (
    Moments,
    Slope,
    StepContext,
    Taken,
    anchored,
    multiplier,
    oscillating,
    settled,
    third_derivatives,
)
from dvi.solvers.macro.stage import CONTROLLER, Pass
from dvi.solvers.protocol import Array, ConstrainedFlow, Frame, Linearised, State, like
from dvi.solvers.svec import outer, skron, smat, svec


def kept_until(
    flow: ConstrainedFlow, tracker: EigenTracker, context: StepContext, step: Pass, moments: Moments, following: float
) -> float:
    """The time until which the next step, of length ``following``, may use this model.

    It is the end of ``step`` if the next step may not.
    """
    k, end = context.frame.k, step.y.t
    if not k:
        return np.inf if tracker.trusted(flow, step.y, context.spectrum, 0, end + following) else end
    keeps = (
        # a long calm tells nothing of how an eigenvalue below the edge will go on
        end + following <= context.spectrum.t + min(context.interval, tracker.patience)
        and context.slope is not None
        and context.slope.covers(moments.zeroth)
        # of what had not acted before, no defect is known
        and (context.measured or not moments.zeroth.any())
        and float(np.linalg.eigvalsh(step.lin.gap)[0]) > -CONSTANTS.sag
        and tracker.trusted(flow, step.y, context.spectrum, k, end + following)
    )
    return end + following if keeps else end


def carried(
    flow: ConstrainedFlow, context: StepContext, step: Pass, moments: Moments, h: float, until: float
) -> StepContext:
    """The context at the end of a step without an update.  The gap is that of the model; w goes on along the new T."""
    context = replace(context, loss=step.loss, g=step.g, until=until)
    if not context.frame.k:
        return context
    return replace(
        context,
        frame=anchored(flow, step.y, context.frame, step.lin.gap),
        moments=moments,
        approach=approaching(flow, step.lin, np.empty(0) if context.approach is None else context.approach.rates, h),
    )


def refreshed(
    flow: ConstrainedFlow,
    context: StepContext,
    step: Pass,
    now: SpectrumEstimate,
    new: Frame,
    R: Array,
    taken: Taken,
    corrected: Corrected,
    tol: float,
) -> StepContext:
    """The context after an update, at the corrected state."""
    H = step.y.t - context.spectrum.t
    loss, g = step.loss, step.g
    if corrected.y is not step.y:
        value, g = flow.value_and_grad(corrected.y)
        loss = float(value)
    approach, ratio = None, corrected.ratio(tol)
    if new.k:
        lin = flow.linearised(corrected.y, g, new)
        # what was seen from update to update is the rate in the middle of the interval
        approach = approaching(flow, lin, now.rates, 0.5 * H)
        new, now = settled(flow, corrected.y, new, lin.gap, now, H)
    return StepContext(
        loss,
        g,
        now,
        new,
        slope=_tempered(Slope.between(context.frame, context.spectrum, new, now), context, R, step.y.t),
        approach=approach,
        interval=H * CONTROLLER.factor(ratio, CONSTANTS.believed),
        taken=taken,
        measured=corrected.measured,
    )


def approaching(flow: ConstrainedFlow, lin: Linearised, rates_before: Array, ago: float) -> Approach | None:
    """The eigenvalues in the frame and their rates, with X acting on directions at the edge only.

    Args:
        rates_before: rates of the leading eigenvalues, as many as are known, ``ago`` unit times ago.

    Returns:
        None if the rates cannot be computed, because β is not monotone there.
    """
    gaps, C = np.linalg.eigh(lin.gap)
    try:
        X = multiplier(flow, lin, 0.0, on=C[:, gaps < CONSTANTS.at_edge])
    except ccp.CCPError:
        return None
    rates = np.einsum("ij,ik,kj->j", C, lin.alpha - smat(lin.beta @ svec(X)), C)
    turns, m = np.zeros_like(rates), min(len(rates), len(rates_before))
    turns[:m] = np.clip((rates[:m] - rates_before[:m]) / ago, 0.0, np.abs(rates[:m]) / ago)
    return Approach(CRITICAL - gaps, rates, turns)


def with_thirds(
    flow: ConstrainedFlow, end: State, new: Frame, now: SpectrumEstimate, context: StepContext, R: Array, X: Array
) -> tuple[Frame, Taken]:
    """The new frame with its third derivatives, and which were computed: all, or those along the axes of X.

    Args:
        flow, end: where the update is made.
        new, now: the frame there, without T, and the spectrum.
        context: the context before the update.
        R: the rotation from the old frame to the new one, [k', k].
        X: oscillation covariance at the end, in the old frame, [k, k].
    """
    axes = _axes(new.k, now, context, R, R @ X @ R.T)
    foreseen = like(skron(R), new.U) @ context.ahead(end.t - context.spectrum.t).T
    T = third_derivatives(flow, end, new, foreseen, axes)
    return replace(new, T=T), Taken(whole=end.t) if axes is None else replace(
        context.taken, axes=axes, looks=context.taken.looks + 1
    )


def _tempered(slope: Slope | None, context: StepContext, R: Array, t: float) -> Slope | None:
    """The slope of T at t, if the last update did not compute all of T.

    The error that the update found in the other entries has grown since all of T was last computed, and not in the last
    interval alone.
    """
    taken = context.taken
    if slope is None or context.slope is None or taken.axes is None:
        return slope
    S = like(outer(R @ taken.axes), slope.T)
    turn = slope.T - like(skron(R), slope.T) @ context.slope.T
    late = 1 - (t - context.spectrum.t) / (t - taken.whole)
    return replace(slope, T=slope.T - late * (turn - S.T @ (S @ turn)))


def _axes(k: int, now: SpectrumEstimate, context: StepContext, R: Array, X: Array) -> Array | None:
    """The axes of the oscillation X [k, k] in the new frame; None if all third derivatives are needed.

    All are needed if a direction is new or has just arrived, if nothing oscillates, and once in 2k updates.
    """
    if k < 2 or context.slope is None or not X.any() or context.taken.looks >= CONSTANTS.whole * k:
        return None
    active, Q = oscillating(X), np.linalg.eigh(X)[1]
    new = np.eye(k) - R @ context.slope.known @ R.T
    arrived = np.eye(k)[:, now.eigenvalues[:k] > CRITICAL - CONSTANTS.at_edge]
    aside = np.hstack([new, arrived - active @ (active.T @ arrived)])
    return None if np.linalg.norm(aside, 2) > 0.5 else Q
