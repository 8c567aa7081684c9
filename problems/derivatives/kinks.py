"""Kinks (ReLU, max-pool, abs, clamp, hinge …): a loss made of smooth pieces is examined one piece at a time.

Decisions determine the piece on which the weights lie: which entries are positive, which of them is the largest.  The
decisions at w are recorded, and applied again wherever else the loss is evaluated.  So the piece at w continues
smoothly past its border, and differences of it distinguish right derivatives from wrong ones.  Differences of the loss
itself cannot do that: the loss of a network on a few hundred examples has a kink every thousandth of a step.

Decisions are recorded below autograd, in the forward and in the backward pass.  They are comparisons, signs, roundings,
and indices of largest entries.  A piecewise function that is one kernel is first decomposed into these.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._decomp import decomposition_table
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dvi.problems.derivatives.protocol import Part, value_and_gradient

aten = torch.ops.aten

# The relative difference allowed between two ways to compute the same value.  Some kernels of torch have constants in
# single precision for every dtype (hardsigmoid: 1/6), which gives 3e-8.
SAME = {torch.float64: 1e-6, torch.float32: 1e-3}


KINKS = (
    "the loss has kinks (ReLU, max, abs, …), where its gradient or its Hessian jumps. Its derivatives are right "
    "between kinks, but do not contain the jumps: a flow may be inaccurate where it crosses many kinks, and may stall "
    "at one. If they are ReLUs, dvi.problems.smoothed(model, beta=20) gives a copy of the model without them."
)


class Undecided(RuntimeError):
    """The loss cannot be continued past its kinks: it does not make the same decisions everywhere."""


class Piece:
    """The smooth piece of a sum of parts that contains w, continued past its border.

    Args:
        parts: the loss, as in :class:`~dvi.problems.problem.Problem`.
        w: weights [d] on the piece.

    Attributes:
        only: True if the loss makes no decisions, and so has only this piece.

    Raises:
        Undecided: if recording the decisions changes the loss.

    """

    def __init__(self, parts: Sequence[Part], w: Tensor) -> None:
        self._parts = parts
        self._answers: list[Tensor] = []
        recorded = self._evaluate(w, replay=False)
        self.only = not self._answers
        if not self.only:
            there = value_and_gradient(parts, w)
            for seen in (recorded, self(w)):
                if not all(_near(x, y) for x, y in zip(seen, there, strict=True)):
                    raise Undecided("the loss has another value when its operations are recorded")

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Loss [] and gradient [d] of the piece at x [d].

        Raises:
            Undecided: if the loss makes other decisions at x than at w.

        """
        return self._evaluate(x, replay=True)

    def ends_before(self, x: Tensor) -> bool:
        """True if there is a kink between w and x: the gradients of the piece and of the loss differ at x.

        Raises:
            Undecided: see :meth:`__call__`.

        """
        return not _near(self(x)[1], value_and_gradient(self._parts, x)[1])

    def _evaluate(self, x: Tensor, replay: bool) -> tuple[Tensor, Tensor]:
        mode = _Decisions(self._answers, replay)
        try:
            with mode:
                result = value_and_gradient(self._parts, x)
        except Undecided:
            raise
        except Exception as error:  # the user's loss, which was not written to be recorded
            raise Undecided(f"the loss fails when its operations are recorded: {error}") from error
        if replay and mode.asked != len(self._answers):
            raise Undecided("the loss makes fewer decisions at other weights")
        return result


def kinks_between(parts: Sequence[Part], w: Tensor, x: Tensor) -> bool:
    """True if the loss has a kink between w and x [d].  A kink that is crossed there and back is not found."""
    try:
        piece = Piece(parts, w)
        return not piece.only and piece.ends_before(x)
    except Undecided:
        return False


def tell_of_kinks(name: str) -> None:
    """Warn through the logger "dvi" that the loss of this name has kinks."""
    logging.getLogger("dvi").warning("%s: %s", name, KINKS)


def _near(a: Tensor, b: Tensor) -> bool:
    """True if both are the same up to rounding; a value that is not finite equals anything."""
    if not bool(torch.isfinite(b).all()):
        return True
    size = float(torch.linalg.vector_norm(b))
    return float(torch.linalg.vector_norm(a - b)) <= SAME[b.dtype] * size


class _Decisions(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the results of all decisions in their order, or replays them."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled; torch's own answer would import the compiler, which takes three seconds

    def __init__(self, answers: list[Tensor], replay: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._answers, self._replay = answers, replay
        self.asked = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if not any(isinstance(x, Tensor) and x.is_floating_point() for x in tree_leaves((args, kwargs))):
            return func(*args, **kwargs)  # not a decision about weights
        name = func._schema.name.removeprefix("aten::")
        if name in _QUESTIONS:
            return self._decide(lambda: func(*args, **kwargs))
        if name in _BY_INDEX and len(func._schema.returns) == 2:
            indices = self._decide(lambda: func(*args, **kwargs)[1])
            return _pick(func, indices, *args, **kwargs), indices
        if name in _COMPOSITIONS:
            return _COMPOSITIONS[name](self._decide, *args, **kwargs)
        with self:  # the operations inside a kernel make decisions, too
            if name in _DECOMPOSED and func in decomposition_table:
                return decomposition_table[func](*args, **kwargs)
            if name.endswith("_") and (name[:-1] in _DECOMPOSED or name[:-1] in _COMPOSITIONS):
                return args[0].copy_(getattr(aten, name[:-1])(*args, **kwargs))
        return func(*args, **kwargs)

    def _decide(self, ask: Callable[[], Tensor]) -> Tensor:
        if not self._replay:
            self._answers.append(ask())
        elif self.asked == len(self._answers):
            raise Undecided("the loss makes more decisions at other weights")
        answer = self._answers[self.asked]
        self.asked += 1
        return answer.clone()


_QUESTIONS = frozenset(
    [
        "lt",
        "le",
        "gt",
        "ge",
        "eq",
        "ne",
        "sgn",
        "sign",
        "signbit",
        "heaviside",
        "floor",
        "ceil",
        "round",
        "trunc",
        "argmax",
        "argmin",
        "argsort",
        "bucketize",
        "searchsorted",
    ]
)

# Kernels that take the largest entry of a window, with the number of dimensions.
_WINDOWS = {
    "max_pool2d_with_indices": 2,
    "max_pool3d_with_indices": 3,
    "adaptive_max_pool2d": 2,
    "adaptive_max_pool3d": 3,
    "fractional_max_pool2d": 2,
    "fractional_max_pool3d": 3,
}

# Kernels that return entries and their indices.
_BY_INDEX = frozenset(
    [*_WINDOWS, *["max", "min", "median", "nanmedian", "kthvalue", "mode", "sort", "topk", "cummax", "cummin"]]
)

# Kernels made of pieces that torch itself can decompose.  Its public table, ``torch.export.default_decompositions``,
# lacks clamp, elu, hardtanh, leaky_relu and relu.
_DECOMPOSED = frozenset(
    [
        "relu",
        "threshold",
        "threshold_backward",
        "leaky_relu",
        "leaky_relu_backward",
        "hardtanh",
        "hardtanh_backward",
        "elu",
        "elu_backward",
        "hardswish",
        "hardswish_backward",
        "hardsigmoid",
        "hardsigmoid_backward",
        "huber_loss",
        "huber_loss_backward",
        "smooth_l1_loss",
        "smooth_l1_loss_backward",
        "softshrink",
        "hardshrink",
        "clamp",
        "clamp_min",
        "clamp_max",
        "_prelu_kernel",
        "_prelu_kernel_backward",
        "celu",
        "selu",
        "relu6",
    ]
)


def _pick(func: Any, indices: Tensor, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The entries of ``input`` at the indices that ``func`` gives."""
    windows = _WINDOWS.get(func._schema.name.removeprefix("aten::"))
    if windows:
        return input.flatten(-windows).gather(-1, indices.flatten(-windows)).view_as(indices)
    if input.ndim == 0:
        return input.clone()
    names = [argument.name for argument in func._schema.arguments]
    dim: int = {**dict(zip(names[1:], args, strict=False)), **kwargs}.get("dim", -1)
    if indices.ndim < input.ndim:
        return input.gather(dim, indices.unsqueeze(dim)).squeeze(dim)
    return input.gather(dim, indices)


Decide = Callable[[Callable[[], Tensor]], Tensor]

# Each has the arguments of the kernel that it replaces.


def _abs(decide: Decide, input: Tensor) -> Tensor:
    return input * decide(lambda: torch.sgn(input))


def _mean_of_chosen(input: Tensor, chosen: Tensor, dims: list[int], keepdim: bool) -> Tensor:
    """The mean of entries that were all equal when they were chosen."""
    total = torch.where(chosen, input, 0.0).sum(dims, keepdim=keepdim)
    return total / chosen.sum(dims, keepdim=keepdim)


def _extreme(kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def composed(decide: Decide, input: Tensor, dim: Any = (), keepdim: bool = False) -> Tensor:
        dims = list(dim) or list(range(input.ndim))
        return _mean_of_chosen(input, decide(lambda: input == kernel(input, dims, keepdim=True)), dims, keepdim)

    return composed


def _middle(decide: Decide, input: Tensor) -> Tensor:
    return _mean_of_chosen(input, decide(lambda: input == input.median()), list(range(input.ndim)), False)


def _larger(decide: Decide, input: Tensor, other: Tensor) -> Tensor:
    return torch.where(decide(lambda: input >= other), input, other)


def _smaller(decide: Decide, input: Tensor, other: Tensor) -> Tensor:
    return torch.where(decide(lambda: input <= other), input, other)


def _norm(
    decide: Decide, input: Tensor, ord: float = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> Tensor:
    dims = list(range(input.ndim)) if dim is None else dim
    if ord == 1:
        return _abs(decide, input).sum(dims, keepdim=keepdim, dtype=dtype)
    if math.isinf(ord):
        sizes = _abs(decide, input)
        return _extreme(torch.amax if ord > 0 else torch.amin)(decide, sizes, dims, keepdim)
    norm: Tensor = torch.linalg.vector_norm(input, ord, dim, keepdim, dtype=dtype)
    return norm


def _rrelu(decide: Decide, input: Tensor, noise: Tensor, lower: float = 1 / 8, upper: float = 1 / 3, *_: Any) -> Tensor:
    return input * torch.where(decide(lambda: input > 0), 1.0, (lower + upper) / 2)


def _rrelu_backward(
    decide: Decide, grad: Tensor, input: Tensor, noise: Tensor, lower: float, upper: float, *_: Any
) -> Tensor:
    return grad * torch.where(decide(lambda: input > 0), 1.0, (lower + upper) / 2)


def _shrink_backward(decide: Decide, grad: Tensor, input: Tensor, lambd: float) -> Tensor:
    return grad * decide(lambda: input.abs() > lambd)


_COMPOSITIONS: Mapping[str, Callable[..., Tensor]] = {
    "abs": _abs,
    "amax": _extreme(torch.amax),
    "amin": _extreme(torch.amin),
    "max": _extreme(torch.amax),
    "min": _extreme(torch.amin),
    "median": _middle,
    "maximum": _larger,
    "minimum": _smaller,
    "fmax": _larger,
    "fmin": _smaller,
    "linalg_vector_norm": _norm,
    "rrelu_with_noise": _rrelu,
    "rrelu_with_noise_backward": _rrelu_backward,
    "softshrink_backward": _shrink_backward,
    "hardshrink_backward": _shrink_backward,
}
