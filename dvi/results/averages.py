"""Local averages over time."""

from __future__ import annotations

import numpy as np

from dvi.solvers.protocol import Array


def gaussian_average(t: Array, values: Array, sigma: float) -> Array:
    """Local average Σ_s f_s c_{t−s} / Σ_s c_{t−s} with c_j = exp(−j²/2σ²) (paper, C.2), on an even time grid."""
    from scipy.ndimage import gaussian_filter1d

    if len(t) < 2:
        return np.asarray(values, dtype=np.float64)
    width = sigma / float(t[1] - t[0])
    value = gaussian_filter1d(np.asarray(values, dtype=np.float64), width, axis=0, mode="constant", truncate=6)
    weight = gaussian_filter1d(np.ones(len(t)), width, mode="constant", truncate=6)
    averaged: Array = value / weight.reshape(-1, *[1] * (value.ndim - 1))
    return averaged
