"""Toy problems with an exact central flow of gradient descent, before, at and after the edge of stability."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from scipy.optimize import brentq
from torch import Tensor

from dvi.problems.errors import ProblemError
from dvi.problems.exact.toy import random_rotation
from dvi.problems.problem import Problem


class MatrixSweep:
    """k eigenvalues that rise to the edge and are held there independently, in a rotated basis.

    The weights are w = (x, svec Y) with x [k] and Y symmetric [k, k]:

        L(w) = ½ xᵀ(S₀ + Y)x − ⟨C, Y⟩

    At x = 0 the only curvature is S₀ + Y, in x.  The central flow of gradient descent with learning rate η keeps x = 0
    and has

        dY/dt = η (C − ½Σ),    Z = (2/η) I − S₀ − Y ⪰ 0,    Σ ⪰ 0,    ⟨Z, Σ⟩ = 0

    C = Q diag(c) Qᵀ and Z(0) = Q diag(z) Qᵀ commute, so all these matrices commute at all times.  For constant η,
    eigenvalue i moves as zᵢ(t) = max(zᵢ − η cᵢ t, 0), and σᵢ² = 2cᵢ once it is at the edge.  Let the learning rate
    decay as 1/η(t) = 1/η + rt.  Then the edge recedes at speed 2r and σᵢ² = 2cᵢ − 4r/η(t).  An eigenvalue leaves the
    edge when this reaches 0.

    Args:
        rates: c [k], the rates at which eigenvalues rise (positive).
        gaps: z [k], their initial distances below the edge (positive).
        lr: η, learning rate at time 0.
        decay: r, the growth of 1/η per unit time.
        seed: of the rotation Q; None for Q = I.
        dtype, device: of all tensors.

    Raises:
        ProblemError: if a number is out of range.

    """

    def __init__(
        self,
        rates: Sequence[float],
        gaps: Sequence[float],
        lr: float,
        decay: float = 0.0,
        seed: int | None = 0,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
    ) -> None:
        if len(rates) != len(gaps) or min(*rates, *gaps, lr) <= 0 or decay < 0:
            raise ProblemError("rates and gaps are equally many; they and lr are positive, and decay is not negative")
        self.rates, self.gaps0, self.lr, self.decay = list(rates), list(gaps), lr, decay
        k = len(self.rates)
        eye = torch.eye(k, dtype=dtype, device=device)
        self.Q = eye if seed is None else random_rotation(k, seed, dtype, device)
        self.C = self._rotate(self.rates)
        self.S0 = 2 / lr * eye - self._rotate(self.gaps0)
        self._i, self._j = torch.triu_indices(k, k, device=device)
        self._scale = torch.where(self._i == self._j, torch.ones_like(self.C[0, 0]), math.sqrt(2))
        self._entries = [self._entry(c, z) for c, z in zip(self.rates, self.gaps0, strict=True)]
        w0 = torch.zeros(k + len(self._i), dtype=dtype, device=device)
        self.problem = Problem(self.loss, w0, name="matrix sweep")

    def loss(self, w: Tensor) -> Tensor:
        """L(w) [], which autograd can differentiate."""
        k = len(self.rates)
        x, y = w[:k], w[k:] / self._scale
        Y = w.new_zeros(k, k).index_put((self._i, self._j), y)
        Y = Y + Y.T - torch.diag(Y.diagonal())
        return 0.5 * torch.dot(x, (self.S0 + Y) @ x) - (self.C * Y).sum()

    def learning_rate(self, t: float) -> float:
        """η(t) = η / (1 + rηt)."""
        return self.lr / (1 + self.decay * self.lr * t)

    @property
    def entry_times(self) -> list[float]:
        """The times [k] at which the eigenvalues reach the edge; infinity for those that never do."""
        return list(self._entries)

    @property
    def exit_times(self) -> list[float]:
        """The times [k] at which the eigenvalues finally leave the edge; infinity for those that never reach or leave
        it.
        """
        return [self._turn(c) if math.isfinite(t) else math.inf for c, t in zip(self.rates, self._entries, strict=True)]

    def gaps(self, t: float) -> Tensor:
        """The distances [k] of the eigenvalues below the edge 2/η(t)."""
        values = []
        for c, z, entry, leave in zip(self.rates, self.gaps0, self._entries, self.exit_times, strict=True):
            if t <= entry:
                values.append(self._free_gap(c, z, t))
            else:
                values.append(0.0 if t <= leave else self._free_gap(c, -self._free_gap(c, 0.0, leave), t))
        return self.S0.new_tensor(values)

    def sharpness(self, t: float) -> Tensor:
        """Return the eigenvalues of S₀ + Y(t) [k] in the order of ``rates``; effective are η(t) times these."""
        return 2 / self.learning_rate(t) - self.gaps(t)

    def variances(self, t: float) -> Tensor:
        """σᵢ²(t) [k], the eigenvalues of Σ in the order of ``rates``."""
        held = [entry <= t <= leave for entry, leave in zip(self._entries, self.exit_times, strict=True)]
        speed = 4 * self.decay / self.learning_rate(t)
        return self.S0.new_tensor([2 * c - speed if h else 0.0 for c, h in zip(self.rates, held, strict=True)])

    def covariance(self, t: float) -> Tensor:
        """Σ(t) [k, k], that of x; the weights of Y do not oscillate."""
        return self._rotate(self.variances(t).tolist())

    def weights(self, t: float) -> Tensor:
        """w(t) [d] on the central flow from w0 = 0."""
        Y = self._rotate(self.sharpness(t).tolist()) - self.S0
        return torch.cat([Y.new_zeros(len(Y)), Y[self._i, self._j] * self._scale])

    def _rotate(self, values: Sequence[float]) -> Tensor:
        return (self.Q * self.Q.new_tensor(list(values))) @ self.Q.T

    def _free_gap(self, c: float, z: float, t: float) -> float:
        """Return the gap z + 2rt − c ∫η at t without Σ."""
        if self.decay == 0:
            return z - self.lr * c * t
        return z + 2 * self.decay * t - c / self.decay * math.log1p(self.decay * self.lr * t)

    def _turn(self, c: float) -> float:
        """The time at which the edge recedes as fast as an eigenvalue of rate c rises without Σ: 2r = c η(t)."""
        if self.decay == 0:
            return math.inf
        return max(0.0, (c / (2 * self.decay) - 1 / self.lr) / self.decay)

    def _entry(self, c: float, z: float) -> float:
        if self.decay == 0:
            return z / (self.lr * c)
        nearest = self._turn(c)
        if self._free_gap(c, z, nearest) > 0:
            return math.inf
        return float(brentq(lambda t: self._free_gap(c, z, t), 0.0, nearest, xtol=1e-14, rtol=1e-14))


class Circle:
    """A flow that slides along a curved edge; it shows the order of an integrator.

    The weights are w = (x, y₁, y₂) and

        L(w) = ½ x²(y₁² + y₂²) − a y₁

    At x = 0 the only curvature is |y|².  So for gradient descent with learning rate η the edge is the circle of radius
    R = √(2/η).  Inside, y₁ moves at speed ηa.  On the circle y = R (cos θ, sin θ) the central flow has

        tan(θ/2) = tan(θ₀/2) exp(−ηat/R),    σ² = a cos θ / R

    Args:
        lr: η.
        a: the force along y₁ (positive).
        angle: θ₀ in (−π/2, π/2), the angle at which the circle is reached.
        entry: the time at which it is reached.
        dtype, device: of all tensors.

    Raises:
        ProblemError: if a number is out of range.

    """

    def __init__(
        self,
        lr: float = 0.5,
        a: float = 1.0,
        angle: float = 1.2,
        entry: float = 0.0,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
    ) -> None:
        if lr <= 0 or a <= 0 or entry < 0 or not abs(angle) < math.pi / 2:
            raise ProblemError("lr and a are positive, entry is not negative, and |angle| is below π/2")
        self.lr, self.a, self.angle, self.entry = lr, a, angle, entry
        self.radius = math.sqrt(2 / lr)
        if lr * a * entry > 2 * self.radius * math.cos(angle):
            raise ProblemError("the flow would have to start outside the circle to enter it so late")
        self.problem = Problem(self.loss, self._at(0.0, dtype, device), name="circle")

    def loss(self, w: Tensor) -> Tensor:
        """L(w) [], which autograd can differentiate."""
        x, y = w[0], w[1:]
        return 0.5 * x.square() * y.square().sum() - self.a * y[0]

    def theta(self, t: float) -> float:
        """Return the angle θ(t) on the circle, for t ≥ entry."""
        decay = math.exp(-self.lr * self.a * max(t - self.entry, 0.0) / self.radius)
        return 2 * math.atan(math.tan(self.angle / 2) * decay)

    def variance(self, t: float) -> float:
        """σ²(t), of x; 0 before the entry."""
        return 0.0 if t < self.entry else self.a * math.cos(self.theta(t)) / self.radius

    def weights(self, t: float) -> Tensor:
        """w(t) [3] on the central flow from w0."""
        return self._at(t, self.problem.dtype, self.problem.device)

    def _at(self, t: float, dtype: torch.dtype, device: torch.device | str) -> Tensor:
        theta = self.theta(t)
        behind = self.lr * self.a * max(self.entry - t, 0.0)
        y = [self.radius * math.cos(theta) - behind, self.radius * math.sin(theta)]
        return torch.tensor([0.0, *y], dtype=dtype, device=device)
