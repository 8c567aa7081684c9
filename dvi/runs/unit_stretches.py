"""The stretches of time in which a flow took steps of one unit, for its notes and its figure."""

from __future__ import annotations

from typing import Any


def joined(steps: list[tuple[float, float]]) -> list[list[float]]:
    """Join consecutive steps (from, to) into stretches [from, to]."""
    stretches: list[list[float]] = []
    for start, end in steps:
        if stretches and start - stretches[-1][1] < 1e-9:
            stretches[-1][1] = float(end)
        else:
            stretches.append([float(start), float(end)])
    return stretches


def unit_step_notes(name: str, stretches: list[list[float]], nodes: list[Any]) -> list[str]:
    """The note on these stretches, if there are any.

    Args:
        name: of the flow.
        stretches: [from, to] each.
        nodes: what was observed at each step, with the time "t" and the effective "eigenvalues".
    """
    if not stretches:
        return []
    times = ", ".join(f"{start:.3g} to {end:.3g}" for start, end in stretches)
    within = (node for node in nodes if any(start - 1e-9 <= node["t"] < end - 1e-9 for start, end in stretches))
    inside = sorted(float(node["eigenvalues"].max(initial=0.0)) for node in within)
    held = ""
    if inside:
        middle = inside[(len(inside) - 1) // 2]
        held = (
            f" There the effective sharpness was at most {inside[-1]:.3g}, in half of the steps at most {middle:.3g}."
        )
    return [
        f"{name} flow: it took steps of one unit from t = {times}, because the force of the oscillation is too stiff "
        f"for longer steps, or shorter ones exceed the budget.{held}"
    ]
