"""Transfers the observations of a run to its time grid.

A flow is observed at the nodes of its integrator, which need not be the times that the user asked for.  Values on the
flow are interpolated between nodes, the loss with its slopes.  The contributions of oscillations follow from X, which
may be an average over a step and then belongs to the step's middle.  If momentum oscillates faster than steps are long,
the interpolated loss would be wrong, and could be negative.  There the run evaluates the loss (:func:`doubtful`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dvi.runs.observables import OSCILLATES, Observation
from dvi.solvers.eigen.block_method import CRITICAL
from dvi.solvers.hermite import basis
from dvi.solvers.protocol import Array

_AVERAGED = ("osc_loss", "osc_grad_sq", "trace", "osc_coordinate_grad_sq", "osc_outputs")  # stamped at X_time
_POINTWISE = (
    "grad_sq",
    "effective_lr",
    "coordinate_grad_sq",
    "coordinate_nu",
    "coordinate_w",
    "outputs",
    "loss_rate",
)  # stamped at t

#: A direction whose X is less than this fraction of its X in the next step does not oscillate yet.
ARRIVING = 1e-3
#: A direction that stopped oscillating has left once its eigenvalue is this far below 2,
FELL_OFF = 1e-3
#: or once its X has been zero for this many unit times.
SILENT = 2.0
#: An interpolated loss may leave the range between two nodes by this fraction of the range, too little for a picture,
OUTSIDE = 0.01
#: or by this fraction of the loss, because nodes at rest differ by rounding.
SAME = 1e-9


def on_grid(nodes: list[Observation], grid: Array) -> dict[str, Any]:
    """The observations at the times of ``grid`` (unit times), all of which must lie between the first and last node."""
    t = np.array([node["t"] for node in nodes])
    X_time = np.array([node["X_time"] for node in nodes])
    out: dict[str, Any] = {"loss": _hermite(t, nodes, grid)}
    for time, loss in (pair for node in nodes for pair in node.get("evaluated", ())):
        out["loss"][grid == time] = loss
    for name in _POINTWISE:
        if name in nodes[0]:
            out[name] = _linear(t, [node[name] for node in nodes], grid)
    for name in _AVERAGED:
        if name in nodes[0]:
            out[name] = _linear(X_time, [node[name] for node in nodes], grid)
    out["predicted_loss"] = out["loss"] + out["osc_loss"]
    out["predicted_grad_sq"] = out["grad_sq"] + out["osc_grad_sq"]
    for name in ("coordinate_grad_sq", "outputs"):
        if name in out:
            out["predicted_" + name] = out[name] + out["osc_" + name]
    out |= _measured(nodes, grid)
    if any("next_term" in node for node in nodes):
        out["next_term"] = _where_measured(t, [node.get("next_term", np.nan) for node in nodes], grid)
    out["eigenvalues"] = _eigenvalues(t, [node["eigenvalues"] for node in nodes], grid)
    holder = np.clip(np.searchsorted(t, grid, side="right") - 1, 0, len(t) - 1)
    out["X"] = [nodes[i]["X"] for i in holder]
    return out


def doubtful(before: Observation, after: Observation, times: Array) -> bool:
    """Whether the interpolated loss at ``times`` leaves the range of the losses at the two nodes."""
    loss = _hermite(np.array([before["t"], after["t"]]), [before, after], times)
    low, high = sorted((before["loss"], after["loss"]))
    slack = OUTSIDE * (high - low) + SAME * max(abs(low), abs(high))
    return bool(np.any((loss < low - slack) | (loss > high + slack)))


def breakpoints(nodes: list[Observation]) -> list[tuple[float, str, int]]:
    """The times at which directions start and stop oscillating.

    A direction enters with the step in which its X is positive and its eigenvalue reaches 2.  X is the mean over a
    step.  If it is less than half of the next X, the direction arrived inside the step, and the ratio of the two gives
    the fraction of the step that was left.  A direction leaves with the first step in which its X is zero, once its
    eigenvalue has fallen below 2 or its X has stayed zero for ``SILENT`` unit times.

    Returns:
        a list of (t, "enter" or "leave", number of oscillating directions from then on).
    """
    found: list[tuple[float, str, int]] = []
    largest, k = 0.0, 0
    silent: list[float] = []  # the nodes at which X was zero on a direction whose eigenvalue is still at 2
    spectra = [np.linalg.eigvalsh(node["X"])[::-1] if len(node["X"]) else np.empty(0) for node in nodes]
    following = zip([*nodes[1:], *nodes[-1:]], [*spectra[1:], *spectra[-1:]], strict=True)
    for node, x, (after, x_after) in zip(nodes, spectra, following, strict=True):
        largest = max(largest, float(x.max(initial=0.0)))
        rank = int((x > OSCILLATES * largest).sum()) if largest > 0 else 0
        values = after["eigenvalues"] if len(after["eigenvalues"]) else after.get("foreseen", after["eigenvalues"])
        at_edge = int((values >= CRITICAL - FELL_OFF).sum())
        t = float(node["t"])
        early = rank > k and len(x_after) > k and x[k] < ARRIVING * x_after[k]
        if rank > k and at_edge > k and not early:
            share = float(x[k] / x_after[k]) if len(x_after) > k and x_after[k] > 0 else 1.0
            k, late = min(rank, at_edge), 0.0 if share >= 0.5 else (1 - share) * (float(after["t"]) - t)
            found.append((t + late, "enter", k))
        elif rank < k:
            silent.append(t)
            meant = len(silent) >= 3 and t - silent[0] >= SILENT
            if at_edge < k or meant:
                k = rank if meant else max(rank, at_edge)
                found.append((silent[0], "leave", k))
        if rank >= k:
            silent = []
    return found


def _where_measured(t: Array, values: list[float], grid: Array) -> Array:
    """Values that only a few nodes have, at the nearest times of the grid; NaN elsewhere."""
    out = np.full(len(grid), np.nan)
    for time, value in zip(t, values, strict=True):
        if not np.isnan(value):
            out[np.abs(grid - time).argmin()] = value
    return out


def padded(rows: list[Array]) -> Array:
    """Rows of unequal length as a table [n, m], NaN where they end."""
    table = np.full((len(rows), max((len(row) for row in rows), default=0)), np.nan)
    for row, values in zip(table, rows, strict=True):
        row[: len(values)] = values
    return table


def _place(t: Array, grid: Array) -> tuple[NDArray[np.intp], Array, Array]:
    """For each time of the grid: the node before it, the fraction of the way to the next node, and that distance."""
    i = np.clip(np.searchsorted(t, grid, side="right") - 1, 0, len(t) - 2)
    h = t[i + 1] - t[i]
    return i, np.clip((grid - t[i]) / h, 0.0, 1.0), h


def _linear(t: Array, values: list[Any], grid: Array) -> Array:
    y = np.asarray(values, dtype=np.float64)
    if len(t) == 1:
        return np.repeat(y, len(grid), axis=0)
    i, s, _ = _place(t, grid)
    s = s.reshape(-1, *[1] * (y.ndim - 1))
    out: Array = np.where(s == 0, y[i], np.where(s == 1, y[i + 1], (1 - s) * y[i] + s * y[i + 1]))
    return out


def _measured(nodes: list[Observation], grid: Array) -> dict[str, Array]:
    """The measurements, linearly interpolated; NaN before the first and after the last."""
    out = {}
    for name in sorted({name for node in nodes for name in node.get("measured", {})}):
        known = [(node["t"], node["measured"][name]) for node in nodes if name in node.get("measured", {})]
        t, values = np.array(known).T
        out[name] = np.interp(grid, t, values, left=np.nan, right=np.nan)
    return out


def _hermite(t: Array, nodes: list[Observation], grid: Array) -> Array:
    """Cubic interpolation of the loss from its values and slopes."""
    y, dy = (np.array([node[name] for node in nodes]) for name in ("loss", "loss_rate"))
    if len(t) == 1:
        return np.full(len(grid), y[0])
    i, s, h = _place(t, grid)
    a, da, b, db = basis(s, h)
    value = a * y[i] + da * dy[i] + b * y[i + 1] + db * dy[i + 1]
    return np.where(s == 0, y[i], np.where(s == 1, y[i + 1], value))


def _eigenvalues(t: Array, rows: list[Array], grid: Array) -> Array:
    """Eigenvalues [len(grid), m], linear between neighbouring nodes that both have the value, and NaN elsewhere."""
    looked = np.array([len(row) > 0 for row in rows])
    t, table = t[looked], padded(rows)[looked]
    out = np.full((len(grid), table.shape[1]), np.nan)
    for j in range(table.shape[1]):
        known = np.isfinite(table[:, j])
        if known.any():
            column = np.interp(grid, t[known], table[known, j], left=np.nan, right=np.nan)
            nearest = np.clip(np.searchsorted(t, grid, side="right") - 1, 0, len(t) - 1)
            after = np.minimum(nearest + 1, len(t) - 1)
            exact = t[nearest] == grid
            inside = known[nearest] & (known[after] | exact)
            out[:, j] = np.where(inside, column, np.nan)
    return out
