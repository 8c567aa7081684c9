"""Replaces, during differentiation, layers whose built-in kernels autograd differentiates wrongly or not at all.

In torch 2.13 some derivatives are silently wrong.  ``layer_norm``, and ``batch_norm`` and ``instance_norm`` with the
batch's own statistics, have third derivatives that are wrong by 10-200 %.  Their second derivatives are wrong if
forward mode is differentiated once more (``jvp`` of ``jvp``, ``grad`` of ``jvp``).  The second derivatives of
``_weight_norm`` (used by ``weight_norm``) are wrong by 60 %.  Fused attention and ``hardsigmoid`` have no second
derivative at all. Under :func:`differentiable_layers` the same functions are computed from elementary operations, whose
derivatives are right to every order and in every nesting.  The user's module is not changed: calls of the functions are
intercepted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode


@contextmanager
def differentiable_layers() -> Iterator[None]:
    """In this context, functions with unsafe kernels are composed of elementary operations.

    The library takes its own derivatives in it.  A loss may take derivatives itself, for example of a network with
    ``layer_norm`` with respect to its inputs.  If ``check()`` says so, such a loss must use this context, too.
    """
    # An active mode also prevents the inference kernels of nn.MultiheadAttention and nn.TransformerEncoderLayer.
    with sdpa_kernel(SDPBackend.MATH), _Composed():
        yield


class _Composed(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        return _COMPOSITIONS.get(func, func)(*args, **(kwargs or {}))


# The signatures below are those of the replaced functions; that of `torch.x` if `torch.nn.functional.x` differs.


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    return _native_layer_norm(input, normalized_shape, weight, bias, eps)[0]


def _native_layer_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    dims = list(range(-len(normalized_shape), 0))
    normal, mean, scale = _standardise(input, dims, eps)
    return _affine(normal, weight, bias), mean, scale


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    own = training or running_mean is None
    return _channel_norm(input, running_mean, running_var, weight, bias, [0] if own else [], eps)


def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if use_input_stats:
        running_mean = running_var = None
    return _channel_norm(input, running_mean, running_var, weight, bias, [], eps)


def _torch_order(composition: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A composition with the argument order of ``torch.batch_norm`` and ``torch.instance_norm``.

    These take weight and bias before the statistics, and one more argument at the end, ``cudnn_enabled``.
    """

    def composed(
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        *more: Any,
        cudnn_enabled: bool = True,
        **named: Any,
    ) -> Tensor:
        return composition(input, running_mean, running_var, weight, bias, *more[:3], **named)

    return composed


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    others = [d for d in range(v.ndim) if d != dim % v.ndim] if dim != -1 else list(range(v.ndim))
    return v * (g * torch.rsqrt(v.square().sum(others, keepdim=True)))


def _channel_norm(
    input: Tensor,
    mean: Tensor | None,
    variance: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    pooled: list[int],
    eps: float,
) -> Tensor:
    """Standardise each channel by the given statistics, or by its own over space and the dimensions ``pooled``."""

    def per_channel(x: Tensor) -> Tensor:
        return x.view(-1, *[1] * (input.ndim - 2))

    if pooled or mean is None or variance is None:
        normal, _, _ = _standardise(input, [*pooled, *range(2, input.ndim)], eps)
    else:
        normal = (input - per_channel(mean)) * torch.rsqrt(per_channel(variance) + eps)
    return _affine(normal, None if weight is None else per_channel(weight), None if bias is None else per_channel(bias))


def _standardise(x: Tensor, dims: list[int], eps: float) -> tuple[Tensor, Tensor, Tensor]:
    mean = x.mean(dims, keepdim=True)
    centred = x - mean
    scale = torch.rsqrt(centred.square().mean(dims, keepdim=True) + eps)
    return centred * scale, mean, scale


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if weight is not None:
        x = x * weight
    return x if bias is None else x + bias


def _hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    out = (input / 6 + 0.5).clamp(0, 1)
    return input.copy_(out) if inplace else out


_COMPOSITIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    F.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    torch.native_layer_norm: _native_layer_norm,
    F.batch_norm: _batch_norm,
    torch.batch_norm: _torch_order(_batch_norm),
    F.instance_norm: _instance_norm,
    torch.instance_norm: _torch_order(_instance_norm),
    torch._weight_norm: _weight_norm,
    F.hardsigmoid: _hardsigmoid,
}
