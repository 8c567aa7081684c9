"""One pass of RKC2 over a step with a fixed model: (w, ν) and the impulse ∫X dt, one gradient and one CCP a stage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dvi.solvers import ccp
from dvi.solvers.constants import CONSTANTS
from dvi.solvers.controller import StepController
from dvi.solvers.eigen.block_method import CRITICAL
from dvi.solvers.eigen.tracker import EigenTracker
from dvi.solvers.errors import DomainError
from dvi.solvers.macro.model import Change, StepContext, baumgarte, multiplier
from dvi.solvers.macro.rkc import rkc, stages
from dvi.solvers.protocol import Array, ConstrainedFlow, Linearised, Rate, State, combine
from dvi.solvers.repair import Repair
from dvi.solvers.svec import smat, svec

#: Errors may be tol·√h: with the same tol for every step, the many short ones of a first transient would make nearly
#: all of the error, which the flow then carries along.
SHARE = 0.5

#: An error estimate of order h³ against this tolerance falls like h^(5/2).
CONTROLLER = StepController(3 - SHARE)


@dataclass(frozen=True)
class Pass:
    """The result of the stages of a step.

    Attributes:
        y, loss, g: the state at the end, and the loss and the gradient there.
        first, last: dy/dt at both ends.
        mean, X: mean of X over the step, and X at the end, in the model's frame [k, k].
        lin: the flow linearised at the end, in the model's frame.
        error: the embedded estimate in the norm of w, divided by √h.
        repaired: moves states of this step back into the domain of P.
    """

    y: State
    loss: float
    g: Tensor
    first: Rate
    last: Rate
    mean: Array
    X: Array
    lin: Linearised
    error: float
    repaired: Repair


def silent(context: StepContext, h: float) -> bool:
    """Whether no direction is at the edge during a step of h.  Then X must be zero.

    Baumgarte's term acts over a part of the step, so it would push before the arrival.
    """
    return context.approach is not None and context.approach.none_within(h)


def run_stages(flow: ConstrainedFlow, tracker: EigenTracker, context: StepContext, y: State, h: float) -> Pass:
    """A step of h from y, with T at the middle of the step.

    Raises:
        DomainError: if a stage leaves the domain of the loss or of P.
    """
    frame = context.ahead(y.t - context.spectrum.t + h / 2)
    gamma, quiet = baumgarte(h), silent(context, h)
    decay = flow.nu_decay(y, context.g)
    repaired = Repair(flow, y, decay)
    warm: list[ccp.CCPResult | None] = [None]

    def rate(at: dict[str, Any], g: Tensor | None = None) -> tuple[dict[str, Any], Array, Linearised]:
        state = State(at["w"], at["nu"], at["t"])
        if g is None:
            state = repaired(state)
            g = flow.gradient(state)
        lin = flow.linearised(state, g, frame)
        X = np.zeros_like(lin.alpha) if quiet else multiplier(flow, lin, gamma, warm)
        drift = lin.drift(X)
        return {"w": drift.w, "nu": drift.nu, "t": 1.0, "z": svec(X)}, X, lin

    start = {"w": y.w, "nu": y.nu, "t": y.t, "z": np.zeros(frame.k * (frame.k + 1) // 2)}
    first, _, _ = rate(start, context.g)
    radius = max(_sharpness(flow, tracker, context, y.t + h), CONSTANTS.margin * decay)
    raw = rkc(lambda at: rate(at)[0], start, h, stages(h, radius), first)
    end = repaired(State(raw["w"], raw["nu"], y.t + h))
    raw["nu"] = end.nu
    loss, g = flow.value_and_grad(end)
    last, X, lin = rate({**raw, "t": end.t}, g)
    names = ("w", "nu")
    off = [(c, {n: of[n] for n in names}) for c, of in ((0.8, start), (-0.8, raw), (0.4 * h, first), (0.4 * h, last))]
    d = combine(off)
    return Pass(
        end,
        float(loss),
        g,
        Rate(first["w"], first["nu"]),
        Rate(last["w"], last["nu"]),
        smat(raw["z"]) / h,
        X,
        lin,
        displacement(flow, end, g, (d["w"], d["nu"]), h) / h**SHARE,
        repaired,
    )


def displacement(flow: ConstrainedFlow, y: State, g: Tensor, change: Change, H: float) -> float:
    """How far a change of (w, ν) moves w: directly, and through the effect of half the change of ν on P over H."""
    size: float = torch.linalg.vector_norm(change[0]).item()
    if not np.isfinite(size) or not pytree.tree_leaves(y.nu):
        return size
    other = State(y.w, combine([(1.0, y.nu), (0.5, change[1])]), y.t)
    try:
        return max(size, H * float((flow.velocity(y, g) - flow.velocity(other, g)).norm()))
    except DomainError:
        return float("inf")


def _sharpness(flow: ConstrainedFlow, tracker: EigenTracker, context: StepContext, end: float) -> float:
    """An upper bound of the effective eigenvalues in a step: the spectral radius of the flow's Jacobian in w."""
    now = context.spectrum
    top = float(now.eigenvalues[0])
    if not flow.constrained or context.frame.k or end > now.until:
        return CONSTANTS.margin * max(CRITICAL, top)
    # far from 2 until then; a Ritz value is below the eigenvalue by its residual at most
    return CONSTANTS.margin * min(CRITICAL, top + float(now.block.residuals[0]) + tracker.rise(now, end))
