"""The spread of the gradients of single examples at some weights, from which the noise of a mini-batch comes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dvi.compiler.calculus import LossLeftDomainError
from dvi.compiler.flows import CompiledFlow
from dvi.methods import Nu
from dvi.problems import MiniBatches, NotFiniteError
from dvi.solvers.protocol import Array, State, host

#: A linear map of gradients [c, d]; None stands for the gradients themselves.
Echo = Callable[[Tensor], Tensor] | None


@dataclass(frozen=True)
class Spread:
    """Averages over the losses and gradients of single examples at some weights.

    Attributes:
        loss: the mean of the losses.
        g: the mean of the gradients gᵢ [d].
        block: the covariance of Uᵀgᵢ [k, k].
        total: the trace of the covariance of gᵢ.
        bend: ½∇²_g f[cov gᵢ], like ν.
        kicks: the gradients of some batches, less the mean [d, m].
    """

    loss: float
    g: Tensor
    block: Array
    total: float
    bend: Nu
    kicks: Tensor


def spread(
    flow: CompiledFlow,
    batches: MiniBatches,
    y: State,
    g: Tensor,
    U: Tensor,
    draws: Tensor | None = None,
    echo: Echo = None,
) -> Spread:
    """The spread of the gradients of single examples at y's weights.

    Args:
        flow: the flow, whose f determines ``bend``.
        batches: the examples.
        y: the weights, and the ν and the time at which f is evaluated.
        g: the gradient [d] at which f is evaluated.
        U: the block [d, k].
        draws: how often each example is in each of m batches, divided by the batch size [m, n]; None: no batches.
        echo: a linear map that is applied to gradients [c, d] for ``total`` and ``bend``; None: the identity.
    """
    calculus, n = flow.calculus, batches.n
    loss, mean, heard, squares = y.w.new_zeros(()), *(torch.zeros_like(y.w) for _ in range(3))
    projected: list[Tensor] = []
    bent: Nu = pytree.tree_map(torch.zeros_like, y.nu)
    coupled = not calculus.stateless and not calculus.local
    kicks, seen = y.w.new_zeros(len(y.w), 0 if draws is None else len(draws)), 0
    try:
        for losses, G in batches.each(y.w):
            if draws is not None:
                kicks = kicks + (draws[:, seen : seen + len(G)] @ G).T
                seen += len(G)
            loss, mean = loss + losses.sum() / n, mean + G.sum(dim=0) / n
            projected.append(G @ U)
            E = G if echo is None else echo(G)
            heard += E.sum(dim=0) / n
            squares += torch.linalg.vector_norm(E, dim=0).square() / n
            if coupled:
                bent = combined([1.0, 1.0 / n], [bent, calculus.f_curvature_of(y.nu, y.t, g, E)])
    except NotFiniteError as error:
        raise LossLeftDomainError(f"At t = {y.t:g}: {error}") from None
    variances = (squares - heard.square()).clamp(min=0)
    value, total, GU, mU = host(loss, variances.sum(), torch.cat(projected), U.T @ mean)
    GU = GU - mU
    if coupled:
        bent = combined([1.0, -1.0], [bent, calculus.f_curvature_of(y.nu, y.t, g, heard[None])])
    elif not calculus.stateless:
        bent = calculus.f_curvature_at(y.nu, y.t, g, variances)
    return Spread(float(value), mean, GU.T @ GU / n, float(total), bent, kicks - mean[:, None])


def noisy_start(flow: CompiledFlow, batches: MiniBatches, factor: float) -> State:
    """The flow's initial state, whose ν is the average after a first update with a mini-batch's gradient."""
    y = flow.initial
    if flow.calculus.stateless or factor == 0:
        return y
    with flow.problem.ledger.paused():
        _, g = flow.problem.value_and_grad(y.w)
        before = State(y.w, flow.method.at(0.0).init(y.w), 0.0)
        bend = spread(flow, batches, before, g, y.w.new_zeros(len(y.w), 0)).bend
    nu = pytree.tree_map(lambda x, b: x + factor * b, y.nu, bend)
    return State(y.w, nu, y.t, y.m)


def inside(G: Tensor, U: Tensor, turned: Tensor) -> Tensor:
    """The part of gradients G [d, c] that lies in the block U [d, k]: P̃U(UᵀP̃U)⁻¹UᵀG, where turned is P̃U."""
    return turned @ torch.linalg.solve(U.T @ turned, U.T @ G) if U.shape[1] else torch.zeros_like(G)


def times(factor: float, tree: Nu) -> Nu:
    """A multiple of a state like ν."""
    return pytree.tree_map(lambda x: factor * x, tree)


def combined(weights: list[float], trees: list[Nu]) -> Nu:
    """A weighted sum of states like ν."""
    return pytree.tree_map(lambda *leaves: sum(c * x for c, x in zip(weights, leaves, strict=True)), *trees)


__all__ = ["Echo", "Spread", "combined", "inside", "noisy_start", "spread", "times"]
