"""Modules with something unusual about them: right, or refused by name with a remedy."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import dvi
from dvi.methods import GradientDescent
from dvi.problems import Problem, ProblemError

F64 = torch.float64


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


X, Y = normal(7, 3), normal(7, 2, seed=1)


def seeded(make):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().to(F64)


def small(*layers):
    return seeded(lambda: nn.Sequential(nn.Linear(3, 4), *layers, nn.Tanh(), nn.Linear(4, 2)))


# ---- recomputation in the backward pass -----------------------------------------------------------------


class Blocks(nn.Module):
    """Two hidden layers, each computed again in the backward pass, or not."""

    def __init__(self, how=None):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(3, 5), nn.Linear(5, 5), nn.Linear(5, 2)
        self.how = how

    def forward(self, x):
        for layer in (self.first, self.second):
            block = lambda z, layer=layer: torch.tanh(layer(z))  # noqa: E731
            if self.how == "checkpoint":
                x = checkpoint(block, x, use_reentrant=False)
            elif self.how == "reentrant":
                x = checkpoint(block, x, use_reentrant=True)
            elif self.how == "offload":
                with torch.autograd.graph.save_on_cpu():
                    x = block(x)
            elif self.how == "hooks":
                with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t.clone()):
                    x = block(x)
            else:
                x = block(x)
        return self.last(x)


@pytest.mark.parametrize("max_directions", [1, 2])
@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.BatchNorm1d, nn.utils.parametrizations.weight_norm])
def test_recomputed_norms_have_the_derivatives_of_plain_ones(norm, max_directions):
    """The recomputation in the backward pass composes unsafe layers as the forward pass did."""

    class Net(nn.Module):
        def __init__(self, again):
            super().__init__()
            weighed = norm is nn.utils.parametrizations.weight_norm
            self.block = nn.Sequential(
                norm(nn.Linear(3, 4)) if weighed else nn.Sequential(nn.Linear(3, 4), norm(4)), nn.Tanh()
            )
            self.last, self.again = nn.Linear(4, 2), again

        def forward(self, x):
            return self.last(checkpoint(self.block, x, use_reentrant=False) if self.again else self.block(x))

    plain, again = (
        Problem.from_module(seeded(lambda k=k: Net(k)).eval(), nn.MSELoss(), X, Y, max_directions=max_directions)
        for k in (False, True)
    )
    w, U = plain.w0 + 0.1, normal(plain.dim, 2, seed=3)
    again.check()
    curvature = lambda p, w, U: p.output_curvature(w, X, U, torch.eye(2, dtype=F64))  # noqa: E731
    for ask in (Problem.hvp, Problem.hessian_gradient, curvature):
        # The same operations in the same order, but for the moment at which they are done.
        torch.testing.assert_close(ask(again, w, U), ask(plain, w, U), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("chunk_size", [None, 3])
@pytest.mark.parametrize("derivatives", ["autodiff", "mixed", "finite-difference"])
@pytest.mark.parametrize("how", ["checkpoint", "offload", "hooks"])
def test_recomputed_blocks_have_the_derivatives_of_plain_ones(how, derivatives, chunk_size):
    """At weights that are not the module's own, and with the graph of the gradient kept between two calls."""
    options = {"derivatives": derivatives, "chunk_size": chunk_size}
    again, plain = (
        Problem.from_module(seeded(lambda how=how: Blocks(how)), F.mse_loss, X, Y, **options) for how in (how, None)
    )
    w, U = plain.w0 + 0.5, normal(plain.dim, 2, seed=3)
    for ask in (
        lambda p: p.value_and_grad(w)[1],
        lambda p: p.hvp(w, U),
        lambda p: (p.value(w - 1), p.hvp(w, U[:, :1]))[1],  # other weights in between
        lambda p: p.hessian_gradient(w, U),
        lambda p: p.hessian_derivative(w, U, U),
        lambda p: p.output_curvature(w, X, U, torch.eye(2, dtype=F64)),
    ):
        expected = ask(plain)
        # the same operations in the same order, but for differences of gradients: rounding over their steps
        assert (ask(again) - expected).norm() <= 1e-12 * expected.norm() + (
            0 if derivatives == "autodiff" else 1e-6 * expected.norm()
        )
    again.check()


def test_reentrant_checkpointing_is_refused_whether_or_not_it_shows_in_the_graph():
    for inputs in (X, X.clone().requires_grad_()):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(ProblemError, match=r"use_reentrant=True.*take use_reentrant=False"):
                Problem.from_module(seeded(lambda: Blocks("reentrant")), F.mse_loss, inputs, Y)


# ---- the user's module is never written to --------------------------------------------------------------


def state(model):
    return {
        f"{path}.{name}": value.detach().clone() if isinstance(value, torch.Tensor) else value
        for path, module in model.named_modules()
        for store in (vars(module), module._parameters, module._buffers)
        for name, value in store.items()
        if isinstance(value, (torch.Tensor, int, float, bool)) or value is None
    }


class Remembering(nn.Module):
    def __init__(self):
        super().__init__()
        self.seen, self.last = 0, None
        self.register_buffer("scale", torch.ones((), dtype=F64))

    def forward(self, x):
        self.seen += 1
        self.last = x.detach()
        return x * self.scale


def old_weight_norm():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = small()
        nn.utils.weight_norm(model[0])
    model(X)
    return model


@pytest.mark.parametrize("make", [small, lambda: small(Remembering()), old_weight_norm])
def test_the_module_is_as_it_was(make):
    model = make()
    before = state(model)
    problem = Problem.from_module(model, F.mse_loss, X, Y)
    problem.check()
    problem.value(problem.w0 + 0.5)
    dvi.solve(dvi.central_flow(problem, GradientDescent(0.1)), 3, progress=False)
    after = state(model)
    assert before.keys() == after.keys()
    for name, value in before.items():
        same = torch.equal(value, after[name]) if isinstance(value, torch.Tensor) else value == after[name]
        assert same, name


def test_a_model_that_cannot_be_copied_is_refused():
    model = small()
    model.lock = __import__("threading").Lock()
    with pytest.raises(ProblemError, match=r"cannot be copied .*lock.*Take out of the module.*dvi.Problem\(loss, w0\)"):
        Problem.from_module(model, F.mse_loss, X, Y)


def test_a_forward_that_refers_to_the_original_is_refused():
    model = small()
    model.forward = lambda x: model[2](torch.tanh(model[0](x)))
    with pytest.raises(ProblemError, match=r"module \(the model itself\) .* reads .* past w.*Make it a method"):
        Problem.from_module(model, F.mse_loss, X, Y)


# ---- parameters and layers ------------------------------------------------------------------------------


class Bag(nn.Module):
    def __init__(self, tied=False, **options):
        super().__init__()
        self.embedding, self.out = nn.Embedding(5, 4, **options), nn.Linear(4, 5, bias=False)
        if tied:
            self.out.weight = self.embedding.weight

    def forward(self, i):
        return self.out(torch.tanh(self.embedding(i) + 0.3).mean(1))


TOKENS, LABELS = torch.arange(20).view(10, 2) % 5, torch.arange(10) % 5


def bag(tokens=TOKENS, **options):
    return Problem.from_module(seeded(lambda: Bag(**options)), F.cross_entropy, tokens, LABELS)


def test_a_padding_row_stays_and_the_rest_moves_as_in_torch():
    model = seeded(lambda: Bag(padding_idx=2))
    with torch.no_grad():
        model.embedding.weight[2] = 0.7  # torch leaves it where it is, zero or not
    problem = Problem.from_module(model, F.cross_entropy, TOKENS, LABELS)
    problem.check()
    run = dvi.solve(dvi.discrete(problem, GradientDescent(0.5)), 20, progress=False)
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    for _ in range(20):
        optimizer.zero_grad()
        F.cross_entropy(model(TOKENS), LABELS).backward()
        optimizer.step()
    assert torch.allclose(run.w, nn.utils.parameters_to_vector(model.parameters()), rtol=1e-11, atol=1e-13)
    H = problem.hvp(problem.w0, torch.eye(problem.dim, dtype=F64))
    assert (H - H.T).norm() < 1e-13 * H.norm()


def test_a_shared_padding_row_is_refused_where_padding_occurs():
    with pytest.raises(
        ProblemError, match=r"module embedding \(Embedding\) has padding_idx=2, shares its weight.*None"
    ):
        bag(tied=True, padding_idx=2)
    bag(tokens=TOKENS.clamp(max=1), tied=True, padding_idx=2).check()


def test_sparse_gradients_are_taken_dense():
    dense, sparse = bag(), bag(sparse=True)
    U = normal(dense.dim, 2)
    assert torch.equal(sparse.value_and_grad(dense.w0)[1], dense.value_and_grad(dense.w0)[1])
    assert torch.equal(sparse.hvp(dense.w0, U), dense.hvp(dense.w0, U))


class Functional(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.weight, self.options = nn.Parameter(normal(5, 5)), options

    def forward(self, i):
        return F.embedding(i, self.weight, **self.options).tanh().mean(1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_norm": 0.5}, "max_norm=0.5: it rescales its weights in place.*Set max_norm=None"),
        ({"scale_grad_by_freq": True}, "scale_grad_by_freq=True.*Set scale_grad_by_freq=False"),
    ],
)
@pytest.mark.parametrize("make", [Bag, Functional])
def test_embeddings_without_a_gradient_are_refused(make, options, message):
    with pytest.raises(ProblemError, match=r"module .*\((Embedding|Functional)\) has " + message):
        Problem.from_module(make(**options).to(F64), F.cross_entropy, TOKENS, LABELS)


class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.ones(1, dtype=F64))  # an odd number of weights before the complex ones
        self.weight = nn.Parameter(torch.complex(normal(3, 2), normal(3, 2, seed=4)))

    def forward(self, x):
        z = x.to(self.weight.dtype) @ self.weight
        return z.abs().tanh() + self.bias


def test_complex_weights_move_as_in_torch():
    model = Complex()
    problem = Problem.from_module(model, F.mse_loss, X, Y)
    assert problem.dim == 1 + 2 * 6
    problem.check()
    run = dvi.solve(dvi.discrete(problem, GradientDescent(0.2)), 10, progress=False)
    optimizer = torch.optim.SGD(model.parameters(), 0.2)
    for _ in range(10):
        optimizer.zero_grad()
        F.mse_loss(model(X), Y).backward()
        optimizer.step()
    expected = torch.cat([model.bias.detach(), torch.view_as_real(model.weight.detach()).flatten()])
    assert torch.allclose(run.w, expected, rtol=1e-11)
    fresh = Complex()
    problem.load_into(fresh, run.w)
    assert torch.allclose(fresh.weight, model.weight, rtol=1e-11)


class Island(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.inner, self.dtype = nn.Linear(4, 4), dtype

    def forward(self, x):
        return self.inner(x.to(self.dtype).square().to(x.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_island_of_lower_precision_is_named(dtype):
    with pytest.raises(ProblemError, match=rf"module 1 \(Island\) computes in {dtype} .* weights are torch.float64"):
        Problem.from_module(small(Island(dtype)), F.mse_loss, X, Y)


def test_constants_of_lower_precision_do_no_harm():
    class Tabled(nn.Module):
        def forward(self, x):
            return x + torch.linspace(0, 1, 4, dtype=torch.float32).sin().to(x.dtype)

    Problem.from_module(small(Tabled()), F.mse_loss, X, Y).check()


def test_the_remedy_for_an_island_works():
    model = small(Island(torch.float32)).float()
    Problem.from_module(model, F.mse_loss, X.float(), Y.float()).check()


def test_autocast_is_named():
    problem = lambda: Problem.from_module(small().float(), F.mse_loss, X.float(), Y.float())  # noqa: E731
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ProblemError, match=r"torch.bfloat16 under autocast"):
        problem()


def hooked():
    model = small()
    model[0].weight.register_hook(lambda g: 2 * g)
    return model


def lazy():
    return nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 2))


def scripted():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(small())


WRAPPERS = {
    "lazy": (lazy, "parameter 0.weight is lazy.*run the model once"),
    "meta": (lambda: nn.Linear(3, 2, device="meta"), "parameter weight is on the meta device.*load or initialise"),
    "data parallel": (lambda: nn.DataParallel(small()), "DataParallel.*hand over what it wraps, model.module"),
    "jit": (scripted, "TorchScript.*hand over the Python module"),
    "compiled": (lambda: torch.compile(small()), "torch.compile.*hand over the module itself"),
    "gradient hook": (hooked, "parameter 0.weight has a hook on its gradient.*Remove the hook"),
    "no module": (lambda: lambda x: x, r"the model is an nn.Module, not a function; of a function make dvi.Problem"),
}


@pytest.mark.parametrize("kind", WRAPPERS)
def test_what_no_flow_can_move_is_named(kind):
    make, message = WRAPPERS[kind]
    with pytest.raises(ProblemError, match=message):
        Problem.from_module(make(), F.mse_loss, X, Y)


def test_inference_mode_is_named():
    make = lambda: Problem.from_module(small(), F.mse_loss, X, Y)  # noqa: E731
    problem = make()
    for ask in (make, lambda: dvi.compare(problem, GradientDescent(0.1), 3, progress=False)):
        with torch.inference_mode(), pytest.raises(ProblemError, match="inference_mode"):
            ask()
    with torch.inference_mode(), torch.inference_mode(False):  # the remedy
        dvi.solve(dvi.discrete(problem, GradientDescent(0.1)), 3, progress=False)


# ---- networks that differentiate by their inputs --------------------------------------------------------


class Slope(nn.Module):
    """The network and its derivative in x, by autograd inside forward or by torch.func."""

    def __init__(self, functional):
        super().__init__()
        self.net, self.functional = nn.Sequential(nn.Linear(1, 6), nn.Tanh(), nn.Linear(6, 1)), functional

    def forward(self, x):
        if self.functional:
            slope = torch.func.vmap(torch.func.jacrev(lambda z: self.net(z[None])[0]))(x)[:, 0]
            return torch.cat([self.net(x), slope], 1)
        if not x.requires_grad:
            x = x.detach().requires_grad_()
        u = self.net(x)
        (du,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        return torch.cat([u, du], 1)


@pytest.mark.parametrize("derivatives", ["autodiff", "finite-difference"])
@pytest.mark.parametrize("wanting", [False, True])
@pytest.mark.parametrize("chunk_size", [None, 4])
def test_autograd_inside_forward(chunk_size, wanting, derivatives):
    x = torch.linspace(0, 1, 9, dtype=F64)[:, None]
    y = torch.cat([x.sin(), x.cos()], 1)

    def problem(functional):
        inputs = x.clone().requires_grad_(wanting and not functional)
        model = seeded(lambda: Slope(functional))
        return Problem.from_module(model, F.mse_loss, inputs, y, chunk_size=chunk_size, derivatives=derivatives)

    inside, outside = problem(False), problem(True)
    w = inside.w0
    U = normal(inside.dim, 2)
    for ask in (
        lambda p: p.value(w),
        lambda p: p.value_and_grad(w)[1],
        lambda p: p.outputs(w, x),
        lambda p: p.output_curvature(w, x, U, torch.eye(2, dtype=F64)),
    ):
        expected = ask(outside)
        assert (ask(inside) - expected).norm() <= (1e-12 if derivatives == "autodiff" else 1e-5) * expected.norm()
    inside.check()
