"""Mamba, a selective state-space model, with its recurrence written out."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dvi.problems.networks.initial import normal


def selective_scan(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """Outputs y [n, t, m] of m scalar inputs, each passed through s states with different decay rates.

    With h₀ = 0, for each time, channel and state: hₜ = exp(Δₜ A) hₜ₋₁ + Δₜ Bₜ xₜ, and yₜ = Σ Cₜ hₜ over the states.

    Args:
        x: inputs [n, t, m].
        delta: step lengths Δ [n, t, m], positive.
        A: rates [m, s], negative.
        B: input weights of the states [n, t, s].
        C: output weights of the states [n, t, s].

    """
    state = torch.zeros_like(x[:, 0, :, None] * A)
    outputs = []
    for t in range(x.shape[1]):
        step = delta[:, t, :, None]
        state = (step * A).exp() * state + step * x[:, t, :, None] * B[:, t, None, :]
        outputs.append((state * C[:, t, None, :]).sum(-1))
    return torch.stack(outputs, dim=1)


class Mamba(nn.Module):
    """A Mamba language model, from tokens [n, context] to logits [n, outputs, alphabet]; the defaults are the paper's.

    Initial embeddings and matrices are normal with standard deviation 0.02; the readout has a tenth of that.

    Args:
        alphabet: number of tokens.
        outputs: number of last positions that are read.
        width: of the embedding.
        depth: number of blocks.
        states: number of states of each channel.
        expand: ratio of the number of channels to the width of the embedding.
        kernel: length of the causal convolution.

    """

    def __init__(
        self,
        alphabet: int,
        outputs: int,
        width: int = 64,
        depth: int = 2,
        states: int = 16,
        expand: int = 2,
        kernel: int = 4,
    ) -> None:
        super().__init__()
        self.outputs = outputs
        self.tokens = nn.Embedding(alphabet, width)
        self.blocks = nn.Sequential(*[_Block(width, states, expand * width, kernel) for _ in range(depth)])
        self.norm = nn.RMSNorm(width, eps=1e-5)
        self.readout = nn.Linear(width, alphabet, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [n, outputs, alphabet]."""
        x = self.blocks(self.tokens(tokens))
        logits: Tensor = self.readout(self.norm(x[:, -self.outputs :]))
        return logits

    def draw(self, generator: torch.Generator) -> None:
        """Draw the weights outside the blocks."""
        normal(self.tokens.weight, 0.02, generator)
        normal(self.readout.weight, 0.002, generator)


class _Block(nn.Module):
    """x plus a gated scan of x, after an RMS norm."""

    def __init__(self, width: int, states: int, inner: int, kernel: int) -> None:
        super().__init__()
        self.states = states
        self.rank = math.ceil(width / 16)
        self.norm = nn.RMSNorm(width, eps=1e-5)
        self.enter = nn.Linear(width, 2 * inner, bias=False)
        self.kernel = nn.Parameter(torch.zeros(kernel, inner))
        self.kernel_bias = nn.Parameter(torch.zeros(inner))
        self.select = nn.Linear(inner, self.rank + 2 * states, bias=False)
        self.step = nn.Linear(self.rank, inner)
        self.log_rates = nn.Parameter(torch.zeros(inner, states))
        self.skip = nn.Parameter(torch.ones(inner))
        self.leave = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        inner, gate = self.enter(self.norm(x)).chunk(2, dim=-1)
        inner = F.silu(causal_convolution(inner, self.kernel) + self.kernel_bias)
        low, B, C = self.select(inner).split([self.rank, self.states, self.states], dim=-1)
        y = selective_scan(inner, F.softplus(self.step(low)), -self.log_rates.exp(), B, C)
        out: Tensor = x + self.leave((y + self.skip * inner) * F.silu(gate))
        return out

    def draw(self, generator: torch.Generator) -> None:
        """Draw the initial weights: rates 1, 2, …; step lengths log-uniform between 0.001 and 0.1, as in Mamba."""
        for matrix in (self.enter.weight, self.kernel, self.select.weight, self.step.weight, self.leave.weight):
            normal(matrix, 0.02, generator)
        self.kernel_bias.zero_()
        share = torch.rand(self.step.bias.shape, generator=generator, dtype=torch.float64, device="cpu")
        self.step.bias.copy_(torch.expm1(0.001 * 100**share).log())  # softplus gives back the step length
        rates = torch.arange(1, self.states + 1, dtype=torch.float64, device="cpu")
        self.log_rates.copy_(rates.log().expand(self.log_rates.shape))
        self.skip.fill_(1.0)


def causal_convolution(x: Tensor, kernel: Tensor) -> Tensor:
    """Convolve each channel of x [n, t, m] in time with its own kernel [length, m]; its last row acts on the present.

    The result is computed as a sum of shifted products, since depthwise convolutions are slow to differentiate three
    times.
    """
    length = kernel.shape[0]
    padded = F.pad(x, (0, 0, length - 1, 0))
    out = padded[:, : x.shape[1]] * kernel[0]
    for i in range(1, length):
        out = out + padded[:, i : i + x.shape[1]] * kernel[i]
    return out
