"""What stands in the way of pickling, in words.

A pickle holds functions and classes by name only, so that a lambda, or what was defined inside a function, is out of
its reach, and its own message does not say what to do.  (The same as in
:mod:`dvi.problems.pickling`: the floors do not import one another.)
"""

from __future__ import annotations

import pickle
import sys
from collections.abc import Mapping
from typing import Any

#: Modules that copy, or that pickle functions by value: there a lambda is no obstacle.
_BY_VALUE = {"copy", "cloudpickle", "dill"}


def refuse_nameless(owner: str, parts: Mapping[str, Any]) -> None:
    """Refuse to pickle ``owner`` if one of its functions, classes or objects cannot be found by name.

    Raises:
        pickle.PicklingError: naming it, and what to do.
    """
    for what, part in parts.items():
        for thing in (part, getattr(part, "func", None), getattr(part, "__self__", None)):
            named: Any = thing if hasattr(thing, "__qualname__") else type(thing)
            if "<" in named.__qualname__ and not _by_value():
                raise pickle.PicklingError(
                    f"{owner} cannot be pickled, as another process would need: {what} is {named.__module__}."
                    f"{named.__qualname__}, which has no name that it could be found by there. Define it at the top "
                    "level of a module (a function by def; a class whose fields hold what a closure would), or make "
                    f"{owner} inside the other process."
                )


def _by_value() -> bool:
    """Is something at work that does not need names?  Picklers do not say; their modules are on the stack."""
    frame = sys._getframe(2)
    while frame is not None:
        if not _BY_VALUE.isdisjoint(frame.f_globals.get("__name__", "").split(".")):
            return True
        if frame.f_back is None:
            return False
        frame = frame.f_back
