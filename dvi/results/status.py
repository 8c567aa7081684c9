"""How a run ended, in a sentence with advice."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


class Status(Enum):
    """How a run ended.  The value of a member is the sentence to print; ``str(status)`` gives it."""

    SUCCESS = "The run reached the requested time."
    RUNNING = "The run has not reached the requested time; continue from its file with resume=."
    INTERRUPTED = "The run was interrupted by the user; its result is kept. Continue from its file with resume=."
    INFEASIBLE_START = (
        "The effective sharpness at the start is above 2, where the optimizer diverges and no central flow exists. "
        'Let the real optimizer settle first: warm_start="auto", or warm_start=N for N steps; or lower lr.'
    )
    NO_SOLUTION = (
        "The cone complementarity problem has no solution here: no oscillation can keep the effective sharpness at 2. "
        "Either the loss is quadratic, without third derivatives, or the method's f and P do not react to oscillations "
        "(β is not monotone). The flow ends where the optimizer would diverge."
    )
    NOT_CONVERGED = (
        "The leading eigenpairs of the effective Hessian did not converge. Loosen the eigenvector tolerance, raise "
        "max_iterations, or compute in float64."
    )
    NOT_POSITIVE_DEFINITE = (
        "P(ν) is no longer positive definite. Give the method an eps > 0, or check the formula of P."
    )
    DIVERGED = (
        "The trajectory diverged (weights or loss not finite). Lower lr; for a flow, also lower dt or tol, and start "
        "from an effective sharpness below 2 (warm_start)."
    )
    OUT_OF_MEMORY = (
        "So many directions are critical that their third derivatives exceed the memory limit. Raise the limit "
        "(max_gib= of central_flow), compute in float32, or lower lr so that fewer directions oscillate."
    )
    KINKS = (
        "The loss has kinks (ReLU, max, abs, …), and the flow cannot cross them at a bounded cost: the gradient jumps "
        "there, so the flow slides along a kink in ever shorter steps. Give the flow a smooth loss: "
        "dvi.problems.smoothed(model, beta=20) is a copy of the model with β-GELU for ReLU; a larger beta is closer to "
        "ReLU, and costs more."
    )
    CHATTERS = (
        "Directions start and stop oscillating again and again while the weights hardly move, so the flow does not "
        "advance. The optimizer does not resolve such details: loosen tol (by default it follows the oscillation), "
        "raise h_min, or lower lr."
    )
    SCHEDULE = "A schedule of the method failed during the run; the message names the hyperparameter, time and cause."
    LOSS_CHANGED = (
        "The loss at the starting weights has changed since the problem was made: it depends on something besides the "
        "weights (changed data, random numbers, a counter). The result cannot be trusted."
    )
    OVER_BUDGET = (
        "The flow cost more per unit time than its budget, whatever the steps: many directions oscillate, or "
        "the loss has kinks there, or the optimizer itself is about to diverge. Lower lr, smooth the loss, or raise "
        "the integrator's budget=."
    )
    CHAOTIC = (
        "The oscillations that mini-batches cause are too large for the flow with noise: second derivatives no longer "
        "describe the loss there, and runs of the optimizer jump about. Take larger batches or a smaller lr."
    )
    RANKS = (
        "The processes of a distributed run could not continue together: one has ended, or their weights differ. Read "
        "the output of that process. Then continue from the run's file with resume=True, on any number of ranks."
    )
    DERIVATIVES = "The loss or one of its derivatives failed during the run; the message says which, and what to do."

    def __str__(self) -> str:
        return self.value


__all__ = ["Status"]
