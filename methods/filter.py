"""Momentum as a linear filter on the gradient, and its effect at the edge of stability.

With w_{t+1} = w_t − P⁻¹ m_t and m_t = Q(z) g_t, the characteristic equation on an eigenvector HU = λPU is

    (z − 1) + λ Q(z) = 0,        x = z⁻¹,

so the optimizer becomes unstable at the least real λ > 0 for which a root lies on the unit circle, λ = (1 − z)/Q(z).
If that root is z = −1, the optimizer oscillates with period two, as gradient descent does at λ = 2.  Then the filter
enters its central flow through three numbers only: the threshold c, the gain Q₁ and the lag τ.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dvi.methods.errors import SpecError

Memory = tuple[Tensor, ...]  # past gradients, then past outputs, all [d]; the latest of each is the last


@dataclass(frozen=True)
class Filter:
    """Q(x) = (n₀ + n₁x + …)/(d₀ + d₁x + …), where x = z⁻¹ delays by one step; ``Filter()`` is 1, no momentum.

    >>> heavy_ball = Filter([1], [1, -0.9])
    >>> [round(float(number), 12) for number in (heavy_ball.threshold, heavy_ball.gain, heavy_ball.lag)]
    [3.8, 10.0, 9.0]

    Args:
        numerator: n₀, n₁, …: numbers (or, inside a method with schedules, tensors []).
        denominator: d₀, d₁, …, d₀ ≠ 0.
    """

    numerator: Sequence[Any] = (1.0,)
    denominator: Sequence[Any] = (1.0,)

    @property
    def trivial(self) -> bool:
        """True if there is no filter, Q = 1."""
        return self.order == 0 and float(self.numerator[0]) == float(self.denominator[0])

    @property
    def order(self) -> int:
        """How many past vectors the filter remembers."""
        return max(len(self.numerator), len(self.denominator)) - 1

    # ---- what the flow needs --------------------------------------------------------------------------

    @property
    def gain(self) -> Any:
        """Q₁ = Q(x = 1): the average step is Q₁ P⁻¹g."""
        return sum(self.numerator) / sum(self.denominator)

    @property
    def threshold(self) -> Any:
        """The threshold c = 2/Q(z = −1): the effective sharpness at which period-two oscillations begin, H ⪯ cP."""
        return 2 * _alternating(self.denominator) / _alternating(self.numerator)

    @property
    def lag(self) -> Any:
        """τ = Q′(x = 1)/Q₁: the mean age of the gradients in m, in unit times."""
        return _slope(self.numerator) / sum(self.numerator) - _slope(self.denominator) / sum(self.denominator)

    # ---- the filter at work ---------------------------------------------------------------------------

    def initial(self, w: Tensor) -> Memory:
        """An empty memory for gradients like w [d]."""
        return tuple(torch.zeros_like(w) for _ in range(self._inputs + self._outputs))

    def step(self, g: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """m_t [d] from g_t [d], and the memory after it, whose last entry is m_t.

        The memory holds gradients and outputs themselves (direct form I).  So scheduled coefficients act with their
        present values: m_t = β_t m_{t−1} + g_t.
        """
        first, inputs = self.denominator[0], (*memory[: self._inputs], g)
        outputs = memory[self._inputs :]
        m = sum(n * x for n, x in zip(self.numerator, reversed(inputs), strict=False)) / first
        m = m - sum(d * y for d, y in zip(self.denominator[1:], reversed(outputs), strict=False)) / first
        return m, (*inputs[1:], *(*outputs, m)[1:])

    @property
    def _inputs(self) -> int:
        """How many past gradients are kept."""
        return len(self.numerator) - 1

    @property
    def _outputs(self) -> int:
        """How many past outputs are kept, the last one always."""
        return max(1, len(self.denominator) - 1)

    # ---- what does not fit ----------------------------------------------------------------------------

    def check(self, decay: float = 0.0) -> None:
        """Raise unless the filter is stable and the optimizer leaves stability by oscillating with period two.

        Args:
            decay: γ of a decoupled weight decay, w_{t+1} = (1 − γ)w_t − P⁻¹m_t.

        Raises:
            SpecError: if coefficients are missing or not numbers; if the filter is unstable or its gain is not
                positive; if the optimizer leaves stability at another frequency.  The message names the pole, the gain
                or the frequency.
        """
        for part in (self.numerator, self.denominator):
            if not isinstance(part, Sequence) or not part or not all(isinstance(x, (Real, Tensor)) for x in part):
                raise SpecError(
                    f"{self}: numerator and denominator are lists of one number or more, as in [1.0, -0.9]."
                )
        if self.trivial:
            return
        numbers = [*self._numbers[0], *self._numbers[1]]
        if not all(math.isfinite(x) for x in numbers) or self._numbers[1][0] == 0:
            raise SpecError(f"{self}: coefficients must be finite, and the denominator's first one not zero.")
        poles = np.roots(self._numbers[1])  # in z
        if len(poles) and np.abs(poles).max() >= 1:
            raise SpecError(
                f"{self}: a pole of modulus {np.abs(poles).max():.3g} (momentum must forget: moduli below 1)."
            )
        if not float(self.gain) > 0:
            raise SpecError(f"{self}: Q(1) = {float(self.gain):.3g}; the average step must go downhill, Q(1) > 0.")
        first = self.escape_under(decay)
        if first is None:
            raise SpecError(f"{self}: no step size makes the optimizer oscillate: it has no edge of stability.")
        frequency, sharpness = first
        if frequency < math.pi:
            raise SpecError(
                f"{self}: the optimizer leaves stability at z = exp(±{frequency:.4g}i), a cycle of "
                f"{2 * math.pi / frequency:.3g} steps, at effective sharpness {sharpness:.4g}, before it would "
                "oscillate with period two. A central flow describes period-two oscillations (z = −1) only."
            )

    @cached_property
    def escape(self) -> tuple[float, float] | None:
        """(ω, λ): the least λ > 0 for which (z−1) + λQ = 0 has a root z = exp(iω), 0 < ω ≤ π, on the unit circle."""
        return self.escape_under(0.0)

    def escape_under(self, decay: float) -> tuple[float, float] | None:
        """The same with decoupled weight decay γ: for (z−1+γ) + λQ = 0.

        At such a root (1−γ−z)/Q(z) is real: Im[(1−γ−z) D(z̄) N(z)] = −Σ aₖ sin kω = 0.  Divided by sin ω, this is a
        polynomial in cos ω.
        """
        numerator, denominator = (np.array(c) for c in self._numbers)
        crossings: list[tuple[float, float]] = []
        if _alternating(self._numbers[0]) != 0:
            edge = float(_alternating(self._numbers[1]) / _alternating(self._numbers[0]))
            crossings.append((math.pi, (2 - decay) * edge))
        # powers of x = z̄ from −len(N) on: (1 − γ − x⁻¹) · D(x) · N(x⁻¹)
        product = np.convolve(np.convolve([-1.0, 1.0 - decay], denominator), numerator[::-1])
        a = {k - len(numerator): float(value) for k, value in enumerate(product)}
        top = max(abs(k) for k in a)
        odd = [0.0] + [a.get(k, 0.0) - a.get(-k, 0.0) for k in range(1, top + 1)]
        for y in _roots_in_cosine(odd):
            omega = math.acos(y)
            x = np.exp(-1j * omega)
            value = np.polyval(numerator[::-1], x)
            if abs(value) > 1e-12:
                crossings.append((omega, float(((1 - decay - 1 / x) * np.polyval(denominator[::-1], x) / value).real)))
        positive = [c for c in crossings if c[1] > 0]
        return min(positive, key=lambda c: c[1]) if positive else None

    @cached_property
    def _numbers(self) -> tuple[list[float], list[float]]:
        return [float(x) for x in self.numerator], [float(x) for x in self.denominator]


def _alternating(coefficients: Sequence[Any]) -> Any:
    """The polynomial at x = −1."""
    return sum(c if i % 2 == 0 else -c for i, c in enumerate(coefficients))


def _slope(coefficients: Sequence[Any]) -> Any:
    """The polynomial's derivative at x = 1."""
    return sum(i * c for i, c in enumerate(coefficients))


def _roots_in_cosine(odd: list[float]) -> list[float]:
    """Roots y = cos ω, −1 < y < 1, of Σ_{k≥1} odd[k] sin(kω)/sin ω = Σ odd[k] U_{k−1}(y)."""
    polynomial = np.polynomial.Polynomial([0.0])
    before, now = np.polynomial.Polynomial([0.0]), np.polynomial.Polynomial([1.0])  # U₋₁, U₀
    for c in odd[1:]:
        polynomial = polynomial + c * now
        before, now = now, np.polynomial.Polynomial([0.0, 2.0]) * now - before
    scale = float(np.abs(polynomial.coef).max())
    if scale == 0:
        return []
    roots = polynomial.trim(1e-13 * scale).roots()
    # the error of a real root from a companion matrix is its rounding; the square root of it at a double root
    return [float(r.real) for r in np.asarray(roots, complex) if abs(r.imag) < 1e-7 and abs(r.real) < 1 - 1e-9]


__all__ = ["Filter", "Memory"]
