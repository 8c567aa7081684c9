"""Flows that do not get on: along a kink of the loss, recognised from what they cost, or in and out of oscillation."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np

from dvi.problems import Ledger
from dvi.runs.observables import OSCILLATES, Observation

#: A run across kinks ends when it costs this many gradient equivalents within so many units of time, 100 a unit.
#: Smooth losses cost 2 to 60, and up to 400 where many directions pull at once; they go on whatever they cost.  At a
#: kink, steps as short as allowed cost 1,000 to 3,000.
KINK_COST, KINK_TIME = 1000.0, 10.0

#: A run ends when directions have stopped to oscillate this many times within one unit of time, at one place.  A flow
#: is an average over several steps of the optimizer: one that comes and goes within a step has no counterpart there.
EXITS = 10


def recent_cost(
    times: Sequence[float], counts: Sequence[dict[str, int]], weights: Mapping[str, float], now: float
) -> tuple[float, float]:
    """Gradient equivalents until now, and until ``KINK_TIME`` ago.

    Args:
        times: of the nodes recorded, ascending.
        counts: the cumulative ledger at each.
        weights: of the kinds of evaluation.
        now: the time reached.

    """
    earlier: dict[str, int] = {}
    for t, count in zip(reversed(times), reversed(counts), strict=True):
        if t < now - KINK_TIME:
            earlier = count
            break
    total, before = (Ledger(**count, weights=weights).gradient_equivalents for count in (counts[-1], earlier))
    return total, before


def exits(nodes: Sequence[Observation], now: float) -> tuple[int, float]:
    """How many directions have stopped to oscillate in the last unit time, and the largest √tr Σ in it.

    Those that came back are counted each time.  One stops that had a hundredth of the largest variance, and has none.

    Args:
        nodes: recorded, ascending in time.
        now: the time reached.
    """
    last = nodes[bisect_left(nodes, now - 1, key=lambda node: node["t"]) :]
    if len(last) < 2 * EXITS:  # an entry and an exit take a step each
        return 0, 0.0
    spectra = [np.linalg.eigvalsh(node["X"]) for node in last]
    largest = max(float(x.max(initial=0.0)) for x in spectra)
    ranks = [[int((x > part * largest).sum()) for part in (0.01, OSCILLATES)] for x in spectra]
    count = sum(max(0, clear - any_) for (clear, _), (_, any_) in pairwise(ranks))
    return count, max(node["trace"] for node in last) ** 0.5
