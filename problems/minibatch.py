"""A loss that is a mean over examples, taken example by example and in mini-batches.

The noise of a mini-batch is the spread of the gradients of single examples.  These are computed for one chunk of
examples at a time.  Each chunk is yielded before the next one is made, so memory is bounded and no n gradients are
stored at once.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import grad_and_value, vmap

from dvi.problems.changed import Change
from dvi.problems.derivatives.safe import differentiable_layers
from dvi.problems.errors import NotFiniteError, ProblemError
from dvi.problems.examples import Examples, count, find_reduction, own, refuse_unusable, take
from dvi.problems.fingerprint import fingerprint
from dvi.problems.problem import Problem

#: The mean loss [] of some examples, given the weights as consecutive pieces of w.
BatchLoss = Callable[[tuple[Tensor, ...], Examples], Tensor]

#: Number of vectors like w that a backward pass keeps in memory for each example.
_ALIVE = 4

#: Size of a chunk's gradients, in numbers, above which a larger chunk is not faster.
_WORTHWHILE = 2**24


class MiniBatches:
    """The examples of a problem, one by one and in batches.

    All gradients count in the problem's ledger: n examples are one gradient.

    Args:
        problem: the problem, whose loss is the mean of ``loss`` over all examples, plus the problem's changes (a
            penalty, a sign).
        loss: the mean loss [] of some examples, without these changes.
        data: all examples, along the first dimension of each tensor.
        release: called with w0 after a computation, so that a module is left with plain weights.
        max_gib: memory for the gradients of a chunk of examples, in GiB.

    Attributes:
        n: number of examples.

    Raises:
        ProblemError: if the loss is not the mean of the losses of single examples, in value and gradient.
    """

    def __init__(
        self,
        problem: Problem,
        loss: BatchLoss,
        data: Examples,
        release: Callable[[Tensor], None] = lambda w: None,
        max_gib: float = 0.5,
    ) -> None:
        n = count(data)
        if n is None or n < 2:
            raise ProblemError(
                "mini-batches need two examples or more, along the first dimension of every tensor of the data; "
                f"here there {'is one' if n == 1 else 'is no number of examples'}"
            )
        self.n = n
        self._problem, self._loss, self._data, self._release = problem, loss, data, release
        per_example = _ALIVE * problem.dim * problem.w0.element_size()
        self._chunk = int(min(n, max(1, max_gib * 2**30 // per_example), max(1, _WORTHWHILE // problem.dim)))
        self._sizes = [math.prod(shape) for shape in problem.shapes]
        self._vectorised = True
        self._spent = 0  # examples that were differentiated but not yet counted as a whole gradient
        with problem.ledger.paused():
            self._look_at_reduction()
            for change in problem.changes:
                self._loss = _ChangedLoss(self._loss, change)
            self._vectorised = self._can_be_vectorised()
            self._look_at_mean()
        self._spent = 0

    # ---- what is asked ---------------------------------------------------------------------------------

    def each(self, w: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Losses [c] and gradients [c, d] of all examples at w [d], a chunk at a time, in order.

        Raises:
            NotFiniteError: if one is not finite.
        """
        for begin in range(0, self.n, self._chunk):
            chosen = torch.arange(begin, min(begin + self._chunk, self.n), device=w.device)
            yield self.batches(w, chosen[:, None])

    def batches(self, W: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """The losses [r] and gradients [r, d] of r mini-batches.

        Args:
            W: weights [r, d], one row for each batch; or [d], the same for all.
            chosen: the indices of the examples of each batch, [r, b].

        Raises:
            NotFiniteError: if one is not finite.
        """
        self._enter(chosen.numel())
        losses, gradients = self._computed(W, chosen)
        if not bool(torch.isfinite(losses.sum() + gradients.sum())):  # a sum takes only one pass over a large tensor
            raise NotFiniteError(f"the loss of {self._problem.name}, or its gradient, is not finite on some examples")
        return losses, gradients

    # ---- inside ----------------------------------------------------------------------------------------

    def _enter(self, examples: int) -> None:
        """Count this many examples; n examples are one gradient."""
        whole, self._spent = divmod(self._spent + examples, self.n)
        self._problem.ledger.gradients += whole

    def _computed(self, W: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        W = W.detach()
        try:
            with torch.enable_grad():
                losses, gradients = (self._together if self._vectorised else self._one_by_one)(W, chosen)
        finally:
            self._release(self._problem.w0)
        return losses.detach(), gradients.detach()

    def _together(self, W: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """By torch.func, for each piece of w: the gradient in one long vector would be a sum of padded pieces."""

        def loss(pieces: tuple[Tensor, ...], which: Tensor) -> Tensor:
            return self._loss(pieces, take(self._data, which))

        with differentiable_layers():
            pieces = torch.split(W, self._sizes, dim=-1)
            gradients, losses = vmap(grad_and_value(loss), in_dims=(0 if W.ndim == 2 else None, 0))(pieces, chosen)
        return losses, gradients[0] if len(gradients) == 1 else torch.cat(gradients, dim=1)

    def _one_by_one(self, W: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        gradients, losses = [], []
        for i, which in enumerate(chosen):
            x = (W[i] if W.ndim == 2 else W).clone().requires_grad_()
            value = self._loss(torch.split(x, self._sizes), take(self._data, which))
            (g,) = torch.autograd.grad(value, x, allow_unused=True, materialize_grads=True)
            gradients.append(g)
            losses.append(value.detach())
        return torch.stack(losses), torch.stack(gradients)

    def _can_be_vectorised(self) -> bool:
        """True if torch vectorises this loss, with the same result as one example after the other."""
        w, some = self._problem.w0, torch.arange(min(self.n, 3), device=self._problem.device)[:, None]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # a warning says that an operation is slow or has no batching rule
                together = self._computed(w, some)
                apart = self._computed(w.repeat(len(some), 1), some)
        except Exception:  # any operation that torch.func does not allow: control flow, in-place, no batching rule
            return False
        self._vectorised = False
        singly = self._computed(w, some)
        return all(self._agree(a, b) for found in (together, apart) for a, b in zip(found, singly, strict=True))

    def _agree(self, a: Tensor, b: Tensor, size: float = 0.0) -> bool:
        """True if both are the same up to the order of sums, whose terms are as large as b or as ``size``."""
        scale = max(float(b.abs().max()), size, torch.finfo(b.dtype).tiny)
        return bool((a - b).abs().max() <= 1e4 * torch.finfo(b.dtype).eps * scale)

    def _look_at_reduction(self) -> None:
        def loss_of(which: slice) -> float:
            with torch.enable_grad():
                pieces = torch.split(self._problem.w0, self._sizes)
                return float(self._loss(pieces, take(self._data, which)).detach())

        try:
            reduction = find_reduction(loss_of, self.n)
        except ProblemError as error:
            raise ProblemError(
                f"mini-batches need a loss that is a mean over examples that do not affect one another: {error}"
            ) from error
        finally:
            self._release(self._problem.w0)
        if reduction == 0:
            raise ProblemError(
                "mini-batches need a loss that is a mean over examples, and this one is a sum, so that the gradient of "
                'a batch would be smaller than that of all examples: take reduction="mean", and a larger lr'
            )

    def _look_at_mean(self) -> None:
        """Check that the examples have equal weights, and that their gradients add up to the gradient."""
        w = self._problem.w0
        value, gradient = self._problem.value_and_grad(w)
        total, summed = w.new_zeros(()), torch.zeros_like(w)
        sizes = [0.0, 0.0]  # sizes of the terms, which may cancel
        for losses, gradients in self.each(w):
            total, summed = total + losses.sum(), summed + gradients.sum(dim=0)
            sizes = [max(a, float(x.abs().max())) for a, x in zip(sizes, (losses, gradients), strict=True)]
        for found, known, size in zip((total, summed), (value, gradient), sizes, strict=True):
            if not self._agree(found / self.n, known, size):
                raise ProblemError(
                    "mini-batches need examples that all count the same, and here the mean over single examples is "
                    f"not the loss or its gradient (loss {float(total) / self.n:.6g} and {float(value):.6g}): weights "
                    "of classes or examples, padding that is left out of a mean, or a model that treats examples "
                    "together. Take them out, or leave batch_size out for the full-batch flow"
                )


class _ChangedLoss:
    """The loss of some examples with one of the problem's changes, the same for every batch."""

    def __init__(self, loss: BatchLoss, change: Change) -> None:
        self._loss, self._change = loss, change

    def __call__(self, pieces: tuple[Tensor, ...], data: Examples) -> Tensor:
        return self._change(self._loss(pieces, data), torch.cat(pieces))


class ExampleProblem(Problem):
    """The mean of a loss over examples, as a function of flat weights.

    >>> import torch, dvi
    >>> x = torch.linspace(-1, 1, 8, dtype=torch.float64)
    >>> def losses(w, x, y):
    ...     return 0.5 * (w[1] * torch.tanh(w[0] * x) - y) ** 2
    >>> problem = dvi.Problem.from_examples(losses, (x, x**2), torch.tensor([0.5, 1.0], dtype=torch.float64))
    >>> problem.mini_batches().n
    8

    Args:
        losses: ``(w [d], *data) -> [n]``, the losses of the given examples; each depends on its own example alone.
        data: a tensor [n, …] or a tuple of them.
        w0: initial weights [d].
        derivatives, max_directions, name: as in :class:`Problem`.

    Raises:
        ProblemError: as for :class:`Problem`, or if the data are not tensors of n examples.
    """

    def __init__(
        self, losses: Callable[..., Tensor], data: Tensor | Sequence[Tensor], w0: Tensor, **options: Any
    ) -> None:
        self._data = own((data,) if isinstance(data, Tensor) else tuple(data))
        refuse_unusable(self._data, "data", w0, any_dtype=True)
        self._mean = _Mean(losses)
        whole = _OfAll(self._mean, self._data)
        options.setdefault("name", getattr(losses, "__name__", None))
        super().__init__(whole, w0, **options)

    def fingerprints(self) -> dict[str, str]:
        """A hash of the contents of the data."""
        return {"data": fingerprint(self._data)}

    def mini_batches(self, max_gib: float = 0.5) -> MiniBatches:
        """The examples, one by one and in batches; ``max_gib`` bounds the memory for their gradients."""
        return MiniBatches(self, _OfSome(self._mean), self._data, max_gib=max_gib)


class _Mean:
    """The mean of a user's losses over some examples."""

    def __init__(self, losses: Callable[..., Tensor]) -> None:
        self._losses = losses

    def __call__(self, w: Tensor, data: Examples) -> Tensor:
        found = self._losses(w, *data)
        if not isinstance(found, Tensor) or found.shape != data[0].shape[:1]:
            shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ProblemError(
                f"losses(w, *data) gives one loss for each of the {len(data[0])} examples, a tensor [n]; got {shape}"
            )
        return found.mean()


class _OfSome:
    """The mean over some examples, as a function of w in one piece."""

    def __init__(self, mean: _Mean) -> None:
        self._mean = mean

    def __call__(self, pieces: tuple[Tensor, ...], data: Examples) -> Tensor:
        return self._mean(pieces[0], data)


class _OfAll:
    """The mean over all examples, a function of w alone."""

    def __init__(self, mean: _Mean, data: Examples) -> None:
        self._mean, self._data = mean, data

    def __call__(self, w: Tensor) -> Tensor:
        return self._mean(w, self._data)


Problem.from_examples = ExampleProblem

__all__ = ["ExampleProblem", "MiniBatches"]
