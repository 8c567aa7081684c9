"""Residual networks of the paper's kind, with group norm or without any norm."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from dvi.problems.errors import ProblemError
from dvi.problems.networks.activations import make_activation
from dvi.problems.networks.initial import normal

Norm = Literal["group", "none"]

#: The factor of the residual branch.
BRANCH = 1 / 3


class ResNet(nn.Module):
    """A residual network for small images, [n, channels, s, s] -> [n, outputs]; with three blocks a stage it is
    ResNet-20.

    A 3×3 convolution, three stages of blocks, and a linear readout of the image pooled to 2×2.  The second and the
    third stage halve the image and double the channels, with a 3×3 convolution as the shortcut.  A block is
    GELU(shortcut(x) + ⅓ branch(x)); its branch is convolution, norm, GELU, convolution, norm.

    Initial weights are normal with He's variance 2/fan-out; the readout is zero.  With group norm, γ of a branch's last
    norm is zero; without it, the branch's last convolution is zero.  So each block begins as its shortcut.

    Args:
        channels: of the input images.
        outputs: number of outputs.
        width: channels of the first stage.
        blocks: number of blocks in each of the three stages.
        norm: "group" (the paper's second version; ``width`` groups) or "none" (as in App. B: convolutions have biases).
        activation: as in :func:`~dvi.problems.digits`.

    Raises:
        ProblemError: if the norm or the activation is not known.

    """

    def __init__(
        self,
        channels: int,
        outputs: int,
        width: int = 16,
        blocks: int = 3,
        norm: Norm = "group",
        activation: str | float = "gelu",
    ) -> None:
        super().__init__()
        if norm not in ("group", "none"):
            raise ProblemError(f'norm is "group" or "none", not {norm!r}')
        self.stem = nn.Conv2d(channels, width, kernel_size=3, padding=1, bias=norm == "none")
        self.activation = make_activation(activation)
        stages = []
        fan_in = width
        for stage in range(3):
            fan_out = width * 2**stage
            for block in range(blocks):
                stride = 2 if stage and not block else 1
                stages.append(_Block(fan_in, fan_out, stride, width, norm, activation))
                fan_in = fan_out
        self.blocks = nn.Sequential(*stages)
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.readout = nn.Linear(4 * fan_in, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Outputs [n, outputs]."""
        out: Tensor = self.readout(self.pool(self.blocks(self.activation(self.stem(x)))).flatten(1))
        return out

    def draw(self, generator: torch.Generator) -> None:
        """Draw the kernels; a block then sets its own last layer to zero."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.out_channels * math.prod(module.kernel_size)
                normal(module.weight, math.sqrt(2 / fan_out), generator)
        self.readout.weight.zero_()


def _convolution(fan_in: int, fan_out: int, stride: int, groups: int, norm: Norm) -> list[nn.Module]:
    layer = nn.Conv2d(fan_in, fan_out, kernel_size=3, padding=1, stride=stride, bias=norm == "none")
    return [layer, nn.GroupNorm(groups, fan_out)] if norm == "group" else [layer]


class _Block(nn.Module):
    def __init__(
        self, fan_in: int, fan_out: int, stride: int, groups: int, norm: Norm, activation: str | float
    ) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            *_convolution(fan_in, fan_out, stride, groups, norm),
            make_activation(activation),
            *_convolution(fan_out, fan_out, 1, groups, norm),
        )
        same = stride == 1 and fan_in == fan_out
        self.shortcut = nn.Sequential(*([] if same else _convolution(fan_in, fan_out, stride, groups, norm)))
        self.activation = make_activation(activation)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.activation(self.shortcut(x) + BRANCH * self.branch(x))
        return out

    def draw(self, generator: torch.Generator) -> None:
        """Let the branch begin as zero."""
        for parameter in self.branch[-1].parameters():
            parameter.zero_()
