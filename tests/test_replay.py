"""Derivatives of a spec that are traced once and replayed."""

import numpy as np
import pytest
import torch
from conftest import CubicLoss, examples
from hypothesis import given
from hypothesis import strategies as st
from torch.func import grad, jvp, vmap
from torch.utils import _pytree as pytree

import dvi
from dvi.replay import WARM, Replay

seeds = st.integers(0, 2**32 - 1)
EPS = torch.finfo(torch.float64).eps

METHODS = {
    "RMSProp": dvi.methods.RMSProp(0.1, 0.9),
    "with bias correction": dvi.methods.RMSProp(0.1, 0.9, eps=1e-3, bias_correction=True),
    "RMSPropNorm": dvi.methods.RMSPropNorm(0.1, 0.9),
    "CentredRMSProp": dvi.methods.CentredRMSProp(0.1, 0.9, eps=1e-2),
    "Adam": dvi.methods.Adam(0.1),
    "AdaGradNorm": dvi.methods.AdaGradNorm(0.1),
    "scheduled": dvi.methods.RMSProp(lambda t: 0.1 / (1 + t), 0.9),
}


def traced(function, *args):
    replay = Replay(function)
    for _ in range(WARM):
        replay(*args)
    return replay


def random(*shape, seed=0):
    return torch.tensor(np.random.default_rng(seed).normal(size=shape))


@given(seeds, st.integers(1, 6))
@examples(25)
def test_a_replay_gives_what_the_function_gives(seed, d):
    """Nested transforms, dictionaries, a constant and an in-place operation included, at arguments not seen before."""

    def f(nu, x):
        a = torch.arange(d, dtype=torch.float64)
        b = (a * nu["v"] + torch.sin(nu["s"] * x)) ** 2
        b += 1
        return {"b": b, "n": torch.linalg.vector_norm(b)}

    def g(nu, x):
        once = grad(lambda x: f(nu, x)["b"].sum())
        return {"slope": jvp(once, (x,), (nu["v"],))[1], **f(nu, x)}

    draws = [({"v": random(d, seed=seed + i), "s": random(seed=i)}, random(d, seed=seed + 7 + i)) for i in (0, 1, 2)]
    replay = traced(g, *draws[0])
    for draw in draws:
        assert replay.ready(*draw)
        for found, expected in zip(pytree.tree_leaves(replay(*draw)), pytree.tree_leaves(g(*draw)), strict=True):
            torch.testing.assert_close(found, expected, rtol=10 * EPS, atol=0)


def test_a_function_that_looks_at_numbers_is_called_as_it_is():
    def f(x):
        return x**2 if float(x.sum()) > 0 else -x

    x = random(3).abs()
    replay = traced(f, x)
    assert not replay.ready(x)
    assert torch.equal(replay(-x), x)


def test_a_function_whose_trace_would_hold_at_its_own_arguments_only_is_called_as_it_is():
    """`tolist` takes numbers out of a tensor unseen by the recorder; at other arguments the trace is wrong."""

    def f(x):
        return x * torch.tensor(x.tolist(), dtype=x.dtype)

    x = random(3)
    replay = traced(f, x)
    assert not replay.ready(x)
    assert torch.equal(replay(2 * x), 4 * x**2)


def test_other_shapes_and_transforms_go_to_the_function():
    x = random(3)
    replay = traced(lambda x: torch.outer(x, x), x)
    assert replay.ready(x)
    y, z = random(4), x.float()
    assert not replay.ready(y)
    assert not replay.ready(z)
    assert torch.equal(replay(y), torch.outer(y, y))
    assert replay(z).dtype == torch.float32
    assert vmap(replay)(random(2, 3)).shape == (2, 3, 3)
    assert jvp(replay, (x,), (x,))[1] == pytest.approx(2 * torch.outer(x, x))


@pytest.mark.parametrize("name", METHODS)
@given(seeds, st.integers(2, 6), st.integers(1, 3))
@examples(8)
def test_a_flow_is_the_same_before_and_after_its_derivatives_are_traced(name, seed, d, k):
    """α, β, the gap, the drift and ν's decay of a flow that has been asked often, and of a new one."""
    rng = np.random.default_rng(seed)
    loss = CubicLoss.random(rng, d)
    U = torch.tensor(rng.normal(size=(d, min(k, d))))

    def fresh():
        return dvi.central_flow(loss.problem(np.ones(d)), METHODS[name], check=False)

    def at(flow, i):
        draw = np.random.default_rng([seed, i])
        w = torch.tensor(1 + 0.1 * draw.normal(size=d))
        nu = pytree.tree_map(lambda x: x * torch.tensor(1 + 0.05 * np.tanh(draw.normal(size=x.shape))), flow.initial.nu)
        lin = flow.linearise(w, nu, U, t=0.5)
        state = dvi.solvers.State(w, nu, 0.5)
        decay = flow.nu_decay(state, flow.gradient(state))
        return [
            lin.alpha,
            lin.beta,
            lin.gap,
            *pytree.tree_leaves(lin.drift(np.eye(U.shape[1])).parts),
            torch.tensor(decay),
        ]

    often = fresh()
    for i in range(WARM + 2):
        at(often, i)
    known = often.calculus.replays._known
    assert any(replay._graph is not None for replay in known.values()) == (name != "scheduled")
    for found, expected in zip(at(often, 99), at(fresh(), 99), strict=True):
        # the same operations but for the order of sums over a batch
        torch.testing.assert_close(found, expected, rtol=1e3 * EPS, atol=1e3 * EPS * float(expected.abs().max()))


def test_which_preconditioners_are_entrywise():
    """Not P made of a norm of ν, nor of neighbours; P made of entries and of scalars is."""

    class Neighbours(dvi.Method):
        def init(self, w):
            return {"v": torch.zeros_like(w)}

        def f(self, nu, g):
            return {"v": 0.1 * (g**2 - nu["v"])}

        def P(self, nu):
            return dvi.Diagonal(nu["v"] + nu["v"].roll(1) + 1)

    class Largest(Neighbours):
        def P(self, nu):
            return dvi.methods.Scalar(nu["v"].max() + 1)

    problem = CubicLoss.random(np.random.default_rng(0), 4).problem(np.ones(4))
    expected = {Neighbours(): False, Largest(): False, **{m: True for n, m in METHODS.items()}}
    for method, entrywise in expected.items():
        assert dvi.central_flow(problem, method, check=False).calculus.metric.entrywise == entrywise, method
