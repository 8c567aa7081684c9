"""What an optimizer may add to a loss, or take it for: a penalty ½Σλᵢwᵢ², and the sign."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dvi.problems.derivatives.protocol import Part, reinstate
from dvi.problems.errors import ProblemError


@dataclass
class Quadratic:
    """The penalty ½Σλᵢwᵢ² of weights w [d], λ [] or [d]: what L2 weight decay adds to a loss."""

    strength: Tensor

    def __call__(self, w: Tensor) -> Tensor:
        """½Σλᵢwᵢ² []."""
        return 0.5 * (self.strength * w.square()).sum()


@dataclass
class Negated:
    """Minus a part of a loss, for an optimizer that maximises it."""

    part: Part

    def __call__(self, w: Tensor) -> Tensor:
        """−L(w) []."""
        return -self.part(w)

    def install(self, w: Tensor) -> None:
        """Let a model compute with w."""
        reinstate(self.part, w)


def strength(weight_decay: object, w0: Tensor) -> Tensor:
    """λ [] or [d], like the weights w0 [d].

    Raises:
        ProblemError: if it is neither, or not finite, zero or positive.
    """
    given = torch.as_tensor(weight_decay, dtype=w0.dtype, device=w0.device).detach().clone()
    if given.shape not in ((), w0.shape):
        raise ProblemError(f"weight_decay is a number or a tensor of shape {list(w0.shape)}, not {list(given.shape)}")
    if not bool((given >= 0).all() & torch.isfinite(given).all()):
        raise ProblemError(f"weight_decay is zero or positive, and finite; got {weight_decay!r}")
    return given
