"""Derivatives of layers that autograd gets wrong by itself, and the check that catches the rest."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dvi.problems import CNN, GPT, MLP, DerivativeError, Problem, digits, sorting

F64 = torch.float64


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


class Function(nn.Module):
    """A function of the inputs after a linear map, so that it has parameters to differentiate in."""

    def __init__(self, function, width):
        super().__init__()
        self.mix = nn.Linear(width, width)
        self.function = function

    def forward(self, x):
        return self.function(self.mix(x))


class SelfAttention(nn.Module):
    def __init__(self, weights, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **options)
        self.weights = weights

    def forward(self, x):
        return self.attention(x, x, x, need_weights=self.weights)[0]


def encoder(**options):
    return nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, activation="gelu", **options)


def attend(x, **options):
    return F.scaled_dot_product_attention(x, x.sin(), x.cos(), **options)


MASK = torch.tensor([[0.0, 1.0, -2.0], [0.5, 0.0, 1.0], [float("-inf"), 0.0, 0.3]], dtype=F64)
LAYERS = {
    "LayerNorm": (lambda: nn.LayerNorm(8), (3, 2, 8)),
    "LayerNorm over two dimensions": (lambda: nn.LayerNorm((2, 8)), (3, 2, 8)),
    "LayerNorm without bias": (lambda: nn.LayerNorm(8, bias=False), (3, 2, 8)),
    "torch.layer_norm": (lambda: Function(lambda x: torch.layer_norm(x, (8,)), 8), (3, 8)),
    "torch.native_layer_norm": (
        lambda: Function(lambda x: torch.native_layer_norm(x, (8,), None, None, 1e-5)[0], 8),
        (3, 8),
    ),
    "BatchNorm, running statistics": (lambda: nn.BatchNorm2d(3), (2, 3, 4, 4)),
    "BatchNorm, own statistics": (lambda: nn.BatchNorm2d(3, track_running_stats=False), (2, 3, 4, 4)),
    "BatchNorm1d, own statistics": (lambda: nn.BatchNorm1d(3, track_running_stats=False), (5, 3)),
    "torch.batch_norm": (
        lambda: Function(lambda x: torch.batch_norm(x, None, None, None, None, True, 0.1, 1e-5, False), 3),
        (5, 3),
    ),
    "InstanceNorm": (lambda: nn.InstanceNorm2d(3, affine=True), (2, 3, 4, 4)),
    "InstanceNorm, running statistics": (
        lambda: nn.InstanceNorm2d(3, affine=True, track_running_stats=True),
        (2, 3, 4, 4),
    ),
    "torch.instance_norm": (
        lambda: Function(lambda x: torch.instance_norm(x, None, None, None, None, True, 0.1, 1e-5, False), 5),
        (2, 3, 5),
    ),
    "weight_norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(5, 3)), (2, 5)),
    "weight_norm along columns": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(5, 3), dim=1), (2, 5)),
    "weight_norm of a kernel": (lambda: nn.utils.parametrizations.weight_norm(nn.Conv1d(2, 3, 2)), (2, 2, 5)),
    "MultiheadAttention": (lambda: SelfAttention(False), (2, 3, 8)),
    "MultiheadAttention with weights": (lambda: SelfAttention(True), (2, 3, 8)),
    "MultiheadAttention with biases": (lambda: SelfAttention(False, add_bias_kv=True, add_zero_attn=True), (2, 3, 8)),
    "TransformerEncoderLayer": (encoder, (2, 3, 8)),
    "TransformerEncoderLayer, norm first": (lambda: encoder(norm_first=True), (2, 3, 8)),
    "TransformerEncoder": (lambda: nn.TransformerEncoder(encoder(), 2, enable_nested_tensor=False), (2, 3, 8)),
    "attention": (lambda: Function(attend, 8), (2, 2, 3, 8)),
    "causal attention": (lambda: Function(lambda x: attend(x, is_causal=True), 8), (2, 2, 3, 8)),
    "masked attention": (lambda: Function(lambda x: attend(x, attn_mask=MASK), 8), (2, 2, 3, 8)),
    "GroupNorm": (lambda: nn.GroupNorm(2, 4), (2, 4, 3)),
    "RMSNorm": (lambda: nn.RMSNorm(8), (3, 8)),
}


def layer_problem(make, shape, **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = make()
    for name, buffer in layer.named_buffers():
        if name.endswith("running_var"):
            buffer.fill_(1.7)
    layer = layer.to(F64).eval()
    for i, parameter in enumerate(layer.parameters()):
        parameter.data += 0.3 * normal(*parameter.shape, seed=i)
    model = nn.Sequential(Function(torch.tanh, shape[-1]).to(F64), layer)
    model[0].mix.weight.data = normal(shape[-1], shape[-1], seed=5) / shape[-1] ** 0.5
    inputs = normal(*shape, seed=7)
    with torch.no_grad():
        targets = normal(*model(inputs).shape, seed=8)
    return Problem.from_module(model, F.mse_loss, inputs, targets, **options), model


def extrapolate(difference, h):
    """Remove the h² and h⁴ errors of a symmetric difference."""
    coarse, middle, fine = difference(2 * h), difference(h), difference(h / 2)
    first, second = (4 * middle - coarse) / 3, (4 * fine - middle) / 3
    return (16 * second - first) / 15


@pytest.mark.parametrize("name", LAYERS)
def test_layer_has_right_derivatives_and_stays_untouched(name):
    """Errors of the extrapolated differences: h⁶ = 1e-15 and ε/h² = 3e-12 at h = 8e-3, so 1e-5 is far above."""
    problem, model = layer_problem(*LAYERS[name])
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    forwards = {path: type(module).forward for path, module in model.named_modules()}
    w = problem.w0
    u = normal(len(w), seed=9)
    u /= u.norm()

    def gradient(x):
        return problem.value_and_grad(x)[1]

    def second(h):
        return (gradient(w + h * u) - gradient(w - h * u)) / (2 * h)

    def third(h):
        return (gradient(w + h * u) + gradient(w - h * u) - 2 * gradient(w)) / h**2

    H, T = problem.hvp(w, u), problem.hessian_gradient(w, u[:, None])[0]
    assert (H - extrapolate(second, 8e-3)).norm() < 1e-5 * H.norm()
    assert (T - extrapolate(third, 8e-3)).norm() < 1e-5 * T.norm()
    problem.check()

    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())
    assert forwards == {path: type(module).forward for path, module in model.named_modules()}
    assert all(not module._forward_pre_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_autograd_alone_is_wrong(monkeypatch):
    """What the replacement is for.  When this fails, PyTorch has been mended."""
    from contextlib import nullcontext

    from dvi.problems.derivatives import autodiff

    monkeypatch.setattr(autodiff, "differentiable_layers", nullcontext)
    for name, order in {"LayerNorm": "third", "BatchNorm, own statistics": "third", "weight_norm": "second"}.items():
        problem, _ = layer_problem(*LAYERS[name])
        with pytest.raises(DerivativeError, match=f"{order} derivative is off by .*\n.*module 1"):
            problem.check()
    problem, _ = layer_problem(*LAYERS["attention"])
    with pytest.raises(DerivativeError, match=r"second derivative .*not implemented(.|\n)*module 1"):
        problem.check()


def test_values_agree_inside_and_outside():
    from dvi.problems.derivatives.safe import differentiable_layers

    for make, shape in LAYERS.values():
        problem, _ = layer_problem(make, shape)
        with differentiable_layers():
            composed = problem.value(problem.w0)
        assert torch.allclose(composed, problem.value(problem.w0), rtol=1e-12)


@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_check_passes_what_is_right(dtype):
    digits(n=60, dtype=dtype).check()
    digits("cnn", "ce", n=40, width=4, dtype=dtype).check()
    sorting(n=20, width=16, depth=1, heads=2, dtype=dtype).check()
    sorting("rnn", "mse", n=20, width=16, dtype=dtype).check()
    Problem(lambda w: w.pow(2).sum(), torch.ones(3, dtype=dtype)).check()  # no third derivative
    Problem(lambda w: w.sum(), torch.ones(3, dtype=dtype)).check()  # nor second
    Problem(lambda w: w.pow(4).sum(), torch.zeros(3, dtype=dtype)).check()  # nor first, at this point


def test_check_says_where_differences_are_too_coarse():
    """Embeddings of size 0.02 behind a layer norm: in float32 no step is both small enough and large enough."""
    problem = sorting(n=10, width=8, depth=1, heads=2, dtype=torch.float32, derivatives="finite-difference")
    with pytest.raises(DerivativeError, match=r"too strongly curved for differences in torch.float32"):
        problem.check(problem.w0 + 0.01)
    exact = sorting(n=10, width=8, depth=1, heads=2, dtype=torch.float32)
    exact.check(exact.w0 + 0.01)


def test_check_leaves_the_ledger_alone():
    problem = digits(n=40, width=4)
    problem.check()
    assert problem.ledger.gradient_equivalents == 0


class WrongBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 1.1 * g * x.cos()


class WrongDoubleBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * x.detach().cos()


class OnceDifferentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * x.cos()


class Detached(nn.Module):
    def forward(self, x):
        return x * x.detach().sigmoid()


class Apply(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function.apply(x)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (lambda: Apply(WrongBackward), r"the gradient is off by(.|\n)*module 1.culprit \(Apply\)"),
        (lambda: Apply(WrongDoubleBackward), r"the second derivative is off by(.|\n)*module 1.culprit \(Apply\)"),
        (lambda: Apply(OnceDifferentiable), r"the second derivative is off by(.|\n)*module 1.culprit \(Apply\)"),
        (Detached, r"the gradient is off by(.|\n)*module 1.culprit \(Detached\)"),
    ],
)
def test_check_names_the_module_at_fault(layer, message):
    inner = nn.Sequential()
    inner.add_module("norm", nn.LayerNorm(4))
    inner.add_module("culprit", layer())
    model = nn.Sequential(nn.Linear(3, 4), inner, nn.Linear(4, 2)).to(F64)
    problem = Problem.from_module(model, F.mse_loss, normal(6, 3), normal(6, 2))
    with pytest.raises(DerivativeError, match=message):
        problem.check()
    # Differences of a gradient that is right make up for a wrong second derivative, not for a wrong gradient.
    differences = Problem.from_module(model, F.mse_loss, normal(6, 3), normal(6, 2), derivatives="finite-difference")
    if "gradient is off" in message:
        with pytest.raises(DerivativeError, match=message):
            differences.check()
    else:
        differences.check()


def test_check_names_the_criterion():
    def criterion(outputs, targets):
        return ((outputs - targets) * (outputs - targets).detach()).mean()

    problem = Problem.from_module(nn.Linear(3, 2).to(F64), criterion, normal(6, 3), normal(6, 2))
    with pytest.raises(DerivativeError, match="At fault: the criterion: the gradient is off by 50"):
        problem.check()


def test_check_of_a_plain_loss():
    problem = Problem(lambda w: (w * w.detach()).sum(), normal(3))
    with pytest.raises(DerivativeError, match=r"gradient is off by 50.0%(.|\n)*detach"):
        problem.check()


def test_check_of_a_derivative_that_is_not_finite():
    problem = Problem(lambda w: w.abs().pow(2.5).sum(), torch.zeros(3, dtype=F64))
    with pytest.raises(DerivativeError, match=r"third derivative is not finite.*NaN in 3 of 3 entries"):
        problem.check()


def test_check_elsewhere():
    problem = Problem(lambda w: torch.where(w > 1, w.detach().sin(), w.sin()).sum(), torch.zeros(3, dtype=F64))
    problem.check()
    with pytest.raises(DerivativeError):
        problem.check(torch.full((3,), 2.0, dtype=F64))


@pytest.mark.parametrize("network", ["mlp", "cnn", "gpt"])
def test_chunks_and_blocks_of_directions_change_nothing(network):
    torch_generator = torch.get_rng_state()
    model, inputs = {
        "mlp": lambda: (MLP([64, 5, 3]), normal(7, 64)),
        "cnn": lambda: (CNN(1, 3, 2), normal(7, 1, 8, 8)),
        "gpt": lambda: (GPT(4, 5, 2, 8, 1, 2), torch.randint(4, (7, 5))),
    }[network]()
    model = model.to(F64)
    with torch.no_grad():
        targets = normal(*model(inputs).shape)
    torch.set_rng_state(torch_generator)
    whole = Problem.from_module(model, F.mse_loss, inputs, targets)
    w, U, V = whole.w0, normal(whole.dim, 3, seed=1), normal(whole.dim, 1, seed=2)
    for options in (
        {"chunk_size": 3},
        {"chunk_size": 1},
        {"max_directions": 2},
        {"chunk_size": 3, "max_directions": 8},
    ):
        split = Problem.from_module(model, F.mse_loss, inputs, targets, **options)
        for call in (
            lambda p: p.value(w),
            lambda p: p.value_and_grad(w)[1],
            lambda p: p.hvp(w, U),
            lambda p: p.hessian_gradient(w, U),
            lambda p: p.hessian_gradient_of(w, U, torch.ones(3, 3, dtype=F64)),
            lambda p: p.hessian_derivative(w, U, V),
            lambda p: p.hessian_derivative(w, U, U),
        ):
            assert (call(split) - call(whole)).norm() <= 1e-12 * call(whole).norm()
