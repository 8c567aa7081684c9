"""The optimizer itself, as declared."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dvi.compiler.flows import CompiledFlow
from dvi.interop.binding import MethodLike
from dvi.methods import Method
from dvi.methods.per_weight import PerWeight
from dvi.methods.validation import decay_of
from dvi.problems import NotFiniteError, Problem
from dvi.solvers.errors import DomainError
from dvi.solvers.protocol import State


class OptimizerDivergedError(DomainError):
    """The optimizer itself, not a flow, has diverged: its weights, its state or its loss are not finite."""


class Discrete(CompiledFlow):
    """The discrete optimizer  w_{t+1} = (1−γ)w_t − P(ν_t)⁻¹m_t,  m_t = Q∇L(w_t),  ν_{t+1} = ν_t + f(ν_t, ∇L(w_{t+1})).

    It starts from the same state as the flows, (w0, ν after the update at w0, t = 0).  It has no constraint.
    """

    name = "discrete"
    constrained = False
    differentiated = False

    def __init__(self, problem: Problem, method: MethodLike, **options: Any) -> None:
        super().__init__(problem, method, **options)
        self.calculus.metric.centred = False  # the optimizer uses a schedule's values as they are

    def step(self, y: State, g: Tensor) -> tuple[State, Tensor, Tensor]:
        """One step from y = (w_t, ν_t, t, memory), given g = ∇L(w_t) [d]: the next state, with L [] and ∇L [d] there.

        Raises:
            OptimizerDivergedError: if the weights, ν, the loss or the gradient are not finite after it.
            NotPositiveDefiniteError: if P(ν_t) is not positive definite.
        """
        now = self.calculus.metric.at(y.t)
        P = now.P(y.nu)
        P.check(g)
        m, memory = (g, None) if y.m is None else now.Q().step(g, y.m)
        w, t = kept(y.w, decay_of(now, y.w, y.t)) - P.solve(m), y.t + 1
        if not _finite(w):  # before the loss is called, which may fail in its own way
            raise _diverged(now, t, "weights are not finite")
        try:
            loss, g_next = self.value_and_grad(State(w, y.nu, t))
        except NotFiniteError as error:
            raise _diverged(now, t, str(error).removeprefix(f"At t = {t:g}: ")) from None
        nu = pytree.tree_map(torch.add, y.nu, self.calculus.metric.at(t).f(y.nu, g_next))
        if not _finite(nu):
            raise _diverged(now, t, "its state ν is not finite")
        return State(w, nu, t, memory), loss, g_next


def kept(w: Tensor, gamma: PerWeight | None) -> Tensor:
    """(1 − γ)w for weights w [d], or for rows of weights [r, d]."""
    if gamma is None:
        return w
    return (1 - gamma.number) * w if gamma.uniform else (1 - gamma.vector) * w


def _finite(tree: Any) -> bool:
    leaves = pytree.tree_leaves(tree)
    return not leaves or bool(torch.stack([torch.isfinite(x).all() for x in leaves]).all())


def _diverged(method: Method, t: float, what: str) -> OptimizerDivergedError:
    return OptimizerDivergedError(f"The optimizer itself diverges{at_lr(method)}: after {t:g} steps {what}.")


def at_lr(method: Method) -> str:
    """Return " at lr=…" for a method with a learning rate, else ""; its schedules must be replaced by their values."""
    lr = getattr(method, "lr", None)
    try:
        return f" at lr={float(lr):g}"  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):
        return ""


def discrete(problem: Problem, method: MethodLike) -> Discrete:
    """Make the real optimizer a process that :func:`dvi.solve` can run, like a flow.

    Args:
        problem: a :class:`dvi.Problem`.
        method: as for :func:`dvi.central_flow`.

    Raises:
        SpecError: if the declaration is wrong.
        NotPositiveDefiniteError: if P(ν) after the first update is not positive definite.
        DerivativeError: if autodiff gets the gradient of this loss wrong.
    """
    return Discrete(problem, method, check="gradient")
