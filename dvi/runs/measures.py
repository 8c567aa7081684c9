"""Quantities that are measured only now and then along a flow, because they cost more than a step.

They are those of the paper's Figs. 5 and 7–11.  A measure is a function of a state that returns named numbers.  They
become series of the run, interpolated between the times of measurement.  Like the eigenvalues of the optimizer, they
are for display: they are not part of the run's cost, and if a measurement fails, the series has a gap.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dvi.compiler.flows import CentralFlow, CompiledFlow
from dvi.methods import Method, NotPositiveDefiniteError, Nu
from dvi.problems import ProblemError
from dvi.solvers.ccp import CCPError
from dvi.solvers.eigen.block_method import CriticalSubspace
from dvi.solvers.errors import ConvergenceError, SolverError
from dvi.solvers.protocol import State, host
from dvi.stationarity.api import stationary
from dvi.stationarity.flow import StationaryFlow

Measure = Callable[[State], dict[str, float]]

_TOL = 1e-5  # of a stationary point; its rates then have errors of about 1e-3, less than the width of a line
_MOST = 500  # iterations for one point; about fifty are usual, and a point that needs more is left out


def sharpness(flow: CompiledFlow) -> Measure:
    """Measure the largest eigenvalue of the Hessian itself, S(w): series ``sharpness``."""
    subspace = CriticalSubspace()

    def measure(y: State) -> dict[str, float]:
        (lr,) = host(flow.calculus.metric.at(y.t).P(y.nu).effective_lr())  # scales H to the eigensolver's tolerance
        block = subspace.start(lambda V: float(lr) * flow.problem.hvp(y.w, V), y.w, want=np.inf)
        return {"sharpness": float(block.eigenvalues[0]) / float(lr)}

    return measure


def stationarity(flow: CompiledFlow) -> Measure | None:
    """Compare ν(t) with its stationary value ν̄(w(t)), and measure the rates of the loss for ν̄ (Figs. 8–10).

    The series are (rates are dL/dt per unit time, like ``loss_rate``):

    - ``stationary_cosine``: the cosine of ν(t) and ν̄(w(t)).
    - ``stationary_rate``: along the stationary flow (eq. 13).
    - ``naive_rate``: −‖∇L‖² in the metric of P(ν̄)⁻¹, the same without the curvature penalty.
    - ``alternative_rate``: the same with the preconditioner that solves eq. (12) without its second term.

    A bias correction counts as completed.  The result is None for flows other than the central one.

    Raises:
        SpecError: if ν has no stationary value.
    """
    if not isinstance(flow, CentralFlow):
        return None
    settled = StationaryFlow(flow.problem, without_correction(flow.method), check=False, accuracy="paper")

    def measure(y: State) -> dict[str, float]:
        point = stationary(settled, y.w, t=y.t, tol=_TOL, max_iterations=_MOST)
        look, P = settled.look(point), settled.calculus.P(point.nu, y.t)
        values = host(_cosine(y.nu, point.nu), look.g @ look.rate, -(look.g @ P.solve(look.g)))
        seen = dict(zip(("stationary_cosine", "stationary_rate", "naive_rate"), map(float, values), strict=True))
        alternative = _rate_without_gradient(settled, y, look.g)
        return seen if alternative is None else seen | {"alternative_rate": alternative}

    return measure


def _rate_without_gradient(settled: StationaryFlow, y: State, g: Tensor) -> float | None:
    """The rate of the loss with the alternative preconditioner, or None if that is singular.

    If the curvature along a weight is negative, the best P without the gradient may be zero there.
    """
    try:
        point = stationary(settled, y.w, t=y.t, tol=_TOL, max_iterations=_MOST, without="gradient")
    except ConvergenceError:
        return None
    P = settled.calculus.P(point.nu, y.t)
    dead = P.dead()
    if dead is not None and bool((dead & (g != 0)).any()):
        return None
    (rate,) = host(-(g @ P.solve(g)))
    return float(rate)


#: All measures by name.
MEASURES: dict[str, Callable[[CompiledFlow], Measure | None]] = {"sharpness": sharpness, "stationarity": stationarity}


def check_names(names: Sequence[str]) -> None:
    """Raise ValueError unless all names are names of measures."""
    if isinstance(names, str) or not set(names) <= set(MEASURES):
        raise ValueError(f"measures={names!r}: give a tuple of names from {', '.join(map(repr, MEASURES))}.")


def measured(measures: Sequence[Measure], y: State) -> dict[str, float]:
    """The values of all measures at y; measures that fail are left out."""
    found: dict[str, float] = {}
    for measure in measures:
        try:
            found |= measure(y)
        except (SolverError, CCPError, ProblemError, NotPositiveDefiniteError, np.linalg.LinAlgError):
            continue
    return found


def without_correction(method: Method) -> Method:
    """The method without its bias correction, if it has one."""
    if not getattr(method, "bias_correction", False):
        return method
    return type(method)(**{**method.hyperparameters(), "bias_correction": False})


def _cosine(nu: Nu, other: Nu) -> Tensor:
    """The cosine of two ν over all parts of the second; a clock that only the first one has is left out."""
    if isinstance(other, dict):
        nu = {name: nu[name] for name in other}
    a, b = (torch.cat([leaf.reshape(-1) for leaf in pytree.tree_leaves(tree)]) for tree in (nu, other))
    cosine: Tensor = (a @ b) / (torch.linalg.vector_norm(a) * torch.linalg.vector_norm(b))
    return cosine
