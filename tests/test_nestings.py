"""In which nestings of derivatives which layers are right.

The library nests derivatives of a loss in four ways, and every layer below is tried in each:

- reverse over reverse, H v;
- reverse over reverse over reverse, T[v, v];
- the derivative of a vector-Jacobian product in its vector, twice, for the curvature of outputs;
- differences of gradients (``derivatives="mixed"`` and ``"finite-difference"``), which ask for one reverse pass.

A loss may differentiate, too (a physics-informed network), in any nesting: what torch gets wrong there is refused.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from test_check import Call, normal, seeded
from torch import nn
from torch.func import grad, hessian, jvp

from dvi.problems import DerivativeError, Problem, differentiable_layers

F64 = torch.float64


class Recurrent(nn.Module):
    """A recurrent layer over four steps of two numbers each."""

    def __init__(self, kind):
        super().__init__()
        self.cell = kind(2, 8, batch_first=True)

    def forward(self, x):
        return self.cell(x.view(-1, 4, 2))[0][:, -1]


class Bag(nn.Module):
    def __init__(self, mode):
        super().__init__()
        self.bag = nn.EmbeddingBag(5, 8, mode=mode)

    def forward(self, x):
        weights = x[:, :3] if self.bag.mode == "sum" else None
        return x * self.bag(torch.arange(3).expand(len(x), 3), per_sample_weights=weights)


class Product(nn.Module):
    def __init__(self, bilinear):
        super().__init__()
        self.bilinear = bilinear

    def forward(self, x):
        return self.bilinear(x, x.sin())


class Convolution(nn.Module):
    def __init__(self, layer, shape):
        super().__init__()
        self.layer, self.shape = layer, shape

    def forward(self, x):
        return self.layer(x.view(-1, *self.shape)).flatten(1)[:, :8]


GRID = torch.linspace(-0.9, 0.9, 16, dtype=F64).view(1, 2, 4, 2)


def image(x):
    return x.view(-1, 1, 2, 4)


def spd(x):
    a = x.view(-1, 2, 4)
    return a @ a.mT + torch.eye(2, dtype=x.dtype)


def wide(y):
    return y.flatten(1).repeat(1, 8)[:, :8]


LAYERS = {
    "layer_norm": lambda: nn.LayerNorm(8),
    "batch_norm, own statistics": lambda: nn.BatchNorm1d(8, track_running_stats=False),
    "instance_norm": lambda: Call(lambda x: F.instance_norm(x.view(-1, 2, 4)).flatten(1)),
    "group_norm": lambda: nn.GroupNorm(2, 8),
    "rms_norm": lambda: nn.RMSNorm(8),
    "weight_norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)),
    "spectral_norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)).eval(),
    "attention": lambda: Call(lambda x: F.scaled_dot_product_attention(x[None], x[None].sin(), x[None].cos())[0]),
    "RNN": lambda: Recurrent(nn.RNN),
    "LSTM": lambda: Recurrent(nn.LSTM),
    "GRU": lambda: Recurrent(nn.GRU),
    "cosine_similarity": lambda: Call(lambda x: wide(F.cosine_similarity(x, x.sin() + 1)[:, None])),
    "pairwise_distance": lambda: Call(lambda x: wide(F.pairwise_distance(x, x.sin() + 1)[:, None])),
    "local_response_norm": lambda: Call(lambda x: F.local_response_norm(x.view(-1, 4, 2), 2, alpha=0.5).flatten(1)),
    "pixel_shuffle": lambda: Call(lambda x: F.pixel_shuffle(x.view(-1, 4, 1, 2), 2).flatten(1)),
    "unfold": lambda: Call(lambda x: F.unfold(image(x), 2).flatten(1)[:, :8]),
    "convolution": lambda: Convolution(nn.Conv1d(2, 4, 3, padding=1), (2, 4)),
    "transposed convolution": lambda: Convolution(nn.ConvTranspose2d(1, 2, 3), (1, 2, 4)),
    "average pooling": lambda: Call(lambda x: wide(F.avg_pool2d(image(x), 2))),
    "bilinear": lambda: Product(nn.Bilinear(8, 8, 8)),
    "prod": lambda: Call(lambda x: wide((1 + x / 2).prod(-1, keepdim=True))),
    "cumprod": lambda: Call(lambda x: (1 + x / 2).cumprod(-1)),
    "cumsum": lambda: Call(lambda x: x.cumsum(-1).sin()),
    "logsumexp": lambda: Call(lambda x: x - x.logsumexp(-1, keepdim=True)),
    "softmax": lambda: nn.Softmax(-1),
    "norm": lambda: Call(lambda x: x / x.norm(dim=-1, keepdim=True)),
    "4-norm": lambda: Call(lambda x: x / x.norm(p=4, dim=-1, keepdim=True)),
    "normalize": lambda: Call(lambda x: F.normalize(x, dim=-1)),
    "std": lambda: Call(lambda x: x / x.std(-1, keepdim=True)),
    "inverse": lambda: Call(lambda x: wide(torch.linalg.inv(spd(x)))),
    "solve": lambda: Call(lambda x: torch.linalg.solve(spd(x), x.view(-1, 2, 4)).flatten(1)),
    "slogdet": lambda: Call(lambda x: wide(torch.linalg.slogdet(spd(x))[1][:, None])),
    "det": lambda: Call(lambda x: wide(torch.linalg.det(spd(x))[:, None])),
    "cholesky": lambda: Call(lambda x: wide(torch.linalg.cholesky(spd(x)))),
    "eigvalsh": lambda: Call(lambda x: wide(torch.linalg.eigvalsh(spd(x)))),
    "matrix_exp": lambda: Call(lambda x: wide(torch.matrix_exp(spd(x) / 4))),
    "pinv": lambda: Call(lambda x: torch.linalg.pinv(x.view(-1, 2, 4)).flatten(1)),
    "grid_sample": lambda: Call(
        lambda x: F.grid_sample(image(x), GRID.expand(len(x), 2, 4, 2), align_corners=True).flatten(1)
    ),
    "interpolate, bicubic": lambda: Call(
        lambda x: F.interpolate(image(x), (2, 5), mode="bicubic").flatten(1)[:, :8].sin()
    ),
    "SiLU": nn.SiLU,
    "GELU": nn.GELU,
    "GELU, tanh": lambda: nn.GELU("tanh"),
    "Mish": nn.Mish,
    "Softplus": nn.Softplus,
    "Softplus, β": lambda: nn.Softplus(2.0),
    "LogSigmoid": nn.LogSigmoid,
    "Sigmoid": nn.Sigmoid,
    "GLU": lambda: Call(lambda x: F.glu(x, -1).repeat(1, 2)),
    "erf": lambda: Call(torch.erf),
    "atan2": lambda: Call(lambda x: torch.atan2(x, 2 + x**2)),
    "pow": lambda: Call(lambda x: (2 + x.sin()) ** x),
    "fft": lambda: Call(lambda x: torch.fft.rfft(x).abs().square().repeat(1, 2)[:, :8]),
}

CRITERIA = {
    "log_softmax and nll": lambda out, y: F.nll_loss(out.log_softmax(-1), y.argmax(-1)),
    "cross-entropy, smoothed": lambda out, y: F.cross_entropy(out, y.argmax(-1), label_smoothing=0.1),
    "Huber": lambda out, y: F.huber_loss(out, y, delta=9.0),
    "smooth L1": lambda out, y: F.smooth_l1_loss(out, y, beta=9.0),
    "kl_div": lambda out, y: F.kl_div(out.log_softmax(-1), y.softmax(-1), reduction="batchmean"),
    "bce_with_logits": lambda out, y: F.binary_cross_entropy_with_logits(out, y.sigmoid()),
    "soft margin": lambda out, y: F.soft_margin_loss(out, y.sign()),
    "Gaussian nll": lambda out, y: F.gaussian_nll_loss(out, y, out.square() + 1),
    "Poisson nll": lambda out, y: F.poisson_nll_loss(out, y.exp()),
    "cosine embedding": lambda out, y: F.cosine_embedding_loss(out, y, torch.ones(len(y))),
}


def problem_of(layer, criterion=F.mse_loss, **options):
    model = seeded(lambda: nn.Sequential(nn.Linear(6, 8), layer())).to(F64).eval()
    return Problem.from_module(model, criterion, normal(5, 6, seed=1), normal(5, 8, seed=2), **options)


def extrapolated(difference, h):
    """Without the errors of orders h² and h⁴ of a symmetric difference."""
    coarse, middle, fine = difference(2 * h), difference(h), difference(h / 2)
    first, second = (4 * middle - coarse) / 3, (4 * fine - middle) / 3
    return (16 * second - first) / 15


def right(problem, rtol):
    """Whether H u, T[u, u] and the outputs' curvature are what differences of gradients and outputs say.

    At h = 4e-3 extrapolated differences are good to h⁶ and ε/h² = 1e-11, relative to derivatives of order one.
    """
    w, x = problem.w0, normal(5, 6, seed=1)
    u = normal(len(w), seed=9)
    u /= u.norm()

    def gradient(z):
        return problem.value_and_grad(z)[1]

    H = extrapolated(lambda h: (gradient(w + h * u) - gradient(w - h * u)) / (2 * h), 4e-3)
    T = extrapolated(lambda h: (gradient(w + h * u) - 2 * gradient(w) + gradient(w - h * u)) / h**2, 4e-3)
    C = extrapolated(
        lambda h: (problem.outputs(w + h * u, x) - 2 * problem.outputs(w, x) + problem.outputs(w - h * u, x)) / h**2,
        4e-3,
    )
    found = (
        problem.hvp(w, u),
        problem.hessian_gradient(w, u[:, None])[0],
        2 * problem.output_curvature(w, x, u[:, None], torch.ones(1, 1, dtype=F64)),
    )
    return [bool((a - b).norm() <= rtol * max(1e-2, b.norm())) for a, b in zip(found, (H, T, C), strict=True)]


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name):
    assert right(problem_of(LAYERS[name]), 1e-5) == [True] * 3
    problem_of(LAYERS[name]).check()


@pytest.mark.parametrize("name", CRITERIA)
def test_criteria(name):
    problem = problem_of(nn.Tanh, CRITERIA[name])
    assert right(problem, 1e-5) == [True] * 3
    problem.check()


@pytest.mark.parametrize("name", ["layer_norm", "batch_norm, own statistics", "weight_norm", "attention", "GRU"])
def test_differences_need_one_reverse_pass(name):
    """Second differences at their best step are good to about 1e-6; third ones alone in mixed derivatives."""
    assert right(problem_of(LAYERS[name], derivatives="finite-difference"), 1e-4) == [True] * 3
    assert right(problem_of(LAYERS[name], derivatives="mixed"), 1e-4) == [True] * 3


REFUSED = {
    "cdist": (lambda: Call(lambda x: wide(torch.cdist(x, x.sin() + 1))), "could not compute a second derivative"),
    "embedding_bag": (lambda: Bag("mean"), "could not compute a second derivative"),
    "embedding_bag, weighted": (lambda: Bag("sum"), "could not compute a second derivative"),
    "logcumsumexp": (lambda: Call(lambda x: x.logcumsumexp(-1)), "third derivative is not finite.*NaN"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_torch_cannot_differentiate_is_refused(name):
    layer, message = REFUSED[name]
    with pytest.raises(DerivativeError, match=message):
        problem_of(layer).check()


# ---- a loss that differentiates --------------------------------------------------------------------------

INNER = {
    "forward over forward": lambda f, x, v: jvp(lambda z: jvp(f, (z,), (v,))[1], (x,), (v,))[1],
    "forward over reverse": lambda f, x, v: (jvp(grad(f), (x,), (v,))[1] * v).sum(),
    "reverse over forward": lambda f, x, v: (grad(lambda z: jvp(f, (z,), (v,))[1])(x) * v).sum(),
    "reverse over reverse": lambda f, x, v: (grad(lambda z: (grad(f)(z) * v).sum())(x) * v).sum(),
    "hessian": lambda f, x, v: (hessian(f)(x[0])[0] * v[0]).sum(),
}
NORMS = {
    "layer_norm": lambda x: F.layer_norm(x, x.shape[-1:]),
    "batch_norm": lambda x: F.batch_norm(x.view(-1, 2), None, None, training=True),
    "instance_norm": lambda x: F.instance_norm(x.reshape(1, 2, -1)),
}


@pytest.mark.parametrize("nesting", INNER)
@pytest.mark.parametrize("norm", NORMS)
def test_a_loss_that_differentiates_is_right_or_refused(norm, nesting):
    x, v, c = normal(2, 4, seed=1), normal(2, 4, seed=2), normal(8, seed=3)

    def loss(w):
        def f(z):
            y = NORMS[norm](z * w).reshape(-1)
            return (y * y.sin() * c[: len(y)]).sum()

        return INNER[nesting](f, x, v) + w.square().sum()

    def composed(w):
        with differentiable_layers():
            return loss(w)

    w0 = 1 + 0.1 * normal(4)
    problem = Problem(composed, w0)
    problem.check()

    plain = Problem(loss, w0)
    wrong = abs(float(plain.value(w0) - problem.value(w0))) > 1e-6 * abs(float(problem.value(w0)))
    wrong |= float((plain.value_and_grad(w0)[1] - problem.value_and_grad(w0)[1]).norm()) > 1e-6
    if wrong:
        with pytest.raises(DerivativeError, match=r"derivatives of its own(.|\n)*differentiable_layers"):
            plain.check()
    else:
        plain.check()
    if nesting in ("forward over forward", "reverse over forward") and norm != "instance_norm":
        assert wrong  # when this fails, torch has been mended
