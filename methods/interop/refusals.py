"""What of ``torch.optim`` has no flow, and why."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.optim import Optimizer

from dvi.methods.errors import SpecError

#: Optimizers that do not fit: the reason, and the nearest thing that does.
REASONS: Mapping[str, str] = {
    "Adadelta": "P contains the average of updates before the step, a delayed copy without memory. The nearest that "
    "fits: RMSprop.",
    "Adafactor": "torch's Adafactor clips the update and takes steps relative to ‖w‖, and P may depend on ν and t "
    "only. The nearest that fits: dvi.methods.Adafactor, without both.",
    "Adamax": "ν is a maximum of the present gradient and the past, which has a kink where iterates oscillate. The "
    "nearest that fits: Adam.",
    "ASGD": "it is gradient descent with an additional average of w, and eta falls with the number of steps. Pass SGD "
    "with a scheduler; a central flow is itself an average over the oscillation.",
    "LBFGS": "the step comes from differences of gradients and a line search, not from a P(ν). The nearest that fits: "
    "dvi.methods.Preconditioned with a fixed matrix.",
    "Muon": "the orthogonalised gradient depends on the present buffer only: P has no memory. The nearest that fits: "
    "dvi.methods.Shampoo(one_sided=True, beta2=…), which is Muon as beta2 tends to 0.",
    "Rprop": "the step is the sign of the gradient, and its size jumps when the sign changes. In an oscillation this "
    "happens at every step. The nearest that fits: RMSprop with a small alpha.",
    "SparseAdam": "it moves only weights whose gradient is stored in this step. Use dense gradients (sparse=False) and "
    "Adam.",
}

AMSGRAD = (
    "amsgrad=True keeps the largest v of all steps: a maximum never forgets, and has a kink where iterates oscillate. "
    "Use amsgrad=False."
)
RMSPROP_MOMENTUM = (
    "RMSprop(momentum={momentum:g}) averages steps P⁻¹g, each with the P of its own time, while a filter averages "
    "gradients before the present P acts. The nearest that fits: Adam(betas=({momentum:g}, {alpha:g})), which averages "
    "gradients, or momentum=0."
)

#: Options of groups that change nothing but rounding and speed.
HARMLESS = frozenset({"foreach", "fused", "capturable", "differentiable"})
#: Entries of groups that schedulers write for their own use.
BOOKKEEPING = frozenset({"initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum", "swa_lr"})
#: Entries of a group that are not options of the optimizer.
BESIDE = BOOKKEEPING | {"params", "param_names", "name"}


def refuse_class(optimizer: Any, readable: Mapping[str, Any]) -> None:
    """Raise SpecError unless this is, exactly, an optimizer of torch that can be read."""
    kind = type(optimizer)
    if not isinstance(optimizer, Optimizer):
        raise SpecError(f"from_torch takes a torch.optim.Optimizer, not a {kind.__name__}.")
    if kind.__name__ in REASONS and kind.__module__.startswith("torch.optim"):
        raise SpecError(f"torch.optim.{kind.__name__} has no central flow: {REASONS[kind.__name__]}")
    if kind.__name__ not in readable or kind is not getattr(torch.optim, kind.__name__, None):
        raise SpecError(
            f"{kind.__module__}.{kind.__qualname__} is not one of torch's optimizers that can be read "
            f"({', '.join(readable)}), and its step may be anything. Declare it as a dvi.Method by init, f and P, or "
            "hand over the torch optimizer that it is made of."
        )
    hooks = [*optimizer._optimizer_step_pre_hooks.values(), *optimizer._optimizer_step_post_hooks.values()]
    if hooks:
        raise SpecError(
            f"torch.optim.{kind.__name__} has a hook on its step ({hooks[0]!r}), which may change anything: remove it."
        )
    step = vars(optimizer).get("step")
    if step is not None and not hasattr(step, "_wrapped_by_lr_sched"):
        raise SpecError(f"The step of this torch.optim.{kind.__name__} was replaced, by {step!r}: undo that.")


def refuse_options(kind: str, i: int, group: Mapping[str, Any], known: frozenset[str]) -> None:
    """Raise SpecError if a group has an option that is not understood."""
    unknown = sorted(set(group) - known - HARMLESS - BESIDE)
    if unknown:
        raise SpecError(
            f"torch.optim.{kind}, group {i}: the option {', '.join(unknown)} is not known to this version of dvi "
            f"(torch {torch.__version__}). Its effect must not be ignored silently: remove it from the group."
        )
    missing = sorted(known - set(group) - {"decoupled_weight_decay", "maximize"})  # of older versions of torch
    if missing:
        raise SpecError(f"torch.optim.{kind}, group {i}: the option {', '.join(missing)} is missing from the group.")


def refuse_state(kind: str, i: int, state: Mapping[str, Any], known: frozenset[str]) -> None:
    """Raise SpecError if the state of a parameter holds what is not understood, or lacks something."""
    unknown, missing = sorted(set(state) - known), sorted(known - set(state))
    if unknown:
        raise SpecError(
            f"torch.optim.{kind}, group {i}: the state holds {', '.join(unknown)}, which is not known to this version "
            f"of dvi (torch {torch.__version__})."
        )
    if missing and state:
        raise SpecError(f"torch.optim.{kind}, group {i}: the state lacks {', '.join(missing)}.")
