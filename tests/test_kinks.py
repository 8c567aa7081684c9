"""Losses with kinks: right derivatives pass, wrong ones are refused, and the user is told of the kinks."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F
from test_check import Call, Sine, normal, seeded
from torch import nn

import dvi
from dvi.problems import DerivativeError, Problem, digits
from dvi.problems.derivatives.kinks import Piece
from dvi.problems.derivatives.protocol import value_and_gradient

F64 = torch.float64


def pooled(x):
    return F.max_pool2d(x.view(-1, 1, 2, 4), 2, stride=1, padding=(0, 1)).flatten(1)[:, :4].repeat(1, 2)


# What has kinks, from [n, 8] to [n, 8].
KINKED = {
    "ReLU": nn.ReLU,
    "ReLU in place": lambda: nn.ReLU(inplace=True),
    "LeakyReLU": nn.LeakyReLU,
    "PReLU": nn.PReLU,
    "RReLU": lambda: nn.RReLU().eval(),
    "ReLU6": nn.ReLU6,
    "ELU": nn.ELU,
    "CELU": lambda: nn.CELU(0.5),
    "Hardtanh": nn.Hardtanh,
    "Hardswish": nn.Hardswish,
    "Hardsigmoid": lambda: nn.Sequential(Call(lambda x: 5 * x), nn.Hardsigmoid()),
    "Softshrink": lambda: nn.Softshrink(0.1),
    "Hardshrink, which jumps little": lambda: nn.Hardshrink(1e-4),
    "abs": lambda: Call(torch.abs),
    "clamp": lambda: Call(lambda x: x.clamp(-0.5, 0.5)),
    "maxout": lambda: Call(lambda x: x.view(-1, 4, 2).max(-1)[0].repeat(1, 2)),
    "maximum": lambda: Call(lambda x: torch.maximum(x, 0.3 * x.flip(-1))),
    "largest entry": lambda: Call(lambda x: x - x.amax(-1, keepdim=True)),
    "largest of all": lambda: Call(lambda x: x / x.abs().max()),
    "max-pool": lambda: Call(pooled),
    "adaptive max-pool": lambda: Call(lambda x: F.adaptive_max_pool1d(x[:, None], 4)[:, 0].repeat(1, 2)),
    "sort": lambda: Call(lambda x: x.sort(-1)[0]),
    "top k": lambda: Call(lambda x: x.topk(4, -1)[0].repeat(1, 2)),
    "median": lambda: Call(lambda x: x - x.median(-1, keepdim=True)[0]),
    "where": lambda: Call(lambda x: torch.where(x > 0, x, 0.1 * x)),
    "1-norm": lambda: Call(lambda x: 8 * x / x.norm(p=1, dim=-1, keepdim=True)),
    "∞-norm": lambda: Call(lambda x: x / torch.linalg.vector_norm(x, float("inf"), dim=-1, keepdim=True)),
    "quantile": lambda: Call(lambda x: x - x.quantile(0.3, dim=-1, keepdim=True)),
}

CRITERIA = {
    "L1": F.l1_loss,
    "Huber": lambda out, y: F.huber_loss(out, y, delta=0.5),
    "smooth L1": lambda out, y: F.smooth_l1_loss(out, y, beta=0.5),
    "hinge": lambda out, y: (1 - out * y.sign()).clamp(min=0).mean(),
    "hinge embedding": lambda out, y: F.hinge_embedding_loss(out, y.sign()),
    "margin": lambda out, y: F.margin_ranking_loss(out[:, 0], out[:, 1], y[:, 0].sign()),
    "triplet": lambda out, y: F.triplet_margin_loss(out, y, y.flip(0)),
    "pinball": lambda out, y: torch.maximum(0.3 * (out - y), 0.7 * (y - out)).mean(),
}


def net(kinked, fault=0, dtype=F64, seed=0, criterion=F.mse_loss, **options):
    """A network with kinks, and behind them a sine with a fault of some order."""
    model = seeded(
        lambda: nn.Sequential(nn.Linear(6, 8), kinked(), nn.Linear(8, 8), Sine(fault), nn.Linear(8, 3)), seed
    ).to(dtype)
    data = [normal(40, n, seed=n + seed, dtype=dtype) for n in (6, 3)]
    return Problem.from_module(model, criterion, *data, **options)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, F64) for name in KINKED),
        *((name, torch.float32) for name in ("ReLU", "ELU", "abs", "maxout", "max-pool", "sort", "1-norm", "quantile")),
    ],
)
def test_kinks_are_no_fault_and_hide_none(name, dtype):
    net(KINKED[name], dtype=dtype).check()
    for order, what in enumerate(("gradient", "second derivative", "third derivative"), start=1):
        with pytest.raises(DerivativeError, match=rf"the {what} is off by(.|\n)*module 3 \(Sine\)"):
            net(KINKED[name], order, dtype=dtype).check()


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("name", CRITERIA)
def test_kinks_of_a_criterion(name, dtype):
    net(nn.Tanh, dtype=dtype, criterion=CRITERIA[name]).check()
    with pytest.raises(DerivativeError, match="the second derivative is off by"):
        net(nn.Tanh, 2, dtype=dtype, criterion=CRITERIA[name]).check()


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("seed", range(6))
def test_relu_networks_of_several_seeds(seed, dtype):
    net(nn.ReLU, seed=seed, dtype=dtype).check()
    for order in (1, 2, 3):
        with pytest.raises(DerivativeError, match="Sine"):
            net(nn.ReLU, order, seed=seed, dtype=dtype).check()


@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_many_kinks(dtype):
    """60 images and 64 units: thousands of kinks within any step that differences can be taken with."""
    digits(n=60, width=32, activation="relu", dtype=dtype).check()
    digits("cnn", "ce", n=20, width=4, activation="relu", dtype=dtype).check()


def test_a_detached_factor_between_relus_is_refused():
    with pytest.raises(DerivativeError, match="the gradient is off by"):
        net(lambda: Call(lambda x: x.relu() * x.relu().detach())).check()


def test_layer_norm_of_torch_is_refused_inside_a_relu_network(monkeypatch):
    from contextlib import nullcontext

    from dvi.problems.derivatives import autodiff

    net(lambda: nn.Sequential(nn.ReLU(), nn.LayerNorm(8))).check()
    monkeypatch.setattr(autodiff, "differentiable_layers", nullcontext)
    with pytest.raises(DerivativeError, match=r"third derivative is off by(.|\n)*LayerNorm"):
        net(lambda: nn.Sequential(nn.ReLU(), nn.LayerNorm(8))).check()


def test_a_loss_that_jumps_is_refused():
    """A rounding has the derivative 0 everywhere, on every piece; the loss climbs all the same."""
    with pytest.raises(DerivativeError, match=r"the loss changes by .*, but the integral of its gradient is"):
        net(lambda: Call(lambda x: (20 * x).round() / 20)).check()


def test_straight_through_gradients_are_refused():
    with pytest.raises(DerivativeError, match="the gradient is off by"):
        net(lambda: Call(lambda x: x + ((5 * x).round() / 5 - x).detach())).check()


def test_kinks_are_told_once(caplog):
    problem = net(nn.ReLU)
    with caplog.at_level(logging.WARNING, "dvi"):
        problem.check()
        problem.check()
    (record,) = caplog.records
    assert "kinks" in record.message
    assert "smoothed(model, beta=20)" in record.message
    caplog.clear()
    with caplog.at_level(logging.WARNING, "dvi"):
        net(nn.GELU).check()
        net(lambda: Call(lambda x: torch.where(torch.arange(8) > 3, x, x**2))).check()  # a question, but not of weights
    assert not caplog.records


def test_kinks_that_differences_cannot_be_taken_across():
    """Third derivatives by differences of a dense net of kinks are of no use; the remedy is named."""
    problem = digits(n=60, width=16, activation="relu", derivatives="finite-difference", dtype=torch.float32)
    with pytest.raises(DerivativeError, match=r'or has kinks: take derivatives="autodiff"'):
        problem.check()


def loss_of_net(kinked):
    """The loss of ``net`` as a function of a vector of weights, in one part."""
    model = seeded(lambda: nn.Sequential(nn.Linear(6, 8), kinked(), nn.Linear(8, 8), Sine(), nn.Linear(8, 3))).to(F64)
    sizes = {name: p.shape for name, p in model.named_parameters()}
    x, y = (normal(40, n, seed=n) for n in (6, 3))

    def loss(w):
        pieces = w.split([shape.numel() for shape in sizes.values()])
        weights = {name: piece.view(shape) for piece, (name, shape) in zip(pieces, sizes.items(), strict=True)}
        return F.mse_loss(torch.func.functional_call(model, weights, (x,)), y)

    return (loss,)


@pytest.mark.parametrize("name", ["ReLU", "max-pool", "abs", "1-norm", "sort"])
def test_a_piece_is_the_loss_up_to_its_border_and_smooth_beyond(name):
    problem, parts = net(KINKED[name]), loss_of_net(KINKED[name])
    piece = Piece(parts, problem.w0)
    u = normal(problem.dim, seed=3)
    u /= u.norm()
    near, far = problem.w0 + 1e-9 * u, problem.w0 + 0.5 * u
    for x, y in zip(piece(near), value_and_gradient(parts, near), strict=True):
        assert torch.allclose(x, y, rtol=1e-13, atol=1e-13)
    assert not piece.ends_before(near)
    assert piece.ends_before(far)
    # The gradient of the piece is that of a smooth function all the way: twice as fine, a quarter of the error.
    way = far - problem.w0

    def error(points):
        ends = (piece(problem.w0)[1] + piece(far)[1]) / 2
        inside = sum(piece(problem.w0 + way * i / points)[1] for i in range(1, points))
        return abs(float((ends + inside) @ way / points - (piece(far)[0] - piece(problem.w0)[0])))

    assert 3.9 < error(20) / error(40) < 4.1


# ---- a flow across kinks ---------------------------------------------------------------------------------


def run(problem, steps, integrator=None, **options):
    method = dvi.methods.GradientDescent(0.5)
    flow = dvi.central_flow(problem, method, check=False)
    return dvi.solve(flow, steps, integrator=integrator, progress=False, throw=False, **options)


def small_relu_net():
    model = seeded(lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))).to(F64)
    return Problem.from_module(model, F.mse_loss, normal(10, 6, seed=1), normal(10, 3, seed=2))


def test_a_flow_does_not_chatter_without_end():
    """Without a bound this run costs more than 23,000 gradient equivalents."""
    solution = run(small_relu_net(), 200)
    assert solution.status is dvi.Status.KINKS
    assert "smoothed(model, beta=20)" in str(solution.status)
    assert "kinks were crossed" in solution.notes[-1]
    assert solution.ledger.gradient_equivalents < 3000


def test_the_remedy_is_one():
    model = seeded(lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))).to(F64)
    problem = Problem.from_module(
        dvi.problems.smoothed(model, 4), F.mse_loss, normal(10, 6, seed=1), normal(10, 3, seed=2)
    )
    assert run(problem, 50).status is dvi.Status.SUCCESS


def test_no_bound_ends_a_smooth_run(monkeypatch):
    """However small: the loss is looked at, and has no kinks."""
    monkeypatch.setattr("dvi.runs.chatter.KINK_COST", 1.0)
    free = run(digits(n=40, width=6), 60, warm_start="auto")
    assert free.status is dvi.Status.SUCCESS
    assert free.ledger.gradient_equivalents > 60


def test_steps_that_are_fixed_cost_what_they_were_told_to(monkeypatch):
    monkeypatch.setattr("dvi.runs.chatter.KINK_COST", 1.0)
    assert run(small_relu_net(), 3, dvi.Euler(dt=0.25)).status is dvi.Status.SUCCESS


def test_kinks_between_two_points():
    problem = Problem(lambda w: (w - 1).abs().sum() + w.square().sum(), torch.zeros(2, dtype=F64))
    w = problem.w0
    assert not problem.kinks_between(w, w + 0.9)
    assert problem.kinks_between(w, w + 1.1)
    assert not problem.kinks_between(w + 1.1, w + 5)
    smooth = Problem(lambda w: w.square().sum(), torch.zeros(2, dtype=F64))
    assert not smooth.kinks_between(w, w + 100)
    assert problem.ledger.gradient_equivalents == 0
