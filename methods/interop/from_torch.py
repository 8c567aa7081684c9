"""Read an optimizer of ``torch.optim`` as a declaration: its groups, its state, and its schedulers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from dvi.methods.errors import SpecError
from dvi.methods.interop.as_optimizer import AsOptimizer
from dvi.methods.interop.grouped import Grouped, Start
from dvi.methods.interop.readers import READERS, Group, Reader
from dvi.methods.interop.refusals import refuse_class, refuse_options, refuse_state
from dvi.methods.interop.rising import ScheduledNesterov
from dvi.methods.interop.scheduler import Reading, as_list
from dvi.methods.optimizers.gd import GradientDescent
from dvi.methods.optimizers.heavy_ball import HeavyBall
from dvi.methods.optimizers.nesterov import Nesterov
from dvi.methods.spec import Method

Begin = Literal["auto", "state", "fresh"]


@dataclass(frozen=True, eq=False)
class Parameter:
    """One parameter of the optimizer.

    Attributes:
        tensor: the user's own tensor, which identifies the parameter; its values are not read later.
        name: its name in the model, if the optimizer was given names.
        label: its name in messages.
        values: a copy of it, flat [n], complex numbers as pairs.
        shape: its shape.
        weight_decay: λ of the penalty ½λ‖p‖² that the optimizer adds to the loss.
        decays: True if it decays, by that penalty or decoupled from the loss.
    """

    tensor: Tensor
    name: str | None
    label: str
    values: Tensor
    shape: tuple[int, ...]
    weight_decay: float
    decays: bool


class FromTorch(Grouped):
    """A method read from an optimizer of torch by :func:`from_torch`.

    Besides f, P and Q it says which parameters it moves, where they start, and what it adds to the loss.  A flow
    matches them with the weights of a problem (:mod:`dvi.interop`).  Without a problem, the method acts on the
    parameters in the optimizer's order.

    Attributes:
        parameters: in the optimizer's order, group by group.
        maximises: True if the optimizer ascends (``maximize=True``).
        begins: "fresh", or "state" if it continues from the optimizer's state.
        steps: the number of steps that the optimizer had made; 0 for SGD, which does not count them.
    """

    parameters: tuple[Parameter, ...] = ()
    maximises: bool = False
    begins: str = "fresh"
    steps: int = 0

    __repr__ = Grouped.__repr__
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def placed(self, where: Mapping[int, Tensor]) -> Grouped:
        """The same with parameter i at the entries where[i] of w, and without other references to the optimizer."""
        ends = torch.tensor([0, *(len(p.values) for p in self.parameters)]).cumsum(0).tolist()
        device = next(iter(where.values())).device
        new = torch.empty(ends[-1], dtype=torch.int64, device=device)
        for i, index in where.items():
            new[ends[i] : ends[i + 1]] = index
        placed = tuple(new[old.to(device)] for old in self.where)
        return Grouped(self.methods, placed, self.starts, self.title, self.joint)


def from_torch(optimizer: Any, scheduler: Any = None, *, start: Begin = "auto") -> Method:
    """Read an optimizer of ``torch.optim`` as a method.

    SGD, RMSprop (without momentum), Adagrad, Adam, AdamW, NAdam and RAdam can be read, with their parameter groups.  So
    can :class:`dvi.methods.AsOptimizer`, which gives its method back.  :func:`dvi.compare`, :func:`dvi.central_flow`
    and the others also take an optimizer and call this function.  Time 0 is the optimizer's next step.

    The optimizer's data are copied, so training may go on afterwards.  If ``weight_decay`` is a penalty in the loss
    (all but AdamW's), the flow adds it to the problem.  ``maximize=True`` reverses the sign of the loss.

    Args:
        optimizer: a ``torch.optim.Optimizer``.
        scheduler: its scheduler, or several that are stepped one after the other.  Only a copy is stepped.  False
            keeps the present learning rates of an optimizer that has a scheduler.
        start: "state" continues from the optimizer's state (ν, momentum, number of steps) and from the present values
            of its parameters.  "fresh" starts anew, at the problem's w0.  "auto" is "state".

    Raises:
        SpecError: if the optimizer has no flow, or has an unknown option or state; if its scheduler was not passed, or
            depends on more than the step; if groups differ in their momentum; for start="state" with an optimizer that
            has made no step.
    """
    if start not in ("auto", "state", "fresh"):
        raise SpecError(f'start is "auto", "state" or "fresh", not {start!r}.')
    ours = isinstance(optimizer, AsOptimizer)
    if not ours:
        refuse_class(optimizer, READERS)
    kind = type(optimizer).__name__
    schedulers = as_list(scheduler)
    if scheduler is None and any("initial_lr" in group for group in optimizer.param_groups):
        raise SpecError(
            f"A scheduler belongs to this {kind} (its groups have an initial_lr), so its learning rates will change: "
            "pass it, dvi.compare(problem, optimizer, …, scheduler=scheduler) or "
            "dvi.from_torch(optimizer, scheduler); or keep the present rates with scheduler=False."
        )
    reading = Reading(optimizer, schedulers) if schedulers else None
    used = start != "fresh" and any(optimizer.state.get(p) for g in optimizer.param_groups for p in g["params"])
    if start == "state" and not used and _keeps_state(optimizer):
        raise SpecError(f'start="state": this {kind} has made no step yet, so it has no state to continue from.')
    if ours:
        parts = _of_ours(optimizer, reading, used)
    else:
        parts = [part for i in range(len(optimizer.param_groups)) for part in _of_group(optimizer, i, reading, used)]
    if not parts:
        raise SpecError(f"All parameters of this {kind} are frozen (requires_grad=False), so it moves no weight.")
    if ours and len(parts) == 1 and not used and reading is None:
        return parts[0].method
    if len({part.maximises for part in parts}) > 1:
        raise SpecError("Some groups have maximize=True and others not, so the steps do not minimise one loss.")
    ends = torch.tensor([0, *(sum(len(p.values) for p in part.parameters) for part in parts)]).cumsum(0).tolist()
    steps = 0 if kind == "SGD" else max(part.steps for part in parts)  # SGD does not count
    return FromTorch(
        methods=tuple(part.method for part in parts),
        where=tuple(torch.arange(a, b) for a, b in pairwise(ends)),
        starts=tuple(part.start for part in parts),
        joint=not ours and len(parts) > 1 and _joint(parts),
        title=_words(parts, steps),
        parameters=tuple(p for part in parts for p in part.parameters),
        maximises=parts[0].maximises,
        begins="fresh" if start == "fresh" else "state",
        steps=steps,
    )


@dataclass(frozen=True)
class _Part:
    """One method with its parameters."""

    method: Method
    start: Start | None
    parameters: tuple[Parameter, ...]
    maximises: bool
    steps: int


def _joint(parts: Sequence[_Part]) -> bool:
    """True if the methods of an optimizer of torch can share one ν.  All act weight by weight; some have no ν."""
    same = len({(type(part.method), part.steps, part.start is None) for part in parts}) == 1
    return same and not isinstance(parts[0].method, (GradientDescent, HeavyBall, Nesterov, ScheduledNesterov))


def _words(parts: Sequence[_Part], steps: int) -> str:
    """The methods on one line; if they differ only in numbers, one method with "|" between the numbers."""
    penalties = [f"{p.weight_decay:g}" for part in parts for p in part.parameters[:1]]
    more = [f"L2 penalty={_either(penalties)}"] if set(penalties) != {"0"} else []
    more += [f"steps_before={steps}"] if steps else []
    if len({type(part.method) for part in parts}) > 1:
        return " | ".join([*(repr(part.method) for part in parts), *more])
    numbers = [part.method.hyperparameters() for part in parts]
    told = [
        f"{name}={_either([repr(given[name]) for given in numbers])}"
        for name in numbers[0]
        if name in parts[0].method.ranges
    ]
    return f"{type(parts[0].method).__name__}({', '.join([*told, *more])})"


def _either(values: Sequence[str]) -> str:
    return " | ".join(values) if len(set(values)) > 1 else values[0]


def _keeps_state(optimizer: Any) -> bool:
    """False for plain gradient descent, which has no state after any number of steps."""
    plain = isinstance(optimizer, torch.optim.SGD)
    return not plain or any(group["momentum"] for group in optimizer.param_groups)


def _moved(group: Mapping[str, Any]) -> list[tuple[int, Tensor, str | None]]:
    """The parameters of a group that move: (place in the group, tensor, name)."""
    names = group.get("param_names") or [None] * len(group["params"])
    return [(j, p, name) for j, (p, name) in enumerate(zip(group["params"], names, strict=True)) if p.requires_grad]


def _of_group(optimizer: Any, i: int, reading: Reading | None, used: bool) -> list[_Part]:
    """The parts of one group: parameters with the same number of steps form one part."""
    kind, group = type(optimizer).__name__, optimizer.param_groups[i]
    reader = READERS[kind]
    refuse_options(kind, i, group, reader.options)
    by_steps: dict[int, list[tuple[int, Tensor, str | None, Mapping[str, Any]]]] = {}
    for j, p, name in _moved(group):
        state = optimizer.state.get(p, {}) if used else {}
        state = {key: value for key, value in state.items() if value is not None}
        if state:
            refuse_state(kind, i, state, reader.state(group))
        elif used and group["weight_decay"] and kind != "SGD":
            raise SpecError(
                f"{name or f'Parameter {j}'} of group {i} has never had a gradient, so {kind} neither moves it nor "
                "lets it decay. Freeze it before the problem is made: parameter.requires_grad_(False)."
            )
        by_steps.setdefault(_steps(kind, state), []).append((j, p, name, state))
    return [
        _part(group, reader, i, steps, members, reading) for steps, members in sorted(by_steps.items(), reverse=True)
    ]


def _steps(kind: str, state: Mapping[str, Any]) -> int:
    """The number of steps that a parameter has made; for SGD, which does not count, 1 means at least one."""
    if not state:
        return 0
    return round(float(state["step"])) if kind != "SGD" else 1


def _part(
    group: Mapping[str, Any],
    reader: Reader,
    i: int,
    steps: int,
    members: Sequence[tuple[int, Tensor, str | None, Mapping[str, Any]]],
    reading: Reading | None,
) -> _Part:
    decoupled = bool(group.get("decoupled_weight_decay"))
    parameters = tuple(
        _parameter(p, name, f"{name or f'parameter {j}'} of group {i}", group["weight_decay"], decoupled)
        for j, p, name, _ in members
    )
    state: dict[str, Tensor] = {}
    for key in members[0][3]:
        values = [member[3][key] for member in members]
        whole = key in ("step", "mu_product")  # numbers that the whole part shares
        state[key] = torch.as_tensor(values[0]).detach().clone() if whole else torch.cat([_flat(x) for x in values])
    n = sum(len(p.values) for p in parameters)
    method, start = reader.read(Group(i, group, reading, steps, state, n))
    return _Part(method, start, parameters, bool(group.get("maximize")), steps)


def _of_ours(optimizer: AsOptimizer, reading: Reading | None, used: bool) -> list[_Part]:
    parts = []
    for i, group in enumerate(optimizer.param_groups):
        members = _moved(group)
        if not members:
            continue
        if len(members) < len(group["params"]):
            raise SpecError(f"Some parameters of group {i} are frozen: give them a group of their own, or none.")
        method, start, steps = optimizer.read(i, reading, used)
        parameters = tuple(_parameter(p, name, f"{name or f'parameter {j}'} of group {i}") for j, p, name in members)
        parts.append(_Part(method, start, parameters, False, steps))
    return parts


def _parameter(p: Tensor, name: str | None, label: str, weight_decay: Any = 0.0, decoupled: bool = False) -> Parameter:
    penalty = 0.0 if decoupled else float(weight_decay)
    return Parameter(p, name, label, _flat(p), tuple(p.shape), penalty, bool(weight_decay))


def _flat(x: Tensor) -> Tensor:
    x = x.detach()
    return (torch.view_as_real(x.resolve_conj()) if x.is_complex() else x).reshape(-1).clone()


__all__ = ["FromTorch", "from_torch"]
