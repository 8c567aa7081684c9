"""The stationary point near a known one: the problem solved in a small subspace, and the subspace grown.

At fixed weights H is fixed.  So for a basis S [d, m] with HS at hand any ν can be tried without a product with H.
Newton's method finds the ν and the Σ in span(S) that belong together: a complementarity problem in the variances of the
leading Ritz vectors.  Then S grows by the residuals P⁻¹Hu − λu, as in Davidson's method for eigenvectors.  The products
with H are about as many as eigenvectors take, where the fixed point (:mod:`dvi.stationarity.fixed_point`) takes as many
at each of its iterations.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.linalg import eigh
from torch import Tensor
from torch.utils import _pytree as pytree

from dvi.methods import NotPositiveDefiniteError, Nu
from dvi.solvers import ccp
from dvi.solvers.eigen.block_method import CRITICAL, Eigenblock
from dvi.solvers.eigen.linalg import beside, orthonormal_against, upright
from dvi.solvers.protocol import Array, host, like
from dvi.solvers.svec import smat, svec, triu
from dvi.stationarity.equation import Balance, StationaryPoint, norm

_ROUNDS = 40  # times that S grows; 7 to 17 were seen, for residuals of 1e-4 to 1e-6
_LARGEST = 80  # columns of S; 52 were seen
_NEWTON = 30  # steps in one S, none of them with a product; after the first rounds one or two do
_INEXACT = 0.1  # ν is solved for in S up to this part of what S itself misses
_SHRINKS = 0.5  # a step is to be smaller than the last by that, else _LEAST and more of it is taken
_LEAST = 1 / 16
_VARIANCES = 8  # that are sought at once, and _MARGIN: below 2, from where on a direction may come to oscillate
_MARGIN = 0.5
_SHOWN = 2  # Ritz vectors kept beyond those that oscillate: the next ones to do so
_ROUGH = 1e-2  # residual of the leading Ritz vector where nothing oscillates; its eigenvalue is then good to 1e-4


@dataclass(frozen=True)
class Reached:
    """Where the search has come to.

    Attributes:
        D, HD: a root of the covariance, and H times it [d, r].
        nu: the ν that goes with it.
        block: leading eigenpairs of the effective Hessian, as far as span(S) shows them.
        residual: ‖½P⁻¹HD − D‖ relative to ‖D‖, in the P-metric.
        rounds: how often S has grown.
    """

    D: Tensor
    HD: Tensor
    nu: Nu
    block: Eigenblock
    residual: float
    rounds: int


def nearby(balance: Balance, start: StationaryPoint, tol: float) -> Reached | None:
    """The stationary point to a relative residual of ``tol``, or None if it is not found from ``start``.

    Directions that the block of ``start`` is blind to are not seen: look for them where it is not of a moment ago.
    """
    try:
        return _search(balance, start, tol)
    except (ccp.CCPError, NotPositiveDefiniteError, np.linalg.LinAlgError):
        return None


def _search(balance: Balance, start: StationaryPoint, tol: float) -> Reached | None:
    calculus, t, hvp = balance.flow.calculus, balance.t, balance.flow.problem.hvp
    first = calculus.checked_P(start.nu, t, balance.g)
    V = orthonormal_against(start.block.V, None)  # S = P₀^(−½) V
    S = first.inv_sqrt(V)
    HS = hvp(balance.w, S)
    (C,) = host(V.T @ first.sqrt(start.D))
    nu, residual = balance.root(start.nu, HS @ like(C, S)), 1.0
    for rounds in range(_ROUNDS):
        (M,) = host(S.T @ HS)
        C, nu = _solved(balance, S, HS, M, C, nu, tol, max(tol, residual))
        D, HD = S @ like(C, S), HS @ like(C, S)
        P = calculus.checked_P(nu, t, balance.g)
        off, size = host((P.sqrt(0.5 * P.solve(HD) - D) ** 2).sum(), (P.sqrt(D) ** 2).sum())
        residual = float(np.sqrt(off / size)) if size > 0 else 0.0
        values, coefficients, _ = _ritz(balance, nu, S, M)
        held = C.shape[1]
        values, Q = values[: held + _SHOWN], like(coefficients[:, : held + _SHOWN], S)
        Z, AZ = upright(P.sqrt(S @ Q)), upright(P.inv_sqrt(HS @ Q))
        W = AZ - Z * like(values, Z)
        (norms,) = host(torch.linalg.vector_norm(W, dim=0))
        rough = norms > np.maximum(CRITICAL - _ROUGH - values, _ROUGH)  # an eigenvalue above 2 may hide behind it
        rough[0] |= norms[0] > _ROUGH
        rough[:held] = norms[:held] > tol if residual > tol else False
        if residual <= tol and not rough.any():
            block = Eigenblock(orthonormal_against(Z, None, rounds=1), AZ, values, norms, start.block.draws)
            return Reached(D, HD, nu, block, residual, rounds)
        room = len(balance.w) - V.shape[1]
        if V.shape[1] > _LARGEST:
            return None
        if room and rough.any():
            new = first.sqrt(P.inv_sqrt(W[:, np.flatnonzero(rough)[:room].tolist()]))
            new = orthonormal_against(new, V)
            added = first.inv_sqrt(new)
            V, S, HS = beside(V, new), beside(S, added), beside(HS, hvp(balance.w, added))
            C = np.concatenate([C, np.zeros((new.shape[1], held))])
    return None


def _solved(
    balance: Balance, S: Tensor, HS: Tensor, M: Array, C: Array, nu: Nu, tol: float, residual: float
) -> tuple[Array, Nu]:
    """C [m, r] and ν with Σ = SCCᵀSᵀ, stationary as far as span(S) goes; M is SᵀHS.

    Raises:
        CCPError: if the variances have no solution.
    """
    calculus, t = balance.flow.calculus, balance.t
    share, last = 1.0, np.inf
    for _ in range(_NEWTON):
        values, Q, G = _ritz(balance, nu, S, M)
        kept = min(max(1, int((values > CRITICAL - _MARGIN).sum())), _VARIANCES, len(values))
        Q, before = Q[:, :kept], nu
        U, root = S @ like(Q, S), Q.T @ G @ C
        # HU = 2PU, as on the constraint: with HU itself β is often not monotone before U has converged
        moved = calculus.metric.rates(nu, t, balance.response(nu, 2 * calculus.P(nu, t).apply(U)), U)
        beta = 2 * triu(kept).weight[:, None] * host(moved)[0].T
        X = ccp.solve(smat(beta @ svec(root @ root.T)) - np.diag(CRITICAL - values[:kept]), beta).X
        # That β leaves out how U turns with ν: where steps do not shrink by themselves, a part of each is taken.
        Y = (1 - share) * (C @ C.T) + share * (Q @ X @ Q.T)
        variances, R = np.linalg.eigh(Y)
        up = variances > 0.01 * tol * max(variances[-1], np.finfo(np.float64).tiny)
        C = R[:, up] * np.sqrt(variances[up])
        nu = balance.root(nu, HS @ like(C, S))
        step = norm(pytree.tree_map(torch.sub, nu, before)) / (share * norm(nu))
        if step <= _INEXACT * residual:
            break
        if step > _SHRINKS * last:
            share = max(0.5 * share, _LEAST)
        last = step
    return C, nu


def _ritz(balance: Balance, nu: Nu, S: Tensor, M: Array) -> tuple[Array, Array, Array]:
    """Ritz values of P⁻¹H in span(S), descending, with M = SᵀHS; their vectors' coefficients [m, m]; and G = SᵀPS."""
    (G,) = host(S.T @ balance.flow.calculus.P(nu, balance.t).apply(S))
    values, Q = eigh(0.5 * (M + M.T), 0.5 * (G + G.T))
    return values[::-1].copy(), Q[:, ::-1], G


__all__ = ["Reached", "nearby"]
