"""Any module as a loss of its flat parameters: what is carried, what is refused, and what comes back out."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dvi.problems import ModuleProblem, Problem, ProblemError

F64 = torch.float64


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


X, Y = normal(7, 3), normal(7, 2, seed=1)


def small(*layers):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), *layers, nn.Tanh(), nn.Linear(4, 2)).to(F64)


def make(model, criterion=F.mse_loss, inputs=X, targets=Y, **options):
    return Problem.from_module(model, criterion, inputs, targets, **options)


def test_the_loss_is_the_modules():
    model = small()
    problem = make(model)
    loss = F.mse_loss(model(X), Y)
    loss.backward()
    value, gradient = problem.value_and_grad(problem.w0)
    assert isinstance(problem, ModuleProblem)
    assert torch.equal(problem.w0, nn.utils.parameters_to_vector(model.parameters()).detach())
    assert torch.allclose(value, loss.detach(), rtol=1e-14)
    assert torch.allclose(gradient, torch.cat([p.grad.flatten() for p in model.parameters()]), rtol=1e-13)
    assert torch.equal(problem.outputs(problem.w0, X), model(X).detach())


def test_flat_weights_have_names_and_go_back():
    model = small()
    problem = make(model)
    assert list(problem.parameter_slices) == [name for name, _ in model.named_parameters()]
    for name, parameter in model.named_parameters():
        assert torch.equal(problem.w0[problem.parameter_slices[name]].view(problem.parameter_shapes[name]), parameter)
    w = problem.w0 + 1
    problem.load_into(model, w)
    assert torch.equal(nn.utils.parameters_to_vector(model.parameters()), w)
    assert torch.equal(F.mse_loss(model(X), Y), problem.value(w))
    with pytest.raises(ProblemError, match=r"parameter 0.weight should have shape \[4, 3\], but has shape \[4, 4\]"):
        problem.load_into(nn.Sequential(nn.Linear(4, 4)), w)
    with pytest.raises(ProblemError, match=r"parameter 0.weight .* is missing"):
        problem.load_into(nn.Linear(3, 4), w)


def test_training_the_model_further_does_not_change_the_problem():
    model = small(nn.BatchNorm1d(4)).eval()
    model[0].bias.requires_grad_(False)
    problem = make(model)
    before = problem.value(problem.w0)
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data += 1
    assert torch.equal(problem.value(problem.w0), before)


def test_shared_parameters_count_once():
    class Same(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.second(torch.tanh(self.first(x)))

    model = Same().to(F64)
    problem = make(model, targets=normal(7, 3))
    assert list(problem.parameter_shapes) == ["first.weight", "first.bias", "second.bias"]
    assert problem.dim == 9 + 3 + 3
    F.mse_loss(model(X), normal(7, 3)).backward()
    gradient = problem.value_and_grad(problem.w0)[1]
    assert torch.allclose(gradient[:9], model.first.weight.grad.flatten(), rtol=1e-13)
    problem.check()


def test_frozen_parameters_stay():
    model = small()
    model[0].weight.requires_grad_(False)
    problem = make(model)
    assert "0.weight" not in problem.parameter_slices
    assert problem.dim == sum(p.numel() for p in model.parameters()) - 12
    assert torch.equal(problem.value(problem.w0), F.mse_loss(model(X), Y).detach())
    problem.check()


def test_buffers_are_carried():
    model = small(nn.BatchNorm1d(4)).eval()
    model[1].running_mean += 0.5
    problem = make(model)
    assert problem.dim == sum(p.numel() for p in model.parameters())
    assert torch.equal(problem.value(problem.w0), F.mse_loss(model(X), Y).detach())
    assert int(model[1].num_batches_tracked) == 0


def test_several_inputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.bilinear = nn.Bilinear(3, 3, 2)

        def forward(self, a, b):
            return self.bilinear(a, b)

    model = Two().to(F64)
    whole = make(model, inputs=(X, X.sin()))
    parts = make(model, inputs=(X, X.sin()), chunk_size=2)
    assert torch.allclose(whole.value(whole.w0), parts.value(whole.w0), rtol=1e-13)
    assert whole.outputs(whole.w0, (X[:1], X[:1])).shape == (1, 2)


@pytest.mark.parametrize(
    "criterion", [nn.MSELoss(), nn.MSELoss(reduction="sum"), lambda o, t: (o - t).pow(4).sum(1).mean()]
)
@pytest.mark.parametrize("chunk_size", [1, 3, 6, 7, 100])
def test_means_and_sums_in_chunks(criterion, chunk_size):
    model = small()
    whole, parts = make(model, criterion), make(model, criterion, chunk_size=chunk_size)
    for a, b in zip(whole.value_and_grad(whole.w0), parts.value_and_grad(whole.w0), strict=True):
        assert torch.allclose(a, b, rtol=1e-12)


def test_two_examples_suffice_to_tell_a_mean():
    model = small()
    whole, parts = make(model, inputs=X[:2], targets=Y[:2]), make(model, inputs=X[:2], targets=Y[:2], chunk_size=1)
    assert torch.allclose(whole.value(whole.w0), parts.value(whole.w0), rtol=1e-12)


@pytest.mark.parametrize("backend", ["autodiff", "finite-difference"])
def test_output_curvature(backend):
    """Against dense second derivatives; differences of outputs balance rounding and truncation at ε^½ = 1.5e-8."""
    model = small()
    problem = make(model, derivatives=backend, chunk_size=3)
    w, U, Q = problem.w0, normal(problem.dim, 3, seed=2), normal(3, 3, seed=3)
    Q = Q + Q.T

    def outputs(v):
        named = {
            path: v[where].view(problem.parameter_shapes[path]) for path, where in problem.parameter_slices.items()
        }
        return torch.func.functional_call(model, named, X)

    dense = torch.func.jacfwd(torch.func.jacrev(outputs))(w)
    expected = 0.5 * torch.einsum("noab,ab->no", dense, U @ Q @ U.T)
    result = problem.output_curvature(w, X, U, Q)
    tolerance = 1e-12 if backend == "autodiff" else 1e-5
    assert (result - expected).norm() < tolerance * expected.norm()
    assert not result.requires_grad
    assert torch.all(problem.output_curvature(w, X, U, torch.zeros(3, 3, dtype=F64)) == 0)


def test_output_curvature_of_linear_outputs_is_zero():
    problem = make(nn.Linear(3, 2).to(F64))
    assert torch.all(problem.output_curvature(problem.w0, X, normal(8, 2), torch.eye(2, dtype=F64)) == 0)


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=F64))

    def forward(self, x):
        self.calls += 1
        return x


class Coupling(nn.Module):
    def forward(self, x):
        return x - x.mean(0)


class Noise(nn.Module):
    def forward(self, x):
        return F.dropout(x, 0.5, training=True)


def mixed():
    model = small()
    model[2].to(torch.float32)
    return model


def frozen():
    return small().requires_grad_(False)


def training(layer):
    return lambda: small(layer).train()


REFUSED = {
    "dropout": (training(nn.Dropout(0.3)), {}, r"comes from 1 \(Dropout, in training mode\).*model.eval\(\)"),
    "batch norm": (training(nn.BatchNorm1d(4)), {}, r"changes the buffer 1.running_mean.*Call model.eval\(\)"),
    "batch norm in chunks": (
        lambda: nn.Sequential(nn.Unflatten(1, (1, 3)), nn.BatchNorm1d(1, track_running_stats=False, dtype=F64)).train(),
        {"chunk_size": 3, "inputs": X, "criterion": lambda out, y: out.pow(4).mean()},
        "neither a mean .* nor a sum",
    ),
    "RReLU": (training(nn.RReLU()), {}, r"comes from 1 \(RReLU, in training mode\)"),
    "functional dropout": (lambda: small(Noise()), {}, r"comes from 1 \(Noise"),
    "changing buffer": (lambda: small(Counting()), {}, "changes the buffer 1.calls"),
    "mixed dtypes": (mixed, {}, "0.weight is torch.float64 on cpu, 2.weight is torch.float32 on cpu"),
    "nothing to train": (frozen, {}, "nothing to train"),
    "coupled examples": (lambda: small(Coupling()), {"chunk_size": 3}, "neither a mean .* nor a sum"),
    "norm": (
        small,
        {"chunk_size": 3, "criterion": lambda o, t: (o - t).norm()},
        "neither a mean .* nor a sum(.|\n)*Without chunk_size any criterion will do",
    ),
    "chunk size": (small, {"chunk_size": 0}, "chunk_size counts examples"),
    "numbers differ": (small, {"targets": Y[:5]}, "7 inputs but 5 targets"),
    "dtype of inputs": (small, {"inputs": X.float()}, "inputs are torch.float32, the model torch.float64"),
    "device of inputs": (small, {"inputs": X.to("meta")}, "inputs are on meta, the model on cpu"),
    "no tensors": (small, {"inputs": X.tolist()}, "inputs are a tensor"),
    "no examples": (small, {"inputs": X[:0], "targets": Y[:0]}, "at least 1"),
    "NaN in inputs": (small, {"inputs": X * math.nan}, "inputs have entries that are NaN"),
    "NaN in targets": (small, {"targets": Y * math.nan}, "targets have entries that are NaN"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case):
    model, options, message = REFUSED[case]
    with pytest.raises(ProblemError, match=message):
        make(model(), **options)


def test_padding_that_shows_late_is_refused():
    labels = torch.tensor([0, 1, 0, 1, 1, -1, -1])
    criterion = nn.CrossEntropyLoss(ignore_index=-1)
    with pytest.raises(ProblemError, match="some examples count for more than others"):
        make(small(), criterion, targets=labels, chunk_size=4)
    make(small(), criterion, targets=labels)  # all at once is fine


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, dropout=0.1)

    def forward(self, x):
        return self.attention(x, x, x)


@pytest.mark.parametrize(
    "layer", [Attending(), nn.RNN(4, 4, num_layers=2, dropout=0.1), nn.TransformerEncoderLayer(4, 2, 4)]
)
def test_dropout_inside_attention_and_recurrence(layer):
    first = lambda out, y: F.mse_loss(out[0] if isinstance(out, tuple) else out, y)  # noqa: E731
    with pytest.raises(ProblemError, match=r"and then .* at the same w0 \(it comes from 1.* in training mode"):
        make(nn.Sequential(nn.Linear(3, 4), layer).to(F64).train(), first, targets=normal(7, 4))


def test_dropout_of_nothing_and_instance_norm_are_no_reason():
    make(small(nn.Dropout(0.0)).train())
    make(
        nn.Sequential(nn.Conv1d(2, 2, 2), nn.InstanceNorm1d(2)).to(F64).train(),
        inputs=normal(3, 2, 5),
        targets=normal(3, 2, 4),
    )


def test_a_model_put_in_training_mode_later_is_no_matter():
    model = small(nn.Dropout(0.3)).eval()
    problem = make(model)
    before = problem.value_and_grad(problem.w0)
    model.train()
    for a, b in zip(before, problem.value_and_grad(problem.w0), strict=True):
        assert torch.equal(a, b)


def test_batch_norm_by_the_batch_is_a_function_of_the_weights():
    model = small(nn.BatchNorm1d(4, track_running_stats=False)).train()
    problem = make(model)
    F.mse_loss(model(X), Y).backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert torch.allclose(problem.value_and_grad(problem.w0)[1], gradient, rtol=1e-12, atol=1e-15)
    problem.check()


def test_outputs_refuse_other_inputs():
    problem = make(small())
    with pytest.raises(ProblemError, match=r"inputs are torch.float32"):
        problem.outputs(problem.w0, X.float())
    with pytest.raises(ProblemError, match="w is"):
        problem.outputs(problem.w0[1:], X)
