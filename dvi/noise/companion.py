"""How the covariance of an oscillation changes in one step of an optimizer with momentum, and where it settles.

Let U [d, k] be a frame with M = UᵀHU and S = UᵀPU.  The deviation Ux and the filter's memory obey a linear map,

    ĝ = Mx + ε,      m̂ = Q ĝ,      x⁺ = Kx − S⁻¹ m̂,      E εεᵀ = N = Uᵀ(noise)U.

For z = (x, past ĝ, past m̂) the map is z⁺ = Fz + Gε, and the covariance of z changes by Z⁺ = FZFᵀ + GNGᵀ.  Without
momentum, and in a frame of eigenvectors with UᵀPU = I, this is X⁺ = (I−Λ)X(I−Λ) + N.

Without weight decay, K = I.  Weight decay Γ gives K = S⁻¹ UᵀP(I−Γ)U.  The projection on the frame then uses P and not
P̃, because without momentum the map of a step, P⁻¹(P(I−Γ) − H), is symmetric in the metric of P.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dvi.methods import Filter
from dvi.solvers.protocol import Array


def remembered(Q: Filter) -> int:
    """The number of past vectors in z, beside x."""
    return 0 if Q.trivial else len(Q.numerator) - 1 + max(1, len(Q.denominator) - 1)


@dataclass(frozen=True)
class Companion:
    """The linear map of z: z⁺ = Fz + Gε."""

    F: Array
    G: Array

    @classmethod
    def of(cls, Q: Filter, M: Array, S: Array, kept: Array | None = None) -> Companion:
        """The map of an optimizer in a frame.

        Args:
            Q: the filter; its coefficients are numbers.
            M: UᵀHU [k, k].
            S: UᵀPU [k, k].
            kept: UᵀP(I−Γ)U [k, k] with weight decay Γ; None if the weights do not decay.
        """
        k = len(M)
        eye = np.eye(k)
        gain = np.asarray(np.linalg.inv(S), dtype=np.float64)
        K = eye if kept is None else gain @ kept
        if Q.trivial:
            return cls(K - gain @ M, -gain)
        n, d = ([float(c) for c in part] for part in (Q.numerator, Q.denominator))
        inputs, outputs = len(n) - 1, max(1, len(d) - 1)
        size = 1 + inputs + outputs

        def place(i: int) -> slice:
            return slice(i * k, (i + 1) * k)

        now = np.zeros((k, size * k))  # ĝ without noise, as a function of z
        now[:, place(0)] = M
        m = n[0] * now
        for i in range(1, inputs + 1):
            m[:, place(1 + inputs - i)] += n[i] * eye
        for j in range(1, len(d)):
            m[:, place(size - j)] -= d[j] * eye
        m = m / d[0]
        F, G = np.zeros((size * k, size * k)), np.zeros((size * k, k))
        F[place(0), place(0)] = K
        F[place(0)] -= gain @ m
        G[place(0)] = -gain * (n[0] / d[0])
        for i in range(1, inputs):
            F[place(i), place(i + 1)] = eye
        if inputs:
            F[place(inputs)], G[place(inputs)] = now, eye
        for j in range(1 + inputs, size - 1):
            F[place(j), place(j + 1)] = eye
        F[place(size - 1)], G[place(size - 1)] = m, eye * (n[0] / d[0])
        return cls(F, G)

    def step(self, Z: Array, N: Array) -> Array:
        """The covariance after a step with noise N [k, k].

        The result is made symmetric.  It is symmetric in exact arithmetic, but rounding errors that are not would grow.
        """
        Z = self.F @ Z @ self.F.T + self.G @ N @ self.G.T
        return 0.5 * (Z + Z.T)

    def stationary(self, N: Array) -> Array:
        """The stationary covariance X [k, k] of x under constant noise N [k, k].

        Raises:
            ValueError: if the map is not stable, so that there is no stationary covariance.
        """
        from scipy.linalg import solve_discrete_lyapunov

        if np.abs(np.linalg.eigvals(self.F)).max() >= 1:
            raise ValueError("The optimizer is not stable here (effective sharpness at or above 2): X grows forever.")
        k = len(N)
        return np.asarray(solve_discrete_lyapunov(self.F, self.G @ N @ self.G.T)[:k, :k], dtype=np.float64)

    def radius(self, spread: Array, steps: int = 200) -> float:
        """The spectral radius of Z ↦ FZFᵀ + G T(X) Gᵀ, T(X)_ad = Σ spread_abcd X_bc, by power iteration.

        Args:
            spread: [k, k, k, k]: how the noise grows with the oscillation (the second term of N).
            steps: the largest number of iterations.
        """
        k = len(spread)
        Z, size = np.eye(len(self.F)), 1.0
        for _ in range(steps):
            T = np.einsum("abcd,bc->ad", spread, Z[:k, :k])
            Z, before = self.step(Z, 0.5 * (T + T.T)), size
            size = float(np.trace(Z))
            if size == 0 or not np.isfinite(size):
                break
            Z = Z / size
            if abs(size - before) < 1e-6 * size:
                break
        return size


__all__ = ["Companion", "remembered"]
