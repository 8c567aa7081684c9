"""How mini-batches are drawn, and the settings of the flow with noise."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor

from dvi.solvers.numbers import number


@dataclass(frozen=True)
class Sampling:
    """How mini-batches are drawn, how runs are averaged, and how accurately the flow is computed.

    Args:
        replacement: draw each example of a batch from all n, so that one may come twice.  By default a batch has
            distinct examples.  Batches are independent of one another in both cases.
        epochs: pass through all examples in a random order, batch by batch, and then again in another order.
        replicas: number of runs of the optimizer, each with its own batches.
        seed: seed of the batches, and of the directions that the flow tries.
        window: standard deviation of the Gaussian that averages runs over time, in unit times.  Directions that relax
            within this time count as oscillation: their effective eigenvalue is above 1/window.
        max_directions: largest number of directions in which oscillations are followed by their covariance.  These
            are the directions with the largest eigenvalues.  One path of the optimizer represents the others.
        every: unit times between two searches for these directions.
        pairs: number of pairs w ± d that are tried per step, where d is a random member of the oscillation.  Or "all":
            one pair along each direction of the block.  This is not random, leaves out what is outside the block, and
            costs 2k gradients.
        tol: residual at which an eigenvector is accurate enough; effective eigenvalues are of order 2.
        trust_every: unit times between two checks of the spectral radius of the map of X, which cost 2k gradients
            each; 0: never.
        trust: the run ends if the next Taylor term of the averaged loss exceeds this multiple of the term that the
            flow keeps.
        max_gib: memory in GiB for the gradients of single examples.

    Raises:
        ValueError: if a number is out of its range.
    """

    replacement: bool = False
    epochs: bool = False
    replicas: int = 4
    seed: int = 0
    window: float = 10.0
    max_directions: int = 10
    every: int = 4
    pairs: int | Literal["all"] = 1
    tol: float = 0.1
    trust_every: int = 50
    trust: float = 0.5
    max_gib: float = 0.5

    def __post_init__(self) -> None:
        for setting in fields(self):
            given = getattr(self, setting.name)
            if setting.name not in ("replacement", "epochs") and not (
                setting.name == "pairs" and isinstance(given, str)
            ):
                value = number(given, f"Sampling: {setting.name}")
                object.__setattr__(self, setting.name, value)
        for name, least in (("replicas", 1), ("max_directions", 1), ("every", 1), ("trust_every", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"Sampling({name}={value!r}): {name} must be a whole number, at least {least}.")
        for name in ("window", "tol", "trust", "max_gib"):
            if not getattr(self, name) > 0:
                raise ValueError(f"Sampling({name}={getattr(self, name)!r}): {name} must be positive.")
        if self.pairs != "all" and not (isinstance(self.pairs, int) and self.pairs >= 1):
            raise ValueError(f'Sampling(pairs={self.pairs!r}): pairs must be a whole number, at least 1, or "all".')
        if self.replacement and self.epochs:
            raise ValueError(
                "Sampling(replacement=True, epochs=True): an epoch draws each example once, so it cannot draw with "
                "replacement. Choose one of the two."
            )

    @property
    def in_words(self) -> str:
        """How batches are drawn, in words."""
        if self.epochs:
            return "in epochs"
        return f"independent, with{'' if self.replacement else 'out'} replacement"

    def check(self, batch_size: int, n: int) -> None:
        """Raise ValueError unless batches of this size can be drawn from n examples."""
        if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
            raise ValueError(f"batch_size={batch_size!r}: must be a whole number of examples, at least 1.")
        if batch_size > n and not self.replacement:
            raise ValueError(f"batch_size={batch_size}: there are {n} examples to draw without replacement.")
        if self.epochs and n % batch_size:
            fits = max(b for b in range(1, batch_size + 1) if n % b == 0)
            raise ValueError(
                f"batch_size={batch_size} does not divide the {n} examples, and batches of unequal size would have "
                f"different noise. Take batch_size={fits}, leave out {n % batch_size} examples, or draw independent "
                "batches."
            )

    def factor(self, batch_size: int, n: int) -> float:
        """φ: the covariance of a batch's gradient divided by that of an example's gradient; 0 without noise."""
        return 1 / batch_size if self.replacement else (n - batch_size) / (batch_size * (n - 1))

    def draw(self, batch_size: int, n: int, step: int) -> Tensor:
        """The examples in the batch of each replica at a step [replicas, batch_size]; the same on every device."""
        if self.epochs:
            epoch, part = divmod(step, n // batch_size)
            chosen = torch.rand(self.replicas, n, generator=generator(self.seed, epoch)).argsort(dim=1)
            return chosen[:, part * batch_size : (part + 1) * batch_size]
        source = generator(self.seed, step)
        if self.replacement:
            return torch.randint(n, (self.replicas, batch_size), generator=source)
        return torch.rand(self.replicas, n, generator=source).argsort(dim=1)[:, :batch_size]


def generator(seed: int, number: int) -> torch.Generator:
    """Random numbers that depend on the two arguments only, so that a run can be resumed at any step."""
    return torch.Generator("cpu").manual_seed((seed * 1_000_003 + number) * 7_919 + 1)
