"""Derivatives of a spec at the price of their arithmetic.

``torch.func`` differentiates by calling f and P under wrappers.  That takes 0.2 to 2.5 ms a call whatever the number of
weights, on a small network longer than a gradient of the loss.  A derivative that is asked for again and again is
therefore traced once, and its plain tensor operations are replayed: the same ones, so that values do not change.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from dvi.compiler.jacobian_structure import away
from dvi.methods import Method

logger = logging.getLogger("dvi")

#: Calls before a trace is made.  It takes as long as 25 to 70 calls, and a run makes hundreds.
WARM = 5


class Replay:
    """A function of pytrees of tensors, traced at its fifth call and replayed from then on.

    It is called as it is wherever a replay might not be the same: for shapes, dtypes or devices other than those of
    the trace, inside a transform of ``torch.func``, and for good if it cannot be traced (control flow that depends on
    data) or if, at arguments that are not those of the trace, the trace gives something else.

    Args:
        function: of positional pytrees of tensors; a pytree of tensors comes back.  It reads nothing else that changes.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self._calls = 0
        self._graph: Callable[..., list[Tensor]] | None = None
        self._signature: Any = None
        self._out: Any = None

    def __call__(self, *args: Any) -> Any:
        """What the function gives."""
        leaves = self._served(args)
        if leaves is None or self._graph is None:
            return self.function(*args)
        return pytree.tree_unflatten(self._graph(*leaves), self._out)

    def ready(self, *args: Any) -> bool:
        """Are these arguments served from the trace?  Counts as a call."""
        return self._served(args) is not None

    def _served(self, args: tuple[Any, ...]) -> list[Tensor] | None:
        """The leaves of arguments that are served from the trace, which is made when it is time; None of others."""
        if self._calls < 0:
            return None
        leaves, spec = pytree.tree_flatten(args)
        if any(torch._C._functorch.is_functorch_wrapped_tensor(x) for x in leaves):
            return None
        signature = spec, [(x.shape, x.stride(), x.dtype, x.device) for x in leaves]
        if self._graph is None:
            self._calls += 1
            if self._calls == WARM:
                self._trace(leaves, spec)
                self._signature = signature
        return leaves if self._graph is not None and signature == self._signature else None

    def _trace(self, leaves: list[Tensor], spec: pytree.TreeSpec) -> None:
        def flat(*leaves: Tensor) -> list[Tensor]:
            out, self._out = pytree.tree_flatten(self.function(*pytree.tree_unflatten(leaves, spec)))
            return out

        self._calls = -1
        try:
            graph = make_fx(flat)(*leaves)
            # forward-mode checks shapes by operations whose results nobody uses, some of them slow
            graph.graph.eliminate_dead_code()
            graph.recompile()
            same = all(_agree(graph, flat, at) for at in _elsewhere(leaves))
        except Exception as error:  # whatever a user's function does that a trace does not allow
            logger.debug("%s is not replayed: %s", self.function, error)
            return
        if same:
            self._calls, self._graph = 0, graph


class Replays:
    """The derivatives of a method's f and P that are replayed: functions of (method, pytrees of tensors, …)."""

    def __init__(self, method: Method) -> None:
        self.method = method
        self._known: dict[Any, Replay] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Without the traces, which are made again."""
        return {"method": self.method, "_known": {}}

    def __call__(self, function: Callable[..., Any], method: Method, *args: Any) -> Any:
        """function(method, *args)."""
        if method is not self.method:  # with schedules it is another one at every moment
            return function(method, *args)
        return self._replay(function, function)(*args)

    def each(self, function: Callable[..., Any], method: Method, args: tuple[Any, ...], *batches: Any) -> Any:
        """function(method, *args, *member) for every member of batches, pytrees with a leading dimension."""

        def all_of_them(method: Method, args: tuple[Any, ...], batches: tuple[Any, ...]) -> Any:
            return vmap(lambda *member: function(method, *args, *member))(*batches)

        if method is not self.method:
            return all_of_them(method, args, batches)
        number = len(pytree.tree_leaves(batches)[0])
        return self._replay(all_of_them, (function, number))(args, batches)

    def _replay(self, function: Callable[..., Any], key: Any) -> Replay:
        if key not in self._known:
            self._known[key] = Replay(lambda *args: function(self.method, *args))
        return self._known[key]


def _elsewhere(leaves: list[Tensor]) -> list[list[Tensor]]:
    """Arguments at which a trace must hold: near those it was taken at, in another order, with other signs."""
    near: list[Tensor] = away(leaves, torch.Generator().manual_seed(0))
    reverse = [x.flip(tuple(range(x.ndim))) for x in near]
    return [near, reverse, [-x if x.is_floating_point() else x for x in leaves]]


def _agree(graph: Callable[..., list[Tensor]], function: Callable[..., list[Tensor]], at: list[Tensor]) -> bool:
    """Do both give the same there, but for rounding (the operations are the same, their order may not be)?

    The graph is asked twice: a replay that wrote into its arguments or into a constant would differ from the first.
    """
    try:
        expected = function(*at)
    except Exception:  # the function does not go there
        return True
    return all(_close(a, b) for _ in range(2) for a, b in zip(graph(*at), expected, strict=True))


def _close(a: Tensor, b: Tensor) -> bool:
    rtol = 100 * torch.finfo(a.dtype).eps if a.is_floating_point() else 0.0
    return a.shape == b.shape and torch.allclose(a, b, rtol=rtol, atol=0.0, equal_nan=True)
