"""A flow whose directions come and go at one place within a unit of time is ended, and told why."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

import dvi
from dvi.methods import GradientDescent
from dvi.solvers.integrator import IntegratorBase
from dvi.solvers.protocol import Node, Rate, State, StepResult


@dataclass(frozen=True)
class Flickering(IntegratorBase):
    """Steps of one length, of which every second one oscillates: for the run it comes and goes."""

    length: float
    speed: float = 0.0
    fixed: bool = False

    @property
    def fixed_steps(self):
        return self.fixed

    def init(self, flow, y):
        return 0

    def observe(self, flow, memory, y):
        loss, g = flow.value_and_grad(y)
        on, U = float(memory % 2 == 0), y.w.new_zeros(2, 1)
        U[0] = 1
        still = Rate(torch.zeros_like(y.w), y.nu)
        return Node(y.t, float(loss), 1.0, np.array([1.99 + 0.01 * on]), U, U, np.array([[on]]), y.t, g, still)

    def step(self, flow, memory, y, h):
        h = min(h, self.length)
        move = torch.tensor([0.0, self.speed * h], dtype=y.w.dtype)
        end = State(y.w + move, y.nu, y.t + h)
        return StepResult(end, memory + 1, self.observe(flow, memory, y), lambda t: y)


def run(integrator, **options):
    problem = dvi.Problem(lambda w: 0.5 * (w[0] ** 2 + 0 * w[1]), torch.ones(2, dtype=torch.float64))
    flow = dvi.central_flow(problem, GradientDescent(0.1), check=False)
    return dvi.solve(flow, 5, integrator=integrator, progress=False, throw=False, **options)


def test_coming_and_going_at_one_place_is_counted_and_ended():
    solution = run(Flickering(1 / 64))
    assert solution.status is dvi.Status.CHATTERS
    # every second step of 1/64 ends an oscillation; whether w stays where it is, is asked after half a unit
    assert solution.ledger.t[-1] == pytest.approx(0.5, abs=2 / 64)
    (words,) = [note for note in solution.notes if note.startswith("Stopped")]
    assert "stopped oscillating 16 times" in words
    assert "The amplitude of the oscillation is 1." in words  # X = 1 along a unit vector
    with pytest.raises(dvi.RunError, match="loosen tol"):
        dvi.solve(
            dvi.central_flow(
                dvi.Problem(lambda w: 0.5 * (w**2).sum(), torch.ones(2, dtype=torch.float64)), GradientDescent(0.1)
            ),
            5,
            integrator=Flickering(1 / 64),
            progress=False,
        )


@pytest.mark.parametrize(
    "integrator",
    [
        Flickering(1 / 8),  # eight steps a unit: no ten exits
        replace(Flickering(1 / 64), speed=8.0),  # in half a unit it goes 4, more than the amplitude 1
        replace(Flickering(1 / 64), fixed=True),  # its steps are what it was told to take
    ],
)
def test_a_flow_that_gets_on_is_not_ended(integrator):
    assert run(integrator).status is dvi.Status.SUCCESS
