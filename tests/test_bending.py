"""What is learned about how the force bends: along the constraint, and over displacements that are given."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import examples, orthogonal
from hypothesis import given
from hypothesis import strategies as st

import dvi
from dvi.methods import GradientDescent, RMSProp
from dvi.solvers.bending import Bending, Past, displaced
from dvi.solvers.protocol import State, combine


def quartic(rng, d):
    """L = ½wᵀAw + Σ(aᵀw)³/6 + Σ(bᵀw)⁴/24: T changes with w."""
    Q = orthogonal(rng, d)
    A, a, b = (torch.tensor(M) for M in ((Q * rng.uniform(1, 3, d)) @ Q.T, *rng.normal(size=(2, 3, d))))

    def loss(w):
        return 0.5 * w @ A @ w + ((a @ w) ** 3).sum() / 6 + ((b @ w) ** 4).sum() / 24

    return dvi.Problem(loss, torch.tensor(0.3 * rng.normal(size=d)))


def at_a_look(rng, method, k=2, d=6):
    """A flow, a state, the gradient there, a frame of k leading eigenvectors and the flow linearised with it."""
    problem = quartic(rng, d)
    flow = dvi.central_flow(problem, method, check=False)
    w = problem.w0
    y = State(w, method.init(w), 5.0)
    y = State(w, {name: x + 0.5 + torch.tensor(rng.uniform(size=x.shape)) for name, x in y.nu.items()}, 5.0)
    _, g = flow.value_and_grad(y)
    product = flow.effective_hessian(y)
    _, V = torch.linalg.eigh(product(torch.eye(d, dtype=w.dtype)))
    V = V.flip(1)[:, :k]
    frame = flow.frame(y, V, product(V))
    return flow, y, g, frame, flow.linearised(y, g, frame)


@pytest.mark.parametrize("method", [GradientDescent(0.5), RMSProp(0.1, beta2=0.9)], ids=["GD", "RMSProp"])
@given(seed=st.integers(0, 2**32 - 1), a=st.integers(0, 2))
@examples(15)
def test_a_change_along_the_constraint_leaves_the_gap_of_what_is_critical(method, seed, a):
    rng = np.random.default_rng(seed)
    flow, y, g, frame, lin = at_a_look(rng, method)
    C = orthogonal(rng, 2)[:, :a]
    bending = Bending(flow, y, g, frame, lin, C, np.eye(2))
    direction = (torch.tensor(rng.normal(size=6)), y.nu and {"v": torch.tensor(rng.uniform(-1, 1, size=6))})

    def opened(size):
        moved = displaced(y, bending.along(combine([(size, direction)])))
        return float(np.abs(C.T @ (flow.linearised(moved, g, frame).gap - lin.gap) @ C).max(initial=0.0))

    # linear in w, so exact for gradient descent; P(ν) is not linear, and P is seen at second order
    scale = 1.0 + float(np.abs(frame.M).max()) + float(frame.T.norm())
    if not y.nu:
        assert opened(1e-2) < 1e-9 * scale
    else:
        assert opened(1e-4) < 1e-2 * max(opened(1e-2), 1e-7 * scale)
    twice = bending.along(bending.along(combine([(1e-4, direction)])))
    once = bending.along(combine([(1e-4, direction)]))
    torch.testing.assert_close(twice[0], once[0], rtol=1e-3, atol=1e-3 * float(once[0].norm()))


def test_a_correction_that_takes_the_last_one_back():
    one = torch.tensor([1.0, 0.0, 0.0])
    past = Past(one, one, one, one, one)
    assert past.reversed_by(-3 * one)
    assert past.reversed_by(torch.tensor([-1.0, 0.5, 0.0]))  # a cosine of -0.89
    assert not past.reversed_by(torch.tensor([-1.0, 1.0, 0.0]))
    assert not past.reversed_by(one)
    assert not past.reversed_by(torch.zeros(3))
