"""The paper's two convolutional networks."""

from __future__ import annotations

from torch import nn

from dvi.problems.errors import ProblemError
from dvi.problems.networks.activations import make_activation


class CNN(nn.Sequential):
    """The paper's CNN (App. B): four 3×3 convolutions with GELU, average pooling over the image, a linear readout.

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


class PoolingCNN(nn.Sequential):
    """The CNN of the paper's second version: two convolutions, each with average pooling by 2, and a hidden dense
    layer.

    Only the last layer has biases.

    Args:
        channels: of the input images.
        pixels: along each side of the input images, at least 4.
        outputs: number of outputs.
        width: channels after the first convolution; after the second, twice as many.
        hidden: width of the dense layer.
        activation: as in :func:`~dvi.problems.digits`.

    Raises:
        ProblemError: if the images are too small to be halved twice.

    """

    def __init__(
        self,
        channels: int,
        pixels: int,
        outputs: int,
        width: int = 32,
        hidden: int = 128,
        activation: str | float = "gelu",
    ) -> None:
        if pixels < 4:
            raise ProblemError(f"images of {pixels} pixels a side cannot be halved twice; at least 4 are needed")
        layers: list[nn.Module] = []
        for fan_in, fan_out in ((channels, width), (width, 2 * width)):
            layers += [
                nn.Conv2d(fan_in, fan_out, kernel_size=3, padding=1, bias=False),
                make_activation(activation),
                nn.AvgPool2d(2),
            ]
        super().__init__(
            *layers,
            nn.Flatten(),
            nn.Linear(2 * width * (pixels // 4) ** 2, hidden, bias=False),
            make_activation(activation),
            nn.Linear(hidden, outputs),
        )
