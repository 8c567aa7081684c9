"""Finds the differences between the run that wrote a file and a run that would continue from it."""

from __future__ import annotations

import re
from typing import Any

import numpy as np


def difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    """The differences between two runs, with both values; "" if there are none.  The number of steps does not count."""
    a, b = before["words"], now["words"]
    found = [
        f"{name} differs: {_shown(a.get(name))} in the file, {_shown(b.get(name))} now"
        for name in sorted({*a, *b} - {"steps"})
        if a.get(name) != b.get(name)
    ]
    for name in sorted(before["numbers"].keys() & now["numbers"].keys()):
        x, y = before["numbers"][name], now["numbers"][name]
        if len(x) == len(y) == 1:
            if x[0] != y[0]:
                found.append(f"{name} differs: {x[0]:.6g} in the file, {y[0]:.6g} now")
            continue
        common, i, j = np.intersect1d(before["times"], now["times"], return_indices=True)
        x, y = (values[at] if len(values) > 1 else np.full(len(common), values[0]) for values, at in ((x, i), (y, j)))
        wrong = np.flatnonzero(~np.isclose(x, y, rtol=1e-12, atol=0.0, equal_nan=True))
        if len(wrong):
            at = wrong[0]
            found.append(
                f"the schedule of {name} differs at t = {common[at]:g}: {x[at]:.6g} in the file, {y[at]:.6g} now"
            )
    if not found:  # a difference above would also show here
        tol = 1e-6 if "float64" in str(b.get("dtype")) else 1e-3  # rounding depends on device and threads
        for name, what in (("loss", "the loss near the start"), ("method", "what the method makes of a gradient")):
            x, y = before[name], now[name]
            size = tol * np.nan_to_num(np.abs(x)).max(axis=1, keepdims=True)  # by row, because a product may cancel
            apart = np.argwhere(np.abs(x - y) > size)  # values that either side could not compute (NaN) do not count
            if len(apart):
                row, column = apart[0]
                found.append(f"{what} differs: {x[row, column]:.9g} in the file, {y[row, column]:.9g} now")
    return "; ".join(found)


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{value[:12]}…" if isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) else text
