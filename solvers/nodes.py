"""Nodes: what a run records of one time.  All integrators make them here."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from dvi.solvers.eigen.tracker import Approach, SpectrumEstimate
from dvi.solvers.protocol import Array, ConstrainedFlow, Frame, Node, Rate, State


def node(
    flow: ConstrainedFlow,
    t: float,
    loss: float,
    g: Tensor,
    now: SpectrumEstimate,
    frame: Frame,
    X: Array,
    X_time: float,
    rate: Rate,
    approach: Approach | None = None,
) -> Node:
    """The node at time t.  Its eigenvalues are those computed at t; if there are none, those of ``approach``."""
    looked = now.t >= t - 1e-9 * max(1.0, abs(t)) or not flow.constrained
    values = now.shown if flow.constrained else now.eigenvalues[:1]
    return Node(
        t=t,
        loss=loss,
        grad_sq=float(g @ g),
        eigenvalues=values if looked else values[:0],
        U=frame.U,
        HU=frame.HU,
        X=X,
        X_time=X_time,
        g=g,
        rate=rate,
        foreseen=np.empty(0) if looked or approach is None else approach.values,
    )


def empty_frame(flow: ConstrainedFlow, y: State) -> Frame:
    """The frame of a flow without constraint: k = 0."""
    nothing = y.w.new_zeros(len(y.w), 0)
    return flow.frame(y, nothing, nothing)
