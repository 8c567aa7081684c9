"""Recurrent networks in elementary operations: fused recurrent kernels have no second derivative on a GPU."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dvi.problems.networks.initial import normal, uniform


class RNN(nn.Module):
    """A single-layer tanh recurrent network from tokens [n, context] to logits [n, outputs, alphabet]."""

    def __init__(self, alphabet: int, outputs: int, width: int = 64) -> None:
        super().__init__()
        self.outputs = outputs
        self.tokens = nn.Embedding(alphabet, width)
        self.step = nn.Linear(2 * width, width)
        self.readout = nn.Linear(width, alphabet)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [n, outputs, alphabet]."""
        x = self.tokens(tokens)
        state = torch.zeros_like(x[:, 0])
        states = []
        for t in range(tokens.shape[1]):
            state = torch.tanh(self.step(torch.cat([x[:, t], state], dim=1)))
            states.append(state)
        logits: Tensor = self.readout(torch.stack(states[-self.outputs :], dim=1))
        return logits


class LSTM(nn.Module):
    """Layers of long short-term memory, from tokens [n, context] to logits [n, outputs, alphabet].

    Initial weights are PyTorch's default: embeddings are normal with variance 1, the rest is uniform within ±1/√width.
    The defaults are the paper's.
    """

    def __init__(self, alphabet: int, outputs: int, width: int = 48, depth: int = 2) -> None:
        super().__init__()
        self.outputs = outputs
        self.tokens = nn.Embedding(alphabet, width)
        self.layers = nn.Sequential(*[_LSTMLayer(width) for _ in range(depth)])
        self.readout = nn.Linear(width, alphabet)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [n, outputs, alphabet]."""
        logits: Tensor = self.readout(self.layers(self.tokens(tokens))[:, -self.outputs :])
        return logits

    def draw(self, generator: torch.Generator) -> None:
        """Draw the initial weights."""
        normal(self.tokens.weight, 1.0, generator)
        bound = 1 / math.sqrt(self.tokens.embedding_dim)
        for parameter in (*self.layers.parameters(), *self.readout.parameters()):
            uniform(parameter, bound, generator)


class _LSTMLayer(nn.Module):
    """Sequences [n, t, width] to sequences of the same shape; gates are in PyTorch's order, with its two biases."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.input = nn.Linear(width, 4 * width)
        self.recurrent = nn.Linear(width, 4 * width)

    def forward(self, x: Tensor) -> Tensor:
        hidden = cell = torch.zeros_like(x[:, 0])
        outputs = []
        for driven in self.input(x).unbind(1):
            i, f, g, o = (driven + self.recurrent(hidden)).chunk(4, dim=-1)
            cell = torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(g)
            hidden = torch.sigmoid(o) * torch.tanh(cell)
            outputs.append(hidden)
        return torch.stack(outputs, dim=1)
