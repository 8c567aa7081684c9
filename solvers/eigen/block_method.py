"""The critical subspace: the eigenpairs of the effective Hessian near and above 2, followed along a run.

The method is a warm-started LOBPCG with stored products: one block product with the Hessian per iteration.  The block
always holds one vector more than the critical ones, so that the next eigenvalue is known before it arrives.  From time
to time, a Krylov space from a random start searches for an eigenvalue that the block has missed.  The block spans an
invariant subspace, so nothing jumps when two eigenvalues cross inside it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from dvi.solvers.eigen.linalg import beside, combined, gram, orthonormal_against, upright
from dvi.solvers.errors import ConvergenceError
from dvi.solvers.numbers import with_numbers
from dvi.solvers.protocol import Array, host, like

Operator = Callable[[Tensor], Tensor]  # V [d, m] -> A V [d, m], A symmetric

CRITICAL = 2.0  # the effective sharpness at which an optimizer starts to oscillate

#: Iterations after which the products are formed anew.  They are carried along otherwise, and gather rounding errors:
#: in float32 residuals may then stagnate above what float32 can do.  Following an operator takes far fewer iterations.
AFRESH = 25


@dataclass(frozen=True)
class Eigenblock:
    """Leading eigenpairs of a symmetric operator.

    Attributes:
        V: orthonormal Ritz vectors [d, m].
        AV: the operator times them [d, m].
        eigenvalues: Ritz values, descending, host float64 [m].
        residuals: ‖A v − λ v‖ [m].
        draws: how many random vectors were drawn so far (the whole random state of the block).
    """

    V: Tensor
    AV: Tensor
    eigenvalues: Array
    residuals: Array
    draws: int = 0

    @property
    def size(self) -> int:
        """Number of vectors m."""
        return int(self.V.shape[1])


@dataclass(frozen=True)
class CriticalSubspace:
    """The block method and its accuracy.

    Args:
        tol: residual ‖Av − λv‖ at which an eigenpair counts as converged, for eigenvalues of order 2.  The error of the
            eigenvalue is of order tol²/gap.
        slack: vectors kept beyond the wanted ones.
        max_iterations: block products before :class:`ConvergenceError`.
        krylov: dimension of the Krylov space of the random search (:meth:`survey`).
        seed: of the random vectors.

    Raises:
        ValueError: if slack is less than 1 (no arrival could be predicted) or tol is not positive.
    """

    tol: float = 1e-3
    slack: int = 1
    max_iterations: int = 400
    krylov: int = 12
    seed: int = 0

    def __post_init__(self) -> None:
        with_numbers(self)
        if self.slack < 1 or not self.tol > 0:
            raise ValueError("CriticalSubspace: slack must be at least 1, tol positive.")

    def start(self, A: Operator, example: Tensor, want: float, tol: float | None = None) -> Eigenblock:
        """Leading eigenpairs from a random start: all above ``want`` and ``slack`` more.

        Args:
            A: the operator.
            example: a vector [d] that sets dtype and device.
            want: every eigenvalue above this is converged (at least the leading one).
            tol: replaces the configured one.

        Raises:
            ConvergenceError: if that takes more than ``max_iterations`` block products.
        """
        V, draws = self.fresh(example, 1 + self.slack, None, 0)
        block = Eigenblock(V, upright(A(V)), np.zeros(V.shape[1]), np.full(V.shape[1], np.inf), draws)
        return self.survey(A, self._iterate(A, block, want, tol or self.tol), want, tol)

    def follow(
        self, A: Operator, block: Eigenblock, want: float, tol: float | None = None, least: int = 1
    ) -> Eigenblock:
        """The same eigenpairs for an operator that has moved a little; the block grows and shrinks as needed.

        Args:
            A, want, tol: as in :meth:`start`.
            block: the eigenpairs before the operator moved.
            least: the number of leading eigenpairs to converge, whatever their eigenvalues are.
        """
        V = block.V
        needed = self._needed(block.eigenvalues, want, least)
        if V.shape[1] > needed + self.slack + 1:  # two to spare: each change of size costs a restart
            V = V[:, : needed + self.slack]
        V = orthonormal_against(V, None, rounds=1)
        return self._iterate(A, replace(block, V=V, AV=upright(A(V))), want, tol or self.tol, least)

    def survey(self, A: Operator, block: Eigenblock, want: float, tol: float | None = None) -> Eigenblock:
        """Search for an eigenvalue above ``want`` that the block has missed, and add it to the block.

        The search is a Lanczos process from a random start in the complement of the block.  It finds an isolated
        eigenvalue above the rest of the spectrum in a dozen products.  It costs ``krylov`` products.
        """
        V = block.V
        if V.shape[1] >= V.shape[0]:
            return block
        v, draws = self.fresh(V[:, 0], 1, V, block.draws)
        basis, products = [v], []
        for _ in range(min(self.krylov, V.shape[0] - V.shape[1])):
            r = upright(A(basis[-1]))
            products.append(r)
            for _ in range(2):
                G = gram([r], [V, *basis])
                r = combined([V, *basis], -G[:, 1:].T, onto=r)
                norm = float(r.norm())
                if norm > 0.5 * np.sqrt(G[0, 0]):  # little was cancelled: one round makes it orthogonal to rounding
                    break
            if norm < 1e-10:  # the Krylov space is invariant
                break
            basis.append(r / norm)
        basis = basis[: len(products)]
        ritz, C = np.linalg.eigh(_small(basis, products)[1])
        # The new vector is of use if its eigenvalue is (nearly) wanted or the largest, and only if it is not in the
        # block.
        news = ritz > max(min(want - 0.1, block.eigenvalues[0]), block.eigenvalues[-1]) + 1e-6
        if not news.any():
            return replace(block, draws=draws)
        grown = replace(
            block,
            V=beside(V, combined(basis, C[:, news])),
            AV=beside(block.AV, combined(products, C[:, news])),
            eigenvalues=np.append(block.eigenvalues, ritz[news]),
            residuals=np.append(block.residuals, np.full(int(news.sum()), np.inf)),
            draws=draws,
        )
        return self._iterate(A, grown, want, tol or self.tol)

    # ---- inside ---------------------------------------------------------------------------------------

    def _needed(self, eigenvalues: Array, want: float, least: int) -> int:
        return max(least, int((eigenvalues > want).sum()))

    def fresh(self, example: Tensor, count: int, V: Tensor | None = None, draws: int = 0) -> tuple[Tensor, int]:
        """Random orthonormal vectors, orthogonal to V [d, m]; reproducible from the number of earlier draws.

        Returns:
            The vectors [d, count], like ``example`` [d], and the number of draws.
        """
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + draws)
        count = min(count, len(example) - (0 if V is None else V.shape[1]))
        X = torch.randn(len(example), count, generator=generator, dtype=torch.float64, device="cpu").to(example)
        return orthonormal_against(X, V), draws + 1

    def _iterate(self, A: Operator, block: Eigenblock, want: float, tol: float, least: int = 1) -> Eigenblock:
        """LOBPCG until all Ritz pairs above ``want``, and at least ``least``, are converged, with ``slack`` more."""
        X, AX, draws = block.V, block.AV, block.draws
        d = X.shape[0]
        floor = 2e3 * torch.finfo(X.dtype).eps * max(1.0, float(np.abs(block.eigenvalues).max(initial=1.0)))
        tol = max(tol, floor)
        P = AP = None
        for iteration in range(self.max_iterations + 1):
            if iteration and iteration % AFRESH == 0:
                P = AP = None  # their memory is free while the products are formed
                X = orthonormal_against(X, None, rounds=1)
                AX = upright(A(X))
            ritz, X, AX = _ritz(X, AX)
            R = torch.addcmul(AX, X, like(ritz, X), value=-1)
            (residuals,) = host(torch.linalg.vector_norm(R, dim=0))
            needed = self._needed(ritz, want, least)
            converged = residuals <= tol
            # A slack vector may stay inaccurate, unless its residual leaves room for an eigenvalue above `want`.
            hiding = residuals > np.maximum(want - ritz, tol)
            if converged[:needed].all() and not hiding[needed:].any():
                missing = min(needed + self.slack, d) - X.shape[1]
                if missing <= 0:
                    return Eigenblock(X, AX, ritz, residuals, draws)
                fresh, draws = self.fresh(X[:, 0], missing, X, draws)
                X, AX = beside(X, fresh), beside(AX, A(fresh))
                P = AP = None
                # a new vector must be given the chance to show an eigenvalue above `want`
                X, AX = self._settle(A, X, AX, tol, count=8)
                continue
            if iteration == self.max_iterations:
                break
            active = ~converged & ((np.arange(len(ritz)) < needed + self.slack) | hiding)
            if not active.all():
                R = R[:, np.flatnonzero(active).tolist()]
            X, AX, P, AP = _improved(A, X, AX, R, P, AP)
        worst = residuals[:needed].max()
        raise ConvergenceError(
            f"The leading {needed} eigenpairs of the effective Hessian did not converge: residual {worst:.1e} against "
            f"{tol:.1e} after {self.max_iterations} block products. Loosen the eigenvector tolerance, raise "
            "max_iterations, or compute in float64 and with automatic differentiation (differences are noisy)."
        )

    def _settle(self, A: Operator, X: Tensor, AX: Tensor, tol: float, count: int) -> tuple[Tensor, Tensor]:
        """A few iterations on the vectors that are not converged: they turn random ones towards the top of the
        spectrum.
        """
        P = AP = None
        for _ in range(count):
            ritz, X, AX = _ritz(X, AX)
            R = torch.addcmul(AX, X, like(ritz, X), value=-1)
            (residuals,) = host(torch.linalg.vector_norm(R, dim=0))
            active = residuals > (min(tol, 1e-8) if P is None else tol)
            if not active.any():
                break
            X, AX, P, AP = _improved(A, X, AX, R[:, np.flatnonzero(active).tolist()], P, AP)
        return X, AX


def _ritz(X: Tensor, AX: Tensor) -> tuple[Array, Tensor, Tensor]:
    """Ritz values [m], descending, in the span of X [d, m], and orthonormal Ritz vectors with their products.

    X is orthonormal up to rounding.  Solving the pencil XᵀAX, XᵀX corrects for the rounding.
    """
    gramian, small = _small([X], [AX])
    scale, Q = np.linalg.eigh(gramian)
    whiten = Q / np.sqrt(scale)
    values, C = np.linalg.eigh(whiten.T @ small @ whiten)
    C = whiten @ C[:, ::-1]
    return values[::-1].copy(), combined([X], C), combined([AX], C)


def _small(S: list[Tensor], AS: list[Tensor]) -> tuple[Array, Array]:
    """SᵀS and SᵀAS, symmetrised, of blocks S and their products."""
    G = gram(S, AS)
    if not np.isfinite(G).all():
        raise ConvergenceError("Hessian–vector products are not finite: the loss has left its domain.")
    A = G[:, len(G) :]
    return G[:, : len(G)], 0.5 * (A + A.T)


def _improved(
    A: Operator, X: Tensor, AX: Tensor, R: Tensor, P: Tensor | None, AP: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One move of LOBPCG, for one block product: the best of X, its residuals R and the last directions P."""
    W = orthonormal_against(R, X, rounds=1)  # the Gram matrix of all three accounts for the rest
    S, AS = [X, W], [AX, upright(A(W))]
    if P is not None and AP is not None:
        S.append(P)
        AS.append(AP)
    return _rayleigh_ritz(S, AS)


def _rayleigh_ritz(S: list[Tensor], AS: list[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The best Ritz vectors in span(S), as many as S[0] has, and LOBPCG's directions (the part that the rest of S
    adds).

    S may be nearly dependent after convergence.  So its Gram matrix is whitened in float64 and its null space dropped.
    This magnifies rounding in the orthonormality of the vectors, which :func:`_ritz` corrects.
    """
    keep, eps = S[0].shape[1], torch.finfo(S[0].dtype).eps
    gramian, A = _small(S, AS)
    scale, Q = np.linalg.eigh(gramian)
    good = scale > max(1e-10, 1e3 * eps) * scale[-1]
    whiten = Q[:, good] / np.sqrt(scale[good])
    C = whiten @ np.linalg.eigh(whiten.T @ A @ whiten)[1][:, ::-1][:, :keep]
    beyond = C[keep:]
    P, AP = combined(S[1:], beyond), combined(AS[1:], beyond)
    X, AX = combined(S[:1], C[:keep], onto=P), combined(AS[:1], C[:keep], onto=AP)
    norm = np.sqrt(((gramian[keep:, keep:] @ beyond) * beyond).sum(0).clip(0.0))
    # P is divided by its norm, and so are its rounding errors, which remain below half a percent.  If P were dropped
    # earlier, float32 would crawl within a cluster of eigenvalues.
    nonzero = norm > eps**0.65
    if not nonzero.all():
        kept = np.flatnonzero(nonzero).tolist()
        P, AP, norm = P[:, kept], AP[:, kept], norm[nonzero]
    scaling = like(1.0 / norm, X)
    return X, AX, P * scaling, AP * scaling
