"""The equation for a stationary ν at fixed weights, and the point that solves it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dvi.compiler.flows import CompiledFlow
from dvi.compiler.jacobian_solve import solve_coupled
from dvi.compiler.jacobian_structure import curvature, diagonal_curvature, diagonal_slope
from dvi.compiler.tangents import derivative, still
from dvi.methods import Nu, SpecError
from dvi.solvers.eigen.block_method import CRITICAL, CriticalSubspace, Eigenblock
from dvi.solvers.errors import ConvergenceError
from dvi.solvers.protocol import Array, State, host, like
from dvi.solvers.svec import triu


@dataclass(frozen=True)
class StationaryPoint:
    """The stationary ν at fixed weights, with the oscillation that maintains it.

    Attributes:
        w: the weights [d].
        nu: the stationary ν, of the structure of ν.
        U: the critical directions [d, k] that oscillate, UᵀPU = I.
        HU: H(w) U [d, k].
        X: their covariance [k, k], Σ = UXUᵀ.
        block: leading eigenpairs of the effective Hessian at ν; the first eigenvalue is 2 where k > 0.
        residual: relative residual of both equations: the change of ν by a Newton step, and ‖½P⁻¹HD − D‖ in the
            P-metric.
        iterations: number of iterations of the fixed point.
        t: the clock, for methods with schedules (unit times).
    """

    w: Tensor
    nu: Nu
    U: Tensor
    HU: Tensor
    X: Array
    block: Eigenblock
    residual: float
    iterations: int
    t: float = 0.0

    @property
    def k(self) -> int:
        """The number of oscillating directions."""
        return len(self.X)

    @property
    def D(self) -> Tensor:
        """A root of the covariance [d, k]: Σ = DDᵀ."""
        values, Q = np.linalg.eigh(self.X) if self.k else (np.zeros(0), np.zeros((0, 0)))
        return self.U @ like(Q * np.sqrt(np.maximum(values, 0.0)), self.U)

    @property
    def covariance_diagonal(self) -> Tensor:
        """The diagonal of Σ [d]: the variances of the weights."""
        return (self.D**2).sum(dim=1)

    @property
    def sharpness(self) -> float:
        """The effective sharpness at ν: 2 if a direction oscillates, less otherwise."""
        return float(self.block.eigenvalues[0])

    @property
    def state(self) -> State:
        """The state (w, ν, t), from which a flow can start."""
        return State(self.w, self.nu, self.t)


class Balance:
    """The equation f(ν, g) + ½ Σⱼ ∇²_g f[HDⱼ, HDⱼ] = 0 for ν at fixed w.

    Raises:
        SpecError: if ν has no stationary value.
    """

    def __init__(self, flow: CompiledFlow, w: Tensor, g: Tensor, t: float) -> None:
        self.flow, self.w, self.g, self.t = flow, w, g, t
        self.method = flow.calculus.metric.at(t)
        if flow.calculus.stateless:
            raise SpecError(f"{flow.method} has no ν, so it has no stationary state.")
        if flow.covariance != "gradient-covariance":
            raise SpecError('A stationary ν is defined with covariance="gradient-covariance" (C.6).')
        # An average that starts at zero stays exactly zero where the gradient is zero, so this is not the start.
        self.example = pytree.tree_map(torch.add, self.method.init(w), self.method.f(self.method.init(w), g))
        self._require_forgetting()

    def _slope(self, nu: Nu, dnu: Nu) -> Nu:
        """∂f/∂ν [dν]."""
        return derivative(lambda nu: self.method.f(nu, self.g), nu, dnu)

    def _divide(self, rhs: Nu, nu: Nu) -> Nu:
        """(∂f/∂ν)⁻¹ rhs, for a diagonal ∂f/∂ν."""
        slope = self.flow.calculus.replays(diagonal_slope, self.method, nu, self.g)
        return pytree.tree_map(lambda r, x: still(r, r / x), rhs, slope)

    def _require_forgetting(self) -> None:
        if not self.flow.calculus.elementwise:
            return  # the solve detects a singular ∂f/∂ν
        slope = self._slope(self.example, pytree.tree_map(torch.ones_like, self.example))
        for path, leaf in pytree.tree_flatten_with_path(slope)[0]:
            if float(leaf.max()) > -1e-12:
                raise SpecError(
                    f"{self.flow.method}: ν{pytree.keystr(path)} never forgets (∂f/∂ν = {float(leaf.max()):.2g}; it "
                    "is −(1 − β₂) for an average), so it has no stationary value. AdaGrad's sum grows forever. A bias "
                    "correction fades out: take bias_correction=False."
                )

    def _curvatures(self, nu: Nu, h: Tensor, other: Tensor) -> Nu:
        """∇²_g f[hⱼ, h′ⱼ] for the rows of h, h′ [n, d]: a pytree like ν with a leading n."""
        replays = self.flow.calculus.replays
        if not self.flow.calculus.local:
            return replays.each(curvature, self.method, (nu, self.g), h, other)
        products = h * other
        return pytree.tree_map(
            lambda c: still(products, c * products) if c.shape == self.g.shape else c.expand(len(h), *c.shape),
            replays(diagonal_curvature, self.method, nu, self.g),
        )

    def push(self, nu: Nu, HD: Tensor) -> Nu:
        """½ Σⱼ ∇²_g f[HDⱼ, HDⱼ]."""
        if not HD.shape[1]:
            return pytree.tree_map(torch.zeros_like, nu)
        return pytree.tree_map(lambda x: 0.5 * x.sum(dim=0), self._curvatures(nu, HD.T, HD.T))

    def newton(self, nu: Nu, HD: Tensor) -> Nu:
        """The Newton step of ν towards the root; it is exact for an average, whose f is affine in ν."""
        rhs = pytree.tree_map(lambda a, b: -(a + b), self.method.f(nu, self.g), self.push(nu, HD))
        if self.flow.calculus.elementwise:
            return self._divide(rhs, nu)
        try:
            return solve_coupled(lambda dnu: self._slope(nu, dnu), nu, rhs, batched=False)
        except (SpecError, RuntimeError):
            raise SpecError(f"{self.flow.method}: ∂f/∂ν is singular: a part of ν never forgets.") from None

    def response(self, nu: Nu, HU: Tensor) -> Nu:
        """The derivative of the root in X by svec basis element: a pytree like ν with a leading n = k(k+1)/2."""
        rows, columns = torch.triu_indices(HU.shape[1], HU.shape[1], device=HU.device)
        weight = like(0.5 * triu(HU.shape[1]).weight, HU)
        pairs = self._curvatures(nu, HU.T[rows], HU.T[columns])
        rhs = pytree.tree_map(lambda x: -weight.reshape(-1, *[1] * (x.ndim - 1)) * x, pairs)
        if self.flow.calculus.elementwise:
            return self._divide(rhs, nu)
        return solve_coupled(lambda dnu: self._slope(nu, dnu), nu, rhs, batched=True)

    def root(self, nu: Nu, HD: Tensor) -> Nu:
        """The stationary ν for a given HD, by Newton's method from a nearby ν."""
        # The step after one of size √eps is rounding.  An average needs only one step, because its f is affine.
        floor = torch.finfo(self.w.dtype).eps ** 0.5
        for _ in range(50):
            step = self.newton(nu, HD)
            nu = pytree.tree_map(torch.add, nu, step)
            change = relative(step, nu) if self.flow.calculus.elementwise else norm(step) / norm(nu)
            if change <= floor:
                return nu
            if not np.isfinite(change):
                break
        raise ConvergenceError(f"{self.flow.method}: Newton's method found no root of f(ν, g) + ½∇²_g f[HΣH] near ν.")

    def look(self, nu: Nu, D: Tensor, tol: float, block: Eigenblock | None = None) -> Eigenblock:
        """Leading eigenpairs of the effective Hessian at ν, including all above 2."""
        subspace = CriticalSubspace(tol=max(1e-5, tol))
        A, want = self.flow.effective_hessian(State(self.w, nu, self.t)), CRITICAL - 1e-3
        if not D.shape[1]:
            return subspace.start(A, self.w, want)
        V = self.flow.calculus.P(nu, self.t).sqrt(D)
        V = torch.linalg.qr(V / torch.linalg.vector_norm(V, dim=0))[0]
        guess = Eigenblock(V, V, np.full(V.shape[1], CRITICAL), np.full(V.shape[1], np.inf))
        return subspace.survey(A, subspace.follow(A, guess, want), want)

    def survey(self, nu: Nu, block: Eigenblock) -> Eigenblock:
        """The block with what a look around has found above 2, or just below, beside it."""
        A, want = self.flow.effective_hessian(State(self.w, nu, self.t)), CRITICAL - 1e-3
        return CriticalSubspace().survey(A, block, want)

    def point(
        self, D: Tensor, HD: Tensor, nu: Nu, block: Eigenblock, residual: float, iterations: int, cut: float
    ) -> StationaryPoint:
        """The stationary point with Σ = DDᵀ.

        Directions with less than ``cut`` times the largest variance are dropped.
        """
        (G,) = host(D.T @ self.flow.calculus.P(nu, self.t).apply(D))
        X, Q = np.linalg.eigh(0.5 * (G + G.T)) if len(G) else (np.zeros(0), np.zeros((0, 0)))
        least = cut * max(X.max(initial=0.0), np.finfo(np.float64).tiny)
        kept = np.flatnonzero(least < X)[::-1]
        mix = like(Q[:, kept] / np.sqrt(X[kept]), D)
        return StationaryPoint(self.w, nu, D @ mix, HD @ mix, np.diag(X[kept]), block, residual, iterations, self.t)


def relative(change: Nu, nu: Nu) -> float:
    """The largest relative change of an entry of ν; entries that are zero and stay zero do not count."""
    worst = 0.0
    for dx, x in zip(pytree.tree_leaves(change), pytree.tree_leaves(nu), strict=True):
        size = torch.maximum(x.abs(), torch.finfo(x.dtype).eps ** 2 * x.abs().max())
        ratio = torch.where(dx == 0, torch.zeros_like(x), dx.abs() / size)
        worst = max(worst, float(ratio.max()))
    return worst


def norm(nu: Nu) -> float:
    """The Euclidean norm of all parts of ν together."""
    return float(sum(float((x**2).sum()) for x in pytree.tree_leaves(nu)) ** 0.5)
