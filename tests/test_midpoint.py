"""The optimizer is shown by its midpoint ¼(w₋ + 2w + w₊), on which every distance rests."""

import numpy as np
import torch

import dvi
from dvi.methods import GradientDescent

F64 = torch.float64
H = torch.tensor([1.9, 0.3], dtype=F64)  # the first direction oscillates with period two
LR, STEPS = 1.0, 8


def problem():
    return dvi.Problem(lambda w: 0.5 * (H * w * w).sum(), torch.tensor([1.0, -2.0], dtype=F64))


def iterates():
    w, found = torch.tensor([1.0, -2.0], dtype=F64), []
    for _ in range(STEPS + 2):
        found.append(w)
        w = w - LR * H * w
    return torch.stack(found).numpy()


def midpoints():
    w = iterates()
    return np.concatenate([w[:1], 0.25 * (w[:-2] + 2 * w[1:-1] + w[2:])])[: STEPS + 1]


def test_the_optimizer_is_shown_by_its_midpoint():
    run = dvi.solve(dvi.discrete(problem(), GradientDescent(LR)), STEPS, save=("w",), progress=False, eigen_every=0)
    np.testing.assert_allclose(run.series["w"], midpoints(), rtol=1e-13)
    # an oscillation of period two, w = (−0.9)^t here, is damped to 0.0025 of itself by it
    assert abs(run.series["w"][5, 0]) < 0.003 * abs(iterates()[5, 0])


def test_distances_are_those_of_the_midpoint():
    race = dvi.compare(
        problem(), GradientDescent(LR), STEPS, runs=("discrete", "stable"), progress=False, eigen_every=0
    )
    t = np.arange(STEPS + 1.0)
    flow = np.exp(-LR * H.numpy() * t[:, None]) * np.array([1.0, -2.0])  # dw/dt = −lr·H·w
    expected = np.linalg.norm(midpoints() - flow, axis=1)
    # the stable flow is integrated to the default tolerance of its integrator, 1e-3 a unit at least
    np.testing.assert_allclose(race.distance["discrete", "stable"], expected, atol=5e-3)
