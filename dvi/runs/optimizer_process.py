"""The optimizer in progress, advanced step by step and recorded as it goes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from dvi.compiler.optimizer import Discrete
from dvi.methods import NotPositiveDefiniteError
from dvi.problems import ProblemError
from dvi.results.solution import Solution
from dvi.results.status import Status
from dvi.runs import sampling
from dvi.runs.observables import Observation, Observer
from dvi.runs.process import Process
from dvi.solvers.eigen.tracker import EigenTracker, SpectrumEstimate
from dvi.solvers.errors import SolverError
from dvi.solvers.protocol import Array, State, host


class DiscreteProcess(Process):
    """The optimizer itself.

    It runs one step ahead of its results, because the midpoint ¼(w_{t−1} + 2w_t + w_{t+1}) needs w_{t+1}.

    Args:
        flow, start, grid, observer: see :class:`Process`.
        eigen_every: unit times between computations of the eigenvalues, which the run itself does not need (0: never).

    Raises:
        ValueError: if a recorded time is not a whole number of steps.
    """

    whole_steps, whole_times = "The optimizer", True
    _own_state = ("previous", "loss", "g", "seen")
    flow: Discrete

    def __init__(self, flow: Discrete, start: State, grid: Array, observer: Observer, eigen_every: float = 5.0) -> None:
        super().__init__(flow, start, grid, observer)
        self.eigen_every = eigen_every
        self.seen: SpectrumEstimate | None = None  # the last computed eigenvalues
        self.previous: Tensor | None = None
        self.loss: Tensor | None = None
        self.g: Tensor | None = None
        self._watch = EigenTracker()

    @property
    def near_end(self) -> bool:
        """Whether the run has used the last values of a schedule, after which the schedule may end."""
        return bool(self.flow.method.scheduled) and self.y.t - self.origin >= self.grid[-1] - 1e-9

    def advance(self) -> None:
        """One step of the optimizer."""
        with self.flow.timetable.stretch(self.y.t):
            self._advance()

    def _advance(self) -> None:
        before = self.flow.problem.ledger.copy()
        if self.g is None:
            self.loss, self.g = self.flow.value_and_grad(self.y)
        y, loss, g = self.y, self.loss, self.g
        assert loss is not None
        following, next_loss, next_g = self.flow.step(y, g)
        counts = self._spent(before, self.counts)
        t = y.t - self.origin
        middle = y.w if self.previous is None else 0.25 * (self.previous + 2 * y.w + following.w)
        value, grad_sq, lr, trace, length = host(
            loss,
            g @ g,
            self.flow.calculus.metric.at(y.t).P(y.nu).effective_lr().to(g),
            ((y.w - middle) ** 2).sum(),
            torch.linalg.vector_norm(following.w - y.w),
        )
        seen: Observation = {
            "t": t,
            "loss": float(value),
            "grad_sq": float(grad_sq),
            "effective_lr": float(lr),
            "trace": float(trace),
            "step_length": float(length),
            **self.observer.observe_iterate(self.flow, y, g),
        }
        with self.flow.problem.ledger.paused():
            seen["eigenvalues"] = self._look(State(middle, y.nu, y.t))
        self.counts.append(counts)
        self.nodes.append(seen)
        for i in np.flatnonzero(np.abs(self.grid - t) < 1e-9):
            self.ready[int(i)] = middle
        self.previous, self.y, self.loss, self.g = y.w, following, next_loss, next_g

    def _look(self, y: State) -> Array:
        """Effective eigenvalues at y if they are due, else none; they do not count as a cost of the run."""
        if not self.eigen_every or (self.seen is not None and y.t < self.seen.t + self.eigen_every - 1e-9):
            return np.empty(0)
        try:
            self.seen = self._watch.update(self.flow, y, self.seen, self.eigen_every)
        except (SolverError, ProblemError, NotPositiveDefiniteError, np.linalg.LinAlgError):
            self.seen = None  # eigenvalues for display do not decide how a run ends
            return np.empty(0)
        return self.seen.shown

    def solution(self, status: Status, about: dict[str, Any]) -> Solution:
        """Every step of the optimizer, whatever the grid, because a thinned oscillation would be misleading."""
        t = np.array([node["t"] for node in self.nodes])
        names = [n for n in (self.nodes[0] if self.nodes else {}) if n not in ("t", "loss", "eigenvalues")]
        data = {name: np.array([node[name] for node in self.nodes]) for name in names}
        return Solution(
            name=self.flow.name,
            t=t,
            loss=np.array([node["loss"] for node in self.nodes]),
            predicted_loss=np.full(len(t), np.nan),
            eigenvalues=sampling.padded([node["eigenvalues"] for node in self.nodes]),
            X=[np.zeros((0, 0))] * len(t),
            w=self.y.w if self.previous is None else self.previous,
            nu=self.y.nu,
            breakpoints=[],
            status=status,
            ledger=self._cost(list(t)),
            series=data,
            notes=list(self.notes),
            about=dict(about),
        )
