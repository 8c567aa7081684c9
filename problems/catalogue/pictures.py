"""Pictures with labels: the choice of a subset, and its scaling."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dvi.problems.catalogue.data import usable
from dvi.problems.errors import ProblemError


@dataclass(frozen=True)
class Pictures:
    """Pictures [n, channels, pixels, pixels] with labels [n] (int64), for training and for tests."""

    inputs: Tensor
    labels: Tensor
    test_inputs: Tensor
    test_labels: Tensor


def choose(
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    n: int,
    classes: int,
    pixels: int | None,
    seed: int,
    dtype: torch.dtype,
    device: torch.device | str,
) -> Pictures:
    """Take the paper's subset of pictures, scaled as in the paper.

    The training pictures are the first n/classes pictures of each class below ``classes``; if that is not a whole
    number, the first classes have one more.  The seed determines their order.  The test pictures are all pictures of
    those classes, in the original order.  Each channel is shifted and scaled to mean 0 and variance 1 over the chosen
    training pictures.  The test pictures are scaled in the same way.

    Args:
        train, test: pictures [m, channels, s, s] and labels [m], both uint8.
        n: number of training pictures.
        classes: number of classes, 2 or more.
        pixels: a side is averaged down to this many, a divisor of s; None leaves it.
        seed: of the order.
        dtype, device: of the result.

    Raises:
        ProblemError: if there are too few pictures, if ``pixels`` does not divide s, or if there is no such device.

    """
    device = usable(device)
    images, labels = train
    known = int(labels.max()) + 1
    if not 2 <= classes <= known or n < classes:
        raise ProblemError(
            f"take 2 to {known} classes, and at least one picture of each; got classes={classes} and n={n}"
        )
    chosen = []
    for label in range(classes):
        wanted = n // classes + (label < n % classes)
        found = torch.nonzero(labels == label).flatten()
        if len(found) < wanted:
            raise ProblemError(f"n={n} needs {wanted} pictures of class {label}, and there are {len(found)}")
        chosen.append(found[:wanted])
    order = torch.randperm(n, generator=torch.Generator("cpu").manual_seed(seed), device="cpu")
    at = torch.cat(chosen)[order]
    tested = test[1] < classes
    inputs, test_inputs = (_shrunk(x.to(torch.float64), pixels) for x in (images[at], test[0][tested]))
    mean = inputs.mean((0, 2, 3), keepdim=True)
    deviation = inputs.std((0, 2, 3), keepdim=True)
    if not bool((deviation > 0).all()):
        raise ProblemError("a channel has one value in all chosen pictures, so that it cannot be scaled to variance 1")
    return Pictures(
        ((inputs - mean) / deviation).to(device, dtype),
        labels[at].long().to(device),
        ((test_inputs - mean) / deviation).to(device, dtype),
        test[1][tested].long().to(device),
    )


def _shrunk(x: Tensor, pixels: int | None) -> Tensor:
    side = x.shape[-1]
    if pixels is None or pixels == side:
        return x
    if pixels < 1 or side % pixels:
        divisors = ", ".join(str(k) for k in range(1, side + 1) if side % k == 0)
        raise ProblemError(f"pictures of {side} pixels a side can be averaged to {divisors}; got pixels={pixels}")
    return F.avg_pool2d(x, side // pixels)


def check_sum(content: bytes, algorithm: str, expected: str, what: str) -> None:
    """Refuse contents whose checksum is not the known one.

    Raises:
        ProblemError: if it is not.

    """
    found = hashlib.new(algorithm, content, usedforsecurity=False).hexdigest()
    if found != expected:
        raise ProblemError(
            f"{what} is not the original: its {algorithm.upper()} is {found} instead of {expected}.  "
            "It was cut short or altered: fetch it again"
        )
