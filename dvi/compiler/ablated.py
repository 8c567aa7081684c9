"""Ablated flows: the central flow without one of the effects of oscillations (paper, Figs. 5, 7 and 11)."""

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
    """The central flow without its curvature penalty: oscillations act on ν but not on w

    dw/dt = −P(ν)⁻¹ ∇L(w)
    dν/dt = (I + ∂f/∂ν)⁻¹ ( f(ν, g) + ½∇²_g f[HΣH] )
    0 ⪯ Σ  ⟂  2P(ν) − H(w) ⪰ 0.

    The step sizes are still the largest stable ones, but no force moves w towards flatter regions.  For RMSProp-Norm,
    √ν = ηS/2 at the edge, and the flow is the paper's dw/dt = −(2/S(w)) ∇L(w).  Only the ν-part of β remains, so Σ
    differs from the central flow's: it is the covariance with which ν alone maintains the constraint.

    Where oscillations act on ν, HU is replaced by 2PU, which is equal on the constraint.  Without the push nothing else
    makes β monotone: with H times U it is not, as soon as there is a direction with an eigenvalue below 2.

    The accuracy is always "paper", because the paper's flow is what it is compared with.

    Raises:
        SpecError: for a method without state (gradient descent), because nothing could then maintain the constraint.
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
                'The ablated flow has accuracy="paper", but the other flows are of second order. Part of the distance '
                "between them is this difference: it is of first order in the step size, and includes the lag of "
                "momentum."
            )
        if self.calculus.stateless:
            raise SpecError(
                f"{self.method} has no state ν, so its oscillations act on w only. Without their force on w nothing "
                "keeps H ⪯ 2P. Use dvi.stable_flow: without oscillations, gradient descent is gradient flow."
            )

    def linearised(self, y: State, g: Tensor, frame: Frame) -> LinearisedFlow:
        """α, β without the force on w, the gap and the drift at y."""
        return LinearisedFlow(self.calculus, y, g, self._read(frame), push=self.pushed)


def ablated_flow(
    problem: Problem,
    method: MethodLike,
    *,
    without: Literal["curvature penalty"] = "curvature penalty",
    check: bool = True,
    max_gib: float = 4.0,
) -> AblatedFlow:
    """Compile the central flow of a method without one of its terms.

    Args:
        problem, method, check, max_gib: as for :func:`dvi.central_flow`.
        without: the term to leave out; "curvature penalty" is ½∇³L[Σ] in dw/dt.

    Raises:
        SpecError: if the declaration is wrong, or the method has no ν that could maintain the constraint.
        ValueError: for any other term.
    """
    if without != "curvature penalty":
        raise ValueError(f'without={without!r}: "curvature penalty" is the only term that can be left out.')
    return AblatedFlow(problem, method, check=check, max_gib=max_gib)


__all__ = ["AblatedFlow", "ablated_flow"]
