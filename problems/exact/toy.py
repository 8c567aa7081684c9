"""Toy problems with all derivatives in closed form."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations

import torch
from torch import Tensor

from dvi.problems.problem import Problem


def draw(shape: tuple[int, ...], seed: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Return standard normal numbers that depend only on the seed, not on the device."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").to(device, dtype)


def random_rotation(k: int, seed: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Return an orthogonal matrix [k, k], uniformly distributed."""
    Q, R = torch.linalg.qr(draw((k, k), seed, torch.float64, "cpu"))
    rotation: Tensor = Q * R.diagonal().sign()
    return rotation.to(device, dtype)


class Quadratic:
    """L(w) = ½ (w − c)ᵀ H (w − c), where H has given eigenvalues in a random basis, and c and w0 are random.

    The third derivative is zero, so no oscillation can hold an eigenvalue of H at the edge.  Above the edge there is no
    central flow.

    Args:
        eigenvalues: of H, of any sign [d].
        seed: of the basis, of c and of w0.
        dtype, device: of everything.

    """

    def __init__(
        self,
        eigenvalues: Sequence[float],
        seed: int = 0,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
    ) -> None:
        self.eigenvalues = torch.tensor(list(eigenvalues), dtype=dtype, device=device)
        d = len(self.eigenvalues)
        self.basis = random_rotation(d, seed, dtype, device)
        self.H = (self.basis * self.eigenvalues) @ self.basis.T
        self.minimum, w0 = draw((2, d), seed + 1, dtype, device)
        self.problem = Problem(self.loss, w0, name="quadratic")

    def loss(self, w: Tensor) -> Tensor:
        """L(w) [], which autograd can differentiate."""
        x = w - self.minimum
        return torch.dot(x, self.H @ x).mul(0.5)

    def gradient_flow(self, t: float, lr: float) -> Tensor:
        """Weights [d] at time t of dw/dt = −lr ∇L from w0: each eigendirection decays as exp(−lr λ t)."""
        return self._scale_modes(torch.exp(-lr * t * self.eigenvalues))

    def gradient_descent(self, steps: int, lr: float) -> Tensor:
        """Weights [d] after ``steps`` steps of gradient descent from w0: each eigendirection decays as (1 − lr
        λ)^steps.
        """
        return self._scale_modes(torch.pow(1 - lr * self.eigenvalues, steps))

    def _scale_modes(self, factors: Tensor) -> Tensor:
        modes: Tensor = self.basis.T @ (self.problem.w0 - self.minimum)
        return torch.addmv(self.minimum, self.basis, factors * modes)


class Cubic:
    """L(w) = gᵀw + ½ wᵀHw + ⅙ T[w, w, w] with random g, H and symmetric T: the third derivative is constant.

    Args:
        d: number of weights.
        seed: of g, H, T and w0.
        scale: of T.
        dtype, device: of everything.

    Attributes:
        g: gradient at 0 [d].
        H: Hessian at 0 [d, d].
        T: third derivative everywhere [d, d, d].

    """

    def __init__(
        self,
        d: int,
        seed: int = 0,
        scale: float = 1.0,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
    ) -> None:
        self.g, w0 = draw((2, d), seed, dtype, device)
        H = draw((d, d), seed + 1, dtype, device)
        self.H = (H + H.T) / 2
        T = draw((d, d, d), seed + 2, dtype, device)
        self.T = scale * sum((T.permute(order) for order in permutations(range(3))), torch.zeros_like(T)) / 6
        self.problem = Problem(self.loss, w0, name="cubic")

    def loss(self, w: Tensor) -> Tensor:
        """L(w) [], which autograd can differentiate."""
        return torch.dot(w, self.g + (self.H / 2 + self.T @ w / 6) @ w)

    def gradient(self, w: Tensor) -> Tensor:
        """∇L(w) [d]."""
        gradient: Tensor = self.g + (self.H + self.T @ w / 2) @ w
        return gradient

    def hessian(self, w: Tensor) -> Tensor:
        """∇²L(w) [d, d]."""
        hessian: Tensor = self.H + self.T @ w
        return hessian


def two_scales(
    zeta: float = 0.0,
    w0: Sequence[float] = (0.5, 1.0),
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> Problem:
    """Berthier's L(x, y) = ½ (y + ζx) x² − x − y: x relaxes fast, y drifts slowly to the edge of stability.

    Berthier's paper takes a learning rate of 0.3.
    """

    def loss(w: Tensor) -> Tensor:
        x, y = w.unbind()
        return 0.5 * (y + zeta * x) * x.square() - x - y

    return Problem(loss, torch.tensor(list(w0), dtype=dtype, device=device), name="two scales")
