"""The movement of ν over a time h, derived from its movement over one step: ν_t = ν_{t−1} + f, J = ∂f/∂ν.

Let K = log(I+J); for an average, K = −ln(1/β₂).  A smooth ν(t) that passes through the discrete values obeys

    dν/dt = K J⁻¹ f,        ν(t+h) = ν(t) + ((I+J)ʰ − I) J⁻¹ f      (g held fixed; h = 1 is the optimizer's update).

The paper's flow has (I+J)⁻¹ f, which is the same to first order.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from dvi.methods import SpecError
from dvi.solvers.protocol import Array

#: "paper": the flow of C.3–C.7.  "second-order": the flow with momentum as a state and the logarithmic rate of ν; while
#: the optimizer is stable, its distance from the optimizer is O(η²).
Accuracy = Literal["paper", "second-order"]

DENSE_LIMIT = 200  # entries of a coupled ν whose matrix logarithm is affordable at every substep


def factor(J: Tensor, h: float | None) -> Tensor:
    """Entry by entry K J⁻¹ (per unit time, if ``h`` is None) or ((1+J)ʰ − 1) J⁻¹, for J > −1."""
    near = J.abs() < 1e-5  # the first term left out of the series is J³/4 ≤ 3e-16
    safe = torch.where(near, torch.ones_like(J), J)
    if h is None:
        return torch.where(near, 1 - J / 2 + J**2 / 3, torch.log1p(safe) / safe)
    series = h * (1 + (h - 1) * J / 2 * (1 + (h - 2) * J / 3))
    return torch.where(near, series, torch.expm1(h * torch.log1p(safe)) / safe)


def matrix(J: Array, h: float | None) -> Array:
    """The same for a coupled ν, J [n, n]: φ₁(K)⁻¹ or h φ₁(hK) φ₁(K)⁻¹, φ₁(x) = (eˣ − 1)/x.

    Raises:
        SpecError: if ν is too large for a matrix logarithm, or I + J has no real logarithm (ν alternates).
    """
    from scipy.linalg import logm

    n = len(J)
    if n > DENSE_LIMIT:
        raise SpecError(
            f'accuracy="second-order" needs a matrix logarithm if entries of ν depend on one another. ν has {n} '
            f'entries, more than {DENSE_LIMIT}. Use accuracy="paper".'
        )
    if h == 1.0:
        return np.eye(n)
    K = logm(np.eye(n) + J)
    if np.abs(np.imag(K)).max() > 1e-8 * max(1.0, np.abs(K).max()):
        raise SpecError("I + ∂f/∂ν has negative eigenvalues: ν alternates from step to step. No flow can follow that.")
    K = np.real(K)
    per_unit = np.linalg.inv(_phi(K))
    return np.asarray(per_unit if h is None else h * _phi(h * K) @ per_unit, dtype=np.float64)


def _phi(K: Array) -> Array:
    """φ₁(K) = ∫₀¹ e^{sK} ds, from the exponential of an augmented matrix."""
    from scipy.linalg import expm

    n = len(K)
    augmented = np.zeros((2 * n, 2 * n))
    augmented[:n, :n], augmented[:n, n:] = K, np.eye(n)
    out: Array = expm(augmented)[:n, n:]
    return out
