"""What lies between the ends of a step."""

import numpy as np
import pytest
import torch

from dvi.solvers.hermite import hermite
from dvi.solvers.protocol import Rate, State


def test_a_cubic_is_met_everywhere_and_a_quartic_to_fourth_order():
    """w and ν are cubics of time, known by their values and slopes at t = 2 and t = 2 + h."""
    c = torch.tensor(np.random.default_rng(0).normal(size=(4, 3)))

    def value(t):
        return c[0] + c[1] * t + c[2] * t**2 + c[3] * t**3

    def slope(t):
        return c[1] + 2 * c[2] * t + 3 * c[3] * t**2

    ends = (2.0, 3.5)
    states = [State(value(t), {"v": 2 * value(t)}, t) for t in ends]
    rates = [Rate(slope(t), {"v": 2 * slope(t)}) for t in ends]
    inside = hermite(*states, *rates)
    for t in (2.0, 2.3, 3.1, 3.5):
        at = inside(t)
        # four terms of size 10 or so
        torch.testing.assert_close(at.w, value(t), rtol=0, atol=1e-13)
        torch.testing.assert_close(at.nu["v"], 2 * value(t), rtol=0, atol=1e-13)
        assert at.t == t

    def off(h):
        """Of t⁴ in the middle of a step: h⁴/16."""
        a, b = (State(torch.tensor([t**4]).double(), {}, t) for t in (0.0, h))
        return float(hermite(a, b, Rate(torch.zeros(1).double(), {}), Rate(4 * b.w / h, {}))(h / 2).w - (h / 2) ** 4)

    assert off(1.0) == pytest.approx(-1 / 16)
    assert off(0.5) == pytest.approx(-1 / 256)
