"""The vision transformer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dvi.problems.errors import ProblemError
from dvi.problems.networks.activations import make_activation
from dvi.problems.networks.initial import as_torch_does


class StdNorm(nn.Module):
    """The layer norm γ (x − μ)/(σ + 1e-6) + β over the last dimension, with σ² the unbiased variance."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        centred = x - x.mean(-1, keepdim=True)
        deviation = (centred.square().sum(-1, keepdim=True) / (x.shape[-1] - 1)).sqrt()
        return centred / (deviation + 1e-6) * self.weight + self.bias


class ViT(nn.Module):
    """A vision transformer, [n, channels, pixels, pixels] -> [n, outputs]; the defaults are the paper's.

    The image is cut into square patches.  Each patch is normalised, mapped linearly and normalised again.  Fixed
    sinusoidal positions are added.  After the blocks of attention and perceptron come a norm, the mean over patches and
    a linear readout.  Initial weights are PyTorch's default; the readout is zero.

    Args:
        channels: of the input images.
        pixels: along each side of the input images.
        outputs: number of outputs.
        patches: number along each side; fewer if this does not divide the pixels.
        width: of the embedding of a patch, a multiple of 4.
        depth: number of blocks.
        heads: number of attention heads in each block.
        head_width: of each head.
        hidden: width of each block's perceptron.
        activation: as in :func:`~dvi.problems.digits`.

    Raises:
        ProblemError: if the width is not a multiple of 4, or the activation is not known.

    """

    positions: Tensor

    def __init__(
        self,
        channels: int,
        pixels: int,
        outputs: int,
        patches: int = 8,
        width: int = 64,
        depth: int = 4,
        heads: int = 8,
        head_width: int = 64,
        hidden: int = 256,
        activation: str | float = "gelu",
    ) -> None:
        super().__init__()
        if width % 4:
            raise ProblemError(f"sinusoidal positions in two dimensions need a width that 4 divides; got {width}")
        side = next(count for count in range(min(patches, pixels), 0, -1) if pixels % count == 0)
        self.patch = pixels // side
        entries = channels * self.patch**2
        self.embed = nn.Sequential(StdNorm(entries), nn.Linear(entries, width), StdNorm(width))
        self.register_buffer("positions", sinusoids(side, width), persistent=False)
        self.blocks = nn.Sequential(*[_Block(width, heads, head_width, hidden, activation) for _ in range(depth)])
        self.norm = StdNorm(width)
        self.readout = nn.Linear(width, outputs)

    def forward(self, images: Tensor) -> Tensor:
        """Outputs [n, outputs]."""
        cut = images.unfold(2, self.patch, self.patch).unfold(3, self.patch, self.patch)  # [n, c, side, side, p, p]
        x = self.embed(cut.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)) + self.positions
        out: Tensor = self.readout(self.norm(self.blocks(x)).mean(1))
        return out

    def draw(self, generator: torch.Generator) -> None:
        """Draw the initial weights."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                # Biases, too: if they were zero, a patch of one colour would be mapped to zero, where σ has a kink.
                as_torch_does(module, generator)
        self.readout.weight.zero_()
        self.readout.bias.zero_()


def sinusoids(side: int, width: int) -> Tensor:
    """Positions [side², width] on a square: sines and cosines of row and column at geometric frequencies."""
    quarter = width // 4
    frequencies = 1e-4 ** (torch.arange(quarter, dtype=torch.float64) / max(1, quarter - 1))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies
    rows = angles.repeat_interleave(side, 0)
    columns = angles.repeat(side, 1)
    return torch.cat([columns.sin(), columns.cos(), rows.sin(), rows.cos()], dim=1)


class _Block(nn.Module):
    """Self-attention and a two-layer perceptron, each after a norm and with a skip connection."""

    def __init__(self, width: int, heads: int, head_width: int, hidden: int, activation: str | float) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = StdNorm(width)
        self.qkv = nn.Linear(width, 3 * heads * head_width, bias=False)
        self.project = nn.Linear(heads * head_width, width, bias=False)
        self.norm2 = StdNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), make_activation(activation), nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.project(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out
