"""Networks by name and size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import nn

from dvi.problems.errors import ProblemError
from dvi.problems.networks.cnn import CNN, PoolingCNN
from dvi.problems.networks.gpt import GPT
from dvi.problems.networks.initial import initialise
from dvi.problems.networks.mamba import Mamba
from dvi.problems.networks.mlp import MLP
from dvi.problems.networks.recurrent import LSTM, RNN
from dvi.problems.networks.resnet import ResNet
from dvi.problems.networks.vit import ViT

ImageNetwork = Literal["mlp", "cnn", "cnn-pool", "resnet", "resnet-groupnorm", "vit"]
SequenceNetwork = Literal["transformer", "rnn", "lstm", "mamba"]
Size = Literal["small", "full"]

#: The settings of each size.  "full" is the paper's; a width that the paper does not give is ours.
SIZES: dict[str, dict[str, dict[str, int]]] = {
    "mlp": {"small": {"hidden": 32}, "full": {"hidden": 256}},
    "cnn": {"small": {"width": 4}, "full": {"width": 32}},
    "cnn-pool": {"small": {"width": 4, "hidden": 16}, "full": {"width": 32, "hidden": 128}},
    "resnet": {"small": {"width": 4, "blocks": 1}, "full": {"width": 16, "blocks": 3}},
    "resnet-groupnorm": {"small": {"width": 4, "blocks": 1}, "full": {"width": 16, "blocks": 3}},
    "vit": {
        "small": {"patches": 4, "width": 16, "depth": 2, "heads": 2, "head_width": 8, "hidden": 32},
        "full": {"patches": 8, "width": 64, "depth": 4, "heads": 8, "head_width": 64, "hidden": 256},
    },
    "transformer": {"small": {"width": 12, "depth": 2, "heads": 3}, "full": {"width": 48, "depth": 3, "heads": 3}},
    "rnn": {"small": {"width": 16}, "full": {"width": 64}},
    "lstm": {"small": {"width": 12, "depth": 2}, "full": {"width": 48, "depth": 2}},
    "mamba": {"small": {"width": 16, "depth": 2, "states": 4}, "full": {"width": 64, "depth": 2, "states": 16}},
}


def image_network(
    name: ImageNetwork,
    size: Size,
    channels: int,
    pixels: int,
    outputs: int,
    seed: int = 0,
    activation: str | float | None = None,
) -> nn.Module:
    """Return a network from images [n, channels, pixels, pixels] to outputs [n, outputs], in float64 on the CPU.

    Raises:
        ProblemError: if a name is not known.

    """
    act: str | float = "gelu" if activation is None else activation
    makers: dict[str, Callable[..., nn.Module]] = {
        "mlp": lambda hidden: MLP([channels * pixels**2, hidden, hidden, outputs], act),
        "cnn": lambda **sizes: CNN(channels, outputs, **sizes, activation=act),
        "cnn-pool": lambda **sizes: PoolingCNN(channels, pixels, outputs, **sizes, activation=act),
        "resnet": lambda **sizes: ResNet(channels, outputs, **sizes, norm="none", activation=act),
        "resnet-groupnorm": lambda **sizes: ResNet(channels, outputs, **sizes, norm="group", activation=act),
        "vit": lambda **sizes: ViT(channels, pixels, outputs, **sizes, activation=act),
    }
    return built(makers, "images", name, size, seed)


def sequence_network(
    name: SequenceNetwork,
    size: Size,
    alphabet: int,
    context: int,
    outputs: int,
    seed: int = 0,
    activation: str | float | None = None,
    **sizes: int | None,
) -> nn.Module:
    """Return a network from tokens [n, context] to logits [n, outputs, alphabet], in float64 on the CPU.

    Sizes given by name, such as ``width``, replace those of ``size``.

    Raises:
        ProblemError: if a name is not known, or the network has no such size.

    """
    act: str | float = "gelu" if activation is None else activation
    if activation is not None and name != "transformer":
        raise ProblemError(f'among networks for sequences only "transformer" takes an activation, not {name!r}')
    makers: dict[str, Callable[..., nn.Module]] = {
        "transformer": lambda **sizes: GPT(alphabet, context, outputs, **sizes, activation=act),
        "rnn": lambda **sizes: RNN(alphabet, outputs, **sizes),
        "lstm": lambda **sizes: LSTM(alphabet, outputs, **sizes),
        "mamba": lambda **sizes: Mamba(alphabet, outputs, **sizes),
    }
    return built(makers, "sequences", name, size, seed, **sizes)


def built(
    makers: dict[str, Callable[..., nn.Module]], what: str, name: str, size: str, seed: int, **own: int | None
) -> nn.Module:
    """Make the network of that name and draw its weights.

    Raises:
        ProblemError: if a name is not known, or the network has no such size.

    """
    if name not in makers:
        raise ProblemError(f"no network {name!r} for {what}; there are {', '.join(makers)}")
    if size not in SIZES[name]:
        raise ProblemError(f"size is {' or '.join(map(repr, SIZES[name]))}, not {size!r}")
    sizes = dict(SIZES[name][size])
    for key, value in own.items():
        if value is None:
            continue
        if key not in sizes:
            raise ProblemError(f"{name!r} has no {key} to set; it has {', '.join(sizes)}")
        sizes[key] = value
    with construction():
        model = makers[name](**sizes).to(torch.float64)
    initialise(model, seed)
    return model


@contextmanager
def construction() -> Iterator[None]:
    """Build layers on the CPU for every default device, without drawing from the global generator."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        yield
