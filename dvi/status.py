"""How a run ended, in a sentence with advice."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dvi.compare import Comparison
    from dvi.solution import Solution


class Status(Enum):
    """How a run ended.  The value of a member is the sentence to print; ``str(status)`` gives it."""

    SUCCESS = "The run reached the requested time."
    RUNNING = "The run has not reached the requested time; go on from its file with resume=."
    INTERRUPTED = "The run was interrupted by the user; what was computed is here, go on from its file with resume=."
    INFEASIBLE_START = (
        "The effective sharpness at the start is above 2, where the optimizer diverges and no central flow exists. "
        'Let the real optimizer settle first: warm_start="auto", or warm_start=N for N steps; or lower lr.'
    )
    NO_SOLUTION = (
        "The cone complementarity problem has no solution here: nothing that oscillates can keep the effective "
        "sharpness at 2. On a quadratic loss there is no third derivative to do it; otherwise the method's f and P do "
        "not react to oscillations (β is not monotone), and the flow ends where the optimizer would diverge."
    )
    NOT_CONVERGED = (
        "The leading eigenpairs of the effective Hessian did not converge. Loosen the eigenvector tolerance, raise "
        "max_iterations, or compute in float64."
    )
    NOT_POSITIVE_DEFINITE = (
        "P(ν) stopped being positive definite. Give the method an eps > 0, or check the formula of P."
    )
    DIVERGED = (
        "The trajectory diverged (weights or loss not finite). Lower lr; for a flow, also lower dt or tol, and start "
        "from an effective sharpness below 2 (warm_start)."
    )
    OUT_OF_MEMORY = (
        "So many directions are critical that their third derivatives would not fit the memory allowed. Allow more "
        "(max_gib= of central_flow), compute in float32, or lower lr so that fewer directions oscillate."
    )
    OVER_BUDGET = (
        "The flow cost more per unit time than it was allowed, even in steps of one unit: many directions "
        "oscillate, or the loss has kinks there, or the optimizer itself is about to diverge. Lower lr, smooth the "
        "loss, or raise the integrator's budget=."
    )
    DERIVATIVES = "The loss or one of its derivatives failed along the way; the message says which and what to do."

    def __str__(self) -> str:
        return self.value


class RunError(RuntimeError):
    """A run could not go on.

    Attributes:
        status: a :class:`Status`, the kind of failure with its remedy.
        result: what was computed until then, a :class:`dvi.Solution` or :class:`dvi.Comparison` (None if nothing).
    """

    def __init__(self, status: Status, detail: str, result: Solution | Comparison | None = None) -> None:
        super().__init__(f"{status}\n{detail}" if detail else str(status))
        self.status = status
        self.detail = detail
        self.result = result


__all__ = ["RunError", "Status"]
