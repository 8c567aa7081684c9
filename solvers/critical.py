"""The critical subspace: the eigenpairs of the effective Hessian near and above 2, followed along a run.

A warm-started block method (LOBPCG with stored products: one block product with the Hessian per iteration).  The block
always holds one vector more than the critical ones, so that the next eigenvalue to arrive is seen coming; at intervals
a Krylov space from a random start looks for one that the block is blind to.  A block spans an invariant subspace, so
nothing jumps when two eigenvalues cross inside it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from dvi.solvers.errors import ConvergenceError
from dvi.solvers.protocol import Array, host, like

Operator = Callable[[Tensor], Tensor]  # V [d, m] -> A V [d, m], A symmetric

CRITICAL = 2.0  # the effective sharpness at which an optimizer starts to oscillate


@dataclass(frozen=True)
class Eigenblock:
    """Leading eigenpairs of a symmetric operator.

    Attributes:
        V: orthonormal Ritz vectors [d, m].
        AV: the operator times them [d, m].
        eigenvalues: Ritz values, descending, host float64 [m].
        residuals: ‖A v − λ v‖ [m].
        draws: how many random vectors were drawn so far (the block's whole random state).
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
    """The block method and how closely it looks.

    Args:
        tol: residual ‖Av − λv‖ at which an eigenpair counts as converged (eigenvalues of order 2; the eigenvalue's own
            error is of order tol²/gap).
        slack: vectors kept beyond the wanted ones.
        max_iterations: block products before :class:`ConvergenceError`.
        krylov: dimension of the random look-around (:meth:`survey`).
        seed: of the random vectors.

    Raises:
        ValueError: if slack is not at least 1: without it nothing is seen coming.
    """

    tol: float = 1e-3
    slack: int = 1
    max_iterations: int = 400
    krylov: int = 12
    seed: int = 0

    def __post_init__(self) -> None:
        if self.slack < 1 or not self.tol > 0:
            raise ValueError("CriticalSubspace: slack must be at least 1, tol positive.")

    def start(self, A: Operator, example: Tensor, want: float, tol: float | None = None) -> Eigenblock:
        """Leading eigenpairs from nothing: all above ``want`` and ``slack`` more.

        Args:
            A: the operator.
            example: a vector [d] whose dtype and device are taken.
            want: every eigenvalue above this is converged (at least the leading one).
            tol: instead of the configured one.

        Raises:
            ConvergenceError: if that takes more than ``max_iterations`` block products.
        """
        V, draws = self._fresh(example, 1 + self.slack, None, 0)
        block = Eigenblock(V, A(V), np.zeros(V.shape[1]), np.full(V.shape[1], np.inf), draws)
        return self.survey(A, self._iterate(A, block, want, tol or self.tol), want, tol)

    def follow(self, A: Operator, block: Eigenblock, want: float, tol: float | None = None) -> Eigenblock:
        """The same eigenpairs for an operator that has moved a little; the block grows and shrinks as needed."""
        V = block.V
        needed = self._needed(block.eigenvalues, want)
        if V.shape[1] > needed + self.slack + 1:  # two to spare: hysteresis, a block that breathes costs restarts
            V = V[:, : needed + self.slack]
        V = torch.linalg.qr(V)[0]
        return self._iterate(A, replace(block, V=V, AV=A(V)), want, tol or self.tol)

    def survey(self, A: Operator, block: Eigenblock, want: float, tol: float | None = None) -> Eigenblock:
        """Look for an eigenvalue above ``want`` that the block is blind to, and take it in.

        A Lanczos process from a random start in the complement of the block: an isolated eigenvalue above the rest of
        the spectrum shows in a dozen products.  Costs ``krylov`` products.
        """
        V = block.V
        if V.shape[1] >= V.shape[0]:
            return block
        v, draws = self._fresh(V[:, 0], 1, V, block.draws)
        basis, products = [v], []
        for _ in range(min(self.krylov, V.shape[0] - V.shape[1])):
            Aq = A(basis[-1])
            products.append(Aq)
            Q = torch.cat([V, *basis], dim=1)
            r = Aq - Q @ (Q.T @ Aq)
            r = r - Q @ (Q.T @ r)
            norm = float(r.norm())
            if norm < 1e-10:  # the Krylov space is invariant
                break
            basis.append(r / norm)
        Q, AQ = torch.cat(basis[: len(products)], dim=1), torch.cat(products, dim=1)
        ritz, C = np.linalg.eigh(_small(Q, AQ))
        # What was found is of interest if it is (nearly) wanted, or if it leads; and only if it is not in the block.
        news = ritz > max(min(want - 0.1, block.eigenvalues[0]), block.eigenvalues[-1]) + 1e-6
        if not news.any():
            return replace(block, draws=draws)
        new = like(C[:, news], Q)
        grown = replace(
            block,
            V=torch.cat([V, Q @ new], dim=1),
            AV=torch.cat([block.AV, AQ @ new], dim=1),
            eigenvalues=np.append(block.eigenvalues, ritz[news]),
            residuals=np.append(block.residuals, np.full(int(news.sum()), np.inf)),
            draws=draws,
        )
        return self._iterate(A, grown, want, tol or self.tol)

    # ---- inside ---------------------------------------------------------------------------------------

    def _needed(self, eigenvalues: Array, want: float) -> int:
        return max(1, int((eigenvalues > want).sum()))

    def _fresh(self, example: Tensor, count: int, V: Tensor | None, draws: int) -> tuple[Tensor, int]:
        """Random orthonormal vectors, orthogonal to V; reproducible from the number of earlier draws."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + draws)
        count = min(count, len(example) - (0 if V is None else V.shape[1]))
        X = torch.randn(len(example), count, generator=generator, dtype=torch.float64, device="cpu").to(example)
        return _orthonormal_against(X, V), draws + 1

    def _iterate(self, A: Operator, block: Eigenblock, want: float, tol: float) -> Eigenblock:
        """LOBPCG until all Ritz pairs above ``want`` are converged and ``slack`` more vectors are at hand."""
        X, AX, draws = block.V, block.AV, block.draws
        d = X.shape[0]
        floor = 2e3 * torch.finfo(X.dtype).eps * max(1.0, float(np.abs(block.eigenvalues).max(initial=1.0)))
        tol = max(tol, floor)
        P = AP = None
        for iteration in range(self.max_iterations + 1):
            ritz, C = np.linalg.eigh(_small(X, AX))
            ritz, rotation = ritz[::-1].copy(), like(C[:, ::-1], X)
            X, AX = X @ rotation, AX @ rotation
            R = AX - X * like(ritz, X)
            (residuals,) = host(torch.linalg.vector_norm(R, dim=0))
            if not np.isfinite(ritz).all():
                raise ConvergenceError("Hessian–vector products are not finite: the loss has left its domain.")
            needed = self._needed(ritz, want)
            converged = residuals <= tol
            # A slack vector may stay rough, unless an eigenvalue above `want` may be hiding behind its residual.
            hiding = residuals > np.maximum(want - ritz, tol)
            if converged[:needed].all() and not hiding[needed:].any():
                missing = min(needed + self.slack, d) - X.shape[1]
                if missing <= 0:
                    return Eigenblock(X, AX, ritz, residuals, draws)
                fresh, draws = self._fresh(X[:, 0], missing, X, draws)
                X, AX = torch.cat([X, fresh], dim=1), torch.cat([AX, A(fresh)], dim=1)
                P = AP = None
                # a new vector must be given the chance to show an eigenvalue above `want`
                X, AX = self._settle(A, X, AX, count=8)
                continue
            if iteration == self.max_iterations:
                break
            active = ~converged & ((np.arange(len(ritz)) < needed + self.slack) | hiding)
            X, AX, P, AP = _improved(A, X, AX, R[:, np.flatnonzero(active).tolist()], P, AP)
        worst = residuals[:needed].max()
        raise ConvergenceError(
            f"The leading {needed} eigenpairs of the effective Hessian did not converge: residual {worst:.1e} against "
            f"{tol:.1e} after {self.max_iterations} block products. Loosen the eigenvector tolerance, raise "
            "max_iterations, or compute in float64."
        )

    def _settle(self, A: Operator, X: Tensor, AX: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """A few unconditional iterations, so that a random vector turns towards the top of the spectrum."""
        P = AP = None
        for _ in range(count):
            ritz = like(np.linalg.eigvalsh(_small(X, AX))[::-1], X)
            R = AX - X * ritz if P is not None else AX - X @ (X.T @ AX)
            if float(R.norm()) < 1e-8:
                break
            X, AX, P, AP = _improved(A, X, AX, R, P, AP)
        return X, AX


def _small(X: Tensor, AX: Tensor) -> Array:
    """XᵀAX, symmetrised, host float64."""
    (G,) = host(X.double().T @ AX.double())
    return 0.5 * (G + G.T)


def _orthonormal_against(W: Tensor, X: Tensor | None) -> Tensor:
    """An orthonormal basis of W's part orthogonal to X (twice is enough)."""
    for _ in range(2):
        if X is not None:
            W = W - X @ (X.T @ W)
        W = torch.linalg.qr(W)[0]
    return W


def _improved(
    A: Operator, X: Tensor, AX: Tensor, R: Tensor, P: Tensor | None, AP: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One move of LOBPCG, for one block product: the best of X, its residuals R and the last directions P."""
    W = _orthonormal_against(R, X)
    S, AS = [X, W], [AX, A(W)]
    if P is not None and AP is not None:
        S.append(P)
        AS.append(AP)
    return _rayleigh_ritz(torch.cat(S, dim=1), torch.cat(AS, dim=1), X.shape[1])


def _rayleigh_ritz(S: Tensor, AS: Tensor, keep: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Best ``keep`` Ritz vectors in span(S), and LOBPCG's search directions (what they hold beyond the first columns).

    S may be nearly dependent once converged, so its Gram matrix is whitened in float64 and its null space dropped.
    """
    gram, A = _small(S, S), _small(S, AS)
    scale, Q = np.linalg.eigh(gram)
    good = scale > max(1e-10, 1e3 * torch.finfo(S.dtype).eps) * scale[-1]
    whiten = Q[:, good] / np.sqrt(scale[good])
    small = whiten.T @ A @ whiten
    C = whiten @ np.linalg.eigh(0.5 * (small + small.T))[1][:, ::-1][:, :keep]
    beyond = C.copy()
    beyond[:keep] = 0
    C_, beyond_ = like(C, S), like(beyond, S)
    P, AP = S @ beyond_, AS @ beyond_
    norm = torch.linalg.vector_norm(P, dim=0)
    nonzero = norm > torch.finfo(S.dtype).eps ** 0.5  # P is divided by it, and so are the rounding errors in AP
    P, AP = P[:, nonzero] / norm[nonzero], AP[:, nonzero] / norm[nonzero]
    X, R = torch.linalg.qr(S @ C_)  # orthonormal to rounding, so that Ritz values mean what they say
    AX = torch.linalg.solve_triangular(R, AS @ C_, upper=True, left=False)
    return X, AX, P, AP
