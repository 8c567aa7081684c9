"""Data, networks and the ready-made problems."""

from __future__ import annotations

import sys

import pytest
import torch

from dvi.problems import (
    CNN,
    GPT,
    MLP,
    RNN,
    BetaGELU,
    Circle,
    Cubic,
    MatrixSweep,
    ProblemError,
    Quadratic,
    digits,
    sorting,
)
from dvi.problems.catalogue.data import load_digits, make_sorting
from dvi.problems.catalogue.tasks import cross_entropy, squared_error
from dvi.problems.networks.initial import initialise

F64 = torch.float64
SMALL = {
    "digits-mlp": lambda **k: digits(n=30, width=4, **k),
    "digits-cnn": lambda **k: digits("cnn", n=20, width=2, **k),
    "sorting-transformer": lambda **k: sorting(n=10, width=8, depth=1, heads=2, **k),
    "sorting-rnn": lambda **k: sorting("rnn", n=10, width=6, **k),
}
TOYS = {
    "quadratic": lambda **k: Quadratic([1.0, 2.0, 3.0], **k).problem,
    "cubic": lambda **k: Cubic(3, **k).problem,
    "matrix sweep": lambda **k: MatrixSweep([1.0, 2.0], [0.5, 0.5], 0.1, **k).problem,
    "circle": lambda **k: Circle(**k).problem,
}


def test_digits_are_standardised_and_seeded():
    x, y = load_digits(200, classes=4, seed=1)
    assert (x.shape, y.shape, x.dtype, y.dtype) == ((200, 1, 8, 8), (200,), F64, torch.int64)
    assert set(y.tolist()) == {0, 1, 2, 3}
    assert abs(x.mean()) < 1e-12
    assert abs(x.std() - 1) < 1e-12
    assert torch.equal(load_digits(200, 4, seed=1)[0], x)
    assert not torch.equal(load_digits(200, 4, seed=2)[0], x)
    for wrong in ({"n": 1000, "classes": 4}, {"n": 0}, {"classes": 11}, {"classes": 1}):
        with pytest.raises(ProblemError, match="digits"):
            load_digits(**wrong)


def test_missing_extra_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"pip install dvi-flows\[data\]"):
        digits()


def test_sorting_task():
    tokens, solved = make_sorting(50)
    assert (tokens.shape, solved.shape) == ((50, 15), (50, 8))
    assert torch.equal(tokens[:, :8].sort(dim=1).values, solved)
    assert torch.equal(tokens[:, 8:], solved[:, :-1])
    assert set(tokens.unique().tolist()) == {0, 1, 2, 3}
    with pytest.raises(ProblemError, match="positive"):
        make_sorting(0)


def test_transformer_is_causal():
    """Changing the last token changes only the prediction at the last position."""
    model = GPT(4, 15, 8, width=8, depth=2, heads=2).to(F64).eval()
    tokens, _ = make_sorting(3)
    changed = tokens.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 4
    before, after = model(tokens), model(changed)
    assert before.shape == (3, 8, 4)
    assert torch.allclose(before[:, :-1], after[:, :-1], rtol=1e-12)
    assert not torch.allclose(before[:, -1], after[:, -1])
    with pytest.raises(ProblemError, match="3 heads"):
        GPT(4, 15, 8, width=8, heads=3)


def test_shapes_of_networks():
    assert MLP([64, 5, 10])(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    assert CNN(1, 10)(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    assert sum(isinstance(layer, torch.nn.Conv2d) for layer in CNN(1, 10)) == 4
    assert RNN(4, 8)(torch.zeros(2, 15, dtype=torch.int64)).shape == (2, 8, 4)
    assert sum(p.numel() for p in GPT(4, 15, 8).parameters()) == 86_016


def test_beta_gelu():
    x = torch.linspace(-3, 3, 50, dtype=F64)
    assert torch.allclose(BetaGELU(1.0)(x), torch.nn.functional.gelu(x), rtol=1e-12)
    assert torch.allclose(BetaGELU(1e6)(x), torch.relu(x), atol=1e-12)
    assert "20.0" in repr(BetaGELU(20))
    with pytest.raises(ProblemError, match="positive"):
        BetaGELU(0)
    digits(n=20, width=4, activation=20).check()
    with pytest.raises(ProblemError, match="no activation 'swish'"):
        digits(n=20, activation="swish")


def test_losses():
    outputs = torch.tensor([[[1.0, 2.0], [0.0, 0.0]]], dtype=F64)
    assert squared_error(outputs, torch.zeros_like(outputs)).item() == pytest.approx(0.5 * 5 / 2)
    expected = torch.nn.functional.cross_entropy(outputs[0], torch.tensor([1, 0]))
    assert cross_entropy(outputs, torch.tensor([[1, 0]])) == expected


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("loss", ["mse", "ce"])
def test_catalogue(name, loss):
    problem = SMALL[name](loss=loss)
    assert problem.name == f"{name}-{loss}"
    problem.check()
    chunked = SMALL[name](loss=loss, chunk_size=7)
    assert torch.allclose(chunked.value(problem.w0), problem.value(problem.w0), rtol=1e-12)
    differences = SMALL[name](loss=loss, derivatives="finite-difference")
    U = torch.randn(problem.dim, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
    H = problem.hvp(problem.w0, U)
    # one-sided: ε^½ = 1.5e-8 times the third derivative along a random direction of length 25 and less, relative to H
    assert (differences.hvp(problem.w0, U) - H).norm() < 1e-6 * H.norm()


def test_catalogue_refuses_unknown_names():
    for call, message in (
        (lambda: digits("rnn"), "digits are for"),
        (lambda: sorting("mlp"), "no network 'mlp' for sequences"),
        (lambda: digits(loss="hinge"), 'loss is "mse" or "ce"'),
    ):
        with pytest.raises(ProblemError, match=message):
            call()


def test_seeds_decide_everything_and_the_global_state_nothing():
    for make in SMALL.values():
        state = torch.get_rng_state()
        a = make(seed=3)
        assert torch.equal(state, torch.get_rng_state())
        torch.rand(5)
        assert torch.equal(make(seed=3).w0, a.w0)
        assert not torch.equal(make(seed=4).w0, a.w0)
        assert torch.allclose(make(seed=3, dtype=torch.float32).w0.double(), a.w0, rtol=1e-6)


def test_initialisation():
    model = GPT(4, 15, 8, width=32, depth=1, heads=2)
    initialise(model, 0)
    assert torch.all(model.norm.weight == 1)
    assert torch.all(model.blocks[0].qkv.bias == 0)
    bound = model.blocks[0].qkv.weight.abs().max().item()
    assert 0.95 / 32**0.5 < bound <= 1 / 32**0.5
    assert model.tokens.weight.std().item() == pytest.approx(0.02, rel=0.2)


@pytest.fixture(params=[(F64, torch.float32), (torch.float32, F64)], ids=["float64", "float32"])
def foreign_defaults(request):
    """Explicit CPU tensors of one dtype among defaults that are another's."""
    used, default = request.param
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    torch.set_default_device("meta")
    yield used
    torch.set_default_device(None)
    torch.set_default_dtype(before)


@pytest.mark.parametrize("name", [*SMALL, *TOYS])
def test_nothing_depends_on_the_default_device_and_dtype(name, foreign_defaults):
    dtype = foreign_defaults
    makers = {**SMALL, **TOYS}
    options = [
        {"derivatives": "autodiff"},
        {"derivatives": "mixed"},
        {"derivatives": "finite-difference"},
        {"chunk_size": 4},
    ]
    for extra in options if name in SMALL else [{}]:
        problem = makers[name](dtype=dtype, device="cpu", **extra)
        w = problem.w0 + 0.01
        U = problem.w0.new_zeros(problem.dim, 2)
        U[0, 0] = U[1, 1] = 1
        X = torch.eye(2, dtype=dtype, device="cpu")
        results = [
            problem.value(w),
            *problem.value_and_grad(w),
            problem.hvp(w, U),
            problem.hessian_gradient(w, U),
            problem.hessian_gradient_of(w, U, X),
            problem.hessian_derivative(w, U, U),
            problem.hessian_derivative(w, U, U[:, :1]),
        ]
        if name in SMALL:
            images = name.startswith("digits")
            inputs = load_digits(3, dtype=dtype, device="cpu")[0] if images else make_sorting(3, device="cpu")[0]
            results += [problem.outputs(w, inputs), problem.output_curvature(w, inputs, U, X)]
        assert all(result.dtype == dtype and result.device.type == "cpu" for result in results)
        problem.measure_weights(repeats=1)
