"""One number for each weight, constant or given over stretches of the flat vector, as ``decay()`` returns it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dvi.methods.errors import SpecError
from dvi.methods.numbers import number

Value = Any  # a number or a tensor [] (with schedules), or a tensor [n]


@dataclass(frozen=True)
class PerWeight:
    """One number for each of d weights.

    Attributes:
        stretches: pairs (value, n) for consecutive stretches of w: a number, or a tensor [n], for n weights.
        like: a tensor [d] that sets dtype and device of the results.
    """

    stretches: tuple[tuple[Value, int], ...]
    like: Tensor

    @staticmethod
    def of(declared: Any, like: Tensor, name: str = "decay()") -> PerWeight:
        """The declaration of a method, for weights like ``like`` [d].

        Raises:
            SpecError: if it is neither a number, nor a tensor [d], nor a list of pairs (number, how many weights).
        """
        pairs = list(declared) if isinstance(declared, (list, tuple)) else [(declared, len(like))]
        if not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs):
            raise SpecError(f"{name}: a list holds pairs (γ, how many weights), as in [(0.01, 12), (0.0, 4)].")
        stretches = tuple((_value(value, int(n), like, name), int(n)) for value, n in pairs)
        total = sum(n for _, n in stretches)
        if total != len(like):
            raise SpecError(f"{name} is for {total} weights; w has {len(like)}.")
        return PerWeight(_merged(stretches), like)

    @property
    def uniform(self) -> bool:
        """True if it is one number for all weights."""
        return len(self.stretches) == 1 and not _is_vector(self.stretches[0][0])

    @property
    def number(self) -> Any:
        """That number, or a tensor []."""
        return self.stretches[0][0]

    @property
    def vector(self) -> Tensor:
        """All of them [d]; a tensor [] if it is one number for all."""
        tensors = [x if isinstance(x, Tensor) else self.like.new_tensor(x) for x, _ in self.stretches]
        if self.uniform:
            return tensors[0].to(self.like)
        # a product, not expand(): tangents of tensors [] may be float64 whatever the tensors are
        return torch.cat(
            [x.to(self.like) * self.like.new_ones(n) for x, (_, n) in zip(tensors, self.stretches, strict=True)]
        )

    def map(self, function: Callable[[Any], Any]) -> PerWeight:
        """A function of each of them."""
        return PerWeight(tuple((function(x), n) for x, n in self.stretches), self.like)

    def split(self, sizes: Sequence[int]) -> list[PerWeight]:
        """The numbers of consecutive parts of w."""
        out, start = [], 0
        for size in sizes:
            inside, first = [], 0
            for x, n in self.stretches:
                low, high = max(start, first), min(start + size, first + n)
                if low < high:
                    inside.append((x[low - first : high - first] if _is_vector(x) else x, high - low))
                first += n
            out.append(PerWeight(_merged(tuple(inside)), self.like[start : start + size]))
            start += size
        return out

    def range(self) -> tuple[float, float]:
        """The least and the greatest."""
        ends = [(float(x.min()), float(x.max())) if _is_vector(x) else (float(x), float(x)) for x, _ in self.stretches]
        return min(low for low, _ in ends), max(high for _, high in ends)


def _is_vector(x: Value) -> bool:
    return isinstance(x, Tensor) and x.ndim > 0


def _value(x: Any, n: int, like: Tensor, name: str) -> Value:
    x = number(x) if not isinstance(x, Tensor) else x
    if isinstance(x, Tensor) and (x.ndim == 0 or x.shape == (n,)):
        return x.to(like)
    if isinstance(x, (int, float)) and not isinstance(x, bool):
        return float(x)
    what = f"a tensor of shape {list(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
    raise SpecError(f"{name} gives {what} for {n} weights; it must give a number or a tensor of shape [{n}].")


def _same(x: Value, other: Value) -> bool:
    """True if both are known to be the same number without reading tensors."""
    return x is other or (isinstance(x, float) and isinstance(other, float) and x == other)


def _merged(stretches: tuple[tuple[Value, int], ...]) -> tuple[tuple[Value, int], ...]:
    """The stretches with equal neighbours merged and empty ones left out."""
    out: list[tuple[Value, int]] = []
    for x, n in stretches:
        if out and not _is_vector(x) and _same(x, out[-1][0]):
            out[-1] = (x, out[-1][1] + n)
        elif n:
            out.append((x, n))
    return tuple(out)


__all__ = ["PerWeight"]
