"""The schedulers of ``torch.optim.lr_scheduler``, read by stepping copies of them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from dvi.methods.errors import SpecError
from dvi.methods.interop.refusals import BOOKKEEPING

#: A learning rate of zero is taken as this part of the first one: then P is finite, and the step is below rounding.
ZERO = 1e-16

#: Options of a group that a scheduler may change, and those that it cycles with ``cycle_momentum``.
MOVING, CYCLED = ("lr",), ("momentum", "betas")


class Reading:
    """What schedulers make of an optimizer's groups, step by step, from now on.

    They are stepped as copies, whose optimizer is a copy with other, empty parameters: the user's are not touched.

    Args:
        optimizer: the user's.
        schedulers: the user's, in the order in which they are stepped.

    Raises:
        SpecError: if one is no scheduler of this optimizer, cannot be copied, or depends on more than the step.
    """

    def __init__(self, optimizer: Optimizer, schedulers: Sequence[Any]) -> None:
        for scheduler in schedulers:
            _refuse(scheduler, optimizer)
        memo: dict[int, Any] = {id(optimizer.state): type(optimizer.state)(dict)}
        for group in optimizer.param_groups:
            for p in group["params"]:
                memo[id(p)] = torch.zeros(0)
        try:
            self._optimizer, self._schedulers = copy.deepcopy((optimizer, list(schedulers)), memo)
        except Exception as error:  # whatever is in a user's scheduler
            raise SpecError(
                f"The scheduler cannot be copied ({type(error).__name__}: {error}), and only a copy of it may be "
                "stepped. Give the learning rates as a table instead: a method of dvi.methods with lr=[…]."
            ) from error
        self.cycles = cycles_momentum(schedulers)
        self._moving = (*MOVING, *CYCLED) if self.cycles else MOVING
        self._seen = [self._groups()]

    def groups(self, t: int) -> list[dict[str, Any]]:
        """The options of every group at the t-th step from now.

        Raises:
            SpecError: if a scheduler changes an option that no schedule can follow.
        """
        while len(self._seen) <= t:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that no step of the optimizer was made in between
                for scheduler in self._schedulers:
                    scheduler.step()
            now = self._groups()
            self._refuse_others(now)
            self._seen.append(now)
        return self._seen[t]

    def __repr__(self) -> str:
        return " and ".join(type(scheduler).__name__ for scheduler in self._schedulers)

    def _groups(self) -> list[dict[str, Any]]:
        return [
            {name: _plain(value) for name, value in group.items() if name != "params"}
            for group in self._optimizer.param_groups
        ]

    def _refuse_others(self, now: list[dict[str, Any]]) -> None:
        before = self._seen[0]
        if len(now) != len(before):
            raise SpecError("The scheduler adds a parameter group: pass the optimizer after this has happened.")
        for i, (one, other) in enumerate(zip(before, now, strict=True)):
            for name in one.keys() & other.keys():
                fixed = name not in self._moving and name not in BOOKKEEPING
                if fixed and one[name] != other[name]:
                    raise SpecError(
                        f"The scheduler changes {name} of group {i} from {one[name]} to {other[name]}. Learning rates "
                        "may be scheduled, and momentum or betas[0] by a scheduler with cycle_momentum=True."
                    )


@dataclass(frozen=True)
class Option:
    """One option of one group as a schedule: t ↦ its value in the step from t to t + 1.

    Args:
        reading: the schedulers' reading.
        group: the number of the group.
        name: of the option.
        item: which item of it, where it is a pair.
        factor: what the value is multiplied by.
        least: the least value.
        delay: how many steps earlier it is read, though not before now.
    """

    reading: Reading
    group: int
    name: str
    item: int | None = None
    factor: float = 1.0
    least: float = -float("inf")
    delay: int = 0

    def __repr__(self) -> str:
        return f"<{self.reading}>" + (f", {self.delay} earlier" if self.delay else "")

    def __call__(self, t: Any) -> float:
        """The value in the step that t lies in."""
        value = self.reading.groups(max(int(t) - self.delay, 0))[self.group][self.name]
        value = value if self.item is None else value[self.item]
        return max(self.factor * float(value), self.least)


def cycles_momentum(schedulers: Sequence[Any]) -> bool:
    """Does a scheduler, or one inside another, cycle the momentum?"""
    return any(
        getattr(scheduler, "cycle_momentum", False) or cycles_momentum(getattr(scheduler, "_schedulers", ()))
        for scheduler in schedulers
    )


def as_list(scheduler: Any) -> list[Any]:
    """Schedulers as a list: none, one, or several that are stepped together."""
    if scheduler is None or scheduler is False:
        return []
    return list(scheduler) if isinstance(scheduler, (list, tuple)) else [scheduler]


def _inside(scheduler: Any) -> Iterator[Any]:
    yield scheduler
    for other in getattr(scheduler, "_schedulers", ()):
        yield from _inside(other)


def _refuse(scheduler: Any, optimizer: Optimizer) -> None:
    for part in _inside(scheduler):
        kind = type(part).__name__
        if isinstance(part, ReduceLROnPlateau):
            raise SpecError(
                f"{kind} sets the learning rate by a measured quantity, which is known only during the run, so it is "
                "not a schedule in t. Give its learning rates as a scheduler of the step (MultiStepLR), or keep the "
                "present rate with scheduler=False."
            )
        if not isinstance(part, LRScheduler):
            raise SpecError(f"scheduler is a torch.optim.lr_scheduler.LRScheduler, or a list of them, not a {kind}.")
        if part.optimizer is not optimizer:
            raise SpecError(f"{kind} belongs to another optimizer, so it does not change this one's learning rates.")


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.item() if value.numel() == 1 else value.tolist()
    return tuple(map(_plain, value)) if isinstance(value, (tuple, list)) else value
