"""Several methods, each for its own weights: the parameter groups of an optimizer."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dvi.methods.errors import SpecError
from dvi.methods.filter import Filter, Memory
from dvi.methods.preconditioners.base import Preconditioner
from dvi.methods.preconditioners.blocks import Blocks
from dvi.methods.spec import Method, Nu

_NAME = re.compile(r"(\w+)\[(\d+)\]")


@dataclass(frozen=True, eq=False)
class Start:
    """What an optimizer remembers of earlier steps.

    Attributes:
        nu: ν before the next update, of n weights.
        memory: (factor, rest [n]) for each vector in the filter's memory.  The vector is factor·g + rest, where g [n]
            is the gradient at the next step.  An optimizer keeps less than a filter's memory; any g would give the same
            steps.  None: the filter has remembered nothing.
    """

    nu: Nu
    memory: tuple[tuple[float, Tensor | float], ...] | None = None


class Grouped(Method):
    """Several methods, each for its own weights: P is block diagonal.

    ν is a tuple with one part for each method.  Joint methods share one ν for all weights, which costs less.

    All methods must have the same momentum filter.  A hyperparameter of method i is called ``name[i]``.

    Args:
        methods: the methods.
        where: the entries of w that belong to each: int64 tensors that together hold 0 … d − 1 once each.
        starts: what each remembers of earlier steps; None: nothing.
        title: the text that ``repr`` gives.
        joint: True if all are of one class whose f and P act weight by weight, and have made equally many steps.  Then
            hyperparameters in which they differ become vectors [d].
    """

    methods: tuple[Method, ...]
    where: tuple[Tensor, ...]
    starts: tuple[Start | None, ...]
    title: str = ""
    joint: bool = False
    #: The entries of w that belong to the weights of all methods, one after the other; and the inverse permutation.
    #: None: in order.
    order: Tensor | None = dataclasses.field(init=False, default=None)
    inverse: Tensor | None = dataclasses.field(init=False, default=None)

    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __post_init__(self) -> None:
        self._one([method.at(0.0).Q() for method in self.methods])
        order = torch.cat(self.where)
        if not bool((torch.diff(order) == 1).all()):
            object.__setattr__(self, "order", order)
            object.__setattr__(self, "inverse", torch.argsort(order))

    def __repr__(self) -> str:
        return self.title or " | ".join(
            f"{len(where)} weights: {method!r}" for method, where in zip(self.methods, self.where, strict=True)
        )

    # ---- hyperparameters ------------------------------------------------------------------------------

    def hyperparameters(self) -> dict[str, Any]:
        """The hyperparameters of all methods: ``name[i]`` for method i, or the name alone if there is one method."""
        given = {
            self._written(name, i): value
            for i, method in enumerate(self.methods)
            for name, value in method.hyperparameters().items()
        }
        return {name: self.__dict__.get(name, value) for name, value in given.items()}

    def _written(self, name: str, i: int) -> str:
        return f"{name}[{i}]" if len(self.methods) > 1 else name

    def _read(self, name: str) -> tuple[int, str]:
        found = _NAME.fullmatch(name)
        return (int(found[2]), found[1]) if found else (0, name)

    def __getattr__(self, name: str) -> Any:
        """A hyperparameter of one of the methods."""
        if not name.startswith("_") and "methods" in self.__dict__:
            i, field = self._read(name)
            if (name != field or len(self.methods) == 1) and field in self.methods[i].hyperparameters():
                return getattr(self.methods[i], field)
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def check_range(self, name: str, value: float, at: float | None = None) -> None:
        """Raise SpecError unless a hyperparameter's value lies in the range that its method declares."""
        i, field = self._read(name)
        self.methods[i].check_range(field, value, at)

    def _called(self, name: str) -> str:
        i, field = self._read(name)
        return self.methods[i]._called(field) + (f" of group {i}" if len(self.methods) > 1 else "")

    def _now(self) -> Sequence[Method]:
        """The methods, with values in place of schedules."""
        put: dict[int, dict[str, Any]] = {}
        own = {field.name for field in dataclasses.fields(self)}
        for name in self.__dict__.keys() - own:
            i, field = self._read(name)
            put.setdefault(i, {})[field] = self.__dict__[name]
        return [_with(method, put[i]) if i in put else method for i, method in enumerate(self.methods)]

    # ---- the declaration --------------------------------------------------------------------------------

    def init(self, w: Tensor) -> Nu:
        """ν of every method before the next update."""
        self._check(w)
        parts = [
            method.init(w[where.to(w.device)]) if start is None else pytree.tree_map(lambda x: x.to(w), start.nu)
            for method, where, start in zip(self._now(), self.where, self.starts, strict=True)
        ]
        if not self.joint:
            return parts[0] if len(parts) == 1 else tuple(parts)
        return pytree.tree_map(lambda *x: self._in_place(torch.cat(x)) if x[0].ndim else x[0], *parts)

    def f(self, nu: Nu, g: Tensor) -> Nu:
        """The change of every method's own ν."""
        if self.joint:
            return self._whole(g).f(nu, g)
        if len(self.methods) == 1:
            return self._now()[0].f(nu, g if self.order is None else g[self.order.to(g.device)])
        return tuple(
            method.f(part, g[where.to(g.device)])
            for method, part, where in zip(self._now(), nu, self.where, strict=True)
        )

    def P(self, nu: Nu) -> Preconditioner:
        """The P of every method, on its own weights; one diagonal if all are diagonal."""
        if self.joint:
            return self._whole(max(pytree.tree_leaves(nu), key=Tensor.numel)).P(nu)
        nus = (nu,) if len(self.methods) == 1 else nu
        parts = [method.P(part) for method, part in zip(self._now(), nus, strict=True)]
        if len(parts) == 1 and self.order is None:
            return parts[0]
        return Blocks(parts, [len(where) for where in self.where], self.order)

    def Q(self) -> Filter:
        """The filter that all methods have."""
        return self._one([method.Q() for method in self._now()])

    def decay(self) -> Any:
        """The decoupled weight decay of every method, on its own weights."""
        if self.joint:
            return self._whole(torch.zeros((), dtype=torch.float64, device=self.where[0].device)).decay()
        given = [method.decay() for method in self._now()]
        if all(value is None for value in given):
            return None
        numbers = [0.0 if value is None else value for value in given]
        if (len(given) == 1 and self.order is None) or all(x is numbers[0] or _equal(x, numbers[0]) for x in numbers):
            return numbers[0]
        return self._in_place(
            torch.cat([_expanded(x, len(where)) for x, where in zip(numbers, self.where, strict=True)])
        )

    def remembered(self, w: Tensor, g: Tensor) -> Memory:
        """The memory of the filter before the next step."""
        memory = self.at(0.0).Q().initial(w)
        for where, start in zip(self.where, self.starts, strict=True):
            if start is not None and start.memory is not None:
                index = where.to(w.device)
                for vector, (factor, rest) in zip(memory, start.memory, strict=True):
                    vector[index] = factor * g[index] + (rest.to(w) if isinstance(rest, Tensor) else rest)
        return memory

    def _whole(self, like: Tensor) -> Method:
        """One method for all weights, made of joint methods; differing hyperparameters become vectors like ``like``."""
        now = self._now()
        values = {}
        for name in now[0].hyperparameters():
            given = [getattr(method, name) for method in now]
            if any(isinstance(x, Tensor) or x != given[0] for x in given):
                each = [
                    torch.as_tensor(x, dtype=like.dtype, device=like.device).expand(len(where))
                    for x, where in zip(given, self.where, strict=True)
                ]
                values[name] = self._in_place(torch.cat(each))
        return _with(now[0], values)

    # ---- inside -----------------------------------------------------------------------------------------

    def _in_place(self, values: Tensor) -> Tensor:
        """One number for each weight, in the order of w; given are those of all methods, one method after the other."""
        return values if self.inverse is None else values[self.inverse.to(values.device)]

    def _check(self, w: Tensor) -> None:
        known = sum(len(where) for where in self.where)
        if known != len(w):
            raise SpecError(f"{self}: the groups have {known} weights, the problem {len(w)}.")

    def _one(self, filters: Sequence[Filter]) -> Filter:
        """The filter, after a check that all methods have the same.

        Raises:
            SpecError: if groups have different momentum.
        """
        for i, other in enumerate(filters[1:], start=1):
            if _coefficients(other) != _coefficients(filters[0]):
                raise SpecError(
                    f"Groups 0 and {i} have different momentum filters, {filters[0]} and {other}. The threshold of a "
                    "central flow belongs to one filter: give all groups the same momentum (betas[0]), dampening and "
                    "nesterov. Learning rates, beta2, eps and weight decay may differ."
                )
        return filters[0]


def _coefficients(Q: Filter) -> tuple[tuple[float | None, ...], ...]:
    """Its numbers; None for tensors, which appear only in derivatives with respect to time."""
    return tuple(
        tuple(None if isinstance(x, Tensor) else float(x) for x in part) for part in (Q.numerator, Q.denominator)
    )


def _equal(one: Any, other: Any) -> bool:
    return isinstance(one, float) and isinstance(other, float) and one == other


def _expanded(value: Any, n: int) -> Tensor:
    """The decay() of one method, for each of its n weights."""
    if isinstance(value, (list, tuple)):
        return torch.cat([_expanded(x, k) for x, k in value])
    return torch.as_tensor(value, dtype=None if isinstance(value, Tensor) else torch.float64).expand(n)


def _with(method: Method, values: Mapping[str, Any]) -> Method:
    now = copy.copy(method)
    for name, value in values.items():
        object.__setattr__(now, name, value)
    return now


__all__ = ["Grouped", "Start"]
