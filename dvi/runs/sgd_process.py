"""The stochastic optimizer in progress: replicas that take their steps together, averaged over a window of time."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dvi.methods import NotPositiveDefiniteError
from dvi.noise.optimizer import MiniBatchOptimizer
from dvi.problems import ProblemError
from dvi.results.solution import Solution
from dvi.results.status import Status
from dvi.runs.observables import Observer
from dvi.runs.process import Process
from dvi.solvers.eigen.tracker import EigenTracker
from dvi.solvers.errors import SolverError
from dvi.solvers.protocol import Array, State, host

#: The reach of an average in both directions, in standard deviations of its Gaussian.
_REACH = 3.0
#: Steps between two evaluations of the loss over all examples, which only the record needs.
_LOSS_EVERY = 5


class SGDProcess(Process):
    """Replicas of the stochastic optimizer.

    Results at t are averages over steps s with weights exp(−(s−t)²/2σ²), |s−t| ≤ 3σ, for each replica separately.
    Near the start, the average has only the steps since time 0.  Replicas run 3σ beyond the end, unless a schedule ends
    there.

    Args:
        flow, start, grid, observer: see :class:`Process`.
        eigen_every: unit times between computations of the leading eigenvalue at the averages (0: never).

    Raises:
        ValueError: if a recorded time is not a whole number of steps.
    """

    whole_steps, whole_times = "The optimizer", True
    _own_state = ("open", "G", "losses", "step", "shown")
    flow: MiniBatchOptimizer

    def __init__(
        self, flow: MiniBatchOptimizer, start: State, grid: Array, observer: Observer, eigen_every: float = 5.0
    ) -> None:
        super().__init__(flow, start, grid, observer)
        self.y = flow.spread_out(start)
        self.eigen_every, self.step = eigen_every, 0
        self.G: Tensor | None = None
        self.losses: Tensor | None = None
        #: by grid point: the sums of an incomplete average; they are never changed in place, so a mark may keep them
        self.open: dict[int, dict[str, Any]] = {}
        self.shown: tuple[Tensor, Any] = (start.w, start.nu)
        self._reach = round(_REACH * flow.sampling.window)

    @property
    def near_end(self) -> bool:
        """Whether a longer run would have begun another average by now, or would have steps that this one lacks."""
        return bool(self.step + self._reach >= self.grid[-1] - 1e-9)

    def weights(self, i: int) -> Tensor:
        """The averages of the replicas [R, d] at grid point i."""
        return super().weights(i)

    def advance(self) -> None:
        """One step of every replica."""
        with self.flow.timetable.stretch(self.y.t), self.flow.problem.ledger.paused():
            if self.G is None:
                self.losses, self.G = self.flow.batch(self.y.w, 0)
            self._include()
            last = bool(self.flow.method.scheduled) and self.step >= round(float(self.grid[-1]))
            self._complete(everything=last)
            if not last:
                self.y, self.losses, self.G = self.flow.advanced(self.y, self.G, self.step + 1)
                self.step += 1

    def _include(self) -> None:
        """Add the present iterates to all averages that they belong to."""
        assert self.G is not None
        W, nu, sigma, s = self.y.w, self.y.nu, self.flow.sampling.window, self.step
        squares = torch.linalg.vector_norm(self.G, dim=1).square()
        lengths = (W - self.flow.problem.w0).square().sum(dim=1)  # relative to a nearby point, to avoid cancellation
        loss = torch.stack([self.flow.problem.value(w) for w in W]) if s % _LOSS_EVERY == 0 else None
        near = np.flatnonzero(np.abs(self.grid - s) <= self._reach + 1e-9)
        changed = dict(self.open)
        for i in near.tolist():
            c = float(np.exp(-0.5 * ((float(self.grid[i]) - s) / sigma) ** 2))
            before = changed.get(i)
            part = {"weight": c, "w": c * W, "nu": pytree.tree_map(lambda x, c=c: c * x, nu), "square": c * squares}
            part["length"] = c * lengths
            part["loss_weight"], part["loss"] = (0.0, torch.zeros_like(squares)) if loss is None else (c, c * loss)
            changed[i] = part if before is None else pytree.tree_map(lambda a, b: a + b, before, part)
        self.open = changed

    def _complete(self, everything: bool) -> None:
        """Record the averages that no later step belongs to."""
        for i in sorted(self.open):
            t = float(self.grid[i])
            if not everything and self.step < t + self._reach - 1e-9:
                break
            sums = self.open[i]
            self.open = {j: other for j, other in self.open.items() if j != i}
            W = sums["w"] / sums["weight"]
            nu = pytree.tree_map(lambda x, total=sums["weight"]: x / total, sums["nu"])
            self._record(i, t, W, nu, sums)
            self.ready[i] = W
            self.shown = (W.mean(dim=0), pytree.tree_map(lambda x: x.mean(dim=0), nu))

    def _record(self, i: int, t: float, W: Tensor, nu: Any, sums: dict[str, Any]) -> None:
        flow, R = self.flow, len(W)
        metric = flow.calculus.metric.at(self.origin + t)
        states = [pytree.tree_map(lambda x, r=r: x[r], nu) for r in range(R)]
        lr = torch.stack([metric.P(each).effective_lr().to(W) for each in states])
        at_average = torch.stack([flow.problem.value(w) for w in W])
        apart = torch.pdist(W) if R > 1 else W.new_zeros(1)
        grads = torch.stack([flow.problem.value_and_grad(w)[1] for w in W]).square().sum(dim=1)
        loss = sums["loss"] / sums["loss_weight"] if sums["loss_weight"] else torch.full_like(at_average, torch.nan)
        variance = sums["length"] / sums["weight"] - (W - flow.problem.w0).square().sum(dim=1)
        values = (loss, at_average, sums["square"] / sums["weight"], lr, apart.mean(), grads, variance)
        loss_, average_, batch_, lr_, apart_, grads_, variance_ = host(*values)
        look = self.eigen_every and abs(t / self.eigen_every - round(t / self.eigen_every)) < 1e-9
        sharpness = self._sharpness(W, states, t) if look else np.full(R, np.nan)
        self.nodes.append(
            {
                "t": t,
                "loss": loss_,
                "loss_of_average": average_,
                "batch_grad_sq": batch_,
                "grad_sq": grads_,
                "effective_lr": lr_,
                "window_trace": variance_,
                "sharpness": sharpness,
                "apart": float(apart_),
            }
        )
        # the cost of all steps until now, which include those that this average needs
        spent = int(np.ceil((self.step + 1) * R * flow.batch_size / flow.batches.n))
        self.counts.append({"gradients": spent, "hvps": 0, "third_derivatives": 0, "values": 0, "ccp_solves": 0})

    def _sharpness(self, W: Tensor, states: list[Any], t: float) -> Array:
        """The leading effective eigenvalue at the average of each replica [R]; NaN if it was not found."""
        found = []
        for w, nu in zip(W, states, strict=True):
            try:
                seen = EigenTracker().update_leading(self.flow, State(w, nu, self.origin + t), None)
                found.append(float(seen.eigenvalues[0]))
            except (SolverError, ProblemError, NotPositiveDefiniteError, np.linalg.LinAlgError):
                found.append(np.nan)  # eigenvalues for display do not decide how a run ends
        return np.array(found)

    def solution(self, status: Status, about: dict[str, Any]) -> Solution:
        """Averages over replicas on the grid; series named ``*_spread`` are their standard deviation."""
        t = np.array([node["t"] for node in self.nodes])
        names = [name for name in (self.nodes[0] if self.nodes else {}) if name not in ("t", "apart")]
        each = {name: np.array([node[name] for node in self.nodes]) for name in names}
        series = {name: values.mean(axis=1) for name, values in each.items() if name not in ("loss", "sharpness")}
        R = self.flow.replicas
        if R > 1:
            series |= {f"{name}_spread": values.std(axis=1, ddof=1) for name, values in each.items()}
        series["apart"] = np.array([node["apart"] for node in self.nodes])
        empty = np.empty(0)
        sharpness = each["sharpness"].mean(axis=1) if self.nodes else empty
        w, nu = self.shown
        return Solution(
            name=self.flow.name,
            t=t,
            loss=each["loss"].mean(axis=1) if self.nodes else empty,
            predicted_loss=np.full(len(t), np.nan),
            eigenvalues=sharpness[:, None] if self.nodes else np.empty((0, 0)),
            X=[np.zeros((0, 0))] * len(t),
            w=w,
            nu=nu,
            breakpoints=[],
            status=status,
            ledger=self._cost(list(t)),
            series=series,
            notes=list(self.notes),
            about=dict(about)
            | {
                "batch_size": self.flow.batch_size,
                "batches": self.flow.sampling.in_words,
                "replicas": R,
                "window": self.flow.sampling.window,
            },
        )
