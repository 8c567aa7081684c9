"""A network without the kinks of its ReLUs: ``smoothed(model, beta=20)``."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dvi.problems.errors import ProblemError
from dvi.problems.networks.activations import beta_gelu

M = TypeVar("M", bound=nn.Module)


def smoothed(model: M, beta: float = 20.0) -> M:
    """Return a copy of the model whose ReLUs are β-GELUs x Φ(βx): smooth, and ReLU as β → ∞.

    A flow needs a smooth loss: at a kink the gradient jumps and the Hessian is not defined.  The paper compares flow
    and optimizer for several β (Figure 38).  The larger β is, the sharper is the bend, and the less accurate the flow.

    All calls of ReLU, ReLU6, LeakyReLU, Hardtanh and ``clamp(min=0)`` in the model's forward pass are replaced, whether
    they are modules or functions: ``nn.ReLU``, ``F.relu``, ``x.relu()``,
    ``nn.TransformerEncoderLayer(activation="relu")``.  Parameters and buffers keep their names and values, so
    ``state_dict`` and ``load_into`` fit.  The given model is not changed.  Other kinks (max-pooling, abs) stay.

    Args:
        model: any module.
        beta: sharpness β of the bend.  The function differs from ReLU by at most 0.17 / β, at |x| = 0.75 / β.

    Raises:
        ProblemError: if β is not positive, or if ReLUs are inside a kernel where they cannot be replaced (``nn.RNN``,
            compiled or scripted models).  Also when the copy is first called, if its forward pass contains no ReLU.

    """
    if not beta > 0:
        raise ProblemError(f"beta of a β-GELU is positive; got {beta}")
    for path, module in model.named_modules():
        where = f"{path or 'the model'} ({type(module).__name__})"
        if isinstance(module, (nn.RNN, nn.RNNCell)) and module.nonlinearity == "relu":
            raise ProblemError(
                f"{where} has its ReLU inside one kernel, where it cannot be replaced: write the recurrence out "
                'with torch.relu, or take nonlinearity="tanh"'
            )
        if isinstance(module, torch.jit.ScriptModule) or type(module).__name__ == "OptimizedModule":
            raise ProblemError(
                f"{where} is compiled, so its ReLUs cannot be replaced: smooth the model it is made from"
            )
    duplicate = copy.deepcopy(model)
    duplicate.forward = _Forward(duplicate, float(beta))  # type: ignore[method-assign, unused-ignore]
    return duplicate


class _Forward:
    """The forward pass of a module, with β-GELU for ReLU.  An object, so that the module can be copied and pickled."""

    def __init__(self, module: nn.Module, beta: float) -> None:
        self.module, self.beta = module, beta
        self.own = module.__dict__.get("forward")  # a forward pass that belongs to this object, not to its class
        if isinstance(self.own, _Forward):
            self.own = self.own.own

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with _Smooth(self.beta) as mode:
            if self.own is not None:
                out = self.own(*args, **kwargs)
            else:
                out = type(self.module).forward(self.module, *args, **kwargs)
        if not mode.replaced:
            raise ProblemError(
                f"{type(self.module).__name__} calls no ReLU in its forward pass, so there is nothing to smooth: "
                "take the model as it is. Other kinks (max-pooling, abs) must be replaced by hand"
            )
        return out


class _Smooth(TorchFunctionMode):
    def __init__(self, beta: float) -> None:
        super().__init__()
        self.beta, self.replaced = beta, False

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func not in _RELUS or (func in _CLAMPS and not _cuts_at_zero(*args, **kwargs)):
            return func(*args, **kwargs)
        self.replaced = True
        inplace = kwargs.pop("inplace", False) or getattr(func, "__name__", "").endswith("_")
        x, *rest = (kwargs.pop("input"),) if "input" in kwargs else args
        if func in _WITH_INPLACE_LAST and len(rest) == _WITH_INPLACE_LAST[func]:
            inplace |= rest.pop()
        out = _RELUS[func](x.clone() if inplace else x, self.beta, *rest, **kwargs)
        return x.copy_(out) if inplace else out


def _relu(x: Tensor, beta: float, *_: Any, **__: Any) -> Tensor:
    return beta_gelu(x, beta)


def _hardtanh(x: Tensor, beta: float, min_val: float = -1.0, max_val: float = 1.0) -> Tensor:
    return min_val + beta_gelu(x - min_val, beta) - beta_gelu(x - max_val, beta)


def _relu6(x: Tensor, beta: float) -> Tensor:
    return _hardtanh(x, beta, 0.0, 6.0)


def _leaky_relu(x: Tensor, beta: float, negative_slope: float = 0.01) -> Tensor:
    return negative_slope * x + (1 - negative_slope) * beta_gelu(x, beta)


def _cuts_at_zero(*args: Any, min: Any = None, max: Any = None, **_: Any) -> bool:
    """Whether a clamp has these arguments: a lower bound of zero, and no upper one."""
    bounds = [min, max]
    for i, bound in enumerate(args[1:3]):
        bounds[i] = bound
    return not isinstance(bounds[0], Tensor) and bounds[0] == 0 and bounds[1] is None


_CLAMPS: tuple[Callable[..., Any], ...] = (
    torch.clamp,
    torch.clip,
    torch.clamp_min,
    torch.clamp_,
    torch.clip_,
    torch.clamp_min_,
    Tensor.clamp,
    Tensor.clip,
    Tensor.clamp_min,
    Tensor.clamp_,
    Tensor.clip_,
    Tensor.clamp_min_,
)

_RELUS: dict[Callable[..., Any], Callable[..., Tensor]] = {
    F.relu: _relu,
    torch.relu: _relu,
    torch.relu_: _relu,
    Tensor.relu: _relu,
    Tensor.relu_: _relu,
    F.relu6: _relu6,
    F.hardtanh: _hardtanh,
    F.hardtanh_: _hardtanh,
    F.leaky_relu: _leaky_relu,
    F.leaky_relu_: _leaky_relu,
    **dict.fromkeys(_CLAMPS, _relu),
}

# Functions that also take ``inplace`` by position: the number of arguments before it, besides x.
_WITH_INPLACE_LAST: dict[Callable[..., Any], int] = {F.relu: 1, F.relu6: 1, F.leaky_relu: 2, F.hardtanh: 3}
