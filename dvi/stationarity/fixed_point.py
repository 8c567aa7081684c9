"""The fixed point of Appendix B for any spec: D ← ½P(ν(D))⁻¹HD, Σ = DDᵀ (see :mod:`dvi.stationarity.api`).

Near a known point a search in subspaces is quicker, and is tried first (:mod:`dvi.stationarity.projected`).

Four additions make it dependable.  A shift excludes eigenvalues of −2 and below, where the plain iteration would also
come to rest.  Anderson acceleration is undone when it increases the residual.  A Newton step in the variances is taken
now and then.  And the leading eigenvalues are checked before a point is accepted.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dvi.methods import Nu, Preconditioner
from dvi.solvers import ccp
from dvi.solvers.eigen.block_method import CRITICAL, Eigenblock
from dvi.solvers.errors import ConvergenceError
from dvi.solvers.protocol import Array, State, host, like
from dvi.solvers.svec import smat, svec, triu
from dvi.stationarity.anderson import Anderson
from dvi.stationarity.equation import Balance, StationaryPoint, relative
from dvi.stationarity.projected import nearby

_CALM = 4  # plain steps before acceleration is tried
_REBALANCE = 40  # iterations between Newton steps in the variances
_LOOKS = 3  # searches in subspaces, each with a direction more that a look around has found


@dataclass
class Search:
    """The accelerated fixed-point iteration.

    Args:
        balance: the equation for ν.
        tol, max_iterations, rank, seed, survey: see :func:`dvi.stationary`.
    """

    balance: Balance
    tol: float
    max_iterations: int
    rank: int
    seed: int
    survey: bool = True

    def run(self, start: StationaryPoint | None) -> StationaryPoint:
        """From a point nearby, if there is one; else by the iteration."""
        if start is not None and (found := self._from(start)) is not None:
            return found
        return self._iterated(start)

    def _from(self, start: StationaryPoint) -> StationaryPoint | None:
        """The point found in subspaces, or None if the iteration has to."""
        balance = self.balance
        for _ in range(_LOOKS):
            found = nearby(balance, start, self.tol)
            if found is None:
                return None
            block = balance.survey(found.nu, found.block) if self.survey else found.block
            start = balance.point(found.D, found.HD, found.nu, block, found.residual, found.rounds, self.tol)
            if block.eigenvalues[0] <= CRITICAL + 10 * self.tol:
                return start
        return None

    def _iterated(self, start: StationaryPoint | None) -> StationaryPoint:
        """Iterate until the residual is below tol and no direction above 2 is missing."""
        balance, flow = self.balance, self.balance.flow
        D, nu = self._first(start)
        anderson, shift, calm = Anderson(), 0.0, _CALM
        best, fallback, plain = np.inf, D, calm  # the lowest residual since the plain steps, and the step from it
        residual, quiet = np.inf, 0
        for iteration in range(self.max_iterations):
            HD = flow.problem.hvp(balance.w, D)
            nu = balance.root(nu, HD)
            P = flow.calculus.checked_P(nu, balance.t, balance.g)
            image = 0.5 * P.solve(HD)
            off = P.sqrt(image - D)
            PD = P.sqrt(D)
            G, M, distance = host(PD.T @ PD, D.T @ HD, (off**2).sum())
            size = float(np.trace(G))
            residual = float(np.sqrt(distance / size)) if size > 0 else 0.0
            without = HD[:, :0]
            if not size or relative(balance.newton(nu, without), nu) <= self.tol:  # nothing oscillates
                D, HD, nu, residual = D[:, :0], without, balance.root(balance.example, without), 0.0
            if residual <= self.tol:
                block = balance.look(nu, D, self.tol)
                if block.eigenvalues[0] <= CRITICAL + 1e3 * self.tol:
                    return balance.point(D, HD, nu, block, residual, iteration, self.tol)
                # Acceleration also finds roots that miss a direction: give it its variance, then take plain steps.
                D = self._rebalanced(D, nu) if D.shape[1] else self._awakened(nu, block)
                D, calm = self._with_noise(D, nu, 2), 2 * calm
                best, plain = np.inf, calm
                continue
            # A shift keeps the iteration from converging to eigenvalues of −2 and below, and damps it.
            wanted = max(0.0, (-0.5 - _lowest(M, G) / 2) / 1.5)
            if wanted > shift * 1.001:
                shift, best, plain = 1.2 * wanted, np.inf, calm
            elif not plain and residual > 2 * best:  # acceleration failed: go back, and take a few plain steps
                D, best, plain = fallback, np.inf, calm
                continue
            elif plain == 1 and residual > 3 * best:
                shift = 1.5 * shift + 0.1
            following = (image + shift * D) / (1 + shift)
            if plain:
                plain -= 1
                best = residual if not plain else min(best, residual)
                anderson.forget()
                fallback, D, quiet = following, following, iteration
                continue
            if residual < best:
                best, fallback = residual, following
            if residual < 0.1 and iteration >= quiet + _REBALANCE:
                D, quiet = self._rebalanced(D, nu), iteration
                anderson.forget()
            else:
                D = anderson.next(D, following)
        raise ConvergenceError(
            f"The stationary ν of {flow.method} was not reached: relative residual {residual:.1e} against "
            f"{self.tol:.1e} after {self.max_iterations} iterations. Convergence is slow if an eigenvalue is barely "
            "below 2: raise max_iterations or loosen tol; in float32, compute in float64. If a gradient is exactly "
            "zero and the curvature negative, ν may have to be zero and P singular: then there is no stationary flow."
        )

    def _first(self, start: StationaryPoint | None) -> tuple[Tensor, Nu]:
        """The first D [d, r] and ν."""
        balance = self.balance
        if start is not None:
            return (self._with_noise(start.D, start.nu, 2) if start.k else start.D), start.nu
        w = balance.w
        nu = balance.root(balance.example, w.new_zeros(len(w), 0))
        D = self._noise(min(self.rank, len(w)))
        HD = balance.flow.problem.hvp(w, D)
        # large enough to change ν by as much as the gradient does
        moved = pytree.tree_map(torch.sub, balance.root(nu, HD), nu)
        size, change = (float(sum((x**2).sum() for x in pytree.tree_leaves(tree))) for tree in (nu, moved))
        scale = (size / change) ** 0.25 if size > 0 and change > 0 else 1.0
        return scale * D, nu

    def _noise(self, count: int) -> Tensor:
        """Random orthonormal columns [d, count]."""
        w = self.balance.w
        generator = torch.Generator().manual_seed(self.seed)
        X = torch.randn(len(w), count, generator=generator, dtype=torch.float64, device="cpu").to(w)
        Q: Tensor = torch.linalg.qr(X)[0]
        return Q

    def _with_noise(self, D: Tensor, nu: Nu, count: int) -> Tensor:
        """D and a few small random columns, in which a direction that has become critical can grow."""
        P = self.balance.flow.calculus.P(nu, self.balance.t)
        count = min(count, len(D) - D.shape[1])
        if count <= 0:
            return D
        fresh = P.inv_sqrt(self._noise(count))
        return torch.cat([D, 1e-3 * torch.linalg.vector_norm(P.sqrt(D)) * fresh], dim=1)

    def _awakened(self, nu: Nu, block: Eigenblock) -> Tensor:
        """A first D if nothing oscillated: the directions above 2, large enough to change ν by a tenth."""
        balance = self.balance
        missed = np.flatnonzero(block.eigenvalues > CRITICAL + 1e3 * self.tol)
        U = balance.flow.calculus.P(nu, balance.t).inv_sqrt(block.V[:, missed.tolist()])
        change = relative(balance.newton(nu, balance.flow.problem.hvp(balance.w, U)), nu)
        return (0.1 / change) ** 0.5 * U if np.isfinite(change) and change > 0 else U

    def _rebalanced(self, D: Tensor, nu: Nu) -> Tensor:
        """D after a Newton step in the variances: a complementarity problem in span(D) and the leading eigenvectors.

        If an eigenvalue is barely above or below 2, its direction grows or shrinks by λ/2 an iteration, which is slow.
        The Newton step gives it its variance, or none, at once: gap(ν(X)) ⪰ 0 ⟂ X ⪰ 0, linearised in X.
        """
        balance = self.balance
        calculus, t = balance.flow.calculus, balance.t
        P = calculus.P(nu, t)
        block = balance.look(nu, D, self.tol)
        D = self._alive(D, P)
        top = block.V[:, block.eigenvalues > CRITICAL - 0.1]
        V = torch.linalg.qr(torch.cat([top, P.sqrt(D)], dim=1))[0]
        A = balance.flow.effective_hessian(State(balance.w, nu, t))
        small, across = host(V.T @ A(V), V.T @ P.sqrt(D))
        values, Q = np.linalg.eigh(0.5 * (small + small.T))
        keep = values > CRITICAL - 1.0  # directions far below 2 do not oscillate
        gap, X = np.diag(CRITICAL - values[keep]), Q[:, keep].T @ across
        X = X @ X.T
        U = P.inv_sqrt(V @ like(Q[:, keep], V))
        if not U.shape[1]:
            return D
        index = triu(U.shape[1])
        # HU = 2PU, as on the constraint, makes β symmetric for RMSProp
        moved = calculus.metric.rates(nu, t, balance.response(nu, 2 * P.apply(U)), U)
        beta = 2 * index.weight[:, None] * host(moved)[0].T
        try:
            found = ccp.solve(smat(beta @ svec(X)) - gap, beta).X
        except ccp.CCPError:
            return D
        variances, R = np.linalg.eigh(found)
        up = variances > 0
        return U @ like(R[:, up] * np.sqrt(variances[up]), U) if up.any() else D

    def _alive(self, D: Tensor, P: Preconditioner) -> Tensor:
        """D with columns orthogonal in the P-metric, without those that have vanished."""
        (G,) = host(P.sqrt(D).T @ P.sqrt(D))
        X, Q = np.linalg.eigh(0.5 * (G + G.T))
        least = self.tol * X[-1]
        return D @ like(Q[:, least < X], D)


def _lowest(M: Array, G: Array) -> float:
    """The lowest Ritz value of P⁻¹H in the span of D, from M = DᵀHD and G = DᵀPD."""
    values, Q = np.linalg.eigh(0.5 * (G + G.T))
    good = values > 1e-8 * values[-1]
    W = Q[:, good] / np.sqrt(values[good])
    return float(np.linalg.eigvalsh(W.T @ (0.5 * (M + M.T)) @ W)[0])
