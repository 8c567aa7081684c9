"""The contract of an integrator, with defaults for all but ``init``, ``step`` and ``observe``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import inf
from typing import Any

from dvi.solvers.protocol import Flow, Integrator, Node, State, StepResult


class IntegratorBase(ABC):
    """All that a run asks of an integrator, with defaults.

    A subclass defines ``init``, ``step`` and ``observe`` as :class:`dvi.solvers.Integrator` describes them.  It
    overrides the other methods if their defaults do not fit.
    """

    @abstractmethod
    def init(self, flow: Flow, y: State) -> Any:
        """The memory before the first step."""

    @abstractmethod
    def step(self, flow: Flow, memory: Any, y: State, h: float) -> StepResult:
        """Advance by at most h unit times."""

    @abstractmethod
    def observe(self, flow: Flow, memory: Any, y: State) -> Node:
        """The node at y, without a step."""

    def accepts(self, flow: Flow) -> str:
        """Why this integrator cannot drive the flow, with a remedy; "" if it can.  Default: flows in w and ν alone."""
        return not_first_order(type(self).__name__, flow)

    def horizon(self, memory: Any) -> float:
        """A larger h than this would not change the step.  Default: infinity, so every step depends on the end."""
        return inf

    def restart(self, flow: Flow, memory: Any, y: State) -> Any:
        """The memory after a jump of the flow, given the memory before it.  Default: that of a new start."""
        return self.init(flow, y)

    @property
    def fixed_steps(self) -> bool:
        """True if the user has chosen the steps.  Then their cost at kinks does not end a run.  Default: False."""
        return False


def not_first_order(name: str, flow: Flow) -> str:
    """Why an integrator of flows in w and ν alone cannot drive this flow, or ""."""
    if flow.quasistatic:
        return "The stationary flow needs the stationary ν at every stage: its integrator is dvi.Quasistatic(h)."
    if flow.stepwise:
        return "The central map takes one step of the optimizer at a time: its integrator is SemiImplicit(dt=1)."
    if flow.inertial:
        return (
            f'{name} cannot drive a flow of accuracy="second-order", whose momentum is part of '
            'the state: use SemiImplicit(dt=…), or compile the flow with accuracy="paper".'
        )
    return ""


@dataclass(frozen=True, repr=False)
class Driver(IntegratorBase):
    """An integrator as a run sees it.  The integrator needs only ``init``, ``step`` and ``observe``.

    The defaults replace any other method that it lacks or has as None.

    Args:
        given: the integrator.

    Raises:
        ValueError: if it lacks one of the three, or is a class.
    """

    given: Integrator

    def __post_init__(self) -> None:
        given = self.given
        if isinstance(given, type):
            raise ValueError(f"integrator={given.__name__} is a class: make one, {given.__name__}(…).")
        missing = [name for name in ("init", "step", "observe") if not callable(getattr(given, name, None))]
        if missing:
            raise ValueError(
                f"integrator={given!r} has no {' and no '.join(missing)}: take one of dvi's, such as dvi.MacroStep(), "
                "or define init, step and observe as dvi.solvers.Integrator describes them."
            )

    def __repr__(self) -> str:
        return repr(self.given)

    def init(self, flow: Flow, y: State) -> Any:
        """Its own."""
        return self.given.init(flow, y)

    def step(self, flow: Flow, memory: Any, y: State, h: float) -> StepResult:
        """Its own."""
        return self.given.step(flow, memory, y, h)

    def observe(self, flow: Flow, memory: Any, y: State) -> Node:
        """Its own."""
        return self.given.observe(flow, memory, y)

    def accepts(self, flow: Flow) -> str:
        """Its own, or the default: flows in w and ν alone."""
        own = getattr(self.given, "accepts", None)
        return not_first_order(type(self.given).__name__, flow) if own is None else str(own(flow))

    def horizon(self, memory: Any) -> float:
        """Its own, or infinity."""
        own = getattr(self.given, "horizon", None)
        return super().horizon(memory) if own is None else float(own(memory))

    def restart(self, flow: Flow, memory: Any, y: State) -> Any:
        """Its own, or a new start."""
        own = getattr(self.given, "restart", None)
        return super().restart(flow, memory, y) if own is None else own(flow, memory, y)

    @property
    def fixed_steps(self) -> bool:
        """Its own, or False."""
        return bool(getattr(self.given, "fixed_steps", False))
