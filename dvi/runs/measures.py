"""What is measured now and then along a flow, because it costs more than a step (paper, Figs. 5 and 7–11).

A measure is a function of a state and its node that gives named numbers.  They become series of the run: known where
they were measured, interpolated in between.  Like the eigenvalues of the optimizer they are a look, no part of the
run's cost, and a look that fails does not end the run: it leaves a gap.
"""

from __future__ import annotations

import dataclasses
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
from dvi.solvers.errors import SolverError
from dvi.solvers.protocol import State, host
from dvi.stationarity.api import stationary
from dvi.stationarity.flow import StationaryFlow

Measure = Callable[[State], dict[str, float]]

_TOL = 1e-5  # of a stationary point: its rates are then good to about 1e-3, less than a line's width


def sharpness(flow: CompiledFlow) -> Measure:
    """The largest eigenvalue of the Hessian itself, S(w): series ``sharpness``."""
    subspace = CriticalSubspace()

    def measure(y: State) -> dict[str, float]:
        (lr,) = host(flow.calculus.metric.at(y.t).P(y.nu).effective_lr())  # brings H to the scale of its tolerance
        block = subspace.start(lambda V: float(lr) * flow.problem.hvp(y.w, V), y.w, want=np.inf)
        return {"sharpness": float(block.eigenvalues[0]) / float(lr)}

    return measure


def stationarity(flow: CompiledFlow) -> Measure | None:
    """How ν(t) stands to its stationary value ν̄(w(t)), and the rates of the loss that go with it (Figs. 8–10).

    The series, rates as dL/dt like ``loss_rate``:

    - ``stationary_cosine``: the cosine of ν(t) and ν̄(w(t)).
    - ``stationary_rate``: along the stationary flow (eq. 13).
    - ``naive_rate``: −‖∇L‖² in the metric of P(ν̄)⁻¹, the same without the curvature penalty.
    - ``alternative_rate``: the same with the preconditioner that eq. (12) has without its second term.

    A bias correction, which ends, is taken at its end.  Of flows other than the central one nothing is measured: None.

    Raises:
        SpecError: if ν has no stationary value.
    """
    if not isinstance(flow, CentralFlow):
        return None
    settled = StationaryFlow(flow.problem, without_correction(flow.method), check=False, accuracy="paper")

    def measure(y: State) -> dict[str, float]:
        point = stationary(settled, y.w, t=y.t, tol=_TOL)
        other = stationary(settled, y.w, t=y.t, tol=_TOL, without="gradient")
        look = settled.look(point)
        P, alternative = (settled.calculus.P(nu, y.t) for nu in (point.nu, other.nu))
        values = host(
            _cosine(y.nu, point.nu),
            look.g @ look.rate,
            -(look.g @ P.solve(look.g)),
            -(look.g @ alternative.solve(look.g)),
        )
        names = ("stationary_cosine", "stationary_rate", "naive_rate", "alternative_rate")
        return {name: float(value) for name, value in zip(names, values, strict=True)}

    return measure


#: What can be measured, by name.
MEASURES: dict[str, Callable[[CompiledFlow], Measure | None]] = {"sharpness": sharpness, "stationarity": stationarity}


def check_names(names: Sequence[str]) -> None:
    """Raise ValueError unless all names are of measures."""
    if isinstance(names, str) or not set(names) <= set(MEASURES):
        raise ValueError(f"measures={names!r}: a tuple of names, of {', '.join(map(repr, MEASURES))}.")


def measured(measures: Sequence[Measure], y: State) -> dict[str, float]:
    """All that is measured at y; what cannot be is left out."""
    found: dict[str, float] = {}
    for measure in measures:
        try:
            found |= measure(y)
        except (SolverError, CCPError, ProblemError, NotPositiveDefiniteError, np.linalg.LinAlgError):
            continue
    return found


def without_correction(method: Method) -> Method:
    """The method behind the end of its bias correction, if it has one."""
    if not getattr(method, "bias_correction", False):
        return method
    return dataclasses.replace(method, bias_correction=False)


def _cosine(nu: Nu, other: Nu) -> Tensor:
    """The cosine of two ν, all parts of the second one together; a clock that only the first one has is left out."""
    if isinstance(other, dict):
        nu = {name: nu[name] for name in other}
    a, b = (torch.cat([leaf.reshape(-1) for leaf in pytree.tree_leaves(tree)]) for tree in (nu, other))
    return (a @ b) / (torch.linalg.vector_norm(a) * torch.linalg.vector_norm(b))
