"""The declaration of an optimizer: init, f and P, Q where it has momentum, decay where weights decay by themselves.

An optimizer is declared as a state spec (paper, Appendix C.7)

    ν_t = ν_{t−1} + f(ν_{t−1}, ∇L(w_t)),        w_{t+1} = w_t − P(ν_t)⁻¹ ∇L(w_t),

with a filter Q before ∇L(w_t) and (1 − γ)w_t in place of w_t where they are declared.  Everything else — the discrete
optimizer, its stable flow, its central flow with α, β and the cone complementarity problem — is derived from that
declaration.
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
from dvi.methods.filter import Filter
from dvi.methods.numbers import number
from dvi.methods.preconditioners.base import Preconditioner
from dvi.methods.schedules import Schedule, as_schedule

Nu = Any  # a pytree of tensors: the optimizer's state ν
Hyperparameter = Any  # a number or a schedule; inside f and P always the number

#: What a hyperparameter of this name may be: (does it hold?, in words).
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

    A subclass is made a frozen dataclass by being declared, so that

    >>> import torch, dvi
    >>> class AdaGrad(dvi.Method):
    ...     lr: float
    ...     eps: float = 1e-8
    ...     def init(self, w):  return {"s": torch.zeros_like(w)}
    ...     def f(self, nu, g): return {"s": g**2}
    ...     def P(self, nu):    return dvi.Diagonal((nu["s"].sqrt() + self.eps) / self.lr)
    >>> AdaGrad(lr=0.1)
    AdaGrad(lr=0.1, eps=1e-08)

    is the whole of it.  NumPy's numbers and tensors of shape [] become Python's.

    Any hyperparameter may be a schedule: a callable ``t -> value`` of the number t of steps taken so far (t = 0 at the
    first step; the flow's time), or a sequence with one value a step.  ``self.lr`` is then the value at the current t
    wherever ``f`` or ``P`` reads it, and dP/dt enters the flow (C.7).  The optimizer uses the values at whole t.  A run
    of n steps asks for 0 ≤ t ≤ n, and does without a value at t = n.

    A schedule may jump.  A jump between the whole numbers t − 1 and t is one at t for the flow, which every integrator
    lands on: the first step with the new value is the one from t on.  A table (a sequence, or ``lambda t:
    values[int(t)]``) jumps at every whole number.  Where its values change steadily (one change is at most twice the
    one before it or after it, or below 1 %), the flow takes the broken line through (t + ½, values[t]) instead;
    elsewhere each value holds from t to t + 1.  Either way ∫ dt between jumps is the optimizer's sum.

    ``f`` and ``P`` must be made of torch operations (or operators) that can be differentiated, must not modify
    their arguments in place, and must not read anything that changes from one step to the next except ν, g and
    scheduled hyperparameters.  Where a flow is compiled, derivatives of both are compared with differences of them, and
    what is lost (``.item()``, ``.detach()``, NumPy, ``torch.no_grad()``) is refused by name.  A part of ν that is zero
    and stays zero does no harm, however steep f or P is there (√ν).  A flow calls f and P some times to differentiate
    them and then replays the tensor operations that it saw (not with control flow that depends on numbers in ν or g,
    which is called every time).

    A part of ν that keeps nothing of itself (``1 + ∂f/∂ν = 0``: the present ‖g‖², a delayed copy) has no differential
    equation and is refused, unless ∂f/∂ν is diagonal and the method has an attribute ``memory`` > 0, unit times: in the
    flows, not in the optimizer, such a part then relaxes towards its value within that time
    (:class:`~dvi.methods.NormalizedGD`).

    Raises:
        SpecError: where the method is made, if a hyperparameter is not finite or not in the range that
            :attr:`ranges` gives for its name (``lr`` positive, ``eps`` and ``weight_decay`` ≥ 0, ``beta1``,
            ``beta2``, ``momentum`` in [0, 1)).  Where a run starts, if a schedule raises anything, gives what is no
            finite number, leaves its range or gives two values at one time; later on that ends the run, with what was
            computed until then.
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
        """ν_t − ν_{t−1}, given ν_{t−1} and the gradient g [d] at w_t; of the structure of ν."""
        return {}

    def P(self, nu: Nu) -> Preconditioner:
        """Make the preconditioner, the learning rate folded in, so that the critical threshold is 2."""
        raise SpecError(f"{type(self).__name__} declares no P(nu): say which preconditioner its state makes.")

    def Q(self) -> Filter:
        """Momentum: the linear filter that makes the step's m_t of the gradients, w_{t+1} = w_t − P(ν_t)⁻¹ Q g_t."""
        return Filter()

    def decay(self) -> Any:
        """Decoupled weight decay γ in [0, 1): w_{t+1} = (1 − γ)w_t − P(ν_t)⁻¹ Q g_t.

        None: there is none.  A number, often ``self.lr * self.weight_decay``: for all weights.  A tensor [d], or a list
        of pairs (γ, how many weights) for consecutive stretches of w: weight by weight.  γ must then be one number over
        each part of P that is no ``Scalar`` or ``Diagonal``.
        """
        return None

    # ---- what follows from it -------------------------------------------------------------------------

    def hyperparameters(self) -> dict[str, Any]:
        """The fields by name, schedules as they were given."""
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

    def at(self, t: float, dt: Tensor | float = 0.0) -> Method:
        """This method with every schedule replaced by its value at t, to first order in dt.

        Args:
            t: unit times, the number of steps taken so far.
            dt: a zero-valued tensor that carries a tangent when dP/dt is wanted: a scheduled value becomes
                ``value(t) + slope(t)·dt``.
        """
        read = {name: self.schedule(name) for name in self.scheduled}
        values = {name: schedule.ask(t) for name, schedule in read.items()}
        slopes = {name: schedule.slope(t) for name, schedule in read.items()} if isinstance(dt, Tensor) else {}
        return self.with_values(t, values, slopes, dt)

    def with_values(
        self, t: float, values: Mapping[str, float], slopes: Mapping[str, float], dt: Tensor | float = 0.0
    ) -> Method:
        """This method with numbers for its schedules, those at t, and ``slopes`` (if any) times dt added.

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
        """Raise SpecError unless a hyperparameter's value (that of its schedule at a time) is in its range."""
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
        """None: the functions have closed over theirs."""
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
