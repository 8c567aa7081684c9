"""The complementarity problem of the central flow, smoothed by noise: X at the edge, and its limit N → 0.

Over one unit time the gap K of the frame changes from gap₀ to K = gap₀ + β[X] − α.  The gap damps the oscillation, and
noise N sustains it.  A stationary X obeys X = (I−Λ)X(I−Λ) + N with Λ = 2 − K, which is

    K X + X K − K X K = N,        X ≻ 0,  K ≻ 0.

For N → 0 this becomes X ⪰ 0, K ⪰ 0, KX = 0: the cone complementarity problem, approached along an interior path.
"""

from __future__ import annotations

import numpy as np

from dvi.solvers.errors import ConvergenceError
from dvi.solvers.protocol import Array
from dvi.solvers.svec import smat, svec


def smoothed_ccp(alpha: Array, beta: Array, N: Array, gap: Array | None = None, tol: float = 1e-12) -> Array:
    """The X ≻ 0 [k, k] that noise N sustains at the end of a unit time.

    Args:
        alpha: [k, k]; beta: [n, n] in svec, n = k(k+1)/2, as :func:`dvi.solvers.ccp.solve` takes them.
        N: UᵀNU [k, k], positive definite.
        gap: Uᵀ(2P − H)U at the beginning [k, k]; 0 by default, which is the edge.
        tol: the allowed residual of the equation, relative to N.

    Raises:
        ConvergenceError: if Newton's method does not converge, for example because β is not monotone.
    """
    alpha, beta, N = (np.asarray(x, dtype=np.float64) for x in (alpha, beta, N))
    base = (np.zeros_like(alpha) if gap is None else np.asarray(gap, dtype=np.float64)) - alpha
    k = len(alpha)
    basis = [smat(e) for e in np.eye(k * (k + 1) // 2)]

    def room(x: Array) -> Array:
        return base + smat(beta @ x)

    def inside(x: Array) -> bool:
        return bool(np.linalg.eigvalsh(smat(x))[0] > 0 and np.linalg.eigvalsh(room(x))[0] > 0)

    def newton(x: Array, right: Array) -> Array:
        for _ in range(60):
            X, K = smat(x), room(x)
            r = svec(K @ X + X @ K - right)
            if np.linalg.norm(r) <= 0.1 * tol * np.linalg.norm(right):
                break
            responses = [smat(beta[:, i]) for i in range(len(basis))]
            J = np.stack([svec(K @ E + E @ K + B @ X + X @ B) for E, B in zip(basis, responses, strict=True)], axis=1)
            dx, step = -np.linalg.solve(J, r), 1.0
            while step > 1e-12 and not inside(x + step * dx):
                step *= 0.7
            x = x + (step if step == 1.0 else 0.9 * step) * dx
        return x

    x, size = svec(np.eye(k)), 1.0
    while not inside(size * x):
        size *= 2
        if size > 1e12:
            raise ConvergenceError("No oscillation opens the gap (β is not monotone), so there is no solution X.")
    x = size * x
    away = room(x) @ smat(x)
    away = away + away.T - N
    for theta in [*0.2 ** np.arange(40), 0.0]:
        if theta * np.abs(away).max() > 1e-3 * np.abs(N).max() or theta == 0.0:
            x = newton(x, N + theta * away)
    for _ in range(200):  # if K is small, −KXK is small beside the other terms
        X, K = smat(x), room(x)
        left = K @ X + X @ K - K @ X @ K
        # K is a difference, so its rounding error is that of its terms
        rounding = 1e2 * np.finfo(np.float64).eps * np.abs(base).max() * np.abs(X).max()
        if np.abs(left - N).max() <= tol * np.abs(N).max() + rounding:
            return smat(x)
        x = newton(x, N + K @ X @ K)
    raise ConvergenceError("The smoothed complementarity problem was not solved; the noise may be too large.")


__all__ = ["smoothed_ccp"]
