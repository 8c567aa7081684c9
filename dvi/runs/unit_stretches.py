"""Where a flow went in steps of one unit: said in its notes, and shaded in its picture."""

from __future__ import annotations


def joined(steps: list[tuple[float, float]]) -> list[list[float]]:
    """Stretches [from, to] of steps (from, to) that follow one another."""
    stretches: list[list[float]] = []
    for start, end in steps:
        if stretches and start - stretches[-1][1] < 1e-9:
            stretches[-1][1] = float(end)
        else:
            stretches.append([float(start), float(end)])
    return stretches


def unit_step_notes(name: str, stretches: list[list[float]]) -> list[str]:
    """What to tell of them."""
    if not stretches:
        return []
    times = ", ".join(f"{start:.3g} to {end:.3g}" for start, end in stretches)
    return [
        f"{name} flow: steps of one unit from t = {times}, where the force of the oscillation is too stiff for longer "
        "ones, or shorter ones cost more than the budget. There the effective sharpness is held to about a tenth."
    ]
