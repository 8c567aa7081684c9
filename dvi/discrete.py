"""The optimizer itself, as it was declared."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dvi.flows import CompiledFlow, MethodLike
from dvi.problems import Problem
from dvi.solvers.protocol import State


class Discrete(CompiledFlow):
    """The discrete optimizer  w_{t+1} = w_t − P(ν_t)⁻¹ m_t,  m_t = Q∇L(w_t),  ν_{t+1} = ν_t + f(ν_t, ∇L(w_{t+1})).

    It starts from the same state as the flows, (w0, ν after the update at w0, t = 0), and has no constraint to keep.
    """

    name = "discrete"
    constrained = False

    def __init__(self, problem: Problem, method: MethodLike, **options: Any) -> None:
        super().__init__(problem, method, **options)
        self.calculus.metric.centred = False  # the optimizer uses a schedule's values as they are

    def step(self, y: State, g: Tensor) -> tuple[State, Tensor, Tensor]:
        """One step from y = (w_t, ν_t, t, memory), given g = ∇L(w_t): the next state, and L and ∇L there.

        Raises:
            NotPositiveDefiniteError: if P(ν_t) is not positive definite.
        """
        now = self.calculus.metric.at(y.t)
        P = now.P(y.nu)
        P.check(g)
        m, memory = (g, None) if y.m is None else now.Q().step(g, y.m)
        w = y.w - P.solve(m)
        nu, t = y.nu, y.t + 1
        loss, g_next = self.value_and_grad(State(w, nu, t))
        nu = pytree.tree_map(torch.add, nu, self.calculus.metric.at(t).f(nu, g_next))
        return State(w, nu, t, memory), loss, g_next


def discrete(problem: Problem, method: MethodLike) -> Discrete:
    """The real optimizer, ready to be run by :func:`dvi.solve` or beside its flows by :func:`dvi.compare`."""
    return Discrete(problem, method, check=False)
