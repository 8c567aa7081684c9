"""The multilayer perceptron."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from dvi.problems.errors import ProblemError
from dvi.problems.networks.activations import make_activation


class MLP(nn.Sequential):
    """A multilayer perceptron of the given widths, input and output included; it flattens its input."""

    def __init__(self, widths: Sequence[int], activation: str | float = "tanh") -> None:
        if len(widths) < 2:
            raise ProblemError(f"an MLP has an input and an output width at least; got {list(widths)}")
        layers: list[nn.Module] = [nn.Flatten()]
        for fan_in, fan_out in pairwise(widths[:-1]):
            layers += [nn.Linear(fan_in, fan_out), make_activation(activation)]
        super().__init__(*layers, nn.Linear(widths[-2], widths[-1]))
