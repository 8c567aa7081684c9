"""Parameter tensors in a flat weight vector, for methods with one state per tensor."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from dvi.methods.errors import SpecError

Shapes = Sequence[Sequence[int]]


def sizes(shapes: Shapes) -> list[int]:
    """The number of weights of each tensor."""
    return [prod(shape) for shape in shapes]


def tensors(v: Tensor, shapes: Shapes) -> list[Tensor]:
    """The stretches of v [d] in the shapes of the parameters, in order; one of shape [] as [1].

    Raises:
        SpecError: if the shapes do not add up to d weights.
    """
    if not shapes or sum(sizes(shapes)) != len(v):
        added = " + ".join("×".join(map(str, shape)) or "1" for shape in shapes) or "nothing"
        raise SpecError(
            f"shapes do not fit: {added} = {sum(sizes(shapes))} weights, but the problem has {len(v)}. "
            "Write shapes=problem.shapes; a problem made from a module knows those of its parameters."
        )
    pieces = zip(torch.split(v, sizes(shapes)), shapes, strict=True)
    return [piece.reshape(tuple(shape) or (1,)) for piece, shape in pieces]
