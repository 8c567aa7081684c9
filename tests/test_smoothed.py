"""``smoothed``: a copy of a model with β-GELU for ReLU, wherever the ReLU is called from."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from test_check import Call, normal, seeded
from torch import nn

import dvi
from dvi.problems import Problem, ProblemError, smoothed

F64 = torch.float64


def in_place(function):
    def call(x):
        x = x.clone()
        function(x)
        return x

    return call


RELUS = {
    "nn.ReLU": nn.ReLU,
    "nn.ReLU in place": lambda: nn.ReLU(inplace=True),
    "F.relu": lambda: Call(F.relu),
    "F.relu in place by position": lambda: Call(in_place(lambda x: F.relu(x, True))),
    "torch.relu": lambda: Call(torch.relu),
    "Tensor.relu": lambda: Call(lambda x: x.relu()),
    "Tensor.relu_": lambda: Call(in_place(lambda x: x.relu_())),
    "torch.relu_": lambda: Call(in_place(torch.relu_)),
    "F.relu with a keyword": lambda: Call(lambda x: F.relu(input=x)),
    "clamp(min=0)": lambda: Call(lambda x: x.clamp(min=0)),
    "clamp(0)": lambda: Call(lambda x: x.clamp(0)),
    "torch.clamp(min=0.0)": lambda: Call(lambda x: torch.clamp(x, min=0.0)),
    "clamp_": lambda: Call(in_place(lambda x: x.clamp_(min=0))),
    "clamp_min": lambda: Call(lambda x: x.clamp_min(0)),
    "clip": lambda: Call(lambda x: x.clip(min=0)),
    "nn.ReLU6": nn.ReLU6,
    "nn.Hardtanh": nn.Hardtanh,
    "nn.LeakyReLU": lambda: nn.LeakyReLU(0.2),
    "nn.LeakyReLU in place": lambda: nn.LeakyReLU(0.2, inplace=True),
    "F.leaky_relu": lambda: Call(lambda x: F.leaky_relu(x, 0.2)),
    "TransformerEncoderLayer": lambda: Call(nn.TransformerEncoderLayer(8, 2, 12, 0.0, "relu", batch_first=True)),
}


def model_with(name):
    return (
        seeded(lambda: nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8).eval(), RELUS[name](), nn.Linear(8, 3)))
        .to(F64)
        .eval()
    )


@pytest.mark.parametrize("name", RELUS)
def test_it_tends_to_the_model_as_beta_grows(name):
    """Each activation is off by 0.17/β at most, and only where |x| is about 1/β: the sum falls faster than 1/β."""
    model, x = model_with(name), 3 * normal(30, 6)
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        errors = [float((smoothed(model, beta)(x) - model(x)).norm() / model(x).norm()) for beta in (1, 10, 1000)]
    assert 1e-3 < errors[0] < 1
    assert errors[1] < errors[0] / 10
    assert errors[2] < 1e-3 * errors[0]
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert "forward" not in model.__dict__


@pytest.mark.parametrize("name", RELUS)
def test_it_has_no_kinks_and_right_derivatives(name, caplog):
    problem = Problem.from_module(smoothed(model_with(name)), F.mse_loss, normal(12, 6, seed=1), normal(12, 3, seed=2))
    problem.check()
    assert not caplog.records
    kinked = Problem.from_module(model_with(name), F.mse_loss, normal(12, 6, seed=1), normal(12, 3, seed=2))
    far = problem.w0 + normal(problem.dim, seed=3)
    assert kinked.kinks_between(problem.w0, far)
    assert not problem.kinks_between(problem.w0, far)


def test_parameters_keep_names_and_values():
    model = model_with("nn.ReLU")
    smooth = smoothed(model)
    assert list(smooth.state_dict()) == list(model.state_dict())
    assert all(
        torch.equal(a, b) for a, b in zip(smooth.state_dict().values(), model.state_dict().values(), strict=True)
    )
    problem = Problem.from_module(smooth, F.mse_loss, normal(12, 6, seed=1), normal(12, 3, seed=2))
    problem.load_into(model, problem.w0 + 1)
    smooth.load_state_dict(model.state_dict())
    assert torch.equal(smooth[0].weight, model[0].weight)
    assert torch.equal(smooth[0].weight.reshape(-1), (problem.w0 + 1)[:48])


def test_it_is_the_networks_own_activation():
    model = seeded(lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))).to(F64)
    written = nn.Sequential(model[0], dvi.problems.BetaGELU(7.0), model[2])
    assert torch.equal(smoothed(model, 7)(normal(5, 6)), written(normal(5, 6)))


def test_relu_six_and_leaky_relu_bend_where_they_should():
    x = torch.linspace(-9, 15, 101, dtype=F64)
    for function in (F.relu6, lambda z: F.leaky_relu(z, 0.2), F.relu):
        assert (smoothed(Call(function), 50)(x) - function(x)).abs().max() < 0.18 / 50


def test_what_is_no_relu_stays():
    model = Call(
        lambda x: x.relu() + x.clamp(-1, 1) + x.clamp(0, 2) + x.clamp(min=0.5) + x.clamp(max=0) + x.clamp(min=x * 0)
    )
    x = normal(20)
    assert torch.allclose(smoothed(model, 1e9)(x), model(x), atol=1e-8)
    assert torch.allclose(smoothed(model, 3)(x) - model(x), dvi.problems.BetaGELU(3)(x) - x.relu())


@pytest.mark.parametrize("send", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_it_can_be_copied_and_pickled(send):
    smooth = smoothed(seeded(lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU())).to(F64), 5)
    sent = send(smooth)
    x = normal(4, 6)
    assert torch.equal(sent(x), smooth(x))
    with torch.no_grad():
        sent[0].weight.zero_()
    assert not torch.equal(sent(x), smooth(x))
    assert torch.equal(smoothed(smooth, 9)(x), smoothed(nn.Sequential(smooth[0], nn.ReLU()), 9)(x))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: nn.RNN(3, 4, nonlinearity="relu"), r"the model \(RNN\) has its ReLU inside one kernel"),
        (lambda: nn.Sequential(nn.RNNCell(3, 4, nonlinearity="relu")), r"0 \(RNNCell\) has its ReLU inside"),
        (lambda: torch.compile(nn.Sequential(nn.Linear(3, 3), nn.ReLU())), "is compiled"),
        (lambda: torch.jit.trace(nn.ReLU(), torch.ones(3)), "is compiled"),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_cannot_be_smoothed_is_refused(model, message):
    with pytest.raises(ProblemError, match=message):
        smoothed(model())


def test_nothing_to_smooth_is_refused():
    smooth = smoothed(nn.Sequential(nn.Linear(6, 8), nn.Tanh()).to(F64))
    with pytest.raises(ProblemError, match="Sequential calls no ReLU in its forward pass"):
        Problem.from_module(smooth, F.mse_loss, normal(12, 6), normal(12, 8))
    with pytest.raises(ProblemError, match="positive"):
        smoothed(nn.ReLU(), beta=0)


def test_a_flow_runs_on_it():
    model = seeded(lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))).to(F64)
    problem = Problem.from_module(smoothed(model), F.mse_loss, normal(20, 6), normal(20, 3))
    solution = dvi.solve(dvi.central_flow(problem, dvi.methods.GradientDescent(0.05)), 20, progress=False)
    assert solution.status is dvi.Status.SUCCESS
