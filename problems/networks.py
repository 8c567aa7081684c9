"""Small networks of the paper's kinds, initialised from a seed of their own."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dvi.problems.errors import ProblemError


def beta_gelu(x: Tensor, beta: float) -> Tensor:
    """Return x Φ(βx), Φ the normal distribution function, entry by entry."""
    return x * (0.5 * (1 + torch.erf(x * (beta / math.sqrt(2)))))


class BetaGELU(nn.Module):
    """The activation x Φ(βx): GELU at β = 1, ReLU as β → ∞; how smooth it is, is a number (Dauphin et al., 2024)."""

    def __init__(self, beta: float = 1.0) -> None:
        super().__init__()
        if not beta > 0:
            raise ProblemError(f"beta of a β-GELU is positive; got {beta}")
        self.beta = float(beta)

    def forward(self, x: Tensor) -> Tensor:
        """Apply entry by entry."""
        return beta_gelu(x, self.beta)

    def extra_repr(self) -> str:
        """β, for the printed module."""
        return f"beta={self.beta}"


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "tanh": nn.Tanh,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
    "relu": nn.ReLU,
    "identity": nn.Identity,
}


def make_activation(kind: str | float) -> nn.Module:
    """Return an activation by name; a number β gives the β-GELU.

    Raises:
        ProblemError: for a name that is not known.

    """
    if not isinstance(kind, str):
        return BetaGELU(kind)
    if kind not in ACTIVATIONS:
        raise ProblemError(f"no activation {kind!r}; there are {', '.join(ACTIVATIONS)}, and β-GELU by its number β")
    return ACTIVATIONS[kind]()


class MLP(nn.Sequential):
    """A multilayer perceptron of the given widths, input and output included; it flattens its input."""

    def __init__(self, widths: Sequence[int], activation: str | float = "tanh") -> None:
        if len(widths) < 2:
            raise ProblemError(f"an MLP has an input and an output width at least; got {list(widths)}")
        layers: list[nn.Module] = [nn.Flatten()]
        for fan_in, fan_out in pairwise(widths[:-1]):
            layers += [nn.Linear(fan_in, fan_out), make_activation(activation)]
        super().__init__(*layers, nn.Linear(widths[-2], widths[-1]))


class CNN(nn.Sequential):
    """The paper's: four 3×3 convolutions with GELU, average pooling over the image, a linear readout.

    The second and the fourth convolution halve the image; each doubles the channels.
    """

    def __init__(self, channels: int, outputs: int, width: int = 8, activation: str | float = "gelu") -> None:
        widths = [channels, width, 2 * width, 2 * width, 4 * width]
        layers: list[nn.Module] = []
        for i in range(4):
            layers += [
                nn.Conv2d(widths[i], widths[i + 1], kernel_size=3, padding=1, stride=1 + i % 2),
                make_activation(activation),
            ]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], outputs))


class _Block(nn.Module):
    """Causal self-attention and a two-layer perceptron, each behind a layer norm and beside the identity."""

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


class RNN(nn.Module):
    """A single-layer tanh recurrent network from tokens [n, context] to logits [n, outputs, alphabet].

    Written out, since fused recurrent kernels have no second derivative on a GPU.
    """

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


@torch.no_grad()
def initialise(model: nn.Module, seed: int) -> None:
    """Draw the parameters of ``model`` from a generator of their own; the global one is left alone.

    Matrices and kernels are uniform with PyTorch's variance 1/(3 fan-in); embeddings normal with minGPT's deviation
    0.02; biases zero; norms stay as they are, the identity.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            draw = torch.randn(module.weight.shape, generator=generator, dtype=torch.float64, device="cpu")
            module.weight.copy_(0.02 * draw)
        elif isinstance(module, (nn.Linear, nn.Conv2d)):
            draw = torch.rand(module.weight.shape, generator=generator, dtype=torch.float64, device="cpu")
            module.weight.copy_((2 * draw - 1) / math.sqrt(module.weight[0].numel()))
            if module.bias is not None:
                module.bias.zero_()
