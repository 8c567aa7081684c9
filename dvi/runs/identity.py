"""The identity of a run, in words and numbers that another session reproduces.

Only the run that wrote a file may continue from it.  Schedules are identified by all their values over the run, data by
their content, and functions (a loss, f and P) by their values at a few fixed arguments.  Settings that change only
rounding (``chunk_size``, ``max_directions``) do not count.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dvi.compiler.flows import CompiledFlow
from dvi.methods import Method, SpecError
from dvi.methods.validation import decay_of
from dvi.problems import Problem
from dvi.problems.fingerprint import fingerprint
from dvi.solvers.protocol import Array

_SCALES = (1e-6, 1e-3, 0.1, 1.0, -1.0, 10.0, 1e3, 1.0)  # sizes of the gradients in the calls of a method
_LONG = 1e5  # unit times beyond which schedules are evaluated at whole times only


def identity(
    flow: CompiledFlow, words: Mapping[str, Any], data: Mapping[str, Any], start: float, grid: Array
) -> dict[str, Any]:
    """The identity of a run, as plain data.

    Args:
        flow: one of the run's flows.
        words: settings by name, plain data.
        data: tensors (or pytrees of them) by name, identified by their content.
        start: the clock at time 0, unit times.
        grid: recorded times.
    """
    problem, method = flow.problem, flow.method
    hyperparameters = method.hyperparameters()
    times = _times(start, grid)
    numbers = {
        name: _table(method, name, times) if name in method.scheduled else np.array([float(value)])
        for name, value in hyperparameters.items()
        if name in method.scheduled or _is_number(value)
    }
    others = {
        f"{name} of the method": fingerprint(_contents(hyperparameters[name]))
        for name in hyperparameters.keys() - numbers
    }
    return {
        "words": {
            **words,
            "method": type(method).__qualname__,
            "hyperparameters": sorted(hyperparameters),
            "derivatives": problem.derivatives,
            "w0": fingerprint(problem.w0),
            **others,
            **problem.fingerprints(),
            **{name: None if tree is None else fingerprint(tree) for name, tree in data.items()},
        },
        "times": times,
        "numbers": numbers,
        "loss": _tried_loss(problem),
        "method": _tried_method(method, problem.w0),
    }


def _times(start: float, grid: Array) -> Array:
    """The times at which schedules are evaluated: four a step, and the recorded times, up to the end of the run."""
    end = start + float(grid[-1])
    step = 0.25 if end <= _LONG else 1.0
    return np.unique(np.concatenate([np.arange(0.0, end + 1e-9, step), start + grid]))


def _table(method: Method, name: str, times: Array) -> Array:
    """The values of a schedule, NaN at times where it has none."""
    schedule = method.schedule(name, float(times[-1]))

    def value(t: float) -> float:
        try:
            return schedule.ask(t)
        except SpecError:  # it has no value there
            return np.nan

    return np.array([value(float(t)) for t in times])


def _is_number(value: Any) -> bool:
    if isinstance(value, (bool, str, bytes)) or value is None:
        return False
    try:
        float(value)
    except (TypeError, ValueError, RuntimeError):
        return False
    return True


def _contents(x: Any) -> Any:
    """Replace objects such as a preconditioner by pytrees of tensors and plain data."""
    if isinstance(x, np.ndarray):
        return torch.from_numpy(np.ascontiguousarray(x))
    if isinstance(x, (dict, list, tuple)):
        return pytree.tree_map(lambda leaf: leaf if leaf is x else _contents(leaf), x)
    if isinstance(x, Tensor) or x is None:
        return x
    if callable(x):
        return getattr(x, "__qualname__", type(x).__qualname__)
    if hasattr(x, "__dict__"):
        return {"": type(x).__qualname__, **{name: _contents(value) for name, value in vars(x).items()}}
    return repr(x)


def settings(x: Any) -> str:
    """An object's settings in words that do not contain its address in memory."""
    shown = repr(x)
    if re.search(r" at 0x[0-9a-fA-F]+>$", shown) and hasattr(x, "__dict__"):  # the default repr
        shown = f"{type(x).__qualname__}({vars(x)})"
    return re.sub(r" at 0x[0-9a-fA-F]+", "", shown)


def _noise(w: Tensor, seed: int) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(len(w), generator=generator, dtype=torch.float64, device="cpu").to(w)


def _signature(x: Tensor) -> list[float]:
    """The norm of x and its product with a ramp, which distinguishes a vector from a permuted one."""
    ramp = torch.linspace(1, 2, len(x), dtype=x.dtype, device=x.device)
    return [float(torch.linalg.vector_norm(x)), float(x @ ramp) / len(x) ** 0.5]


def _tried_loss(problem: Problem) -> Array:
    """The losses and the signatures of their gradients, in rows, at w0 and at two points near it."""
    w0, rows = problem.w0, []
    size = 0.05 * max(0.1, float(w0.square().mean().sqrt()))
    with problem.ledger.paused():
        for seed in range(3):
            try:
                loss, g = problem.value_and_grad(w0 + size * _noise(w0, seed) if seed else w0, checked=False)
                rows += [[float(loss)] * 2, _signature(g)]
            except Exception:  # a loss may have no value there
                rows += [[np.nan, np.nan]] * 2
    return np.array(rows)


def _tried_method(method: Method, w0: Tensor) -> Array:
    """Signatures of the steps that a method takes for a sequence of large and small gradients."""
    now, rows = method.at(0.0), []
    try:
        nu, Q, gamma = now.init(w0), now.Q(), decay_of(now, w0)
        memory = None if Q.trivial else Q.initial(w0)
        for seed, scale in enumerate(_SCALES):
            g = scale * _noise(w0, seed)
            nu = pytree.tree_map(torch.add, nu, now.f(nu, g))
            m, memory = (g, None) if memory is None else Q.step(g, memory)
            step = now.P(nu).solve(m)
            rows.append(_signature(step if gamma is None else step + gamma.vector * w0))
    except Exception:  # a user's formula may fail at gradients that do not come from a loss
        pass
    return np.array(rows + [[np.nan, np.nan]] * (len(_SCALES) - len(rows)))
