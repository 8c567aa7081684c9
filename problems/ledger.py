"""Counts the evaluations of a loss, and their cost in gradients.

Wall-clock time depends on the machine; the number of evaluations does not.  A ledger counts evaluations, and weighs
each kind by its cost relative to one gradient: *gradient equivalents*.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any

KINDS = ("gradients", "hvps", "third_derivatives", "values", "ccp_solves", "collectives", "collective_bytes")

# Relative to one value_and_grad.  A complementarity problem is a few numbers on the host and counts as free.  The cost
# of collectives depends on the network between ranks and is not known here.
DEFAULT_WEIGHTS: Mapping[str, float] = {
    "gradients": 1.0,
    "hvps": 2.5,
    "third_derivatives": 9.0,
    "values": 1 / 3,
    "ccp_solves": 0.0,
    "collectives": 0.0,
    "collective_bytes": 0.0,
}


@dataclass
class Ledger:
    """Counts of evaluations of a loss.

    Attributes:
        gradients: calls of ``value_and_grad`` (the loss comes with it).
        hvps: Hessian-vector products, one per column of the block.
        third_derivatives: contractions T[u, v], one per pair of directions.
        values: forward-only evaluations.
        ccp_solves: complementarity problems solved (the solver of each reports it).
        collectives: sums over ranks (:func:`dvi.distribute`).
        collective_bytes: bytes that each rank contributed to them.
        weights: cost of one of each, in gradients.

    """

    gradients: int = 0
    hvps: int = 0
    third_derivatives: int = 0
    values: int = 0
    ccp_solves: int = 0
    collectives: int = 0
    collective_bytes: int = 0
    weights: Mapping[str, float] = field(default_factory=lambda: dict(DEFAULT_WEIGHTS), repr=False)

    def __post_init__(self) -> None:
        unknown = set(self.weights) - set(KINDS)
        if unknown:
            raise ValueError(f"a ledger has no {', '.join(sorted(unknown))} to weigh; it counts {', '.join(KINDS)}")
        self.weights = {**DEFAULT_WEIGHTS, **self.weights}

    @property
    def counts(self) -> dict[str, int]:
        """The counts alone, by kind."""
        return {kind: getattr(self, kind) for kind in KINDS}

    @property
    def gradient_equivalents(self) -> float:
        """Total cost in units of one gradient."""
        return sum(self.weights[kind] * count for kind, count in self.counts.items())

    def copy(self) -> Ledger:
        """Return a snapshot that further counting does not change."""
        return replace(self, weights=dict(self.weights))

    def reset(self) -> None:
        """Set every count to zero; the weights stay."""
        self._restore(dict.fromkeys(KINDS, 0))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """A context in which nothing is counted: checks and measurements are not part of a run's cost."""
        before = self.counts
        try:
            yield
        finally:
            self._restore(before)

    def _restore(self, counts: Mapping[str, int]) -> None:
        for kind, count in counts.items():
            setattr(self, kind, count)

    def __sub__(self, earlier: Ledger) -> Ledger:
        """Return the counts since the snapshot ``earlier``, with this ledger's weights."""
        return self._combine(earlier, -1)

    def __add__(self, other: Ledger) -> Ledger:
        """The sum of both, with this ledger's weights."""
        return self._combine(other, 1)

    def _combine(self, other: Ledger, sign: int) -> Ledger:
        if not isinstance(other, Ledger):
            return NotImplemented
        counts = {kind: mine + sign * other.counts[kind] for kind, mine in self.counts.items()}
        return Ledger(**counts, weights=dict(self.weights))

    def to_dict(self) -> dict[str, Any]:
        """Return counts, weights and their total as plain numbers, for a file."""
        return {**self.counts, "weights": dict(self.weights), "gradient_equivalents": self.gradient_equivalents}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Ledger:
        """Return the inverse of :meth:`to_dict`."""
        return cls(**{f.name: stored[f.name] for f in fields(cls) if f.name in stored})
