"""The paper's discretisation (App. B), built from parts of the library, as the standard of comparison.

It takes Euler steps of ¼ with the complementarity linearised over the step.  Eigenvectors are computed once a unit
time, to 1e-10.  The substeps between reuse them, with the quadratic forms uᵀHu as eigenvalues.  Third derivatives are
computed pair by pair.  The scheme uses the same problem and ledger as every other integrator.

Where the paper leaves a choice, the cheaper one is taken.  The eigensolver starts from the previous vectors.
Hessian–vector products share the gradient's graph while the weights stay the same.  Only eigenpairs above 1.8 are
converged.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch
from ccp_timing import solve_with_cvxpy
from torch import Tensor

from dvi.compiler.flows import CompiledFlow
from dvi.problems import Problem
from dvi.solvers import ccp
from dvi.solvers.eigen.block_method import CRITICAL, CriticalSubspace, Eigenblock
from dvi.solvers.errors import StepError
from dvi.solvers.protocol import Array, Flow, Frame, Node, Rate, State, StepResult


@dataclass(frozen=True)
class PaperMemory:
    """The eigenpairs of the last eigendecomposition, and its time."""

    block: Eigenblock | None = None
    made: float = -math.inf
    surveyed: float = -math.inf


@dataclass(frozen=True)
class PaperScheme:
    """Euler steps of ¼ with eigenvectors computed once a unit time.

    Args:
        dt: unit times per substep.
        refresh: unit times between eigendecompositions.
        subspace: the eigensolver and its tolerance.
        band: eigenvalues within ``band`` of 2 are constrained.
        want: eigenvalues above this are converged.
        ccp: "library", or the name of a CVXPY solver.
    """

    dt: float = 0.25
    refresh: float = 1.0
    subspace: CriticalSubspace = field(default_factory=lambda: CriticalSubspace(tol=1e-10, max_iterations=3000))
    band: float = 0.05
    want: float = CRITICAL - 0.2
    survey_every: float = 20.0
    ccp: Literal["library", "CVXOPT", "CLARABEL"] = "library"

    def init(self, flow: Flow, y: State) -> PaperMemory:
        """No memory yet."""
        return PaperMemory()

    def step(self, flow: Flow, memory: PaperMemory, y: State, h: float) -> StepResult:
        """One substep."""
        h = h if h <= self.dt * (1 + 1e-9) else self.dt
        node, memory, rate = self._evaluate(flow, memory, y, h)
        end = y.moved(rate, h)
        if not bool(end.w.isfinite().all()):
            raise StepError(f"the paper's scheme gave weights that are not finite at t = {y.t:g}.")
        return StepResult(end, memory, node, lambda t: y.moved(rate, t - y.t))

    def observe(self, flow: Flow, memory: PaperMemory, y: State) -> Node:
        """The node at which a step from y would begin."""
        return self._evaluate(flow, memory, y, self.dt)[0]

    def _evaluate(self, flow: Flow, memory: PaperMemory, y: State, h: float) -> tuple[Node, PaperMemory, Rate]:
        loss, g = flow.value_and_grad(y)
        memory = self._eigenpairs(flow, memory, y)
        assert memory.block is not None
        block = memory.block
        k = int((block.eigenvalues >= CRITICAL - self.band).sum())
        frame = flow.frame(y, block.V[:, :k], block.AV[:, :k], third=False)
        if k:
            assert isinstance(flow, CompiledFlow)
            frame = replace(frame, T=third_derivatives(flow.problem, frame))
        lin = flow.linearised(y, g, frame)
        X = np.zeros((k, k))
        if k:
            alpha: Array = lin.alpha - lin.gap / h
            X = ccp.solve(alpha, lin.beta).X if self.ccp == "library" else solve_with_cvxpy(alpha, lin.beta, self.ccp)
            flow.count_ccp()
        rate = lin.drift(X)
        node = Node(
            t=y.t,
            loss=float(loss),
            grad_sq=float(g @ g),
            eigenvalues=block.eigenvalues,
            U=frame.U,
            HU=frame.HU,
            X=X,
            X_time=y.t,
            g=g,
            rate=rate,
        )
        return node, memory, rate

    def _eigenpairs(self, flow: Flow, memory: PaperMemory, y: State) -> PaperMemory:
        """New eigenvectors once every ``refresh`` unit times; between, quadratic forms of the old ones."""
        A = flow.effective_hessian(y)
        if memory.block is None:
            return PaperMemory(self.subspace.start(A, y.w, self.want), y.t, y.t)
        if y.t < memory.made + self.refresh - 1e-9:
            V = memory.block.V
            AV = A(V)
            forms = np.asarray((V * AV).sum(dim=0).double().cpu())
            order = np.argsort(-forms, kind="stable")
            index = torch.as_tensor(order, device=V.device)
            block = replace(memory.block, V=V[:, index], AV=AV[:, index], eigenvalues=forms[order])
            return replace(memory, block=block)
        block, surveyed = self.subspace.follow(A, memory.block, self.want), memory.surveyed
        if y.t >= surveyed + self.survey_every - 1e-9:
            block, surveyed = self.subspace.survey(A, block, self.want), y.t
        return PaperMemory(block, y.t, surveyed)


def third_derivatives(problem: Problem, frame: Frame) -> Tensor:
    """T [k(k+1)/2, d] in svec order, by one contraction T[v, v] for each pair: v = uᵢ, and (uᵢ + uⱼ)/√2 for i ≠ j."""
    U, k = frame.U, frame.k
    one = torch.ones(1, 1, dtype=torch.float64)

    def contraction(v: Tensor) -> Tensor:
        return problem.hessian_gradient_of(frame.w, v[:, None], one)

    size = torch.linalg.vector_norm(U, dim=0)
    V = U / size
    squares = [contraction(V[:, i]) for i in range(k)]
    rows = []
    for i in range(k):
        for j in range(i, k):
            if i == j:
                rows.append(size[i] ** 2 * squares[i])
            else:
                mixed = contraction((V[:, i] + V[:, j]) / math.sqrt(2)) - 0.5 * (squares[i] + squares[j])
                rows.append(math.sqrt(2) * size[i] * size[j] * mixed)
    return torch.stack(rows)
