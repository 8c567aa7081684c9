"""Small networks of common kinds that the catalogue lacks, made from torch's own layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Residual(nn.Module):
    """Two convolutions added to the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.5 * self.second(F.gelu(self.first(F.gelu(x))))


def resnet(channels: int = 6, classes: int = 10) -> nn.Module:
    """Two residual blocks on one-channel images."""
    return nn.Sequential(
        *(nn.Conv2d(1, channels, 3, padding=1), Residual(channels), nn.AvgPool2d(2), Residual(channels)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)),
    )


def _encoder(width: int, depth: int) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(width, 2, 2 * width, 0.0, F.gelu, batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)


class ViT(nn.Module):
    """A vision transformer on 8×8 images in patches of 2×2."""

    def __init__(self, width: int = 16, depth: int = 2, classes: int = 10) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, 2)
        self.places = nn.Parameter(0.1 * torch.randn(1, 16, width))
        self.body = _encoder(width, depth)
        self.readout = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2) + self.places
        return self.readout(self.body(x).mean(1))


class Decoder(nn.Module):
    """A causal language model; logits of the last ``outputs`` places."""

    def __init__(self, alphabet: int, context: int, outputs: int, width: int = 16, tied: bool = False) -> None:
        super().__init__()
        self.outputs = outputs
        self.tokens, self.places = nn.Embedding(alphabet, width), nn.Embedding(context, width)
        self.body, self.norm = _encoder(width, 2), nn.LayerNorm(width)
        self.readout = nn.Linear(width, alphabet, bias=False)
        if tied:
            self.readout.weight = self.tokens.weight
        mask = torch.full((context, context), -torch.inf).triu(1)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.body(self.tokens(tokens) + self.places.weight, mask=self.mask)
        return self.readout(self.norm(x))[:, -self.outputs :]


class Recurrent(nn.Module):
    """A recurrent network of torch's, such as nn.LSTM; logits of the last ``outputs`` places."""

    def __init__(self, kind: type[nn.RNNBase], alphabet: int, outputs: int, width: int = 16) -> None:
        super().__init__()
        self.tokens, self.body = nn.Embedding(alphabet, width), kind(width, width, batch_first=True)
        self.readout, self.outputs = nn.Linear(width, alphabet), outputs

    def forward(self, tokens: Tensor) -> Tensor:
        return self.readout(self.body(self.tokens(tokens))[0][:, -self.outputs :])


class GraphAttention(nn.Module):
    """Two layers of attention over a ring with chords."""

    def __init__(self, nodes: int, features: int, width: int = 8, classes: int = 4) -> None:
        super().__init__()
        i = torch.arange(nodes)
        apart = (i[:, None] - i) % nodes
        self.register_buffer("far", (apart > 2) & (apart < nodes - 2) & (apart != nodes // 3))
        self.lifts = nn.ModuleList([nn.Linear(features, width), nn.Linear(width, width)])
        self.scores = nn.ModuleList([nn.Linear(width, 2), nn.Linear(width, 2)])
        self.readout = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        for lift, score in zip(self.lifts, self.scores, strict=True):
            x = lift(x)
            sent, received = score(torch.tanh(x)).unbind(1)
            weights = torch.softmax((sent[:, None] + received).masked_fill(self.far, -1e9), 1)
            x = torch.tanh(weights @ x)
        return self.readout(x)
