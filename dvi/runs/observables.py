"""Time averages of the optimizer as a flow predicts them, and the same quantities of the optimizer itself.

With iterates w_t = w + δ, E[δ] = 0 and E[δδᵀ] = Σ = UXUᵀ (paper, eqs. 7, 18, 22), to second order in δ

    E[L(w_t)]    ≈ L(w)    + ½⟨H, Σ⟩   = L + ½ tr(M X),           M = UᵀHU
    E[‖∇L‖²]     ≈ ‖∇L‖²   + ⟨H², Σ⟩   = ‖∇L‖² + tr(X (HU)ᵀHU)
    E[(∂ᵢL)²]    ≈ (∂ᵢL)²  + (HΣH)ᵢᵢ
    E[h(w_t)]    ≈ h(w)    + ½⟨∇²h, Σ⟩                             (a network output h)

Every observation below is a pair: the value on the flow, and the contribution of oscillations to its time average.

:meth:`Observer.next_term` measures the size of the terms that these expansions leave out.
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

#: An eigenvalue of X counts as an oscillation if it is larger than this fraction of the largest.
OSCILLATES = 1e-7

#: The entries of a flow's observation besides eigenvalues and X; "osc_*": what oscillations add to the time average.
Observation = dict[str, Any]


@dataclass(frozen=True)
class Observer:
    """The quantities that are observed along a run.

    Args:
        coordinates: indices of weights that are observed with their νᵢ, and whose squared gradient is predicted.
        test_inputs: inputs of the network whose outputs are predicted.
        measures: quantities that are measured now and then along the flows, see :mod:`dvi.runs.measures`.
        measure_every: least number of unit times between measurements.
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
        """The weights at the coordinates, and ν there if ν has one value for each weight."""
        if not len(self.coordinates):
            return {}
        index = torch.as_tensor(list(self.coordinates), dtype=torch.long, device=y.w.device)
        leaves = [leaf[index] for leaf in pytree.tree_leaves(y.nu) if leaf.shape == y.w.shape]
        names = ("coordinate_w", "coordinate_nu") if len(leaves) == 1 else ("coordinate_w",)
        return dict(zip(names, host(y.w[index], *leaves), strict=False))

    def next_term(self, flow: CompiledFlow, y: State, node: Node) -> float:
        """Size of the next term of the oscillation's force, which the flow leaves out, relative to that force.

        The flow takes the time average of the gradient to be g + ½∇³L[Σ] (eq. 7), the first two terms of a Taylor
        series.  The series is compared with gradients at the oscillation's own amplitude.  With Σ = Σᵢ vᵢvᵢᵀ, the vᵢ
        being the eigenvectors in the P-metric times the square roots of their eigenvalues:

            ‖Σᵢ [½(∇L(w + vᵢ) + ∇L(w − vᵢ)) − ∇L(w)] − ½∇³L[Σ]‖ / ‖½∇³L[Σ]‖

        It is 0 for a cubic loss.  Each direction oscillates alone here: terms that mix two directions are left out.
        It costs two gradients and a third derivative for each direction.

        Returns:
            the ratio; infinity where the loss is not finite at w ± vᵢ; NaN where nothing oscillates, or so little that
            rounding hides the difference.
        """
        variances, axes = np.linalg.eigh(node.X)
        kept = variances > OSCILLATES * variances.max(initial=0.0)
        if not kept.any():
            return float("nan")
        V = node.U @ like(axes[:, kept] * np.sqrt(variances[kept]), node.U)
        force = 0.5 * flow.third_derivatives(y, V, squares=True).sum(dim=0)
        average, largest = torch.zeros_like(node.g), node.g.new_zeros(())
        for v in V.unbind(dim=1):
            for w in (y.w + v, y.w - v):
                _, g = flow.problem.value_and_grad(w, checked=False)
                average += 0.5 * (g - node.g)
                largest = torch.maximum(largest, torch.linalg.vector_norm(g))
        size, missing, known = (float(x) for x in host(largest, (average - force).norm(), force.norm()))
        if not np.isfinite(missing):
            return float("inf")
        rounding = 10 * torch.finfo(y.w.dtype).eps * size  # of a difference of gradients: a few units in the last place
        return missing / known if rounding < 0.01 * known else float("nan")

    def observe_outputs(self, flow: CompiledFlow, y: State, node: Node) -> Observation:
        """Network outputs on the test inputs and what oscillations add to them; {} without test inputs."""
        if self.test_inputs is None:
            return {}
        outputs = flow.problem.outputs(y.w, self.test_inputs)
        added = torch.zeros_like(outputs)
        U, X = node.oscillation
        if X.any():
            added = flow.problem.output_curvature(y.w, self.test_inputs, U, like(X, U))
        value, osc = host(outputs, added)
        return {"outputs": value, "osc_outputs": osc}

    def observe_iterate(self, flow: CompiledFlow, y: State, g: Tensor) -> dict[str, Array]:
        """The same quantities at an iterate of the optimizer, without averages."""
        seen = self._observe_coordinates(y)
        if len(self.coordinates):
            index = torch.as_tensor(list(self.coordinates), dtype=torch.long, device=g.device)
            (seen["coordinate_grad_sq"],) = host(g[index] ** 2)
        if self.test_inputs is not None:
            (seen["outputs"],) = host(flow.problem.outputs(y.w, self.test_inputs))
        return seen
