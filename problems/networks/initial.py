"""Initial weights that depend only on a seed."""

from __future__ import annotations

import math
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn


@runtime_checkable
class DrawsItself(Protocol):
    """A module that draws its own initial weights instead of by the rule of :func:`initialise`."""

    def draw(self, generator: torch.Generator) -> None:
        """Draw the weights in place.  It is called without gradients, after the rule, and on a module before its
        children.
        """
        ...


def uniform(parameter: Tensor, bound: float, generator: torch.Generator) -> None:
    """Fill with numbers between -bound and bound: the same for every dtype and device, up to rounding."""
    draw = torch.rand(parameter.shape, generator=generator, dtype=torch.float64, device="cpu")
    parameter.copy_((2 * draw - 1) * bound)


def normal(parameter: Tensor, deviation: float, generator: torch.Generator) -> None:
    """Fill with normal numbers of this standard deviation: the same for every dtype and device, up to rounding."""
    draw = torch.randn(parameter.shape, generator=generator, dtype=torch.float64, device="cpu")
    parameter.copy_(deviation * draw)


def as_torch_does(layer: nn.Module, generator: torch.Generator) -> None:
    """PyTorch's default for linear layers and convolutions: weight and bias uniform, at most 1/√(fan-in)."""
    assert isinstance(layer, (nn.Linear, nn.Conv2d))
    bound = 1 / math.sqrt(layer.weight[0].numel())
    uniform(layer.weight, bound, generator)
    if layer.bias is not None:
        uniform(layer.bias, bound, generator)


@torch.no_grad()
def initialise(model: nn.Module, seed: int) -> None:
    """Draw the parameters of ``model`` from a separate generator; the global one is not used.

    Matrices and kernels are uniform with PyTorch's variance 1/(3 fan-in).  Embeddings are normal with minGPT's standard
    deviation 0.02.  Biases are zero, and norms stay the identity.  Networks with another rule draw their own weights.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            normal(module.weight, 0.02, generator)
        elif isinstance(module, (nn.Linear, nn.Conv2d)):
            uniform(module.weight, 1 / math.sqrt(module.weight[0].numel()), generator)
            if module.bias is not None:
                module.bias.zero_()
    for module in model.modules():
        if isinstance(module, DrawsItself):
            module.draw(generator)
