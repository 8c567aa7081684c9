"""Use any declared method as a ``torch.optim.Optimizer``, in the user's own training loop."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from dvi.methods.errors import SpecError
from dvi.methods.filter import Memory
from dvi.methods.interop.grouped import Start
from dvi.methods.interop.scheduler import ZERO, Option, Reading
from dvi.methods.spec import Method, as_method
from dvi.methods.validation import decay_of


class AsOptimizer(Optimizer):
    """A method of this library as an optimizer of PyTorch: ``AsOptimizer(RMSPropNorm(0.1, 0.99), model.parameters())``.

    The method sees each group as one weight vector, in the order of its parameters.  So a method that couples weights
    (by a norm, a matrix) couples them within a group.  The method's numeric hyperparameters are options of the group:
    groups may differ in them, and a scheduler may change ``group["lr"]``.  Hyperparameters that are schedules are
    evaluated at the number of steps that the group has made.

    Each group has one state, stored at its first parameter; ``state_dict`` and ``load_state_dict`` work as usual.

    Args:
        method: the declaration.
        params: parameters, or groups of them; a group may have a ``method`` of its own.

    Raises:
        SpecError: if ``method`` is not a method, if a group has an option that its method lacks, or if its parameters
            are complex.
    """

    def __init__(self, method: Method, params: Iterable[Any]) -> None:
        self._method = as_method(method)
        super().__init__(params, {})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; the method's numbers become its options unless it has its own."""
        known = {"params", "param_names", "name", "method"}
        method = as_method(param_group.get("method", self._method))
        options = _numbers(method)
        unknown = sorted(param_group.keys() - known - options.keys())
        if unknown:
            raise SpecError(f"{method} has no hyperparameter {', '.join(unknown)} that is a number.")
        super().add_param_group({"method": method, **options, **param_group})
        group = self.param_groups[-1]
        if any(p.is_complex() for p in group["params"]):
            raise SpecError("Complex parameters: a method acts on real vectors. Use torch.view_as_real(p).")
        self.declared(group)

    def declared(self, group: dict[str, Any]) -> Method:
        """The method of a group with the group's present options."""
        method: Method = group["method"]
        options = {name: group[name] for name in _numbers(method)}
        changed = {name: value for name, value in options.items() if value != getattr(method, name)}
        if not changed:
            return method
        now = copy.copy(method)
        for name, value in changed.items():
            value = value.item() if isinstance(value, Tensor) else value
            value = _least(group, method) if name == "lr" and value == 0 else value
            now.check_range(name, value)
            object.__setattr__(now, name, value)
        return now

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_method": self._method}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every group; parameters without a gradient have a gradient of zero.

        Args:
            closure: evaluates the loss again and returns it.

        Raises:
            NotPositiveDefiniteError: if a P(ν) is not positive definite.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if any(p.grad is not None for p in group["params"]):
                self._step(group)
        return loss

    def _step(self, group: dict[str, Any]) -> None:
        params = group["params"]
        w = torch.cat([p.reshape(-1) for p in params])
        g = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in params])
        state = self.state[params[0]]
        t = int(state.get("step", 0))
        method = self.declared(group).at(float(t))
        nu = state["nu"] if state else method.init(w)
        nu = pytree.tree_map(torch.add, nu, method.f(nu, g))
        P, Q = method.P(nu), method.Q()
        P.check(g)
        m, memory = g, Memory()
        if not Q.trivial:
            memory = tuple(state["memory"]) if state else method.remembered(w, g)
            m, memory = Q.step(g, memory)
        gamma = decay_of(method, w)
        kept = w if gamma is None else (1 - (gamma.number if gamma.uniform else gamma.vector)) * w
        w = kept - P.solve(m)
        self.state[params[0]] = {"step": t + 1, "nu": nu, "memory": list(memory)}
        for p, new in zip(params, torch.split(w, [p.numel() for p in params]), strict=True):
            p.copy_(new.view_as(p))

    def read(self, i: int, reading: Reading | None, used: bool) -> tuple[Method, Start | None, int]:
        """The method of group i, its state, and the number of steps it has made."""
        group = self.param_groups[i]
        method = self.declared(group)
        state = self.state.get(group["params"][0], {}) if used else {}
        steps = int(state.get("step", 0))
        if method.scheduled and steps:
            method = _later(method, steps)
        if reading is not None:
            method = _scheduled(method, reading, i, _least(group, method))
        if not state:
            return method, None, 0
        nu = pytree.tree_map(torch.clone, state["nu"])
        memory = tuple((0.0, x.clone()) for x in state["memory"])
        return method, Start(nu, memory or None), steps


def _numbers(method: Method) -> dict[str, float]:
    """The hyperparameters that are numbers."""
    return {
        name: value
        for name, value in method.hyperparameters().items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }


class _Later:
    """A schedule read some steps later."""

    def __init__(self, schedule: Callable[[Any], Any], steps: int) -> None:
        self.schedule, self.steps = schedule, steps

    def __call__(self, t: Any) -> Any:
        return self.schedule(t + self.steps)


def _later(method: Method, steps: int) -> Method:
    now = copy.copy(method)
    for name in method.scheduled:
        object.__setattr__(now, name, _Later(getattr(method, name), steps))
    return now


def _least(group: dict[str, Any], method: Method) -> float:
    """The positive number that replaces a learning rate of zero."""
    return ZERO * abs(float(group.get("initial_lr", getattr(method, "lr", 0.0))))


def _scheduled(method: Method, reading: Reading, i: int, least: float) -> Method:
    """The method with its learning rate as schedulers change it."""
    if "lr" not in _numbers(method):
        return method
    now = copy.copy(method)
    object.__setattr__(now, "lr", Option(reading, i, "lr", least=least))
    return now


__all__ = ["AsOptimizer"]
