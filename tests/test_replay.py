"""Derivatives of a spec that are traced once and replayed."""

import numpy as np
import pytest
import torch
from conftest import CubicLoss, examples
from hypothesis import given
from hypothesis import strategies as st
from torch.func import grad, jvp, vmap
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import dvi
from dvi.compiler.tracing import WARM, Replay

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


TALLY = torch.zeros((), dtype=torch.float64)


def count(x):
    return x * len(x[x > 0])


def masked_mean(x):
    return x * x[x > 0].mean() if bool(torch.isfinite(x).all()) else x


def by_list(x):
    """`tolist` takes numbers out of a tensor unseen: at other arguments the trace is wrong."""
    return x * torch.tensor(x.tolist(), dtype=x.dtype)


def sign_by_list(x):
    """The same, and right at all arguments with the same signs."""
    return x if x.tolist()[0] > 0 else -x


def tallies(x):
    """Writes into a tensor that outlives the call: every call gives something else."""
    return x * TALLY.add_(1.0)


def draws(x):
    return x * torch.randn(3, dtype=x.dtype)


@pytest.mark.parametrize("f", [count, masked_mean, by_list, sign_by_list, tallies, draws])
def test_a_function_whose_trace_would_not_hold_elsewhere_is_called_as_it_is(f):
    x = torch.tensor([0.4, 0.9, 0.3], dtype=torch.float64)
    replay = traced(f, x)
    assert not replay.ready(x)
    if f in (tallies, draws):
        return  # no two calls of them agree
    for y in (x, x.flip(0), -x, 3 * x, x):
        torch.testing.assert_close(replay(y), f(y), rtol=0, atol=0, equal_nan=True)


def test_what_a_function_writes_into_its_own_results_and_constants_is_replayed():
    def f(x):
        out = torch.zeros(3, dtype=x.dtype)
        out[x > 0] = 1.0
        rates = torch.tensor([1.0, 2.0, 3.0], dtype=x.dtype)
        rates[x > 0.5] = 5.0  # must be gone at the next replay
        return out + rates

    x = random(3)
    replay = traced(f, x)
    assert replay.ready(x)
    for y in (x, -x, x):
        assert torch.equal(replay(y), f(y))


class Operations(TorchDispatchMode):
    """Names of the operations that are carried out."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_replay_carries_out_only_what_its_result_needs():
    """Forward mode compares shapes by operations on the side; what is written into a result is needed."""

    def f(x):
        out = x.new_zeros(3)
        out.add_(x)  # nobody uses what the operation returns
        return jvp(lambda x: out + 1 / (1 + x**0.5), (x,), (x,))[1] + out

    x = random(3) ** 2
    replay = traced(f, x)
    assert replay.ready(x)
    with Operations() as replayed:
        found = replay(x)
    assert torch.equal(found, f(x))
    assert any("add_" in name for name in replayed.names)
    with Operations() as called:
        f(x)
    beside = ("is_same_size", "_has_same_storage_numel", "prims.")
    assert [name for name in called.names if any(word in name for word in beside)]  # so it can fail
    assert not [name for name in replayed.names if any(word in name for word in beside)]


def test_other_shapes_and_transforms_go_to_the_function():
    x = random(3)
    replay = traced(lambda x: torch.outer(x, x), x)
    assert replay.ready(x)
    y, z, apart = random(4), x.float(), random(6)[::2]
    for other in (y, z, apart):
        assert not replay.ready(other)
    assert torch.equal(replay(y), torch.outer(y, y))
    assert replay(z).dtype == torch.float32
    assert vmap(replay)(random(2, 3)).shape == (2, 3, 3)
    assert jvp(replay, (x,), (x,))[1] == pytest.approx(2 * torch.outer(x, x))


@pytest.mark.parametrize("name", METHODS)
@given(seeds, st.integers(2, 6), st.integers(1, 3))
@examples(4)
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
    other = fresh()
    for found, expected in zip(at(often, 98) + at(often, 99), at(other, 98) + at(other, 99), strict=True):
        # the same operations but for the order of sums over a batch
        torch.testing.assert_close(found, expected, rtol=1e3 * EPS, atol=1e3 * EPS * float(expected.abs().max()))


class Counted(dvi.methods.RMSProp):
    """RMSProp that counts how often its f is asked."""

    def f(self, nu, g):
        CALLS.append(1)
        return super().f(nu, g)


CALLS = []


@pytest.mark.parametrize(("lr", "replayed"), [(0.1, True), (lambda t: 0.1 / (1 + t), False)])
def test_a_flow_that_was_asked_often_differentiates_f_no_more(lr, replayed):
    """Only for its value.  With a schedule the method is another one at every moment, and is differentiated."""
    rng = np.random.default_rng(0)
    flow = dvi.central_flow(CubicLoss.random(rng, 4).problem(np.ones(4)), Counted(lr, 0.9), check=False)
    U, w = torch.tensor(rng.normal(size=(4, 2))), torch.ones(4, dtype=torch.float64)
    for _ in range(WARM + 2):
        CALLS.clear()
        flow.linearise(w, flow.initial.nu, U, t=0.5).drift(np.eye(2))
        w = 1.01 * w
    assert (len(CALLS) == 1) == replayed


class Floor(dvi.Method):
    """P has a floor that depends on all of ν, and is not felt at the start."""

    def init(self, w):
        return {"s": torch.zeros_like(w)}

    def f(self, nu, g):
        return {"s": 0.1 * (g**2 - nu["s"])}

    def P(self, nu):
        r = nu["s"].sqrt()
        return dvi.Diagonal(torch.maximum(r, 0.5 * r.amax()))


def test_a_coupling_of_P_that_comes_later_is_felt():
    w = torch.ones(3, dtype=torch.float64)
    problem = dvi.Problem(lambda w: (w**4).sum(), w)
    often, U = dvi.central_flow(problem, Floor(), check=False), torch.eye(3, dtype=torch.float64)[:, :2]
    for i in range(WARM + 2):
        often.linearise(w, {"s": torch.tensor([1.0, 1.0, 1.1], dtype=torch.float64) + 0.01 * i}, U)
    later = {"s": torch.tensor([1.0, 0.1, 3.0], dtype=torch.float64)}
    new = dvi.central_flow(problem, Floor(), check=False)
    new.calculus.metric.simple = False
    found, expected = often.linearise(w, later, U), new.linearise(w, later, U)
    assert torch.allclose(found.alpha, expected.alpha, rtol=1e3 * EPS, atol=0)
    assert torch.allclose(found.beta, expected.beta, rtol=1e3 * EPS, atol=1e3 * EPS * float(expected.beta.abs().max()))


def test_a_scalar_P_that_is_a_number_may_go_with_a_state():
    class Idle(Floor):
        def P(self, nu):
            return dvi.methods.Scalar(2.0)

    w = torch.ones(3, dtype=torch.float64)
    flow = dvi.central_flow(dvi.Problem(lambda w: (w**4).sum(), w), Idle(), check=False)
    lin = flow.linearise(w, flow.initial.nu, torch.eye(3, dtype=torch.float64)[:, :1])
    assert lin.beta[0, 0] == pytest.approx(0.5 * 24**2 / 2)  # ½ T P⁻¹ T
