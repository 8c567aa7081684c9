"""The real stochastic optimizer, with many replicas at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap
from torch.utils import _pytree as pytree

from dvi.compiler.flows import Check
from dvi.compiler.optimizer import Discrete, OptimizerDivergedError, at_lr, kept
from dvi.interop.binding import MethodLike
from dvi.methods import Method, Nu
from dvi.noise.sampling import Sampling
from dvi.noise.spread import noisy_start
from dvi.problems import MiniBatches, NotFiniteError, Problem
from dvi.solvers.protocol import State


class MiniBatchOptimizer(Discrete):
    """The declared optimizer on mini-batches: g_t is the gradient of the batch of step t.

    All replicas start from one state.  Its ν is the average over mini-batches after a first update.  Each replica draws
    its own batches.

    Attributes:
        batch_size, sampling, batches: see :class:`dvi.NoisyFlow`.
    """

    name = "sgd"

    def __init__(
        self, problem: Problem, method: MethodLike, batch_size: int, sampling: Sampling, *, check: Check = True
    ) -> None:
        super().__init__(problem, method, check="gradient" if check else False)
        self.batch_size, self.sampling = batch_size, sampling
        # of the minimised problem: an optimizer of torch has its own start, penalty or sign
        self.batches: MiniBatches = self.problem.mini_batches(sampling.max_gib)
        sampling.check(batch_size, self.batches.n)
        self.initial = noisy_start(self, self.batches, sampling.factor(batch_size, self.batches.n))
        self._vectorised = True

    @property
    def replicas(self) -> int:
        """The number of runs: one if a batch has all examples, because all runs would be the same."""
        return self.sampling.replicas if self.noisy else 1

    @property
    def noisy(self) -> bool:
        """Whether batches differ."""
        return self.sampling.factor(self.batch_size, self.batches.n) > 0

    def spread_out(self, y: State) -> State:
        """The state of all replicas [R, …]: R copies of y."""
        R = self.replicas

        def copies(tree: Any) -> Any:
            return pytree.tree_map(lambda x: None if x is None else x.expand(R, *x.shape).clone(), tree)

        return State(copies(y.w), copies(y.nu), y.t, copies(y.m))

    def batch(self, W: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Losses [R] and gradients [R, d] of the batches of a step at weights W [R, d]."""
        chosen = self.sampling.draw(self.batch_size, self.batches.n, step)[: len(W)]
        return self.batches.batches(W, chosen.to(W.device))

    def advanced(self, y: State, G: Tensor, step: int) -> tuple[State, Tensor, Tensor]:
        """One step of all replicas from y, given their batches' gradients G [R, d]: state, losses [R], gradients.

        Raises:
            OptimizerDivergedError: if weights, state, loss or gradient of a replica are not finite after the step.
        """
        now, t = self.calculus.metric.at(y.t), y.t + 1
        m, memory = (G, None) if y.m is None else now.Q().step(G, y.m)
        W = kept(y.w, self.calculus.metric.decay(y.t)) - self._each(lambda nu, m: now.P(nu).solve(m), y.nu, m)
        if not bool(torch.isfinite(W.sum())):
            raise self._diverged(now, t, "weights are not finite")
        try:
            losses, following = self.batch(W, step)
        except NotFiniteError as error:
            raise self._diverged(now, t, str(error)) from None
        nu = y.nu
        if not self.calculus.stateless:
            later = self.calculus.metric.at(t)
            change = self._each(later.f, y.nu, following)
            nu = pytree.tree_map(torch.add, y.nu, change)
            if not all(bool(torch.isfinite(x.sum())) for x in pytree.tree_leaves(nu)):
                raise self._diverged(now, t, "its state ν is not finite")
        return State(W, nu, t, memory), losses, following

    def _diverged(self, method: Method, t: float, what: str) -> OptimizerDivergedError:
        return OptimizerDivergedError(
            f"The optimizer itself diverges{at_lr(method)} on batches of {self.batch_size}: after {t:g} steps {what}."
        )

    def _each(self, function: Callable[[Nu, Tensor], Any], nu: Nu, G: Tensor) -> Any:
        """function(ν, g) of every replica, stacked; computed one by one if torch cannot vectorise the function."""
        if self.calculus.stateless:
            return vmap(lambda g: function(nu, g))(G)
        if self._vectorised:
            try:
                return vmap(function)(nu, G)
            except Exception:  # an operation without batching rule, or control flow: both allowed in f and P
                self._vectorised = False
        found = [function(pytree.tree_map(lambda x, i=i: x[i], nu), g) for i, g in enumerate(G)]
        return pytree.tree_map(lambda *leaves: torch.stack(leaves), *found)


def minibatch(
    problem: Problem,
    method: MethodLike,
    batch_size: int,
    sampling: Sampling | None = None,
    **settings: Any,
) -> MiniBatchOptimizer:
    """The real optimizer on mini-batches, to be run by :func:`dvi.solve` or beside its flows by :func:`dvi.compare`.

    Its :class:`dvi.Solution` holds averages over a window of time and over replicas, and their spread.

    Args:
        problem: a problem that is made of examples: ``Problem.from_module``, or ``Problem.from_examples``.
        method: a :class:`dvi.Method`, a triple of functions, or a ``torch.optim.Optimizer``.
        batch_size: B, the number of examples in a batch.
        sampling: how batches are drawn, the number of replicas, and the window of time for averages.
        settings: fields of :class:`dvi.Sampling`, instead of ``sampling``.

    Raises:
        ProblemError: if the problem has no examples, or if some examples count for more than others.
        ValueError: if the batch size or a setting is out of its range.
    """
    if sampling is not None and settings:
        raise ValueError("Give sampling=dvi.Sampling(…) or its fields, not both.")
    return MiniBatchOptimizer(problem, method, batch_size, sampling or Sampling(**settings))


__all__ = ["MiniBatchOptimizer", "minibatch"]
