"""What the gap asks of X in a macro step, and how a gap is carried from one frame to the next."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from dvi.solvers import ccp
from dvi.solvers.interval import partial_isometry
from dvi.solvers.protocol import Array, Flow, Frame, Linearised, State, host
from dvi.solvers.svec import skron, smat, svec
from dvi.solvers.watch import AT_EDGE, LOOSE, Approach, Coupling, Sighting

_COUPLED = 4.0
_SINGULAR = 1e-10  # an eigenvalue of β, in parts of the largest, that is as good as zero

#: A direction with less than this part of the largest eigenvalue of X is as good as at rest.
OSCILLATES = 1e-2


def oscillating(X: Array) -> Array:
    """The axes of X [k, k] along which it oscillates, [k, a]."""
    if not X.any():
        return np.zeros((len(X), 0))
    x, Q = np.linalg.eigh(X)
    return Q[:, x > OSCILLATES * x[-1]]


def closing(lin: Linearised, opened: Array, axes: Array) -> Array:
    """The impulse [k, k], of any sign, that takes back by how much the gap has opened [k, k], on the axes [k, a]."""
    S = skron(axes.T)
    z = np.linalg.lstsq(S @ lin.beta @ S.T, -svec(axes.T @ opened @ axes), rcond=_SINGULAR)[0]
    return axes @ smat(z) @ axes.T


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


def approaching(
    flow: Flow, lin: Linearised, rates_before: Array, ago: float, X: Array | None = None
) -> Approach | None:
    """Where the eigenvalues in the frame are and go: with X on those at the edge only, on none that is on its way.

    Args:
        rates_before: of as many of the leading ones as are known, ``ago`` unit times ago.
        X: of the oscillation, where it is known [k, k].  None of those along which it acts is on its way then: what is
            left of their gaps is being closed.

    Returns:
        None if that cannot be said, because β is not monotone there.
    """
    gaps, C = np.linalg.eigh(lin.gap)
    try:
        acting = multiplier(flow, lin, 0.0, on=C[:, gaps < AT_EDGE]) if X is None else X
    except ccp.CCPError:
        return None
    held = np.zeros(len(gaps), dtype=bool)
    if X is not None:
        held = np.einsum("ij,ik,kj->j", C, X, C) > OSCILLATES * np.linalg.eigvalsh(X)[-1]
    rates = np.einsum("ij,ik,kj->j", C, lin.alpha - smat(lin.beta @ svec(acting)), C)
    rates = np.where(held, 0.0, rates)
    turns, m = np.zeros_like(rates), min(len(rates), len(rates_before))
    turns[:m] = np.clip((rates[:m] - rates_before[:m]) / ago, 0.0, np.abs(rates[:m]) / ago)
    return Approach(2 - gaps, rates, turns, bool(held.any()))


def coupled(lin: Linearised, X: Array, h: float) -> Coupling:
    """Which directions of the frame a step of h must hold, wherever their eigenvalues are.

    A critical vector u turns towards v, whose eigenvalue is δ below 2, by ⟨T_uv, dw⟩/δ, and the force of its
    oscillation turns with it: it pulls back at the rate Σ x_u |T_uv|²/δ (squares in the metric of P⁻¹, as in β, with
    what ν adds).  With v in the frame that is foreseen, whatever the rate.  Without, it is made up for once a step
    only, which overshoots where h times the rate is above ``_COUPLED``.
    """
    gaps, C = np.linalg.eigh(lin.gap)
    x, Q = np.linalg.eigh(X)
    found, z = LOOSE, svec(X)
    force = max(2 * float(z @ lin.beta @ z), 0.0) ** 0.5
    for j in np.flatnonzero(gaps > AT_EDGE):
        pairs = [svec(0.5 * (np.outer(u, C[:, j]) + np.outer(C[:, j], u))) for u in Q.T]
        squares = 2 * np.array([pair @ lin.beta @ pair for pair in pairs]) / gaps[j]  # |T_uv|²/δ
        if h * float(x.clip(0.0) @ squares) > _COUPLED:
            turn = 2 * float(x**2 @ squares / gaps[j]) ** 0.5 / force if force else 0.0
            found = Coupling(int(j) + 1, max(turn, found.turn))
    return found


def transport(flow: Flow, end: State, new: Frame, old: Frame) -> Array:
    """The rotation from the old frame to the new one: polar factor of U'ᵀPU, also when k changed."""
    if not new.k or not old.k:
        return np.zeros((new.k, old.k))
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
