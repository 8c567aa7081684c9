"""What can be asked of ``dvi compare``: its flags, the names they know, and the objects they stand for."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import torch

import dvi
from dvi.forgetting import Accuracy
from dvi.problems import ProblemError
from dvi.problems.data import usable
from dvi.solve import WarmStart
from dvi.solvers.protocol import Integrator
from dvi.solvers.torchdiffeq import ADAPTIVE

T = TypeVar("T")

#: What makes a thing, and the arguments that its name stands for; flags of the same names come on top.
Recipe = tuple[Callable[..., T], dict[str, Any]]

PROBLEMS: Mapping[str, Recipe[dvi.Problem]] = {
    "digits-mlp": (dvi.problems.digits, {"network": "mlp"}),
    "digits-cnn": (dvi.problems.digits, {"network": "cnn"}),
    "sorting-transformer": (dvi.problems.sorting, {"network": "transformer"}),
    "sorting-rnn": (dvi.problems.sorting, {"network": "rnn"}),
}

METHODS: Mapping[str, Recipe[dvi.Method]] = {
    "gd": (dvi.methods.GradientDescent, {}),
    "rmsprop-norm": (dvi.methods.RMSPropNorm, {"beta2": 0.99}),
    "rmsprop": (dvi.methods.RMSProp, {"beta2": 0.99}),
    "heavy-ball": (dvi.methods.HeavyBall, {}),
    "nesterov": (dvi.methods.Nesterov, {}),
    "adam": (dvi.methods.Adam, {}),
    "nadam": (dvi.methods.NAdam, {}),
    "rmsprop-centred": (dvi.methods.CentredRMSProp, {"beta2": 0.99}),
    "adagrad": (dvi.methods.AdaGrad, {}),
    "adagrad-norm": (dvi.methods.AdaGradNorm, {}),
    "normalized-gd": (dvi.methods.NormalizedGD, {}),
}


def _torchdiffeq(ode_method: str) -> Integrator:
    return dvi.TorchDiffEq(chosen("--ode-method", ode_method, ODE_METHODS))


#: Integrators of the central flow; a flag alone means the first that listens to it.
INTEGRATORS: Mapping[str, Recipe[Integrator]] = {
    "macro-step": (dvi.MacroStep, {}),
    "euler": (dvi.Euler, {}),
    "rk": (dvi.RungeKutta, {}),
    "torchdiffeq": (_torchdiffeq, {"ode_method": "dopri5"}),
    "semi-implicit": (dvi.SemiImplicit, {}),
}

#: Solvers of torchdiffeq that need no further options.
ODE_METHODS = {name: name for name in (*ADAPTIVE, "euler", "midpoint", "rk4")}

ACCURACIES: Mapping[str, Accuracy] = {"paper": "paper", "second-order": "second-order"}

DTYPES = {"float64": torch.float64, "float32": torch.float32}


class UsageError(ValueError):
    """A flag that is wrong or does not apply; the message says which and what would do."""


def shown(metavar: str, default: str) -> Any:
    """How --help shows a flag whose default depends on other flags."""
    import tyro

    return tyro.conf.arg(metavar=metavar, help_behavior_hint=f"(default: {default})" if default else "(required)")


@dataclass(frozen=True)
class Options:
    """What is run: problem, method, processes and integrator."""

    problem: str = "digits-mlp"
    """What is minimised: digits-mlp, digits-cnn (8×8 handwritten digits), sorting-transformer, sorting-rnn."""
    loss: Annotated[str | None, shown("LOSS", "mse for digits, ce for sorting")] = None
    """mse (½ squared distance to one-hot targets) or ce (cross-entropy)."""
    n: Annotated[int | None, shown("COUNT", "1000")] = None
    """How many training examples."""
    classes: Annotated[int | None, shown("COUNT", "10")] = None
    """How many of the ten digits are told apart, 2 to 10 (digits only)."""
    width: Annotated[int | None, shown("COUNT", "32 for mlp, 8 for cnn, 48 for transformer, 64 for rnn")] = None
    """Width of the hidden layers, in neurons or channels."""
    activation: Annotated[str | None, shown("NAME", "tanh for mlp, gelu for cnn and transformer")] = None
    """tanh, gelu, silu, softplus, relu, or beta-gelu:β for x Φ(βx)."""
    seed: Annotated[int | None, shown("SEED", "0")] = None
    """Seed of the examples and of the initial weights."""
    dtype: str = "float64"
    """Precision of all that meets the weights: float64, or float32 (half the memory, less accurate eigenvectors)."""
    device: str = "cpu"
    """Where to compute: cpu, cuda, cuda:1, mps."""
    chunk_size: Annotated[int | None, shown("COUNT", "all at once")] = None
    """How many examples to differentiate at a time: less memory, same result."""

    method: str = "rmsprop"
    """What minimises it: gd; one adaptive step size: rmsprop-norm, adagrad-norm, normalized-gd; one for each weight:
    rmsprop, rmsprop-centred, adagrad; with momentum: heavy-ball, nesterov, adam, nadam."""
    lr: float = 1e-3
    """Learning rate η, positive, in units of weight²/loss for gd, of weight for rmsprop."""
    momentum: Annotated[float | None, shown("β", "0.9")] = None
    """Momentum, 0 to 1 (heavy-ball, nesterov)."""
    beta1: Annotated[float | None, shown("β₁", "0.9")] = None
    """Momentum of the average of gradients, 0 to 1 (adam, nadam)."""
    beta2: Annotated[float | None, shown("β₂", "0.99; adam, nadam: 0.999")] = None
    """Decay β₂ of the average of squared gradients per step, 0 < β₂ < 1 (rmsprop, rmsprop-norm, rmsprop-centred)."""
    eps: Annotated[float | None, shown("ε", "0; 1e-8 for rmsprop-centred, adam and nadam, 1e-10 for adagrad")] = None
    """ε ≥ 0, added to the root of that average or sum, in units of the gradient (all but gd and adagrad-norm)."""
    bias_correction: Annotated[bool | None, shown("True|False", "False; adam: True")] = None
    """Divide the averages by 1 − βᵗ, so that early steps are not too long (rmsprop, rmsprop-norm), or not (adam)."""

    steps: int = 1000
    """How long to run, in steps of the optimizer (= unit times of the flows), after the warm start."""
    runs: tuple[str, ...] = ("discrete", "central", "stable")
    """Which processes: discrete (the optimizer itself), central, map (the central map), stable, ablated (the central
    flow without its curvature penalty)."""
    accuracy: Annotated[str | None, shown("NAME", "paper; with momentum second-order")] = None
    """Of the flows: paper, or second-order (momentum kept as a state), closer to the optimizer where it is stable."""
    integrator: Annotated[str | None, shown("NAME", "macro-step; of second order semi-implicit")] = None
    """How the central flow is integrated: macro-step (cheap), rk (accurate), torchdiffeq, or euler (the paper’s); those
    of second order by semi-implicit."""
    tol: Annotated[float | None, shown("TOL", "0.3 of the oscillation's amplitude; 1e-6 for rk")] = None
    """Error allowed in a step of --integrator macro-step, semi-implicit or rk, in the norm of the weights."""
    dt: Annotated[float | None, shown("TIME", "0.25, the paper’s; 0.5 for semi-implicit")] = None
    """Length of a substep of --integrator euler or semi-implicit, in optimizer steps."""
    order: Annotated[int | None, shown("ORDER", "4")] = None
    """Order of --integrator rk, 2 or 4; breakpoints are located, eigenvectors made anew at every stage."""
    ode_method: Annotated[str | None, shown("NAME", "dopri5")] = None
    """Solver of --integrator torchdiffeq: dopri5, dopri8, bosh3, fehlberg2, adaptive_heun, euler, midpoint or rk4."""
    warm_start: str = "auto"
    """Steps of the real optimizer before time 0: a number, or auto: until the effective sharpness is at most 2."""
    save_every: float = 1.0
    """Time between recorded moments of the flows, in optimizer steps; the optimizer is recorded at every step."""
    eigen_every: float = 5.0
    """Time between looks at the eigenvalues of the optimizer, in optimizer steps; 0 for never."""

    def _given(self, *names: str) -> dict[str, Any]:
        """Those of the flags that were given."""
        flags = {name: getattr(self, name) for name in names}
        return {name: value for name, value in flags.items() if value is not None}

    def _problem(self) -> dvi.Problem:
        recipe = chosen("--problem", self.problem, PROBLEMS)
        dtype = chosen("--dtype", self.dtype, DTYPES)
        for name, count in self._given("n", "classes", "width", "chunk_size").items():
            at_least_one(name, count)
        given = self._given("loss", "n", "classes", "width", "activation", "seed", "chunk_size")
        return _make(recipe, self.problem, given | {"dtype": dtype, "device": _device(self.device)})

    def _method(self) -> dvi.Method:
        given = self._given("lr", "momentum", "beta1", "beta2", "eps", "bias_correction")
        return _make(chosen("--method", self.method, METHODS), self.method, given)

    def _integrator(self) -> Integrator | None:
        given = self._given("tol", "dt", "order", "ode_method")
        name = self.integrator
        if name is None:
            if not given:
                return None
            fitting = [name for name, recipe in INTEGRATORS.items() if not _foreign(recipe, given)]
            if self._second_order() and "semi-implicit" in fitting:
                fitting = ["semi-implicit"]
            if not fitting:
                raise UsageError(f"No integrator listens to all of {', '.join(map(_flag, given))}: give one of them.")
            name = fitting[0]
        return _make(chosen("--integrator", name, INTEGRATORS), f"--integrator {name}", given)

    def _accuracy(self) -> Accuracy | None:
        return None if self.accuracy is None else chosen("--accuracy", self.accuracy, ACCURACIES)

    def _second_order(self) -> bool:
        """Is the central flow of second order, for which there is one integrator only?"""
        accuracy = self._accuracy()
        return accuracy == "second-order" or (accuracy is None and not self._method().at(0.0).Q().trivial)

    def _warm_start(self) -> WarmStart:
        if self.warm_start == "auto":
            return "auto"
        if not self.warm_start.isdecimal():
            raise UsageError(f"--warm-start {self.warm_start}: a number of optimizer steps, or auto.")
        return int(self.warm_start)


# ---- from words to objects ------------------------------------------------------------------------------


def chosen(flag: str, name: str, table: Mapping[str, T]) -> T:
    """What a name stands for in a table."""
    if name not in table:
        raise UsageError(f"{flag} {name}: choose from {', '.join(table)}.")
    return table[name]


def at_least_one(name: str, count: int) -> int:
    """A count, once it was seen to be positive."""
    if count < 1:
        raise UsageError(f"{_flag(name)} {count}: must be 1 or more.")
    return count


def _make(recipe: Recipe[T], called: str, given: dict[str, Any]) -> T:
    """Follow a recipe with the flags that were given, all of which must apply to it."""
    for name in _foreign(recipe, given):
        raise UsageError(f"{_flag(name)} does not apply to {called}; leave it out.")
    make, arguments = recipe
    return make(**(arguments | given))


def _foreign(recipe: Recipe[Any], given: Mapping[str, Any]) -> list[str]:
    known = inspect.signature(recipe[0]).parameters
    return [name for name in given if name not in known]


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _device(name: str) -> torch.device:
    """Return the device, once it was seen to work."""
    try:
        return usable(name)
    except ProblemError as error:
        raise UsageError(f"--device {name} cannot be used here: {error}") from None


__all__ = [
    "INTEGRATORS",
    "METHODS",
    "ODE_METHODS",
    "PROBLEMS",
    "Options",
    "UsageError",
    "at_least_one",
    "chosen",
    "shown",
]
