"""The numbers of a report, computed from the runs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch.utils import _pytree as pytree

from dvi.reports.report import AT_EDGE, Report
from dvi.results.solution import Solution
from dvi.solvers.protocol import Array

#: Runs that do not predict the optimizer's average.
_OTHERS = ("discrete", "stable", "ablated")

Distances = Mapping[tuple[str, str], Array]


def report_of(
    runs: Mapping[str, Solution],
    distance: Distances | None = None,
    t: Array | None = None,
    about: Mapping[str, Any] | None = None,
    notes: tuple[str, ...] = (),
) -> Report:
    """The report of runs from one start.

    Args:
        runs: solutions by name, as in a :class:`dvi.Comparison`.
        distance: by pair of names, on the grid ``t`` [n].
        about: the description of the comparison: method and problem.
        notes: the notes of the comparison.
    """
    recorded = {name: run for name, run in runs.items() if len(run.t)}
    title = _title(about or {})
    if not recorded:
        return Report(title, 0.0, 0.0, 0.0, missing=("nothing was recorded.",), notes=notes)
    flow = recorded.get("central") or next((run for name, run in recorded.items() if name not in _OTHERS), None)
    optimizer, stable, ablated = (recorded.get(name) for name in ("discrete", "stable", "ablated"))
    main = flow or optimizer or next(iter(recorded.values()))
    start, end = float(main.t[0]), float(main.t[-1])
    window = min(end - start, max(10.0, (end - start) / 10))
    stateless = flow is not None and not pytree.tree_leaves(flow.nu)

    def last(run: Solution | None, values: Array | None) -> float | None:
        return None if run is None or values is None else _mean(run.t, values, end - window)

    def apart(name: str) -> float | None:
        found = _pair(distance or {}, name)
        return None if found is None or t is None else _mean(t, found, end - window)

    curvature = {name: last(run, _curvature(run)) for name, run in recorded.items()}
    without_push = curvature.get("stable") if stateless and ablated is None else curvature.get("ablated")
    sharpness = last(main, _sharpness(main))
    effective_lr = last(main, main.series.get("effective_lr"))
    predicts = flow is not None and "osc_loss" in flow.series
    return Report(
        title=title,
        start=start,
        end=end,
        window=window,
        flow=flow.name if flow is not None else None,
        **_edge(flow, optimizer),
        sharpness=sharpness,
        effective_lr=effective_lr,
        largest_stable_lr=2 * effective_lr / sharpness if effective_lr and sharpness and sharpness > 0 else None,
        loss=last(flow, flow.loss) if flow is not None else None,
        oscillation_loss=last(flow, flow.series["osc_loss"]) if flow is not None and predicts else None,
        optimizer_loss=last(optimizer, optimizer.loss) if optimizer is not None else None,
        stable_loss=last(stable, stable.loss) if stable is not None else None,
        curvature=curvature.get(flow.name) if flow is not None else None,
        curvature_ablated=without_push,
        curvature_stable=curvature.get("stable"),
        distance=apart(flow.name) if flow is not None else None,
        distance_stable=apart("stable"),
        strain=flow.about.get("strain") if flow is not None else None,
        next_terms=_next_terms(flow) if flow is not None else (),
        missing=tuple(_missing(recorded, flow, stateless)),
        notes=notes,
    )


def _title(about: Mapping[str, Any]) -> str:
    problem = re.sub(r"^\w+\('([^']*)', dim=(\d+).*", r"\1 (\2 weights)", str(about.get("problem", "")))
    return " on ".join(filter(None, [str(about.get("method", "")), problem])) or "A run"


def _mean(t: Array, values: Array, since: float) -> float | None:
    """The average of the known values since a time; if there are none, the last known value."""
    known = np.isfinite(values)
    if not known.any():
        return None
    inside = known & (t >= since - 1e-9)
    return float(values[inside].mean()) if inside.any() else float(values[known][-1])


def _sharpness(run: Solution) -> Array:
    """Largest effective eigenvalue at the recorded times [n], NaN where it was not computed."""
    return run.eigenvalues[:, 0] if run.eigenvalues.shape[1] else np.full(len(run.t), np.nan)


def _curvature(run: Solution) -> Array | None:
    return _sharpness(run) / run.series["effective_lr"] if "effective_lr" in run.series else None


def _pair(distance: Distances, name: str) -> Array | None:
    """The distance of a run from the optimizer [n]."""
    found = distance.get(("discrete", name), distance.get((name, "discrete")))
    return found if found is not None and len(found) else None


def _edge(flow: Solution | None, optimizer: Solution | None) -> dict[str, Any]:
    """Whether the run is at the edge, since when, and in how many directions."""
    if flow is not None:
        k = flow.k
        at, since = bool(k[-1] > 0), None
        if at:  # the first entry after the last time that nothing oscillated
            still = [i for i, b in enumerate(flow.breakpoints) if b[2] == 0]
            since = float(flow.breakpoints[still[-1] + 1 if still else 0][0])
        share, most = float((k > 0).mean()), int(max(b[2] for b in flow.breakpoints)) if flow.breakpoints else 0
        return {"at_edge": at, "since": since, "edge_share": share, "directions": int(k[-1]), "most_directions": most}
    sharpness = _sharpness(optimizer) if optimizer is not None else np.empty(0)
    known = np.isfinite(sharpness)
    if optimizer is None or not known.any():
        return {}
    high = sharpness[known] >= AT_EDGE
    below = np.flatnonzero(~high)
    first = below[-1] + 1 if len(below) else 0
    since = float(optimizer.t[known][first]) if high[-1] else None
    return {"at_edge": bool(high[-1]), "since": since, "edge_share": float(high.mean())}


def _next_terms(flow: Solution) -> tuple[tuple[float, float], ...]:
    sizes = flow.series.get("next_term", np.empty(0))
    return tuple((float(t), float(size)) for t, size in zip(flow.t, sizes, strict=False) if not np.isnan(size))


def _missing(runs: Mapping[str, Solution], flow: Solution | None, stateless: bool) -> list[str]:
    """What the runs do not show, and how to get it."""
    if flow is None:
        return ['what oscillates, and what that does; add "central" to the runs of dvi.compare.']
    if not flow.breakpoints:
        return []
    told = []
    needed = {
        "discrete": "how far the flow is from the optimizer",
        "stable": "what would be without the oscillation",
        "ablated": "what the curvature would be without the push of the oscillation on the weights",
    }
    if stateless:  # the stable flow is the ablated one
        del needed["ablated"]
    told += [f'{what}; add "{name}" to the runs of dvi.compare.' for name, what in needed.items() if name not in runs]
    if not _next_terms(flow):
        told.append(
            "how large the first term is that the flow leaves out; the oscillation was too small to measure it, or an "
            "earlier version wrote the file: run it again."
        )
    return told
