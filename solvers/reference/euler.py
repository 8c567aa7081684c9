"""Euler steps with the complementarity linearised over the step: the paper's discretisation (App. B), the reference."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from dvi.solvers import ccp
from dvi.solvers.eigen.tracker import EigenTracker, SpectrumEstimate
from dvi.solvers.errors import StepError
from dvi.solvers.integrator import IntegratorBase
from dvi.solvers.nodes import empty_frame, node
from dvi.solvers.numbers import with_numbers
from dvi.solvers.protocol import Array, ConstrainedFlow, Node, Rate, State, StepResult


@dataclass(frozen=True)
class EulerMemory:
    """The memory of Euler: the eigenpairs and the last X, as starts of the next searches."""

    seen: SpectrumEstimate | None = None
    X: Array | None = None


@dataclass(frozen=True)
class Euler(IntegratorBase):
    """Explicit Euler steps of length dt; X from the constraint at the end of the step, to first order:

        X ⪰ 0   ⟂   gap + dt (β[X] − α) ⪰ 0.

    The method is of first order in dt.  Every substep computes eigenpairs and third derivatives anew: this is the cost
    of a central flow without any savings.  A flow without constraint takes as many substeps as its sharpness needs,
    each at most 1/λ₁ unit times long; λ₁ is computed once a unit.

    Args:
        dt: unit times per substep; the paper uses 1/4.
        watch: the tracker of the critical eigenpairs.

    Raises:
        ValueError: if dt is not positive.
    """

    dt: float = 0.25
    watch: EigenTracker = field(default_factory=EigenTracker)

    def __post_init__(self) -> None:
        with_numbers(self)
        if not self.dt > 0:
            raise ValueError(f"Euler(dt={self.dt}): dt must be positive, in unit times (the paper's is 0.25).")

    def init(self, flow: ConstrainedFlow, y: State) -> EulerMemory:
        """No memory yet."""
        return EulerMemory()

    @property
    def fixed_steps(self) -> bool:
        """Every substep is dt, or what is left."""
        return True

    def horizon(self, memory: EulerMemory) -> float:
        """A larger h than this would not change the step."""
        return 1.001 * self.dt

    def step(self, flow: ConstrainedFlow, memory: EulerMemory, y: State, h: float) -> StepResult:
        """One substep of min(dt, h)."""
        if not flow.constrained:
            seen = self.watch.update_leading(flow, y, memory.seen)
            memory = EulerMemory(seen)
            h = min(h, 1 / max(1.0, float(seen.eigenvalues[0])))
        h = h if h <= self.dt * (1 + 1e-9) else self.dt  # land on h when the rest would be rounding
        begin, memory, rate = self._evaluate(flow, memory, y, h)
        end = y.moved(rate, h)
        if not bool(end.w.isfinite().all()):
            raise StepError(
                f"Euler(dt={self.dt:g}) gave weights that are not finite at t = {y.t:g}. Take a smaller dt; if the "
                "effective sharpness was above 2 at the start, warm-start with real optimizer steps."
            )
        return StepResult(end, memory, begin, lambda t: y.moved(rate, t - y.t))

    def observe(self, flow: ConstrainedFlow, memory: EulerMemory, y: State) -> Node:
        """The node with which a step from y would begin."""
        return self._evaluate(flow, memory, y, self.dt)[0]

    def _evaluate(
        self, flow: ConstrainedFlow, memory: EulerMemory, y: State, h: float
    ) -> tuple[Node, EulerMemory, Rate]:
        loss, g = flow.value_and_grad(y)
        seen = (
            self.watch.update(flow, y, memory.seen, h)
            if flow.constrained
            else self.watch.update_leading(flow, y, memory.seen)
        )
        frame = self.watch.frame(flow, y, seen, h) if flow.constrained else empty_frame(flow, y)
        lin = flow.linearised(y, g, frame)
        X = np.zeros((frame.k, frame.k))
        if frame.k:
            warm = memory.X if memory.X is not None and memory.X.shape == X.shape else None
            X = ccp.solve(lin.alpha - lin.gap / h, lin.beta, warm=warm).X
            flow.count_ccp()
        rate = lin.drift(X)
        return node(flow, y.t, float(loss), g, seen, frame, X, y.t, rate), EulerMemory(seen, X), rate
