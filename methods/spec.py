"""The declaration of an optimizer: init, f and P; also Q for momentum, and decay for decoupled weight decay.

An optimizer is declared as a state spec (paper, Appendix C.7)

    ν_t = ν_{t−1} + f(ν_{t−1}, ∇L(w_t)),        w_{t+1} = w_t − P(ν_t)⁻¹ ∇L(w_t),

If Q is declared, it filters ∇L(w_t) in the second equation; if decay is declared, (1 − γ)w_t replaces w_t.  Everything
else is derived from that declaration: the discrete optimizer, its stable flow, and its central flow with α, β and the
cone complementarity problem.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, dataclass_transform

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dvi.methods.errors import ScheduleError, SpecError
from dvi.methods.filter import Filter, Memory
from dvi.methods.numbers import number
from dvi.methods.preconditioners.base import Preconditioner
from dvi.methods.schedules import Schedule, as_schedule

Nu = Any  # a pytree of tensors: the optimizer's state ν
Hyperparameter = Any  # a number or a schedule; inside f and P it is always the number

#: The range of a hyperparameter with this name: (a test, the range in words).
RANGES: Mapping[str, tuple[Callable[[float], bool], str]] = {
    "lr": (lambda x: x > 0, "positive"),
    "eps": (lambda x: x >= 0, "zero or positive"),
    "beta1": (lambda x: 0 <= x < 1, "in [0, 1)"),
    "beta2": (lambda x: 0 <= x < 1, "in [0, 1)"),
    "momentum": (lambda x: 0 <= x < 1, "in [0, 1)"),
    "weight_decay": (lambda x: x >= 0, "zero or positive"),
    "share": (lambda x: 0 <= x <= 1, "in [0, 1]"),
}


@dataclass_transform(frozen_default=True)
class Method:
    """An optimizer declared as (init, f, P).  Subclass it; fields are hyperparameters.

    Every subclass becomes a frozen dataclass.  So a complete declaration is

    >>> import torch, dvi
    >>> class AdaGrad(dvi.Method):
    ...     lr: float
    ...     eps: float = 1e-8
    ...     def init(self, w):  return {"s": torch.zeros_like(w)}
    ...     def f(self, nu, g): return {"s": g**2}
    ...     def P(self, nu):    return dvi.Diagonal((nu["s"].sqrt() + self.eps) / self.lr)
    >>> AdaGrad(lr=0.1)
    AdaGrad(lr=0.1, eps=1e-08)

    Numbers of NumPy and tensors of shape [] are converted to Python numbers.

    Any hyperparameter may be a schedule.  A schedule is a callable ``t -> value`` of the number t of steps taken so far
    (t = 0 at the first step; it is also the flow's time), or a sequence with one value a step.  Inside ``f`` and ``P``,
    ``self.lr`` is then the value at the current t, and dP/dt enters the flow (C.7).  The optimizer uses the values at
    whole t.  A run of n steps asks for 0 ≤ t ≤ n; a value at t = n is not required.

    A schedule may jump.  If it jumps between the whole numbers t − 1 and t, the flow jumps at t: the step that starts
    at t is the first with the new value.  Every integrator ends a step there.  A table (a sequence, or ``lambda t:
    values[int(t)]``) jumps at every whole number.  If its values change steadily (one change is at most twice the one
    before it or after it, or below 1 %), the flow uses the broken line through (t + ½, values[t]) instead.  Otherwise
    each value holds from t to t + 1.  In both cases ∫ dt between jumps is the optimizer's sum.

    ``f`` and ``P`` must be made of differentiable torch operations (or operators).  They must not modify their
    arguments in place.  Apart from ν, g and scheduled hyperparameters, they must not read anything that changes between
    steps.  When a flow is compiled, the derivatives of both are compared with difference quotients.  Operations that
    lose derivatives (``.item()``, ``.detach()``, NumPy, ``torch.no_grad()``) are refused by name.  A part of ν that is
    zero and stays zero does no harm, however steep f or P is there (√ν).  A flow calls f and P a few times to
    differentiate them and then replays the recorded tensor operations.  If their control flow depends on numbers in ν
    or g, they are called every time.

    A part of ν that keeps nothing of its own value (``1 + ∂f/∂ν = 0``: the present ‖g‖², a delayed copy) has no
    differential equation, so it is refused.  The exception is a diagonal ∂f/∂ν in a method with an attribute
    ``memory`` > 0 (unit times).  In its flows, such a part relaxes towards its value within that time; the optimizer is
    unchanged (:class:`~dvi.methods.NormalizedGD`).

    Raises:
        SpecError: when the method is made, if a hyperparameter is not finite or outside the range that :attr:`ranges`
            gives for its name (``lr`` positive, ``eps`` and ``weight_decay`` ≥ 0, ``beta1``, ``beta2``, ``momentum`` in
            [0, 1)).  When a run starts, if a schedule raises anything, gives something that is not a finite number,
            leaves its range, or gives two values at one time.  If that happens later, the run ends with the results up
            to that time.
    """

    #: Ranges by field name; a subclass may extend them.
    ranges: ClassVar[Mapping[str, tuple[Callable[[float], bool], str]]] = RANGES

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        dataclasses.dataclass(frozen=True)(cls)

    def __post_init__(self) -> None:
        for name, given in self.hyperparameters().items():
            value = number(given)
            if name in self.ranges:
                value = as_schedule(value, self._called(name))
            if value is not given:
                object.__setattr__(self, name, value)
            if callable(value):
                self.check_range(name, self.schedule(name).asked_again(0), at=0.0)
            elif isinstance(value, (int, float)) and not isinstance(value, bool):
                self.check_range(name, value)
            elif name in self.ranges:
                raise SpecError(f"{type(self).__name__}({name}={value!r}): {name} must be a number or a schedule.")

    # ---- what an optimizer declares -------------------------------------------------------------------

    def init(self, w: Tensor) -> Nu:
        """ν before the first update: a pytree (dict, tuple, …) of tensors; ``{}`` for a method without state."""
        return {}

    def f(self, nu: Nu, g: Tensor) -> Nu:
        """ν_t − ν_{t−1}, given ν_{t−1} and the gradient g [d] at w_t; it has the structure of ν."""
        return {}

    def P(self, nu: Nu) -> Preconditioner:
        """The preconditioner, including the learning rate, so that the critical threshold is 2."""
        raise SpecError(f"{type(self).__name__} declares no P(nu): say which preconditioner its state makes.")

    def Q(self) -> Filter:
        """Momentum: the linear filter Q that acts on the gradients, w_{t+1} = w_t − P(ν_t)⁻¹ Q g_t."""
        return Filter()

    def remembered(self, w: Tensor, g: Tensor) -> Memory:
        """The memory of the filter before the first step, given w [d] and the gradient g [d] there: all zeros."""
        return self.at(0.0).Q().initial(w)

    def decay(self) -> Any:
        """Decoupled weight decay γ in [0, 1): w_{t+1} = (1 − γ)w_t − P(ν_t)⁻¹ Q g_t.

        None means no decay.  A number, often ``self.lr * self.weight_decay``, holds for all weights.  A tensor [d], or
        a list of pairs (γ, how many weights) for consecutive stretches of w, gives γ for each weight.  γ must then be
        constant over each part of P that is neither a ``Scalar`` nor a ``Diagonal``.
        """
        return None

    # ---- what follows from it -------------------------------------------------------------------------

    def hyperparameters(self) -> dict[str, Any]:
        """The fields by name; schedules are not evaluated."""
        if not dataclasses.is_dataclass(self):
            return {}
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @property
    def scheduled(self) -> tuple[str, ...]:
        """Names of the hyperparameters that are schedules."""
        return tuple(name for name, value in self.hyperparameters().items() if callable(value))

    def schedule(self, name: str, end: float = math.inf) -> Schedule:
        """The schedule of a hyperparameter as a flow reads it, for a run until ``end`` (unit times)."""
        return Schedule(getattr(self, name), self._called(name), end)

    def at(self, t: float) -> Method:
        """This method with every schedule replaced by its value at t (unit times, the number of steps taken so far)."""
        return self.with_values(t, {name: self.schedule(name).ask(t) for name in self.scheduled}, {})

    def with_values(
        self, t: float, values: Mapping[str, float], slopes: Mapping[str, float], dt: Tensor | float = 0.0
    ) -> Method:
        """This method with its schedules replaced by numbers, their values at t plus ``slopes`` (if any) times dt.

        Raises:
            SpecError: if a number is out of its range.
        """
        if not values:
            return self
        now = copy.copy(self)
        for name, value in values.items():
            self.check_range(name, value, at=t)
            object.__setattr__(now, name, value + slopes[name] * dt if slopes else value)
        return now

    def update(self, nu: Nu, g: Tensor, t: float) -> Nu:
        """ν_t from ν_{t−1} and the gradient at w_t."""
        return pytree.tree_map(torch.add, nu, self.at(t).f(nu, g))

    def _called(self, name: str) -> str:
        return f"{type(self).__name__}({name}=…)"

    def check_range(self, name: str, value: float, at: float | None = None) -> None:
        """Raise SpecError unless a hyperparameter's value (or its schedule's value at a time) is in its range."""
        where = f"{type(self).__name__}({name}={value!r})" + ("" if at is None else f" at t = {at:g}")
        kind = SpecError if at is None else ScheduleError
        if not math.isfinite(value):
            raise kind(f"{where}: {name} must be finite.")
        holds, words = self.ranges.get(name, (lambda x: True, ""))
        if not holds(value):
            raise kind(f"{where}: {name} must be {words}.")


class FunctionMethod(Method):
    """A method made of three plain functions: ``(init, f, P)`` without a class."""

    init_fn: Callable[[Tensor], Nu]
    f_fn: Callable[[Nu, Tensor], Nu]
    P_fn: Callable[[Nu], Preconditioner]

    def hyperparameters(self) -> dict[str, Any]:
        """Empty: the functions hold their own hyperparameters."""
        return {}

    def init(self, w: Tensor) -> Nu:
        """ν before the first update."""
        return self.init_fn(w)

    def f(self, nu: Nu, g: Tensor) -> Nu:
        """ν_t − ν_{t−1}."""
        return self.f_fn(nu, g)

    def P(self, nu: Nu) -> Preconditioner:
        """The preconditioner."""
        return self.P_fn(nu)


def as_method(method: Method | tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]) -> Method:
    """A :class:`Method` from a method or from a triple ``(init, f, P)`` of functions.

    Raises:
        SpecError: if it is neither.
    """
    if isinstance(method, Method):
        return method
    if isinstance(method, tuple) and len(method) == 3 and all(callable(part) for part in method):
        return FunctionMethod(*method)
    what = (
        f"the class {method.__name__}; make one, as in {method.__name__}(lr=…)"
        if isinstance(method, type)
        else (f"a {type(method).__name__}")
    )
    raise SpecError(f"A method is a dvi.Method or a triple (init, f, P) of functions, not {what}.")
