"""Anderson acceleration of a fixed-point iteration x ← F(x): the best combination of the last few steps."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from dvi.solvers.protocol import host, like


@dataclass
class Anderson:
    """Proposes the next iterate from the last ones and their images.

    For a linear F it is equivalent to GMRES, so that a slow mode needs only the square root of its iterations.

    Args:
        window: the number of earlier steps that are combined.
    """

    window: int = 8
    _points: list[Tensor] = field(default_factory=list)
    _steps: list[Tensor] = field(default_factory=list)

    def forget(self) -> None:
        """Start anew, after a change of F or a bad combination."""
        self._points.clear()
        self._steps.clear()

    def next(self, x: Tensor, image: Tensor) -> Tensor:
        """The next iterate, given the last one and its image under F; all have one shape."""
        step = image - x
        self._points.append(x)
        self._steps.append(step)
        del self._points[: -self.window - 1], self._steps[: -self.window - 1]
        if len(self._steps) == 1:
            return image
        last = step.reshape(-1)
        dF = [(step - s).reshape(-1) for s in self._steps[:-1]]
        norms = [float(v.norm()) for v in dF]
        kept = [i for i, norm in enumerate(norms) if norm > 0]
        if not kept:
            return image
        columns = [(dF[i] / norms[i]).double() for i in kept]
        gram, rhs = (np.array([host(*(a @ b for b in row)) for a in columns]) for row in (columns, [last.double()]))
        weights = np.linalg.lstsq(gram, rhs[:, 0], rcond=1e-12)[0]  # nearly dependent steps are left out
        out = image
        for weight, i in zip(weights, kept, strict=True):
            c = like(np.array(weight / norms[i]), x)
            out = out - c * (x - self._points[i] + step - self._steps[i])
        return out
