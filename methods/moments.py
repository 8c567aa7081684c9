"""The average v of squared gradients in Adam and RMSProp, with or without bias correction.

With bias correction, the state also counts the updates made, t, and v̂ = v/(1 − β₂ᵗ) replaces v.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dvi.methods.spec import Hyperparameter, Nu


def zero_average(v: Tensor, counted: bool) -> Nu:
    """The state before the first update: v, which is zero, and t = 0 if updates are counted."""
    return {"v": v, "t": v.new_zeros(())} if counted else {"v": v}


def averaged(nu: Nu, square: Tensor, beta2: Hyperparameter) -> Nu:
    """The change of the state in one update: (1−β₂)(square − v), and 1 for t if the state counts updates."""
    change = {"v": (1 - beta2) * (square - nu["v"])}
    return change | {"t": torch.ones_like(nu["t"])} if "t" in nu else change


def corrected(nu: Nu, beta2: Hyperparameter) -> Tensor:
    """v̂ = v/(1 − β₂ᵗ) if the state counts updates, else v."""
    v: Tensor = nu["v"]
    return v / (1 - beta2 ** nu["t"]) if "t" in nu else v


__all__ = ["averaged", "corrected", "zero_average"]
