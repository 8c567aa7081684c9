"""Flows that slide along a kink of the loss in ever shorter steps: recognised from what they cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dvi.problems import Ledger

#: A run across kinks ends when it costs this many gradient equivalents within so many units of time, 100 a unit.
#: Smooth losses cost 2 to 60, and up to 400 where many directions pull at once; they go on whatever they cost.  At a
#: kink, steps as short as allowed cost 1,000 to 3,000.
KINK_COST, KINK_TIME = 1000.0, 10.0


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
