"""Ready-made problems: a data set, a network and a loss by name."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dvi.problems.catalogue.cifar import load_cifar10
from dvi.problems.catalogue.data import load_digits, make_sorting
from dvi.problems.catalogue.fashion import load_fashion
from dvi.problems.catalogue.pictures import Pictures
from dvi.problems.errors import ProblemError
from dvi.problems.modules.module import Criterion, ModuleProblem
from dvi.problems.networks.by_name import (
    ImageNetwork,
    SequenceNetwork,
    Size,
    construction,
    image_network,
    sequence_network,
)
from dvi.problems.networks.cnn import CNN
from dvi.problems.networks.initial import initialise
from dvi.problems.networks.mlp import MLP
from dvi.problems.problem import Backend


def squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Half the squared distance ½‖outputs − targets‖² over the last dimension; mean over the others (the examples)."""
    return 0.5 * (outputs - targets).square().sum(-1).mean()


def cross_entropy(outputs: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of logits [..., classes] and labels [...], mean over examples."""
    return F.cross_entropy(outputs.flatten(0, -2), labels.flatten())


def digits(
    network: str = "mlp",
    loss: str = "mse",
    n: int = 1000,
    classes: int = 10,
    width: int | None = None,
    depth: int = 2,
    activation: str | float | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    chunk_size: int | None = None,
    derivatives: Backend = "autodiff",
) -> ModuleProblem:
    """Classify handwritten digits (scikit-learn's, 8×8 pixels).

    Args:
        network: "mlp" (hidden layers of one width; tanh) or "cnn" (the paper's: four convolutions; GELU; average
            pooling).
        loss: "mse" (½ squared distance to one-hot targets, summed over classes, mean over examples) or "ce".
        n: how many examples.
        classes: the digits below this, 2 to 10.
        width: of each hidden layer of the MLP (default 32); channels of the CNN's first layer (default 8), of the last
            four times as many.
        depth: how many hidden layers the MLP has.
        activation: tanh, gelu, silu, softplus, relu, or a number β for the β-GELU (default: that of the network).
        seed: of both the subset and the initial weights.
        dtype: of the weights and whatever meets them.
        device: of everything.
        chunk_size: how many examples to take at a time, as in :class:`ModuleProblem`.
        derivatives: "autodiff", "mixed" or "finite-difference", as in :class:`Problem`.

    Raises:
        ImportError: if scikit-learn is missing.
        ProblemError: if a name or a size is not known.

    """
    _check_sizes(width, depth)
    images, labels = load_digits(n, classes, seed, dtype, device)
    model: nn.Module
    with construction():
        if network == "mlp":
            model = MLP([64, *[width or 32] * depth, classes], "tanh" if activation is None else activation)
        elif network == "cnn":
            model = CNN(1, classes, width or 8, "gelu" if activation is None else activation)
        else:
            raise ProblemError(f'digits are for network="mlp" or "cnn", not {network!r}')
    initialise(model.to(torch.float64), seed)
    return _assemble("digits", network, model, loss, images, labels, classes, dtype, chunk_size, derivatives)


def sorting(
    network: SequenceNetwork = "transformer",
    loss: str = "ce",
    n: int = 1000,
    length: int = 8,
    alphabet: int = 4,
    size: Size = "small",
    width: int | None = None,
    depth: int | None = None,
    heads: int | None = None,
    activation: str | float | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    chunk_size: int | None = None,
    derivatives: Backend = "autodiff",
) -> ModuleProblem:
    """Sort sequences, the paper's task: having read a sequence, write it down in order.

    Args:
        network: "transformer" (GPT-style, causal), "rnn" (one tanh layer), "lstm" or "mamba".
        loss: "ce", or "mse" (½ squared distance to one-hot targets); mean over sequences and sorted positions.
        n: how many sequences.
        length: how long.
        alphabet: how many letters.
        size: "small" (some thousand weights, for a CPU) or "full" (the paper's).
        width: of the embedding; of the RNN's layer.  Default: that of the size.
        depth: how many blocks or layers there are; the RNN has one.  Default: that of the size.
        heads: how many attention heads each block of the transformer has.  Default: that of the size.
        activation: of the transformer, as in :func:`digits`; default GELU.
        seed: of both the sequences and the initial weights.
        dtype: of the weights and whatever meets them.
        device: of everything.
        chunk_size: how many examples to take at a time, as in :class:`ModuleProblem`.
        derivatives: "autodiff", "mixed" or "finite-difference", as in :class:`Problem`.

    Raises:
        ProblemError: if a name or a size is not known.

    """
    _check_sizes(width, depth or 0)
    tokens, solved = make_sorting(n, length, alphabet, seed, device)
    model = sequence_network(
        network,
        size,
        alphabet,
        tokens.shape[1],
        length,
        seed,
        activation,
        width=width,
        depth=depth,
        heads=heads,
    )
    return _assemble("sorting", network, model, loss, tokens, solved, alphabet, dtype, chunk_size, derivatives)


def fashion(
    network: ImageNetwork = "mlp",
    loss: str = "mse",
    n: int = 1000,
    classes: int = 10,
    size: Size = "small",
    pixels: int | None = None,
    folder: str | Path | None = None,
    activation: str | float | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    chunk_size: int | None = None,
    derivatives: Backend = "autodiff",
) -> ModuleProblem:
    """Classify pictures of clothes (Fashion-MNIST, 28×28 pixels, grey); 1,000 of them ship with the library.

    Args:
        network: "mlp", "cnn" (four convolutions), "cnn-pool" (two, and a dense layer), "resnet" (without norms),
            "resnet-groupnorm" or "vit".
        loss: "mse" (½ squared distance to one-hot targets, summed over classes, mean over examples) or "ce".
        n: how many examples: the first n/classes of each class.
        classes: the classes below this, 2 to 10.
        size: "small" (some thousand weights, for a CPU) or "full" (the paper's).
        pixels: a side is averaged down to this many: 14, 7, 4, 2 or 1; cheaper.  Default: 28.
        folder: with the four original files, packed or not.  Default: the 1,000 + 200 pictures that are shipped.
        activation: gelu, tanh, silu, softplus, relu, or a number β for the β-GELU; default GELU.
        seed: of both the order of the pictures and the initial weights.
        dtype: of the weights and whatever meets them.
        device: of everything.
        chunk_size: how many examples to take at a time, as in :class:`ModuleProblem`.
        derivatives: "autodiff", "mixed" or "finite-difference", as in :class:`Problem`.

    Raises:
        ProblemError: if a name or a size is not known, or files are missing, cut short or altered.

    """
    pictures = load_fashion(n, classes, pixels, folder, seed, dtype, device)
    return _classify(
        "fashion", pictures, network, size, loss, classes, activation, seed, dtype, chunk_size, derivatives
    )


def cifar10(
    folder: str | Path,
    network: ImageNetwork = "cnn",
    loss: str = "mse",
    n: int = 1000,
    classes: int = 10,
    size: Size = "small",
    pixels: int | None = None,
    activation: str | float | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    chunk_size: int | None = None,
    derivatives: Backend = "autodiff",
) -> ModuleProblem:
    """Classify small photographs (CIFAR-10, 32×32 pixels, colour), the paper's task.

    Args:
        folder: with the official ``cifar-10-binary.tar.gz``, or with its six .bin files.
        network: as in :func:`fashion`.
        loss: "mse" (½ squared distance to one-hot targets, summed over classes, mean over examples) or "ce".
        n: how many examples: the first n/classes of each class.
        classes: the classes below this; the paper has 4 and 10.
        size: "small" (some thousand weights, for a CPU) or "full" (the paper's).
        pixels: a side is averaged down to this many: 16, 8, 4, 2 or 1; cheaper.  Default: 32.
        activation: gelu, tanh, silu, softplus, relu, or a number β for the β-GELU; default GELU.
        seed: of both the order of the pictures and the initial weights.
        dtype: of the weights and whatever meets them.
        device: of everything.
        chunk_size: how many examples to take at a time, as in :class:`ModuleProblem`.
        derivatives: "autodiff", "mixed" or "finite-difference", as in :class:`Problem`.

    Raises:
        ProblemError: if a name or a size is not known, or files are missing, cut short or altered.

    """
    pictures = load_cifar10(folder, n, classes, pixels, seed, dtype, device)
    return _classify(
        "cifar10", pictures, network, size, loss, classes, activation, seed, dtype, chunk_size, derivatives
    )


def _classify(
    task: str,
    pictures: Pictures,
    network: ImageNetwork,
    size: Size,
    loss: str,
    classes: int,
    activation: str | float | None,
    seed: int,
    dtype: torch.dtype,
    chunk_size: int | None,
    derivatives: Backend,
) -> ModuleProblem:
    _, channels, pixels, _ = pictures.inputs.shape
    model = image_network(network, size, channels, pixels, classes, seed, activation)
    data = (pictures.inputs, pictures.labels)
    return _assemble(task, network, model, loss, *data, classes, dtype, chunk_size, derivatives)


def _check_sizes(width: int | None, depth: int) -> None:
    """A width of 0 would be taken for none given, and a depth below 0 for 0."""
    if (width is not None and width < 1) or depth < 0:
        raise ProblemError(f"width={width} must be 1 or more, and depth={depth} not negative")


def _assemble(
    task: str,
    network: str,
    model: nn.Module,
    loss: str,
    inputs: Tensor,
    labels: Tensor,
    classes: int,
    dtype: torch.dtype,
    chunk_size: int | None,
    derivatives: Backend,
) -> ModuleProblem:
    criterion: Criterion
    if loss == "mse":
        criterion, targets = squared_error, F.one_hot(labels, classes).to(dtype)
    elif loss == "ce":
        criterion, targets = cross_entropy, labels
    else:
        raise ProblemError(f'loss is "mse" or "ce", not {loss!r}')
    model = model.to(inputs.device, dtype)
    name = f"{task}-{network}-{loss}"
    return ModuleProblem(model, criterion, inputs, targets, chunk_size, derivatives=derivatives, name=name)
