"""Activations by name, and the β-GELU by its number β."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from dvi.problems.errors import ProblemError


def beta_gelu(x: Tensor, beta: float) -> Tensor:
    """Return x Φ(βx) for each entry, where Φ is the normal distribution function."""
    return x * (0.5 * (1 + torch.erf(x * (beta / math.sqrt(2)))))


class BetaGELU(nn.Module):
    """The activation x Φ(βx): GELU at β = 1, ReLU as β → ∞; β sets its smoothness (Dauphin et al., 2024)."""

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
