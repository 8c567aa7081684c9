"""Recognises flows that do not advance: at a kink of the loss, by their cost, or in and out of oscillation."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np

from dvi.problems import Ledger
from dvi.runs.observables import OSCILLATES, Observation

#: A run across kinks ends when it costs KINK_COST gradient equivalents within KINK_TIME units of time: 100 a unit.  For
#: smooth losses runs cost 2 to 60 a unit, and up to 400 if many directions oscillate strongly; they are never ended for
#: their cost.  At a kink, the shortest steps cost 1,000 to 3,000 a unit.
KINK_COST, KINK_TIME = 1000.0, 10.0

#: A run ends when directions stop oscillating this many times within one unit of time while w hardly moves.  A flow is
#: an average over several steps of the optimizer, so an oscillation shorter than a step has no counterpart there.
EXITS = 10


def recent_cost(
    times: Sequence[float], counts: Sequence[dict[str, int]], weights: Mapping[str, float], now: float
) -> tuple[float, float]:
    """Gradient equivalents until now, and until ``KINK_TIME`` ago.

    Args:
        times: times of the recorded nodes, ascending (unit times).
        counts: the cumulative ledger at each node.
        weights: gradient equivalents of each kind of evaluation.
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
    """How many directions stopped oscillating in the last unit of time, and the largest √tr Σ in it.

    A direction that comes back is counted each time.  It stops when its variance falls from more than a hundredth of
    the largest one to none.

    Args:
        nodes: the recorded observations, ascending in time.
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
