"""The stretches of time in which a flow took steps of one unit, for its notes and its figure."""

from __future__ import annotations


def joined(steps: list[tuple[float, float]]) -> list[list[float]]:
    """Join consecutive steps (from, to) into stretches [from, to]."""
    stretches: list[list[float]] = []
    for start, end in steps:
        if stretches and start - stretches[-1][1] < 1e-9:
            stretches[-1][1] = float(end)
        else:
            stretches.append([float(start), float(end)])
    return stretches


def unit_step_notes(name: str, stretches: list[list[float]]) -> list[str]:
    """The note on these stretches, if there are any."""
    if not stretches:
        return []
    times = ", ".join(f"{start:.3g} to {end:.3g}" for start, end in stretches)
    return [
        f"{name} flow: it took steps of one unit from t = {times}, because the force of the oscillation is too stiff "
        "for longer steps, or shorter ones exceed the budget. There it keeps the effective sharpness at 2 only to "
        "about a tenth."
    ]
