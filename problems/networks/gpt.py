"""The GPT-style transformer, causal."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from dvi.problems.errors import ProblemError
from dvi.problems.networks.activations import make_activation


class _Block(nn.Module):
    """Causal self-attention and a two-layer perceptron, each after a layer norm and with a skip connection."""

    def __init__(self, width: int, heads: int, activation: str | float) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), make_activation(activation), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.project(attended.transpose(1, 2).flatten(2))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class GPT(nn.Module):
    """A GPT-2-style transformer from tokens [n, context] to logits [n, outputs, alphabet] of the last positions.

    The defaults are minGPT's "nano".
    """

    def __init__(
        self,
        alphabet: int,
        context: int,
        outputs: int,
        width: int = 48,
        depth: int = 3,
        heads: int = 3,
        activation: str | float = "gelu",
    ) -> None:
        super().__init__()
        if width % heads:
            raise ProblemError(f"{heads} heads do not share a width of {width} evenly")
        self.outputs = outputs
        self.tokens = nn.Embedding(alphabet, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*[_Block(width, heads, activation) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.readout = nn.Linear(width, alphabet, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [n, outputs, alphabet]."""
        x = self.blocks(self.tokens(tokens) + self.positions.weight[: tokens.shape[1]])
        logits: Tensor = self.readout(self.norm(x[:, -self.outputs :]))
        return logits
