"""Traces of the derivatives of a spec, which cost no more than their arithmetic.

``torch.func`` differentiates by calling f and P under wrappers.  That takes 0.2 to 2.5 ms a call, whatever the number
of weights; on a small network this is longer than a gradient of the loss.  A derivative that is needed repeatedly is
therefore traced once.  Then its tensor operations are replayed; they are the same ones, so that values do not change.
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

#: Calls before a trace is made.  Tracing takes as long as 25 to 70 calls, and a run makes hundreds.
WARM = 5


class Replay:
    """A function of pytrees of tensors that is traced at its fifth call and replayed from then on.

    The function itself is called if a replay might differ: for shapes, dtypes or devices other than those of the
    trace, and inside a transform of ``torch.func``.  It is never replayed if it cannot be traced (control flow that
    depends on data), or if the trace gives other values at arguments other than those of the trace.

    Args:
        function: takes positional pytrees of tensors and returns one.  Its result may depend on nothing else that
            changes.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self._calls = 0
        self._graph: Callable[..., list[Tensor]] | None = None
        self._signature: Any = None
        self._out: Any = None

    def __call__(self, *args: Any) -> Any:
        """The value of the function, replayed if possible."""
        leaves = self._served(args)
        if leaves is None or self._graph is None:
            return self.function(*args)
        return pytree.tree_unflatten(self._graph(*leaves), self._out)

    def ready(self, *args: Any) -> bool:
        """Can the trace be replayed for these arguments?  This counts as a call."""
        return self._served(args) is not None

    def _served(self, args: tuple[Any, ...]) -> list[Tensor] | None:
        """The leaves of the arguments, or None if the trace does not fit them; the fifth call makes the trace."""
        if self._calls < 0:
            return None
        leaves, spec = pytree.tree_flatten(args)
        # torch has no public way to ask whether a transform wraps a tensor
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
            # forward mode checks shapes by operations whose results are not used; some of them are slow
            graph.graph.eliminate_dead_code()
            graph.recompile()
            same = all(_agree(graph, flat, at) for at in _elsewhere(leaves))
        except Exception as error:  # a user's function may do what a trace does not allow
            logger.debug("%s is not replayed: %s", self.function, error)
            return
        if same:
            self._calls, self._graph = 0, graph


class Replays:
    """The traced derivatives of a method's f and P: functions of (method, pytrees of tensors, …)."""

    def __init__(self, method: Method) -> None:
        self.method = method
        self._known: dict[Any, Replay] = {}

    def __getstate__(self) -> dict[str, Any]:
        """The state without the traces, which are made again when needed."""
        return {"method": self.method, "_known": {}}

    def __call__(self, function: Callable[..., Any], method: Method, *args: Any) -> Any:
        """The value of function(method, *args), replayed if possible."""
        if method is not self.method:  # with schedules, the method is a new object at every time
            return function(method, *args)
        return self._replay(function, function)(*args)

    def each(self, function: Callable[..., Any], method: Method, args: tuple[Any, ...], *batches: Any) -> Any:
        """function(method, *args, *member) for every member of ``batches``, pytrees with a leading dimension."""

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
    """Arguments for the test of a trace: near those it was made with, in reverse order, and with other signs."""
    near: list[Tensor] = away(leaves, torch.Generator().manual_seed(0))
    reverse = [x.flip(tuple(range(x.ndim))) for x in near]
    return [near, reverse, [-x if x.is_floating_point() else x for x in leaves]]


def _agree(graph: Callable[..., list[Tensor]], function: Callable[..., list[Tensor]], at: list[Tensor]) -> bool:
    """Do the graph and the function agree at these arguments up to rounding (their operations may be reordered)?

    The graph is called twice: if a replay wrote into its arguments or into a constant, the second call would differ.
    """
    try:
        expected = function(*at)
    except Exception:  # the function is not defined there
        return True
    return all(_close(a, b) for _ in range(2) for a, b in zip(graph(*at), expected, strict=True))


def _close(a: Tensor, b: Tensor) -> bool:
    rtol = 100 * torch.finfo(a.dtype).eps if a.is_floating_point() else 0.0
    return a.shape == b.shape and torch.allclose(a, b, rtol=rtol, atol=0.0, equal_nan=True)
