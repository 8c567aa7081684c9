"""Finds the line in which a function does something with tensors that torch cannot differentiate."""

from __future__ import annotations

import linecache
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_NUMBER = "a number has no derivative. Keep it a tensor (g.norm()**2 in place of g.norm().item()**2)"
_CUT = "it removes the derivative. Leave it out"
_NUMPY = "NumPy is not differentiated. Use the torch function of that name"
_OFF = "it switches differentiation off. Leave it out"
_PLACE = "it changes a tensor in place. Make a new one (y = y * x in place of y *= x)"
_OWN = "its jvp or its backward is wrong. Compare them with torch.autograd.gradcheck(…, check_forward_ad=True)"
_IF = "a branch has no derivative in the numbers of its condition. Use torch.where(condition, a, b)"

#: Operations that are not differentiated: (name, why it is wrong and the remedy); the most likely cause first.
_KNOWN: dict[Any, tuple[str, str]] = {
    Tensor.item: (".item()", _NUMBER),
    Tensor.__float__: ("float(…)", _NUMBER),
    Tensor.__int__: ("int(…)", _NUMBER),
    Tensor.tolist: (".tolist()", _NUMBER),
    torch.tensor: ("torch.tensor(…) of a tensor", _CUT),
    Tensor.numpy: (".numpy()", _NUMPY),
    Tensor.__array__: ("NumPy", _NUMPY),
    Tensor.detach: (".detach()", _CUT),
    Tensor.data.__get__: (".data", _CUT),  # type: ignore[attr-defined]
    Tensor.__bool__: ("an if", _IF),
}

_ELSE = (
    "f and P must be made of torch operations on ν, g and hyperparameters: no .item(), float(…), .detach(), .data, "
    "NumPy, torch.no_grad() or changes in place. A torch.autograd.Function needs the right jvp and backward, and vmap."
)


def likely_cause(call: Callable[[], Any], error: Exception | None = None) -> str:
    """The likely reason why a call cannot be differentiated: the operation, its line, and the remedy, in words.

    Args:
        call: runs the function once.
        error: the exception that its differentiation raised, if any.
    """
    said = str(error or "")
    if "autograd.Function" in said or "vmap over" in said:
        return (
            "Likely cause: a torch.autograd.Function without forward derivatives. Write forward(…) and "
            "setup_context(ctx, …), a jvp(ctx, …), and generate_vmap_rule = True; or use plain torch operations."
        )
    watch = _Watch()
    try:
        with watch:
            call()
    except Exception:  # only what the call does before it fails matters
        pass
    if not watch.seen:
        return _ELSE
    rank = [*dict.fromkeys([*_KNOWN, "off", "place", "function"])]
    what, why, where = min(watch.seen, key=lambda seen: rank.index(seen[0]))[1:]
    return f"Likely cause: {what}{where}: {why}."


class _Watch(TorchFunctionMode):
    """Records calls that cannot be differentiated."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Any, str, str, str]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Carry out one call, and record it."""
        name = getattr(func, "__name__", "")
        if func in _KNOWN and any(isinstance(x, Tensor) for x in args):
            self._note(func, *_KNOWN[func])
        elif _in_function():
            self._note("function", "a torch.autograd.Function", _OWN)
        elif not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
            self._note("off", "torch.no_grad() or its like", _OFF)
        elif (name.endswith("_") and not name.endswith("__")) or (name.startswith("__i") and name != "__invert__"):
            self._note("place", f"{name.strip('_')}, in place", _PLACE)
        return func(*args, **(kwargs or {}))

    def _note(self, key: Any, what: str, why: str) -> None:
        self.seen.append((key, what, why, _line()))


def _in_function() -> bool:
    """Is the forward pass of a torch.autograd.Function running?"""
    frame: Any = sys._getframe(2)
    while frame is not None and not frame.f_code.co_filename.endswith(os.path.join("autograd", "function.py")):
        frame = frame.f_back
    return frame is not None


def _line() -> str:
    """The innermost running line outside torch and this file, in words."""
    frame: Any = sys._getframe(2)
    while frame is not None:
        path = frame.f_code.co_filename
        if path != __file__ and f"{os.sep}torch{os.sep}" not in path:
            text = linecache.getline(path, frame.f_lineno).strip()
            quoted = f" ({text})" if text else ""
            return f" in line {frame.f_lineno} of {os.path.basename(path)}{quoted}"
        frame = frame.f_back
    return ""


__all__ = ["likely_cause"]
