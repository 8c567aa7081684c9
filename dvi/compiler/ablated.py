"""Ablated flows: the central flow with a part of what oscillations do taken out (paper, Figs. 5, 7 and 11)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from dvi.compiler.exact_rates import Accuracy
from dvi.compiler.flows import CompiledFlow
from dvi.compiler.linearised import LinearisedFlow
from dvi.interop.binding import MethodLike
from dvi.methods import SpecError
from dvi.problems import Problem
from dvi.solvers.protocol import Frame, State


class AblatedFlow(CompiledFlow):
    """The central flow without its curvature penalty: oscillations act on ν and leave w alone

    dw/dt = −P(ν)⁻¹ ∇L(w)
    dν/dt = (I + ∂f/∂ν)⁻¹ ( f(ν, g) + ½∇²_g f[HΣH] )
    0 ⪯ Σ  ⟂  2P(ν) − H(w) ⪰ 0.

    The step sizes are still the largest stable ones, but nothing steers towards flatter regions.  For RMSProp-Norm at
    the edge √ν = ηS/2, and this is the paper's dw/dt = −(2/S(w)) ∇L(w).  β keeps its ν-part alone, so Σ is another
    one than the central flow's: what it takes for ν to hold the constraint by itself.

    Where oscillations act on ν, HU = 2PU is put in, which holds on the constraint.  Without the push nothing else in β
    makes it monotone: with H times U it is not, as soon as a direction with an eigenvalue below 2 is among the others.

    Its accuracy is "paper" whatever is asked for: it is compared with the paper's.

    Raises:
        SpecError: for a method without state (gradient descent): nothing is then left to hold the constraint.
    """

    name = "ablated"
    constrained = True
    pushed = False

    def __init__(
        self,
        problem: Problem,
        method: MethodLike,
        *,
        check: bool = True,
        accuracy: Accuracy | None = None,
        max_gib: float = 4.0,
    ) -> None:
        super().__init__(problem, method, check=check, accuracy="paper", max_gib=max_gib, edge_hessian="edge")
        if self._chosen(accuracy, self.calculus.momentum) != self.accuracy:
            self.notes.append(
                'The ablated flow has accuracy="paper" beside flows of second order: their distance is partly that, of '
                "first order in the step size, and with momentum its lag."
            )
        if self.calculus.stateless:
            raise SpecError(
                f"{self.method} has no state ν: its oscillations act on w only, and without their push nothing keeps "
                "H ⪯ 2P. What remains of gradient descent is gradient flow, dvi.stable_flow."
            )

    def linearised(self, y: State, g: Tensor, frame: Frame) -> LinearisedFlow:
        """α, β without the push on w, the gap and the drift at y."""
        return LinearisedFlow(self.calculus, y, g, self._read(frame), push=self.pushed)


def ablated_flow(
    problem: Problem,
    method: MethodLike,
    *,
    without: Literal["curvature penalty"] = "curvature penalty",
    check: bool = True,
    max_gib: float = 4.0,
) -> AblatedFlow:
    """Compile the central flow of a method with a part taken out.

    Args:
        problem, method, check, max_gib: as for :func:`dvi.central_flow`.
        without: the part; "curvature penalty" is ½∇³L[Σ] in dw/dt.

    Raises:
        SpecError: if the declaration is wrong, or the method has no ν to hold the constraint.
        ValueError: for another part.
    """
    if without != "curvature penalty":
        raise ValueError(f'without is "curvature penalty", not {without!r}: nothing else can be taken out.')
    return AblatedFlow(problem, method, check=check, max_gib=max_gib)


__all__ = ["AblatedFlow", "ablated_flow"]
