"""Read one group of a ``torch.optim`` optimizer as a method, and its state as that method's ν and momentum."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dvi.methods.errors import SpecError
from dvi.methods.interop.grouped import Start
from dvi.methods.interop.refusals import AMSGRAD, RMSPROP_MOMENTUM
from dvi.methods.interop.rising import RectifiedAdam, RisingNAdam, ScheduledNesterov
from dvi.methods.interop.scheduler import ZERO, Option, Reading
from dvi.methods.optimizers.adagrad import AdaGrad
from dvi.methods.optimizers.adam import Adam
from dvi.methods.optimizers.adamw import AdamW
from dvi.methods.optimizers.gd import GradientDescent
from dvi.methods.optimizers.heavy_ball import HeavyBall
from dvi.methods.optimizers.nesterov import Nesterov
from dvi.methods.optimizers.rmsprop import RMSProp
from dvi.methods.optimizers.rmsprop_centred import CentredRMSProp
from dvi.methods.spec import Hyperparameter, Method


@dataclass(frozen=True)
class Group:
    """Parameters of one group that have taken the same number of steps.

    Attributes:
        number: index of the group in the optimizer.
        options: the group's options.
        reading: the reading of the schedulers, if there are any.
        steps: number of steps made.
        state: the tensors of the state by name, flat [n], numbers as numbers; {} before the first step.
        n: number of weights.
    """

    number: int
    options: Mapping[str, Any]
    reading: Reading | None
    steps: int
    state: Mapping[str, Tensor]
    n: int

    def lr(self, factor: float = 1.0) -> Hyperparameter:
        """The learning rate, a number or a schedule, times a factor.

        Raises:
            SpecError: if it is zero and no scheduler changes it.
        """
        value = float(self.options["lr"])
        if self.reading is not None:
            first = float(self.options.get("initial_lr", value)) or 1.0
            return Option(self.reading, self.number, "lr", factor=factor, least=ZERO * factor * abs(first))
        if value == 0:
            raise SpecError(
                f"Group {self.number} has lr=0: its parameters do not move. Freeze them instead, before the problem is "
                "made: parameter.requires_grad_(False)."
            )
        return factor * value

    @property
    def cycles(self) -> bool:
        """True if the momentum is scheduled."""
        return self.reading is not None and self.reading.cycles

    def momentum(self, delay: int = 0) -> Hyperparameter:
        """β of SGD, or β₁, a number or a schedule."""
        pair = "betas" in self.options
        name, item = ("betas", 0) if pair else ("momentum", None)
        if self.reading is not None and self.reading.cycles:
            return Option(self.reading, self.number, name, item, delay=delay)
        value = self.options[name]
        return float(value[0]) if pair else float(value)

    def number_of(self, name: str) -> float:
        """An option that is a number."""
        return float(self.options[name])

    @property
    def beta2(self) -> float:
        """β₂."""
        return float(self.options["betas"][1])


Read = Callable[[Group], tuple[Method, Start | None]]


@dataclass(frozen=True)
class Reader:
    """How an optimizer of torch is read.

    Attributes:
        options: the names of its options.
        state: the names in the state of a parameter, given the options.
        read: makes the method and its start from a group.
    """

    options: frozenset[str]
    state: Callable[[Mapping[str, Any]], frozenset[str]]
    read: Read


def _sgd(group: Group) -> tuple[Method, Start | None]:
    o, buffer = group.options, group.state.get("momentum_buffer")
    scheduled = group.cycles
    if not scheduled and float(o["momentum"]) == 0:
        return GradientDescent(group.lr()), None
    if o["nesterov"]:
        beta = float(o["momentum"])
        memory = None if buffer is None else ((1.0, 0.0), (1.0, beta * buffer))
        method: Method = Nesterov(group.lr(), beta)
        if scheduled:
            method = ScheduledNesterov(group.lr(), group.momentum(), group.momentum(delay=1))
        return method, Start({}, memory)
    # with dampening d the buffer is 1 − d times that of a heavy ball, except for the first step, which torch does not
    # damp
    d = float(o["dampening"])
    if not d < 1:
        raise SpecError(f"SGD(dampening={d:g}): the gradient has no part in the step; dampening must be below 1.")
    beta = float(o["momentum"])
    method = HeavyBall(group.lr(1 - d), group.momentum())
    if buffer is None:
        return method, Start({}, ((d / ((1 - d) * beta), 0.0),)) if d and beta else None
    return method, Start({}, ((0.0, buffer / (1 - d)),))


def _rmsprop(group: Group) -> tuple[Method, Start | None]:
    o, state = group.options, group.state
    if o["momentum"]:
        raise SpecError(RMSPROP_MOMENTUM.format(momentum=o["momentum"], alpha=o["alpha"]))
    kind = CentredRMSProp if o["centered"] else RMSProp
    method = kind(lr=group.lr(), beta2=float(o["alpha"]), eps=float(o["eps"]))
    if not state:
        return method, None
    return method, Start({"v": state["square_avg"]} | ({"m": state["grad_avg"]} if o["centered"] else {}))


@dataclass(frozen=True)
class Slowing:
    """The learning rate of Adagrad, lr/(1 + n·lr_decay) after n steps, as a schedule.

    Args:
        lr: a number or a schedule.
        decay: lr_decay.
        steps: how many steps were made before time 0.
    """

    lr: Hyperparameter
    decay: float
    steps: int

    def __call__(self, t: Any) -> Any:
        """Its value at t; constant within a step if lr is scheduled."""
        lr, t = (self.lr(t), int(t)) if callable(self.lr) else (self.lr, t)
        return lr / (1 + (self.steps + t) * self.decay)


def _adagrad(group: Group) -> tuple[Method, Start | None]:
    decay, eps = group.number_of("lr_decay"), group.number_of("eps")
    lr = Slowing(group.lr(), decay, group.steps) if decay else group.lr()
    begin = group.state.get("sum", torch.full((group.n,), group.number_of("initial_accumulator_value")))
    return AdaGrad(lr, eps), Start({"s": begin})


def _adam(group: Group) -> tuple[Method, Start | None]:
    o = group.options
    if o["amsgrad"]:
        raise SpecError(AMSGRAD)
    method = Adam(group.lr(), group.momentum(), group.beta2, group.number_of("eps"))
    if o.get("decoupled_weight_decay"):
        method = AdamW(method.lr, method.beta1, method.beta2, method.eps, weight_decay=group.number_of("weight_decay"))
    return method, _averages(group, ((0.0, group.state.get("exp_avg", 0.0)),))


def _averages(group: Group, memory: tuple[tuple[float, Any], ...] | None) -> Start | None:
    """The start of a method with v and t in its state."""
    if not group.state:
        return None
    v = group.state["exp_avg_sq"]
    return Start({"v": v, "t": torch.tensor(float(group.steps), dtype=torch.float64)}, memory)


def _decoupled(group: Group) -> float:
    """λ of a weight decay that is decoupled from the loss."""
    return group.number_of("weight_decay") if group.options.get("decoupled_weight_decay") else 0.0


@dataclass(frozen=True, eq=False)
class Momenta:
    """The μ of NAdam and their products, step by step.

    Args:
        beta1, decay: β₁ and momentum_decay.
        steps: how many steps were made before time 0.
        products: the product of the μ of these steps, then of later ones as they are needed, in torch's precision.
    """

    beta1: Hyperparameter
    decay: float
    steps: int
    products: list[np.floating[Any]]

    def mu(self, t: int, ahead: int = 0) -> float:
        """The μ of the step from t to t + 1 (t ≥ −1), or of the next one with the present β₁, as in torch."""
        beta1 = float(self.beta1(max(t, 0)) if callable(self.beta1) else self.beta1)
        return beta1 * (1.0 - 0.5 * float(0.96 ** ((self.steps + t + 1 + ahead) * self.decay)))

    def product(self, t: int) -> float:
        """The product of all μ up to that step's."""
        while len(self.products) <= t + 1:
            last = self.products[-1]
            self.products.append(last.dtype.type(last * last.dtype.type(self.mu(len(self.products) - 1))))
        return float(self.products[t + 1])


@dataclass(frozen=True)
class Rise:
    """The schedule a or b of :class:`RisingNAdam`, constant within a step.

    Args:
        momenta: the μ.
        direct: True for a, False for b.
        delay: how many steps earlier to read it.  Before the very first step nothing is remembered and any value
            serves; the first step's is used.
    """

    momenta: Momenta
    direct: bool
    delay: int = 0

    def __repr__(self) -> str:
        return f"{'a' if self.direct else 'b'}(t)" + (", one step earlier" if self.delay else "")

    def __call__(self, t: Any) -> float:
        """Its value."""
        s = max(int(t) - self.delay, -1 if self.momenta.steps else 0)
        product = self.momenta.product(s)
        if self.direct:
            return (1.0 - self.momenta.mu(s)) / (1.0 - product)
        following = self.momenta.mu(s, ahead=1)
        return following / (1.0 - product * following)


def _nadam(group: Group) -> tuple[Method, Start | None]:
    o, state = group.options, group.state
    kind = np.dtype(str(torch.get_default_dtype()).removeprefix("torch.")).type
    product = kind(1.0)
    if state:
        kept = state["mu_product"]
        product = np.dtype(str(kept.dtype).removeprefix("torch.")).type(float(kept))

    if not group.cycles and not float(o["betas"][0]):  # μ = 0: there is no momentum
        fixed = (group.lr(), 0.0, group.beta2, group.number_of("eps"), 1.0, 0.0, 1.0, 1.0)
        return RisingNAdam(*fixed, _decoupled(group)), _averages(group, None)
    momenta = Momenta(group.momentum(), float(o["momentum_decay"]), group.steps, [product])

    def rise(direct: bool, delay: int) -> Rise:
        return Rise(momenta, direct, delay)

    method = RisingNAdam(
        *(group.lr(), group.momentum(), group.beta2, group.number_of("eps")),
        *(rise(True, 0), rise(False, 0), rise(True, 1), rise(False, 1)),
        _decoupled(group),
    )
    if not state:
        return method, None
    a, b = rise(True, 1)(0), rise(False, 1)(0)
    return method, _averages(group, ((1.0, 0.0), (a, b * state["exp_avg"])))


@dataclass(frozen=True)
class Rectification:
    """RAdam's r, or whether the step is rectified; constant within a step.

    Args:
        beta2: β₂.
        steps: how many steps were made before time 0.
        size: True for r; False for 1 if the step is rectified and 0 in the first steps.
    """

    beta2: float
    steps: int
    size: bool

    def __repr__(self) -> str:
        return "r(t)" if self.size else "0, then 1"

    def __call__(self, t: Any) -> float:
        """Its value; before the first rectified step r is 1 and not used."""
        n = self.steps + int(t) + 1
        longest = 2 / (1 - self.beta2) - 1
        length = longest - 2 * n * self.beta2**n / (1 - self.beta2**n)
        if not self.size:
            return float(length > 5)
        if not length > 5:
            return 1.0
        return float(((length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)) ** 0.5)


def _radam(group: Group) -> tuple[Method, Start | None]:
    rectified: Hyperparameter = Rectification(group.beta2, group.steps, size=False)
    rectified = 1.0 if rectified(0) else rectified
    method = RectifiedAdam(
        *(group.lr(), group.momentum(), group.beta2, group.number_of("eps")),
        *(rectified, Rectification(group.beta2, group.steps, size=True)),
        _decoupled(group),
    )
    return method, _averages(group, ((0.0, group.state.get("exp_avg", 0.0)),))


def _names(words: str) -> frozenset[str]:
    return frozenset(words.split())


_ADAM = _names("lr betas eps weight_decay amsgrad maximize decoupled_weight_decay")
_AVERAGES = _names("step exp_avg exp_avg_sq")

READERS: Mapping[str, Reader] = {
    "SGD": Reader(
        _names("lr momentum dampening weight_decay nesterov maximize"),
        lambda o: _names("momentum_buffer"),
        _sgd,
    ),
    "RMSprop": Reader(
        _names("lr momentum alpha eps centered weight_decay maximize"),
        lambda o: _names("step square_avg" + " grad_avg" * bool(o["centered"])),
        _rmsprop,
    ),
    "Adagrad": Reader(
        _names("lr lr_decay eps weight_decay initial_accumulator_value maximize"),
        lambda o: _names("step sum"),
        _adagrad,
    ),
    "Adam": Reader(_ADAM, lambda o: _AVERAGES, _adam),
    "AdamW": Reader(_ADAM, lambda o: _AVERAGES, _adam),
    "NAdam": Reader(
        _names("lr betas eps weight_decay momentum_decay maximize decoupled_weight_decay"),
        lambda o: _AVERAGES | {"mu_product"},
        _nadam,
    ),
    "RAdam": Reader(_names("lr betas eps weight_decay maximize decoupled_weight_decay"), lambda o: _AVERAGES, _radam),
}
