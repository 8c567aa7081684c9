"""What a flow says about time averages of the optimizer, and what the optimizer itself shows.

With iterates w_t = w + δ, E[δ] = 0 and E[δδᵀ] = Σ = UXUᵀ (paper, eqs. 7, 18, 22), to second order in δ

    E[L(w_t)]    ≈ L(w)    + ½⟨H, Σ⟩   = L + ½ tr(M X),           M = UᵀHU
    E[‖∇L‖²]     ≈ ‖∇L‖²   + ⟨H², Σ⟩   = ‖∇L‖² + tr(X (HU)ᵀHU)
    E[(∂ᵢL)²]    ≈ (∂ᵢL)²  + (HΣH)ᵢᵢ
    E[h(w_t)]    ≈ h(w)    + ½⟨∇²h, Σ⟩                             (a network output h)

Every observation below is a pair: the value on the flow, and what oscillations add to its time average.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dvi.compiler.flows import CompiledFlow
from dvi.runs.measures import check_names
from dvi.solvers.protocol import Array, Node, State, host, like

#: What a flow's observation holds, beside eigenvalues and X; "osc_*" is what oscillations add to the time average.
Observation = dict[str, Any]


@dataclass(frozen=True)
class Observer:
    """What to watch along a run.

    Args:
        coordinates: indices of weights that are observed with their νᵢ, and whose squared gradient is predicted.
        test_inputs: inputs of the network whose outputs are predicted.
        measures: what is measured along the flows now and then, see :mod:`dvi.runs.measures`.
        measure_every: unit times between measurements, at least.
    """

    coordinates: Sequence[int] = ()
    test_inputs: Any = None
    measures: Sequence[str] = ()
    measure_every: float = 10.0

    def check(self, dim: int) -> None:
        """Raise ValueError unless coordinates are indices of ``dim`` weights and measures are known."""
        check_names(self.measures)
        if not self.measure_every > 0:
            raise ValueError(f"measure_every={self.measure_every} must be positive (unit times).")
        wrong = [i for i in self.coordinates if not isinstance(i, (int, np.integer)) or not -dim <= i < dim]
        if wrong:
            raise ValueError(f"coordinates={wrong}: indices of weights are whole numbers below {dim}.")

    def observe_flow(self, flow: CompiledFlow, y: State, node: Node) -> Observation:
        """The observation at a node of a flow."""
        U, HU, g = node.U, node.HU, node.g
        X = like(node.X, g)
        index = torch.as_tensor(list(self.coordinates), dtype=torch.long, device=g.device)
        rows = HU[index]
        UU, HUHU, MM, slope, lr, square, added = host(
            U.T @ U,
            HU.T @ HU,
            U.T @ HU,
            torch.zeros_like(node.g[0]) if node.rate is None else g @ node.rate.w,
            flow.calculus.metric.at(y.t).P(y.nu).effective_lr().to(g),
            g[index] ** 2,
            ((rows @ X) * rows).sum(dim=1),
        )
        seen: Observation = {
            "t": node.t,
            "loss": node.loss,
            "loss_rate": float(slope),
            "grad_sq": node.grad_sq,
            "effective_lr": float(lr),
            "osc_loss": 0.5 * float(np.sum(MM * node.X)),
            "osc_grad_sq": float(np.sum(HUHU * node.X)),
            "trace": float(np.sum(UU * node.X)),
            "X_time": node.X_time,
            "X": node.X,
            "eigenvalues": node.eigenvalues,
            "foreseen": node.foreseen,
        }
        if len(self.coordinates):
            seen["coordinate_grad_sq"], seen["osc_coordinate_grad_sq"] = square, added
        return seen | self._observe_coordinates(y)

    def _observe_coordinates(self, y: State) -> dict[str, Array]:
        """The weights at the coordinates, and ν there of a method whose ν has one value a weight."""
        if not len(self.coordinates):
            return {}
        index = torch.as_tensor(list(self.coordinates), dtype=torch.long, device=y.w.device)
        leaves = [leaf[index] for leaf in pytree.tree_leaves(y.nu) if leaf.shape == y.w.shape]
        names = ("coordinate_w", "coordinate_nu") if len(leaves) == 1 else ("coordinate_w",)
        return dict(zip(names, host(y.w[index], *leaves), strict=False))

    def observe_outputs(self, flow: CompiledFlow, y: State, node: Node) -> Observation:
        """Network outputs on the test inputs and what oscillations add to them; {} without test inputs."""
        if self.test_inputs is None:
            return {}
        outputs = flow.problem.outputs(y.w, self.test_inputs)
        added = torch.zeros_like(outputs)
        if node.k and node.X.any():
            X = like(node.X, node.U)
            added = flow.problem.output_curvature(y.w, self.test_inputs, node.U, X)
        value, osc = host(outputs, added)
        return {"outputs": value, "osc_outputs": osc}

    def observe_iterate(self, flow: CompiledFlow, y: State, g: Tensor) -> dict[str, Array]:
        """The same quantities at an iterate of the optimizer, as they are."""
        seen = self._observe_coordinates(y)
        if len(self.coordinates):
            index = torch.as_tensor(list(self.coordinates), dtype=torch.long, device=g.device)
            (seen["coordinate_grad_sq"],) = host(g[index] ** 2)
        if self.test_inputs is not None:
            (seen["outputs"],) = host(flow.problem.outputs(y.w, self.test_inputs))
        return seen
