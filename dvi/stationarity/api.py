"""The stationary ν: the value to which ν settles if the weights are held fixed (paper, §5.2.1, App. B, C.6).

It exists for every spec that forgets.  At fixed w, with g = ∇L(w) and H = ∇²L(w), it is the ν of the pair (ν, Σ) with

    f(ν, g) + ½∇²_g f[HΣH] = 0,        0 ⪯ Σ  ⟂  2P(ν) − H ⪰ 0.

With Σ = DDᵀ, D [d, r], complementarity means P(ν)⁻¹HD = 2D.  The paper's fixed point for RMSProp then becomes, for any
(f, P),

    ν ← the root of f(ν, g) + ½ Σⱼ ∇²_g f[HDⱼ, HDⱼ],        D ← ½ P(ν)⁻¹ H D.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from dvi.compiler.flows import CompiledFlow
from dvi.methods import Method, RMSProp, SpecError
from dvi.solvers.protocol import host, like
from dvi.stationarity.diagonal_sdp import Bounds, bounds, require_small, stable_diagonal
from dvi.stationarity.equation import Balance, StationaryPoint
from dvi.stationarity.fixed_point import Search


def stationary(
    flow: CompiledFlow,
    w: Tensor | None = None,
    *,
    t: float = 0.0,
    by: Literal["fixed point", "sdp"] = "fixed point",
    tol: float | None = None,
    max_iterations: int = 3000,
    rank: int = 8,
    start: StationaryPoint | None = None,
    seed: int = 0,
    survey: bool = True,
    without: Literal["gradient"] | None = None,
) -> StationaryPoint:
    """The ν with dν/dt = 0 at fixed weights, and the oscillation that maintains it.

    Args:
        flow: a compiled flow, see :func:`dvi.central_flow`; the f of its method must forget (an average).
        w: weights [d] (default: the flow's initial ones).
        t: the clock, for methods with schedules (unit times).
        by: "fixed point" needs Hessian–vector products with r directions only.  "sdp" solves eq. (12) as a semidefinite
            program: for RMSProp with ε = 0 and about a hundred weights, as a reference.
        tol: relative residual to be reached (default: 1e-9, in float32 1e-5); eigenvalues of P⁻¹H are then at most
            2 + 1000 tol.
        max_iterations: limit for the fixed point; each iteration takes r Hessian–vector products.
        rank: the first number r of columns of D; it grows if more directions oscillate.
        start: a nearby point to start from, which takes about a fifth of the products.
        survey: with ``start``, look for oscillating directions that it does not know.  They are rare if it is of the
            moment before, and the look takes twelve products.
        seed: of the random first D.
        without: "gradient" leaves g = ∇L(w) out of f, so that the oscillation alone maintains ν.  For RMSProp, P(ν)
            then solves eq. (12) without its second term, the paper's alternative preconditioner (Fig. 9).

    Raises:
        SpecError: if ν has no stationary value: the method has no state, or a part of ν never forgets (AdaGrad, the
            clock of a bias correction).  With by="sdp", if the method is not RMSProp with ε = 0.
        ConvergenceError: if the fixed point is not reached.
        MemoryLimitError: with by="sdp", if there are too many weights.
        ValueError: for any other ``by`` or ``without``.
    """
    if without not in (None, "gradient"):
        raise ValueError(f'without is "gradient" or None, not {without!r}.')
    w = flow.initial.w if w is None else w
    g = torch.zeros_like(w) if without else flow.problem.value_and_grad(w)[1]
    balance = Balance(flow, w, g, t)
    if by == "sdp":
        return _by_sdp(flow, balance)
    if by != "fixed point":
        raise ValueError(f'by is "fixed point" or "sdp", not {by!r}.')
    search = Search(balance, tol or (1e-9 if w.dtype == torch.float64 else 1e-5), max_iterations, rank, seed, survey)
    return search.run(start)


def duality(flow: CompiledFlow, point: StationaryPoint) -> Bounds:
    """Primal and dual value of eq. (12) at a stationary point; their gap bounds the error of both (App. B, errata).

    Both points are first scaled to be feasible.  The bound therefore holds for any residual of the point, up to the
    error of its leading eigenvalue.

    Raises:
        SpecError: if the method is not RMSProp with ε = 0.
    """
    lr = _program(flow.method, point.t)
    _, g = flow.problem.value_and_grad(point.w)
    D = point.D
    v, grad, sigma, HDD = host(point.nu["v"], g, point.covariance_diagonal, (D * flow.problem.hvp(point.w, D)).sum())
    to_dual = 2 / lr**2  # Σ̂ = (2/η²) Σ
    return bounds(np.sqrt(v) / lr, np.abs(grad) / lr, point.sharpness, to_dual * sigma, to_dual * float(HDD))


def _program(method: Method, t: float) -> float:
    """The learning rate of a method to which eq. (12) applies."""
    now = method.at(t)
    plain = now.Q().trivial and now.decay() is None
    if not isinstance(now, RMSProp) or now.bias_correction or now.eps != 0 or not plain:
        raise SpecError(
            f"{method}: the convex program (eq. 12) applies only to RMSProp with eps=0 and bias_correction=False, "
            'without weight decay. For other methods take by="fixed point".'
        )
    return float(now.lr)


def _by_sdp(flow: CompiledFlow, balance: Balance) -> StationaryPoint:
    lr = _program(flow.method, balance.t)
    w, g = balance.w, balance.g
    require_small(len(w))
    H, grad = host(flow.problem.hvp(w, torch.eye(len(w), dtype=w.dtype, device=w.device)), g)
    found = stable_diagonal(0.5 * (H + H.T), grad / lr)
    values, Q = np.linalg.eigh(0.5 * lr**2 * found.multiplier)
    kept = values > 1e-6 * max(values[-1], np.finfo(np.float64).tiny)  # the solver leaves about 1e-9
    D = like(Q[:, kept] * np.sqrt(values[kept]), w)
    nu = {"v": like((lr * found.p) ** 2, w)}
    return balance.point(D, flow.problem.hvp(w, D), nu, balance.look(nu, D, 1e-6), found.bounds.gap, 0, 0.0)


__all__ = ["StationaryPoint", "duality", "stationary"]
