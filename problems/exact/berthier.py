"""Berthier's two scales on a curved edge: a central flow in closed form whose eigenvector turns."""

from __future__ import annotations

import cmath
import math
from collections.abc import Iterable

import torch
from numpy.polynomial import Polynomial
from scipy.optimize import brentq
from torch import Tensor

from dvi.problems.errors import ProblemError
from dvi.problems.exact.toy import two_scales


class TwoScales:
    """The flow of :func:`two_scales` along the edge of stability, from a point on it.

    With weights w = (x, y) and L(w) = ½ (y + ζx) x² − x − y the Hessian is [[z, x], [x, 0]], z = y + 3ζx.  Its leading
    eigenvalue is s = 2/η, with eigenvector (s, x), on the curve

        y = s − 3ζx − x²/s

    On this edge Σ = q (s, x)(s, x)ᵀ.  Let A = ∂L/∂x = xy + (3/2)ζx² − 1, B = ∂L/∂y = ½x² − 1 and m = 2x + 3ζs, so that
    (m, s) is normal to the edge.  The central flow of gradient descent with learning rate η is

        dx/dt = −η (A + ½ q s m),    dy/dt = −η (B + ½ q s²)

    It stays on the edge if m dx/dt + s dy/dt = 0, so ½ q s = −(mA + sB)/(s² + m²).  This leaves

        dx/dt = −η s N(x) / (s² + (2x + 3ζs)²),    N(x) = sA − mB = −2x³ − 3ζs x² + (s² + 2) x + (3ζ − 1) s

    the flow of −η∇L projected onto the edge.  N is a cubic with roots rᵢ, and partial fractions give

        t = −1/(ηs) Σᵢ aᵢ log((x − rᵢ)/(x₀ − rᵢ)),    aᵢ = (s² + (2rᵢ + 3ζs)²) / N′(rᵢ)

    which is solved for x.  For small η, x relaxes to a root near 1/s at a rate of about 2 per unit time.

    Args:
        lr: η; Berthier's paper takes 0.3.
        zeta: ζ.
        x: x₀.
        dtype, device: of all tensors.

    Raises:
        ProblemError: if lr is not positive, or if the flow from x₀ does not come to rest on the edge.  It leaves the
            edge when q would become negative.

    """

    def __init__(
        self,
        lr: float = 0.3,
        zeta: float = 0.0,
        x: float = 0.5,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
    ) -> None:
        if not lr > 0:
            raise ProblemError("lr must be positive")
        self.lr, self.zeta, self.x0, self.edge = lr, zeta, x, 2 / lr
        s = self.edge
        normal = Polynomial([3 * zeta * s, 2])
        N = Polynomial([(3 * zeta - 1) * s, s**2 + 2, -3 * zeta * s, -2])
        sA = Polynomial([-s, s**2, -1.5 * zeta * s, -1])
        B = Polynomial([-1, 0, 0.5])
        self._push = -2 / s**2 * (normal * sA + s**2 * B)  # q (s² + m²), as a polynomial
        self._normal = normal
        self._roots = [complex(r) for r in N.roots()]  # real ones come without an imaginary part
        slope = N.deriv()
        self._parts = [(s**2 + normal(r) ** 2) / slope(r) for r in self._roots]
        self._rest = self._resting_place(N)
        low, high = sorted((x, self._rest))
        turns = [r for r in _real(self._push.roots()) if low <= r <= high]
        if turns or self._push(x) <= 0:
            raise ProblemError(f"from x = {x:g} the flow leaves the edge: oscillations there would have to be negative")
        self.problem = two_scales(zeta, self._point(x), dtype, device)

    def _resting_place(self, N: Polynomial) -> float:
        """The root of N to which x moves: the nearest one in the direction of dx/dt."""
        towards = -math.copysign(1.0, N(self.x0))
        ahead = [r for r in _real(self._roots) if (r - self.x0) * towards > 0]
        if not ahead:
            raise ProblemError(f"from x = {self.x0:g} the flow runs along the edge without end")
        return min(ahead, key=lambda r: abs(r - self.x0))

    def x(self, t: float) -> float:
        """Return x at time t; x₀ before 0."""
        if t <= 0:
            return self.x0
        rest, first = self._rest, self.x0
        # In v = log((x − rest)/(x₀ − rest)) the time is nearly linear, and x never reaches its rest.
        speed = 1.0
        while self._time(rest + (first - rest) * math.exp(-speed * t), -speed * t) < t:
            speed *= 2
        v = float(brentq(lambda v: self._time(rest + (first - rest) * math.exp(v), v) - t, -speed * t, 0.0, xtol=1e-15))
        return rest + (first - rest) * math.exp(v)

    def _time(self, x: float, v: float) -> float:
        """The time at which x is reached; v = log((x − rest)/(x₀ − rest)) is an argument because computing it would
        cancel.
        """
        total = 0j
        for root, part in zip(self._roots, self._parts, strict=True):
            total += part * (v if root == self._rest else cmath.log((x - root) / (self.x0 - root)))
        return -total.real / (self.lr * self.edge)

    def covariance(self, t: float) -> Tensor:
        """Σ(t) [2, 2]."""
        x, s = self.x(t), self.edge
        u = self.problem.w0.new_tensor([s, x])
        q = float(self._push(x)) / (s**2 + float(self._normal(x)) ** 2)
        return q * torch.outer(u, u)

    def variance(self, t: float) -> float:
        """The trace of Σ(t)."""
        return float(self.covariance(t).trace())

    def weights(self, t: float) -> Tensor:
        """w(t) [2] on the central flow from w0."""
        return self.problem.w0.new_tensor(self._point(self.x(t)))

    def _point(self, x: float) -> list[float]:
        return [x, self.edge - 3 * self.zeta * x - x**2 / self.edge]


def _real(roots: Iterable[complex]) -> list[float]:
    """Return the real ones of the roots."""
    return [complex(r).real for r in roots if complex(r).imag == 0]
