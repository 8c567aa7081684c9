"""Binds an optimizer read from torch to a problem: finds which parameter is which part of w."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from dvi.methods import Method, SpecError, as_method
from dvi.methods.interop.from_torch import Begin, FromTorch, from_torch
from dvi.problems import ModuleProblem, Problem

#: The arguments that count as a method.
MethodLike = Method | Optimizer | tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]


def bind(problem: Problem, method: MethodLike) -> tuple[Problem, Method]:
    """The problem that a method minimises, and the method for its flat weights.

    For an optimizer of torch, the problem gets the optimizer's penalty (``weight_decay``) and sign (``maximize``), and
    starts from the present values of its parameters.  Otherwise the problem stays as it is.

    Raises:
        SpecError: if parameters and weights do not match one to one; the message names them.
    """
    declared = read(method)
    if not isinstance(declared, FromTorch):
        return problem, declared
    places = _places(problem, declared)
    if declared.begins == "state":
        problem = _moved(problem, declared, places)
    if declared.maximises:
        problem = problem.negated()
    return _penalised(problem, declared, places), declared.placed(places)


def read(method: MethodLike, scheduler: Any = None, start: Begin | None = None) -> Method:
    """Return a method, made from an optimizer of torch and its scheduler if one is given.

    Raises:
        ValueError: if a scheduler or a start is given for anything but an optimizer of torch.
    """
    if isinstance(method, Optimizer):
        return from_torch(method, scheduler, start=start or "auto")
    if scheduler is not None or start is not None:
        raise ValueError(
            f"scheduler= and start={start or 'state'!r} are for a torch.optim.Optimizer, not for a "
            f"{type(method).__name__}. dvi.from_torch(optimizer, scheduler, start=…) takes both; any other method has "
            "schedules for hyperparameters (lr=…) and starts from a dvi.State."
        )
    return as_method(method)


def _places(problem: Problem, method: FromTorch) -> dict[int, Tensor]:
    """The entries of w of every parameter of the optimizer, by its number."""
    if not isinstance(problem, ModuleProblem):
        return _single(problem, method)
    found: dict[str, int] = {}
    for i, parameter in enumerate(method.parameters):
        name = problem.name_of(parameter.tensor) or parameter.name
        if name is None:
            raise SpecError(
                f"{parameter.label} (shape {list(parameter.shape)}) is no parameter of the model of {problem.name}, "
                "and the optimizer does not know its name. Make the problem from the model that the optimizer "
                "moves, or the optimizer with names: torch.optim.…(model.named_parameters(), …)."
            )
        if name not in problem.parameter_shapes:
            raise SpecError(
                f"{parameter.label} is called {name}, and the problem has no such weights; it has "
                f"{', '.join(problem.parameter_shapes)}. Freeze it before both are made: "
                "parameter.requires_grad_(False); or make the problem from the whole model."
            )
        if name in found:
            raise SpecError(f"Two parameters of the optimizer are called {name}.")
        expected = tuple(problem.parameter_shapes[name])
        if expected not in (parameter.shape, (*parameter.shape, 2)) or len(parameter.values) != _size(expected):
            raise SpecError(f"{name} has shape {list(parameter.shape)} in the optimizer, {list(expected)} in w.")
        if parameter.decays and name in problem.held:
            raise SpecError(
                f"{name} has a padding row, which stays as it is in the problem, while torch lets it decay. Set "
                "weight_decay=0 for the group of this parameter, or padding_idx=None."
            )
        found[name] = i
    missing = [name for name in problem.parameter_shapes if name not in found]
    if missing:
        raise SpecError(
            f"The optimizer does not move {', '.join(missing)}, which the problem takes for weights. Hold them fixed "
            "before you make the problem: parameter.requires_grad_(False); or add them to the optimizer."
        )
    index = torch.arange(problem.dim, device=problem.device)
    return {i: index[problem.parameter_slices[name]] for name, i in found.items()}


def _single(problem: Problem, method: FromTorch) -> dict[int, Tensor]:
    """The places for a problem without named parameters: w itself is the only parameter."""
    sizes = [len(parameter.values) for parameter in method.parameters]
    if sizes != [problem.dim]:
        raise SpecError(
            f"{problem.name} is a loss of one flat vector of {problem.dim} weights, but the optimizer moves tensors of "
            f"{', '.join(map(str, sizes))}, and their order in the vector is unknown. Make the problem from the model, "
            "dvi.Problem.from_module(model, …), or let the optimizer move one flat tensor."
        )
    return {0: torch.arange(problem.dim, device=problem.device)}


def _size(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())


def _scattered(problem: Problem, values: Mapping[int, Any], places: Mapping[int, Tensor]) -> Tensor:
    """A vector like w with the values of every parameter in its places."""
    whole = torch.zeros_like(problem.w0)
    for i, index in places.items():
        value = values[i]
        whole[index] = value.to(whole) if isinstance(value, Tensor) else whole.new_tensor(value)
    return whole


def _moved(problem: Problem, method: FromTorch, places: Mapping[int, Tensor]) -> Problem:
    """The problem that starts at the values of the optimizer's parameters when it was read."""
    w = _scattered(problem, {i: p.values for i, p in enumerate(method.parameters)}, places)
    return problem if torch.equal(w, problem.w0) else problem.starting_at(w)


def _penalised(problem: Problem, method: FromTorch, places: Mapping[int, Tensor]) -> Problem:
    """The problem with the optimizer's own weight decay, if that is a penalty in the loss."""
    strengths = [parameter.weight_decay for parameter in method.parameters]
    if not any(strengths):
        return problem
    if problem.weight_decay:
        raise SpecError(
            f"Both the optimizer (weight_decay={max(strengths):g}) and the problem "
            f"(weight_decay={problem.weight_decay:g}) add a penalty to the loss. Leave it out of the problem "
            "(weight_decay= of from_module, or penalised); the penalty of the optimizer is added automatically."
        )
    if len(set(strengths)) == 1:
        return problem.penalised(strengths[0])
    return problem.penalised(_scattered(problem, dict(enumerate(strengths)), places))


__all__ = ["MethodLike", "bind", "read"]
