"""Numbers of all kinds: Python's, NumPy's, and tensors of shape []."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor


def number(x: Any) -> Any:
    """The Python number in a NumPy scalar, or in an array or a tensor of shape []; anything else unchanged."""
    if isinstance(x, np.generic) or (isinstance(x, (np.ndarray, Tensor)) and x.ndim == 0):
        return x.item()
    return x


__all__ = ["number"]
