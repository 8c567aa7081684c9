"""Finds the module whose derivatives are wrong: each is tried alone, on its own inputs in the forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from dvi.problems.derivatives.autodiff import Autodiff
from dvi.problems.derivatives.check import compare
from dvi.problems.derivatives.protocol import Part
from dvi.problems.errors import DerivativeError
from dvi.problems.examples import Examples, arguments
from dvi.problems.ledger import Ledger


def name_culprit(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    criterion: Callable[[Any, Any], Tensor],
    samples: Sequence[tuple[Examples, Examples]],
) -> str:
    """Return the innermost module (or the criterion) whose derivatives disagree with differences, in words.

    Args:
        model: the network.
        tensors: its parameters and buffers by name, used in place of its own.
        criterion: the function applied to its outputs.
        samples: inputs with their targets; the first ones that the model and the criterion accept are used.

    Raises:
        Exception: whatever the model or the criterion raise, if they accept none of the samples.

    """
    calls, outputs, targets = _first_accepted(model, tensors, criterion, samples)
    alone: list[str] = []
    for path, module in _innermost_first(model):
        if path not in calls:
            continue
        prefix = f"{path}." if path else ""
        own = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        name = f"module {path or '(the model itself)'} ({type(module).__name__})"
        try:
            fault = _fault(_module_part(module, own, *calls[path]))
        except Exception:  # a module may need something that only the whole forward pass provides
            alone.append(name)
            continue
        if fault:
            return f"{name}: {fault}"
    try:
        fault = _fault(_flat_part(lambda out: criterion(out, targets), [outputs]))
    except Exception:
        fault = None
        alone.append("the criterion")
    if fault:
        return f"the criterion: {fault}"
    untried = f" ({', '.join(alone)} cannot be tried alone)" if alone else ""
    return f"no module is wrong when tried alone{untried}; look at what the model does between them"


Call = tuple[tuple[Any, ...], dict[str, Any]]


def _first_accepted(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    criterion: Callable[[Any, Any], Tensor],
    samples: Sequence[tuple[Examples, Examples]],
) -> tuple[dict[str, Call], Any, Examples]:
    """Return the calls of modules, the outputs and the targets of the first sample that raises no error."""
    for i, (inputs, targets) in enumerate(samples):
        try:
            calls, outputs = _record_calls(model, tensors, inputs)
            with torch.no_grad():
                criterion(outputs, targets)
        except Exception:
            if i == len(samples) - 1:
                raise
        else:
            return calls, outputs, targets
    raise ValueError("no examples")


def _record_calls(model: nn.Module, tensors: Mapping[str, Tensor], inputs: Examples) -> tuple[dict[str, Call], Any]:
    """Return the arguments of the first call of each module in a forward pass, and its outputs."""
    calls: dict[str, Call] = {}
    with ExitStack() as hooks, torch.no_grad():
        for path, module in model.named_modules():

            def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], path: str = path) -> None:
                if path not in calls:  # copied, because a module may write to its input (inplace=True)
                    calls[path] = tree_map(_copied, (args, kwargs))

            hooks.enter_context(module.register_forward_pre_hook(record, with_kwargs=True))
        outputs = functional_call(model, dict(tensors), *arguments(inputs))
    return calls, outputs


def _copied(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


def _innermost_first(model: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    for name, child in model.named_children():
        yield from _innermost_first(child, f"{path}.{name}" if path else name)
    yield path, model


def _module_part(
    module: nn.Module, tensors: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Part, Tensor] | None:
    def call(parameters: dict[str, Tensor], arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        return functional_call(module, parameters, arguments, keywords)

    return _flat_part(call, [tensors, args, kwargs])


def _flat_part(call: Callable[..., Any], arguments: list[Any]) -> tuple[Part, Tensor] | None:
    """Return a scalar function of all floating-point tensors in ``arguments``, flattened, and their values, if any.

    The outputs are summed with random weights, so that none of them can cancel another.
    """
    leaves, structure = tree_flatten(arguments)
    moving = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    if not moving:
        return None
    ends = torch.tensor([leaves[i].numel() for i in moving]).cumsum(0).tolist()

    def part(w: Tensor) -> Tensor:
        filled = list(leaves)
        for i, start, end in zip(moving, [0, *ends], ends, strict=False):
            filled[i] = w[start:end].clone().view(leaves[i].shape)  # a copy may be written to
        total = w.new_zeros(())
        generator = torch.Generator("cpu").manual_seed(0)
        for out in tree_leaves(call(*tree_unflatten(filled, structure))):
            if isinstance(out, Tensor) and out.is_floating_point():
                weights = torch.randn(out.shape, generator=generator, dtype=torch.float64, device="cpu")
                total = total + (out * weights.to(out)).sum()
        return total

    return part, torch.cat([leaves[i].detach().reshape(-1) for i in moving])


def _fault(tried: tuple[Part, Tensor] | None) -> str | None:
    if tried is None:
        return None
    part, w = tried
    try:
        found, _ = compare([part], Autodiff([part], Ledger()), w)
    except DerivativeError as error:
        return str(error).splitlines()[0]
    return str(found) if found else None
