"""Observations of a run, put on its time grid.

A flow is observed at the nodes of its integrator, which need not be the moments the user asked for.  Values on the flow
are interpolated between nodes (the loss by its slope, too); what oscillations add is read from X, which an integrator
may give as an average over a step, stamped at the step's middle.  Where a momentum's swings are shorter than a step,
the interpolated loss would be wrong, and even negative: there the run evaluates the loss (:func:`doubtful`).
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

#: It does not yet where it is given this part of what it is given in the next step: it arrives at the end of this one.
ARRIVING = 1e-3
#: A direction that no longer oscillates has left once its eigenvalue is this far below 2.
FELL_OFF = 1e-3
#: … or once X has been zero on it for so many unit times.
SILENT = 2.0
#: An interpolated loss may leave the range between two nodes by this part of it: no picture shows less.
OUTSIDE = 0.01
#: … or by this part of the loss: at rest, nodes differ by rounding.
SAME = 1e-9


def on_grid(nodes: list[Observation], grid: Array) -> dict[str, Any]:
    """The observations at the times of ``grid``, all of which lie within the nodes' span."""
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
    """Whether the loss that is interpolated between two nodes leaves the range of the losses there."""
    loss = _hermite(np.array([before["t"], after["t"]]), [before, after], times)
    low, high = sorted((before["loss"], after["loss"]))
    slack = OUTSIDE * (high - low) + SAME * max(abs(low), abs(high))
    return bool(np.any((loss < low - slack) | (loss > high + slack)))


def breakpoints(nodes: list[Observation]) -> list[tuple[float, str, int]]:
    """When directions start and stop to oscillate: (t, "enter" | "leave", how many oscillate from then on).

    A direction enters with the step that gives it a positive X and brings its eigenvalue to 2; where that X is less
    than half of the next one, the direction arrived within the step, as long before its end as that share of it (X is
    the mean over a step).  It leaves with the step from which on it is given none, once its eigenvalue has fallen off
    2, or X has been silent long enough to mean it.
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
    """Values that few nodes have, at the times of the grid next to them; NaN elsewhere."""
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
    """For each time of the grid: the node before it, the part of the way to the next one, and how long that is."""
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
    """What was measured now and then, linear in between; NaN before the first and after the last time."""
    out = {}
    for name in sorted({name for node in nodes for name in node.get("measured", {})}):
        known = [(node["t"], node["measured"][name]) for node in nodes if name in node.get("measured", {})]
        t, values = np.array(known).T
        out[name] = np.interp(grid, t, values, left=np.nan, right=np.nan)
    return out


def _hermite(t: Array, nodes: list[Observation], grid: Array) -> Array:
    """Cubic interpolation of the loss by its values and slopes."""
    y, dy = (np.array([node[name] for node in nodes]) for name in ("loss", "loss_rate"))
    if len(t) == 1:
        return np.full(len(grid), y[0])
    i, s, h = _place(t, grid)
    a, da, b, db = basis(s, h)
    value = a * y[i] + da * dy[i] + b * y[i + 1] + db * dy[i + 1]
    return np.where(s == 0, y[i], np.where(s == 1, y[i + 1], value))


def _eigenvalues(t: Array, rows: list[Array], grid: Array) -> Array:
    """[len(grid), m], NaN where fewer were followed; linear between neighbouring looks that both have the value."""
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
