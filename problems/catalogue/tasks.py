"""Ready-made problems: a data set, a network and a loss by name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dvi.problems.catalogue.data import load_digits, make_sorting
from dvi.problems.catalogue.networks import CNN, GPT, MLP, RNN, initialise
from dvi.problems.errors import ProblemError
from dvi.problems.module import Criterion, ModuleProblem
from dvi.problems.problem import Backend


def squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Half the squared distance ½‖outputs − targets‖² over the last dimension, mean over the others (the examples)."""
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
    with _construction():
        if network == "mlp":
            model = MLP([64, *[width or 32] * depth, classes], "tanh" if activation is None else activation)
        elif network == "cnn":
            model = CNN(1, classes, width or 8, "gelu" if activation is None else activation)
        else:
            raise ProblemError(f'digits are for network="mlp" or "cnn", not {network!r}')
    return _assemble("digits", network, model, loss, images, labels, classes, seed, dtype, chunk_size, derivatives)


def sorting(
    network: str = "transformer",
    loss: str = "ce",
    n: int = 1000,
    length: int = 8,
    alphabet: int = 4,
    width: int | None = None,
    depth: int = 3,
    heads: int = 3,
    activation: str | float = "gelu",
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    chunk_size: int | None = None,
    derivatives: Backend = "autodiff",
) -> ModuleProblem:
    """Sort sequences, the paper's task: having read a sequence, write it down in order.

    Args:
        network: "transformer" (GPT-style) or "rnn" (one tanh layer).
        loss: "ce", or "mse" (½ squared distance to one-hot targets); mean over sequences and sorted positions.
        n: how many sequences.
        length: how long.
        alphabet: how many letters.
        width: of the transformer's embedding (default 48); of the RNN's layer (default 64).
        depth: how many blocks the transformer has.
        heads: how many attention heads each block has.
        activation: of the transformer, as in :func:`digits`.
        seed: of both the sequences and the initial weights.
        dtype: of the weights and whatever meets them.
        device: of everything.
        chunk_size: how many examples to take at a time, as in :class:`ModuleProblem`.
        derivatives: "autodiff", "mixed" or "finite-difference", as in :class:`Problem`.

    Raises:
        ProblemError: if a name or a size is not known.

    """
    _check_sizes(width, depth)
    tokens, solved = make_sorting(n, length, alphabet, seed, device)
    model: nn.Module
    with _construction():
        if network == "transformer":
            model = GPT(alphabet, tokens.shape[1], length, width or 48, depth, heads, activation)
        elif network == "rnn":
            model = RNN(alphabet, length, width or 64)
        else:
            raise ProblemError(f'sorting is for network="transformer" or "rnn", not {network!r}')
    return _assemble("sorting", network, model, loss, tokens, solved, alphabet, seed, dtype, chunk_size, derivatives)


def _check_sizes(width: int | None, depth: int) -> None:
    """A width of 0 would be taken for none given, and a depth below 0 for 0."""
    if (width is not None and width < 1) or depth < 0:
        raise ProblemError(f"width={width} must be 1 or more, and depth={depth} not negative")


@contextmanager
def _construction() -> Iterator[None]:
    """Build layers on the CPU, whatever the default device, and without drawing from the global generator."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        yield


def _assemble(
    task: str,
    network: str,
    model: nn.Module,
    loss: str,
    inputs: Tensor,
    labels: Tensor,
    classes: int,
    seed: int,
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
    model = model.to(dtype)
    initialise(model, seed)
    model = model.to(inputs.device)
    name = f"{task}-{network}-{loss}"
    return ModuleProblem(model, criterion, inputs, targets, chunk_size, derivatives=derivatives, name=name)
