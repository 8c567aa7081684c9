"""Inspects a loss when the problem is made: its graph, and the operations of one evaluation.

Derivatives are taken with respect to w alone.  So some losses would silently be differentiated wrongly: those that
depend on other trained tensors, that round to a lower precision on the way, or that have operations whose "gradients"
are not gradients.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from dvi.problems.errors import ProblemError

#: Functions that use only the shape, dtype and device of a tensor.
_SHAPE_ONLY = {"zeros_like", "ones_like", "empty_like", "full_like", "new_zeros", "new_ones", "new_empty", "new_full"}

_NO_GRADIENT = "None of the inputs have requires_grad=True"  # torch's own words, of a checkpoint that loses gradients


class Watcher(TorchFunctionMode):
    """Observes the operations of one evaluation of a loss.

    Args:
        w0: the weights [d].
        foreign: tensors of the user's own module, as {identity: description}.  They are its parameters, which train but
            are not w, and the tensors that its forward pass has stored on it.
        stale: tensors that the copy of the module has from an earlier forward pass, in the same form.
        stack: descriptions of the modules whose forward passes are running
            (:meth:`~dvi.problems.modules.flat_model.FlatModel.traced`).

    Raises:
        ProblemError: at the operation at fault.

    """

    def __init__(
        self,
        w0: Tensor,
        foreign: Mapping[int, str] | None = None,
        stale: Mapping[int, tuple[Tensor, str]] | None = None,
        stack: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self._dtype = w0.dtype
        self._foreign, self._stale = foreign or {}, stale or {}
        self._stack = stack

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Carry out one operation and inspect it."""
        kwargs = kwargs or {}
        if func in (F.embedding, F.embedding_bag):
            self._look_at_embedding(func, args, kwargs)
        out = func(*args, **kwargs)
        made = [x for x in pytree.tree_leaves(out) if isinstance(x, Tensor)]
        if made and (self._foreign or self._stale) and func.__name__ not in _SHAPE_ONLY:
            for x in pytree.tree_leaves((args, kwargs)):
                if id(x) in self._foreign:
                    raise ProblemError(self._past_w(self._foreign[id(x)]))
                if id(x) in self._stale:
                    raise ProblemError(
                        f"{self._where()} uses {self._stale[id(x)][1]}, which was computed from earlier weights: "
                        "a cache. Switch it off, or empty it before you pass the model"
                    )
        for x in made:
            if x.is_floating_point() and x.requires_grad and _coarser(x.dtype, self._dtype):
                self._refuse_island(func, x.dtype)
        return out

    def _past_w(self, what: str) -> str:
        if not self._stack:
            return past_w(what)
        return (
            f"{self._where()} reads {what} of your module instead of its copy, past w: it calls a function that refers "
            "to your module by name (a lambda, a closure, a replaced forward). Make it a method: def forward(self, x)"
        )

    def _where(self) -> str:
        return self._stack[-1] if self._stack else "the loss"

    def _look_at_embedding(self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        called = inspect.signature(func).bind(*args, **kwargs)
        called.apply_defaults()
        options = called.arguments
        if options.get("max_norm") is not None:
            raise ProblemError(
                f"{self._where()} has max_norm={options['max_norm']}: it rescales its weights in place at every "
                "forward pass, so the loss is not a function of them. Set max_norm=None"
            )
        if options.get("scale_grad_by_freq"):
            raise ProblemError(
                f"{self._where()} has scale_grad_by_freq=True: its result is not the gradient of the loss. "
                "Set scale_grad_by_freq=False"
            )
        if options.get("sparse"):
            raise ProblemError(f"{self._where()} asks for sparse gradients: set sparse=False, the values are the same")

    def _refuse_island(self, func: Callable[..., Any], dtype: torch.dtype) -> None:
        if torch.is_autocast_enabled(torch.get_default_device().type) or dtype in (torch.float16, torch.bfloat16):
            cause, remedy = "under autocast, or by a cast", "Leave autocast out and cast to w's dtype only"
        else:
            cause, remedy = (
                "by a cast",
                (
                    "Take everything in that precision (model.float(), data.float()), or let the module keep the dtype "
                    "of its inputs"
                ),
            )
        raise ProblemError(
            f"{self._where()} computes in {dtype} {cause} ({func.__name__}), while the weights are {self._dtype}: "
            f"derivatives would silently have the lower precision. {remedy}"
        )


def past_w(what: str) -> str:
    """Return the error for a loss that depends on something trained besides w, with a remedy."""
    return (
        f"the loss depends on {what}, past w: it does not move with w, and the gradient leaves it out. "
        "For a penalty on a model's parameters use penalty= (a function of the parameters by name) or weight_decay= of "
        "from_module. Put parameters of a criterion into one module with the model, whose forward returns the loss "
        "(criterion=None). Pass fixed tensors as tensor.detach(), or set requires_grad_(False)"
    )


def other_leaves(value: Tensor, w: Tensor) -> list[Tensor]:
    """Return the leaves of the graph of ``value`` [] other than w [d].

    Raises:
        ProblemError: if reentrant checkpointing computes a part of the graph, since it allows no such derivatives.

    """
    found: dict[int, Tensor] = {}
    seen: set[Any] = set()
    waiting = [value.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == "CheckpointFunctionBackward":
            raise ProblemError(REENTRANT)
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, Tensor) and leaf is not w:
            found[id(leaf)] = leaf
        waiting.extend(following for following, _ in node.next_functions)
    return list(found.values())


REENTRANT = (
    "the loss uses activation checkpointing with use_reentrant=True, which loses gradients or allows first "
    "derivatives only: take use_reentrant=False, or switch checkpointing off "
    "(of transformers: model.gradient_checkpointing_disable())"
)


@contextmanager
def attentive() -> Iterator[None]:
    """In this context, torch's warning that a checkpoint loses gradients is an error; other warnings are unchanged."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for warning in caught:
        if _NO_GRADIENT in str(warning.message):
            raise ProblemError(REENTRANT)
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


@contextmanager
def unwritten(w: Tensor) -> Iterator[None]:
    """A context for evaluating a loss, which must not write into its weights w [d].

    Raises:
        ProblemError: if it does.

    """
    before = w.detach().clone()
    remedy = "the loss writes into its weights: let it work on a copy (w.clone()), or use operations without a final _"
    try:
        yield
    except RuntimeError as error:
        if "in-place operation" in str(error):
            raise ProblemError(f"{remedy} ({error})") from error
        raise
    if not torch.equal(before, w.detach()):
        raise ProblemError(remedy)


def _coarser(dtype: torch.dtype, than: torch.dtype) -> bool:
    return torch.finfo(dtype).eps > torch.finfo(than).eps
