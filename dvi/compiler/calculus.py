"""The compiler: from a declared (f, P) to α, β and the drift, by automatic differentiation.

With J = ∂f/∂ν, h_i = H u_i and an svec basis E_b of symmetric k × k matrices (paper, C.7 with its errata)

    ν̇₀ = (I+J)⁻¹ f(ν, g),          ν̇_b = (I+J)⁻¹ ½∇²_g f[HU E_b UᵀH],
    α  = T P⁻¹(−g) − 2 Uᵀ(∂P[ν̇₀])U,     β_ab = ½ T_a P⁻¹ T_b + 2 ⟨E_a, Uᵀ(∂P[ν̇_b])U⟩.

The code is the same for every optimizer: it only calls f and P, and differentiates them.

P here and below is P̃ (:mod:`~dvi.compiler.scaled_preconditioner`).  With momentum Q, the flow moves at κ = Q₁c/2 times
the speed of its P̃, −Q₁P⁻¹ = −κP̃⁻¹.  Without momentum κ = 1 and P̃ = P.  Weight decay Γ = diag(γ) is included in
P̃ = (c/2)P(I − Γ/2), so that −Q₁P⁻¹ = −κ(I − Γ/2)P̃⁻¹.  It also adds −T[Γw] to α (:mod:`dvi.compiler.decay`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.func import vmap
from torch.utils import _pytree as pytree

from dvi.compiler import exact_rates
from dvi.compiler.decay import Decay
from dvi.compiler.exact_rates import Accuracy
from dvi.compiler.jacobian_solve import Flat, smallest_singular_value, solve_coupled
from dvi.compiler.jacobian_structure import (
    curvature,
    diagonal_curvature,
    diagonal_slope,
    generic,
    is_local,
    random_like,
)
from dvi.compiler.scaled_preconditioner import Metric
from dvi.compiler.tangents import derivative, still
from dvi.compiler.tracing import Replays
from dvi.methods import Method, NotPositiveDefiniteError, Nu, Preconditioner, SpecError
from dvi.problems import NotFiniteError
from dvi.solvers.errors import DomainError
from dvi.solvers.protocol import host, like
from dvi.solvers.svec import triu

#: The meaning of ½∇²_w f[Σ].  "gradient-covariance": only the curvature of f in g, ½∇²_g f[HΣH], which gives the
#: paper's C.4 and C.5.  "full": the derivative through g = ∇L(w), which adds ∂f/∂g · ½∇³L[Σ].
Covariance = Literal["gradient-covariance", "full"]

#: The HU that acts on ν: H times U as computed, 2P(ν)U as on the constraint, or the one that the integrator chooses.
EdgeHessian = Literal["integrator", "computed", "edge"]

_FORGOTTEN = 1e-8  # ν has no memory if it keeps less than this fraction of itself in one step


class LeftDomainError(NotPositiveDefiniteError, DomainError):
    """P(ν) is no longer positive definite at a state of a run; an integrator may retry with a smaller step."""


class LossLeftDomainError(NotFiniteError, DomainError):
    """The loss or its gradient is not finite at a trial state; an integrator may retry with a smaller step."""


class SpecCalculus:
    """All derivatives of a spec (f, P) that a flow needs.

    Args:
        method: the declaration.
        nu: ν after a first update at some weights: an example from which the structure of ∂f/∂ν is found.
        g: the gradient [d] at those weights.
        covariance: the meaning of ½∇²_w f[Σ], see :data:`Covariance`.
        accuracy: of ν's rate, see :data:`dvi.compiler.exact_rates.Accuracy`.

    Raises:
        ValueError: for an unknown ``covariance``.
        SpecError: if ν has no memory (I + ∂f/∂ν is singular), or alternates from step to step.
    """

    def __init__(
        self,
        method: Method,
        nu: Nu,
        g: Tensor,
        covariance: Covariance = "gradient-covariance",
        accuracy: Accuracy = "paper",
    ) -> None:
        if covariance not in ("gradient-covariance", "full"):
            raise ValueError(f'covariance is "gradient-covariance" or "full", not {covariance!r}.')
        self.method = method
        self.covariance, self.accuracy = covariance, accuracy
        self.replays = Replays(method)
        self.metric = Metric(method, nu, g, self.replays, centred=accuracy == "paper")
        self.momentum, self.stateless = self.metric.momentum, self.metric.stateless
        self.elementwise = self.stateless or self._is_elementwise(nu, g)
        #: relaxation time (unit times) that is assumed for parts of ν without memory; 0: such parts are refused
        self.memory = float(getattr(method, "memory", 0.0))
        self._example = nu, g
        if not self.stateless:
            self._refuse_algebraic(nu, g)

    @cached_property
    def local(self) -> bool:
        """Is ∂²f/∂g² diagonal?  Found when it is asked for: the optimizer itself never asks."""
        return not self.stateless and is_local(self.method, *self._example)

    def find_structure(self) -> None:
        """Differentiate f and P to find what is local, so that an f or P without derivatives fails here."""
        _ = self.local, self.metric.local

    # ---- P --------------------------------------------------------------------------------------------

    def P(self, nu: Nu, t: float) -> Preconditioner:
        """P̃ at (ν, t): the preconditioner, scaled so that the threshold is 2."""
        return self.metric.P(nu, t)

    def speed(self, t: float) -> float:
        """κ = Q₁c/2: the speed of the flow relative to P̃⁻¹; 1 without momentum."""
        Q = self.metric.at(t).Q()
        return float(Q.gain * Q.threshold) / 2 if self.momentum else 1.0

    def decay(self, t: float) -> Decay | None:
        """The weight decay at t, or None if there is none."""
        gamma = self.metric.decay(t)
        return None if gamma is None else Decay(gamma.vector)

    def checked_P(self, nu: Nu, t: float, g: Tensor | None = None) -> Preconditioner:
        """The preconditioner at (ν, t), after a check that it is positive definite.

        Raises:
            LeftDomainError: if it is not positive definite.
        """
        P = self.P(nu, t)
        self.require(P, t, g)
        return P

    def require(self, P: Preconditioner, t: float, g: Tensor | None = None) -> None:
        """Raise LeftDomainError unless P is positive definite."""
        try:
            P.check(g)
        except NotPositiveDefiniteError as error:
            raise LeftDomainError(f"At t = {t:g}: {error}") from None

    def clock(self, t: float) -> float:
        """The time (unit times) at which a flow of second order at time t evaluates the schedules of P."""
        return self.metric.timetable.clock(t)

    def lag(self, t: float) -> float:
        """τ′ = τ + ½, unit times: the delay with which the flow's momentum follows the gradient."""
        return float(self.metric.at(t).Q().lag) + 0.5

    def last_update(self, nu: Nu, t: float, g: Tensor) -> Nu:
        """ν_t − ν_{t−1} = (I+J)⁻¹ f(ν_t, g), exact if ν is an average; g [d] is the gradient that ν_t was made with."""
        if self.stateless:
            return nu
        method = self.metric.at(t)
        return self._divide(method, nu, g, method.f(nu, g), batched=False, paper=True)

    # ---- ν --------------------------------------------------------------------------------------------

    def nu_rate(self, nu: Nu, t: float, g: Tensor) -> Nu:
        """ν̇₀ = (I + ∂f/∂ν)⁻¹ f(ν, g)."""
        if self.stateless:
            return nu
        method = self.metric.at(t)
        return self._divide(method, nu, g, method.f(nu, g), batched=False)

    def nu_decay(self, nu: Nu, t: float, g: Tensor) -> float:
        """The spectral radius of ∂ν̇₀/∂ν per unit time, which measures the stiffness of ν alone: (1−β₂)/β₂ for an EMA.

        It is exact for an elementwise spec whose f is affine in ν.  Otherwise a few power iterations estimate it.
        """
        if self.stateless:
            return 0.0
        if self.elementwise:
            slopes = self.replays(self._nu_slopes, self.metric.at(t), nu, g)
            return max(float(_finite(x).abs().max()) for x in pytree.tree_leaves(slopes))
        if self.accuracy == "second-order":  # log(I + J), which is computed on the host
            flat = Flat(nu, self.metric.at(t).f(nu, g))
            J = host(flat.matrix(_slope(self.metric.at(t), nu, g), still=0.0))[0]
            return float(np.abs(np.log(np.linalg.eigvals(np.eye(flat.size) + J).astype(complex))).max())
        # an entry that is zero may have an infinite slope, and stays zero
        v, size = pytree.tree_map(lambda x: (x != 0).to(x), nu), 0.0
        for _ in range(8):
            image = derivative(lambda nu: self.nu_rate(nu, t, g), nu, v)
            size = max(float(x.abs().max()) for x in pytree.tree_leaves(image))
            if size == 0.0:
                break
            v = pytree.tree_map(lambda x, size=size: x / size, image)
        return size

    def _nu_slopes(self, method: Method, nu: Nu, g: Tensor) -> Nu:
        """The diagonal of ∂ν̇₀/∂ν for an elementwise spec."""
        ones = pytree.tree_map(torch.ones_like, nu)
        return derivative(lambda nu: self._divide(method, nu, g, method.f(nu, g), batched=False), nu, ones)

    def nu_response(self, nu: Nu, t: float, g: Tensor, HU: Tensor, T: Tensor) -> Nu:
        """ν̇_b for every svec basis element E_b: a pytree like ν with a leading dimension k(k+1)/2.

        Args:
            nu, t, g: the state and the gradient [d] there.
            HU: [d, k].
            T: ∇_w uᵢᵀHuⱼ [n, d]; used only if ``covariance`` is "full".
        """
        if self.stateless:
            return nu
        return self._divide(self.metric.at(t), nu, g, self.f_curvature(nu, t, g, HU, T), batched=True)

    def nu_changes(self, nu: Nu, t: float, g: Tensor, spans: Sequence[float], rhs: Nu | None = None) -> list[Nu]:
        """The change of ν over each of ``spans`` with g held fixed; over a span of 1 it is the optimizer's f(ν, g).

        Args:
            nu, t, g: the state and the gradient [d] there.
            spans: lengths of time, unit times.
            rhs: what takes the place of f: a pytree like ν with a leading dimension (see :meth:`f_curvature`).
        """
        if self.stateless:
            return [nu for _ in spans]
        method, batched = self.metric.at(t), rhs is not None
        rhs = method.f(nu, g) if rhs is None else rhs
        if not self.elementwise:
            return [self._divide(method, nu, g, rhs, batched, h) for h in spans]
        J = self._diagonal(method, nu, g)
        return [pytree.tree_map(lambda r, x, h=h: still(r, r * exact_rates.factor(x, h)), rhs, J) for h in spans]

    def f_curvature(self, nu: Nu, t: float, g: Tensor, HU: Tensor, T: Tensor) -> Nu:
        """½∇²_g f[HU E_b UᵀH] for every svec basis element E_b; the arguments are those of :meth:`nu_response`."""
        method = self.metric.at(t)

        k = HU.shape[1]
        rows, columns = torch.triu_indices(k, k, device=g.device)
        H_rows = HU.T
        if self.local:
            products = H_rows[rows] * H_rows[columns]
            second = pytree.tree_map(
                lambda c: still(products, c * products) if c.shape == g.shape else c.expand(len(products), *c.shape),
                self.replays(diagonal_curvature, method, nu, g),
            )
        else:
            second = self.replays.each(curvature, method, (nu, g), H_rows[rows], H_rows[columns])
        weight = like(0.5 * triu(k).weight, g)
        out = pytree.tree_map(lambda x: weight.reshape(-1, *[1] * (x.ndim - 1)) * x, second)
        if self.covariance == "full":
            slope = vmap(lambda v: derivative(lambda g: method.f(nu, g), g, v))(0.5 * T)
            out = pytree.tree_map(torch.add, out, slope)
        return out

    def f_curvature_of(self, nu: Nu, t: float, g: Tensor, rows: Tensor) -> Nu:
        """½∇²_g f[C], a pytree like ν, for a covariance C = Σ rᵢrᵢᵀ of gradients given by its rows rᵢ [m, d]."""
        method = self.metric.at(t)
        if self.local:
            return self.f_curvature_at(nu, t, g, rows.square().sum(dim=0))
        bent = self.replays.each(curvature, method, (nu, g), rows, rows)
        return pytree.tree_map(lambda x: 0.5 * x.sum(dim=0), bent)

    def f_curvature_at(self, nu: Nu, t: float, g: Tensor, variances: Tensor) -> Nu:
        """½∇²_g f[C], a pytree like ν, for a local f: it depends only on the diagonal of C, ``variances`` [d]."""
        found = self.replays(diagonal_curvature, self.metric.at(t), nu, g)
        return pytree.tree_map(
            lambda c: 0.5 * still(variances, c * variances) if c.shape == g.shape else torch.zeros_like(c), found
        )

    def _diagonal(self, method: Method, nu: Nu, g: Tensor) -> Nu:
        """∂f/∂ν where it is diagonal, with the memory that is assumed for parts of ν without one."""
        J = self.replays(diagonal_slope, method, nu, g)
        return pytree.tree_map(lambda x: x.clamp(min=self.memory - 1), J) if self.memory else J

    def _divide(
        self, method: Method, nu: Nu, g: Tensor, rhs: Nu, batched: bool, h: float | None = None, paper: bool = False
    ) -> Nu:
        """(I + J)⁻¹ rhs; to second order K J⁻¹ rhs, or its integral over a time h (:mod:`dvi.compiler.exact_rates`).

        If J = ∂f/∂ν is diagonal, the solve is entry by entry; otherwise it is dense or matrix-free.
        """
        slope = _slope(method, nu, g)
        paper = paper or (self.accuracy == "paper" and h is None)
        if self.elementwise:
            J = self._diagonal(method, nu, g)
            if paper:
                return pytree.tree_map(lambda r, x: still(r, r / (1 + x)), rhs, J)
            return pytree.tree_map(lambda r, x: still(r, r * exact_rates.factor(x, h)), rhs, J)
        if paper:
            return solve_coupled(lambda dnu: pytree.tree_map(torch.add, dnu, slope(dnu)), nu, rhs, batched)
        flat = Flat(nu, rhs)
        if flat.size > exact_rates.DENSE_LIMIT:
            exact_rates.matrix(np.empty((flat.size, 0)), h)  # raises the error
        F = like(exact_rates.matrix(host(flat.matrix(slope, still=0.0))[0], h), flat.example)
        if batched:
            return vmap(lambda r: flat.unravel(F @ flat.ravel(r)))(rhs)
        return flat.unravel(F @ flat.ravel(rhs))

    def _is_elementwise(self, nu: Nu, g: Tensor) -> bool:
        """Is ∂f/∂ν diagonal?  If so, a jvp with ones gives the diagonal, and a random probe must agree with it."""
        generator = torch.Generator().manual_seed(0)
        method = self.method.at(0.0)
        nu = generic(method, nu, g, generator)
        slope = _slope(method, nu, g)
        ones = pytree.tree_leaves(slope(pytree.tree_map(torch.ones_like, nu)))
        probe = pytree.tree_map(lambda x: random_like(x, generator), nu)
        for diagonal, seen, r in zip(ones, pytree.tree_leaves(slope(probe)), pytree.tree_leaves(probe), strict=True):
            # Both sides are one product and the sums inside f, so they agree to some hundred eps.  This is relative to
            # the largest entry, or to 1, the size of ∂f/∂ν that matters in I + ∂f/∂ν.
            scale = max(1.0, float((diagonal * r).abs().max()), float(seen.abs().max()))
            if float((seen - diagonal * r).abs().max()) > 1e3 * torch.finfo(r.dtype).eps * scale:
                return False
        return True

    def _refuse_algebraic(self, nu: Nu, g: Tensor) -> None:
        method = self.method.at(0.0)
        if self.elementwise:
            ones = pytree.tree_map(torch.ones_like, nu)
            J = pytree.tree_leaves(_slope(method, nu, g)(ones))
            f = pytree.tree_leaves(method.f(nu, g))
            moving = [1 + x[(v != 0) | (r != 0)] for x, v, r in zip(J, pytree.tree_leaves(nu), f, strict=True)]
            lowest = min((float(x.min()) for x in moving if x.numel()), default=1.0)
            if self.memory and abs(lowest) <= _FORGOTTEN:
                return
        else:
            lowest = smallest_singular_value(lambda nu: method.f(nu, g), nu)
        if abs(lowest) <= _FORGOTTEN:
            raise SpecError(
                f"{self.method}: 1 + ∂f/∂ν = {lowest:.1g}, so ν follows the gradient at once (β₂ = 0) and has no "
                "differential equation. Give it some memory (a larger β₂; the smaller, the stiffer the flow)."
            )
        if lowest < 0:
            raise SpecError(
                f"{self.method}: 1 + ∂f/∂ν = {lowest:.3g} is negative, so ν overshoots at every step (it alternates). "
                "No flow in ν can follow that."
            )


def _slope(method: Method, nu: Nu, g: Tensor) -> Callable[[Nu], Nu]:
    """dν ↦ ∂f/∂ν dν at (ν, g)."""
    return lambda dnu: derivative(lambda nu: method.f(nu, g), nu, dnu)


def _finite(x: Tensor) -> Tensor:
    """X with zeros in place of infinite slopes, which belong to entries of ν that are zero."""
    return torch.nan_to_num(x, nan=0.0, posinf=0.0, neginf=0.0)
