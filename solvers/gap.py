"""What the gap asks of X in a macro step, and how a gap is carried from one frame to the next."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from dvi.solvers import ccp
from dvi.solvers.interval import partial_isometry
from dvi.solvers.protocol import Array, Flow, Frame, Linearised, State, host
from dvi.solvers.svec import skron, smat, svec
from dvi.solvers.watch import AT_EDGE, Approach, Sighting


def baumgarte(h: float) -> float:
    """The rate at which a gap is closed, per unit time."""
    return 4 / max(h, 2.0)


def multiplier(
    flow: Flow, lin: Linearised, gamma: float, warm: list[ccp.CCPResult | None] | None = None, on: Array | None = None
) -> Array:
    """X of Baumgarte type, γ gap + β[X] − α ⪰ 0 ⟂ X ⪰ 0; if ``on`` [k, a] is given, on the span of its columns only."""
    alpha, beta = lin.alpha - gamma * lin.gap, lin.beta
    if on is not None:
        S = skron(on.T)
        alpha, beta = on.T @ alpha @ on, S @ beta @ S.T
    if not len(alpha):
        return np.zeros_like(lin.alpha)
    solved = ccp.solve(alpha, beta, warm=warm[0] if warm else None)
    flow.count_ccp()
    if warm:
        warm[0] = solved
    return solved.X if on is None else on @ solved.X @ on.T


def approaching(flow: Flow, lin: Linearised, rates_before: Array, ago: float) -> Approach | None:
    """Where the eigenvalues in the frame are and go: with X on those at the edge only, on none that is on its way.

    Args:
        rates_before: of as many of the leading ones as are known, ``ago`` unit times ago.

    Returns:
        None if that cannot be said, because β is not monotone there.
    """
    gaps, C = np.linalg.eigh(lin.gap)
    try:
        X = multiplier(flow, lin, 0.0, on=C[:, gaps < AT_EDGE])
    except ccp.CCPError:
        return None
    rates = np.einsum("ij,ik,kj->j", C, lin.alpha - smat(lin.beta @ svec(X)), C)
    turns, m = np.zeros_like(rates), min(len(rates), len(rates_before))
    turns[:m] = np.clip((rates[:m] - rates_before[:m]) / ago, 0.0, np.abs(rates[:m]) / ago)
    return Approach(2 - gaps, rates, turns)


def transport(flow: Flow, end: State, new: Frame, old: Frame) -> Array:
    """The rotation from the old frame to the new one: polar factor of U'ᵀPU, also when k changed."""
    return partial_isometry(host(new.U.T @ flow.precondition(end, old.U))[0])


def anchored(flow: Flow, y: State, frame: Frame, gap: Array) -> Frame:
    """The frame with its gap at y, where w is: from there on it is linear in w anew."""
    M = 2 * host(frame.U.T @ flow.precondition(y, frame.U))[0] - gap
    return replace(frame, w=y.w, M=0.5 * (M + M.T))


def settled(flow: Flow, moved: State, new: Frame, gap: Array, seen: Sighting, h: float) -> tuple[Frame, Sighting]:
    """Frame and eigenvalues after the small displacement by the corrections of a step of h, to first order."""
    values = seen.eigenvalues.copy()
    values[: new.k] = 2 - np.linalg.eigvalsh(gap)
    shift = (values - seen.eigenvalues) / h
    block = replace(seen.block, eigenvalues=values)
    return anchored(flow, moved, new, gap), replace(seen, block=block, rates=seen.rates + shift)
