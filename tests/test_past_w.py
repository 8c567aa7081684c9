"""A loss is a function of w alone: what trains beside w is refused by name, and added by penalty= and weight_decay=."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dvi
from dvi.methods import GradientDescent
from dvi.problems import Problem, ProblemError

F64 = torch.float64


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


X, Y = normal(7, 3), normal(7, 2, seed=1)


def small():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(F64)


def l2(model):
    return lambda out, y: F.mse_loss(out, y) + 0.01 * sum(p.square().sum() for p in model.parameters())


def detached_l2(model):
    return lambda out, y: F.mse_loss(out, y) + 0.01 * sum(p.detach().square().sum() for p in model.parameters())


def data_of_weights(model):
    return lambda out, y: F.mse_loss(out, y) + 0.01 * model[0].weight.data.square().sum()


def once_more(model):
    return lambda out, y: F.mse_loss(out, y) + 0.01 * (model(X + 0.1) - out).square().mean()


@pytest.mark.parametrize("criterion", [l2, detached_l2, data_of_weights, once_more])
def test_a_criterion_that_reads_the_model_is_refused_with_the_parameter_and_the_remedy(criterion):
    model = small()
    with pytest.raises(ProblemError, match=r"the model's parameter 0.weight, past w.*penalty=.*weight_decay="):
        Problem.from_module(model, criterion(model), X, Y)


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros((), dtype=F64))

    def forward(self, out, y):
        return F.mse_loss(out * self.log_scale.exp(), y)


def test_a_criterion_with_parameters_of_its_own_is_refused_unless_they_are_fixed():
    with pytest.raises(ProblemError, match="the criterion's parameter log_scale, past w"):
        Problem.from_module(small(), Scaled(), X, Y)
    fixed = Problem.from_module(small(), Scaled().requires_grad_(False), X, Y)
    assert torch.equal(fixed.value(fixed.w0), F.mse_loss(small()(X), Y).detach())


class Listed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 2).to(F64)
        self.others = [nn.Parameter(torch.ones(2, dtype=F64))]

    def forward(self, x):
        return self.first(x) * self.others[0]


def test_a_parameter_in_a_plain_list_is_refused_by_its_attribute():
    with pytest.raises(ProblemError, match=r"others of the model \(Listed\), which is not registered.*ParameterList"):
        Problem.from_module(Listed(), F.mse_loss, X, Y)


def test_a_parameter_in_a_closure_is_refused():
    extra = torch.ones(3, dtype=F64, requires_grad=True)
    with pytest.raises(ProblemError, match=r"a tensor of shape \[3\] that requires a gradient, past w"):
        Problem(lambda w: (w * extra).square().sum(), normal(3))
    Problem(lambda w: (w * extra.detach()).square().sum(), normal(3))


def test_a_leaf_that_the_loss_makes_itself_is_its_own_business():
    points = normal(5, 1)

    def loss(w):
        x = points.clone().requires_grad_()
        (slope,) = torch.autograd.grad((w[0] * torch.sin(w[1] * x)).sum(), x, create_graph=True)
        return slope.square().mean()

    problem = Problem(loss, normal(2))
    exact = lambda w: (w[0] * w[1] * torch.cos(w[1] * points)).square().mean()  # noqa: E731
    w = problem.w0
    assert torch.allclose(problem.value_and_grad(w)[1], torch.func.grad(exact)(w), rtol=1e-12)
    assert torch.allclose(problem.value(w), exact(w), rtol=1e-14)


def trained(model, optimizer, steps, extra=lambda model: 0.0):
    for _ in range(steps):
        optimizer.zero_grad()
        (F.mse_loss(model(X), Y) + extra(model)).backward()
        optimizer.step()
    return nn.utils.parameters_to_vector(model.parameters()).detach()


@pytest.mark.parametrize("chunk_size", [None, 3])
def test_weight_decay_is_that_of_torch_sgd(chunk_size):
    problem = Problem.from_module(small(), F.mse_loss, X, Y, chunk_size=chunk_size, weight_decay=0.1)
    run = dvi.solve(dvi.discrete(problem, GradientDescent(0.3)), 20, progress=False)
    model = small()
    expected = trained(model, torch.optim.SGD(model.parameters(), 0.3, weight_decay=0.1), 20)
    assert torch.allclose(run.w, expected, rtol=1e-11, atol=1e-13)  # rounding of twenty steps


def penalty(parameters):
    return 0.02 * parameters["0.weight"].pow(4).sum() + 0.01 * parameters["2.bias"].square().sum()


def penalised(model):
    return penalty(dict(model.named_parameters()))


@pytest.mark.parametrize("derivatives", ["autodiff", "mixed", "finite-difference"])
def test_a_penalty_is_part_of_the_loss_in_all_derivatives(derivatives):
    problem = Problem.from_module(small(), F.mse_loss, X, Y, penalty=penalty, derivatives=derivatives)
    run = dvi.solve(dvi.discrete(problem, GradientDescent(0.3)), 20, progress=False)
    model = small()
    assert torch.allclose(run.w, trained(model, torch.optim.SGD(model.parameters(), 0.3), 20, penalised), rtol=1e-11)

    shapes = {name: p.shape for name, p in model.named_parameters()}

    def loss(w):
        named = dict(zip(shapes, torch.split(w, [s.numel() for s in shapes.values()]), strict=True))
        named = {name: p.view(shapes[name]) for name, p in named.items()}
        return F.mse_loss(torch.func.functional_call(model, named, X), Y) + penalty(named)

    w, u = problem.w0, normal(problem.dim, 1, seed=5)
    H = torch.func.hessian(loss)(w)
    third = torch.func.grad(lambda w: u[:, 0] @ torch.func.hessian(loss)(w) @ u[:, 0])(w)
    # differences of gradients: see finite_difference.py
    exact = derivatives == "autodiff"
    assert torch.allclose(
        problem.hvp(w, u), H @ u, rtol=1e-10 if derivatives != "finite-difference" else 1e-5, atol=1e-6
    )
    assert (problem.hessian_gradient(w, u)[0] - third).norm() < (1e-10 if exact else 1e-5) * third.norm()
    problem.check()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_decay": -1.0}, "weight_decay is zero or positive"),
        ({"penalty": lambda p: 3.0}, "penalty gives a scalar tensor from the parameters by name, not float"),
        ({"penalty": lambda p: p["0.bias"]}, r"not \[4\]"),
    ],
)
def test_bad_penalties(options, message):
    with pytest.raises(ProblemError, match=message):
        Problem.from_module(small(), F.mse_loss, X, Y, **options)


def test_a_loss_that_changes_between_or_after_its_evaluations_is_found_out():
    calls = []

    def counting(w):
        calls.append(0)
        return w.square().sum() * (1 + 0.01 * len(calls))

    with pytest.raises(ProblemError, match=r"and then .* at the same w0; a flow needs a deterministic loss"):
        Problem(counting, normal(3))
    data = normal(3)
    problem = Problem(lambda w: (w - data).square().sum(), normal(3, seed=1))
    problem.check_unchanged()
    data += 1
    with pytest.raises(ProblemError, match="when the problem was made, and is"):
        problem.check_unchanged()


def test_data_of_a_module_are_copies():
    inputs, targets = X.clone(), Y.clone()
    problem = Problem.from_module(small(), F.mse_loss, inputs, targets)
    before = problem.value(problem.w0)
    inputs += 1
    targets += 1
    assert torch.equal(problem.value(problem.w0), before)
    problem.check_unchanged()


class Drifting:
    """A loss that is w² at first and something else after some evaluations."""

    def __init__(self, calls):
        self.left = calls

    def __call__(self, w):
        self.left -= 1
        return w.square().sum() * (1.0 if self.left > 0 else 1.1)


@pytest.mark.parametrize("race", [False, True])
def test_a_run_whose_loss_has_changed_meanwhile_says_so_and_keeps_what_it_has(race):
    def run(throw):
        problem = Problem(Drifting(60), normal(3))
        if race:
            return dvi.compare(problem, GradientDescent(0.1), 20, progress=False, throw=throw, check=False)
        return dvi.solve(dvi.discrete(problem, GradientDescent(0.1)), 60, progress=False, throw=throw, eigen_every=0)

    result = run(throw=False)
    assert result.status is dvi.Status.LOSS_CHANGED
    assert "when the problem was made, and is" in result.notes[-1]
    assert len(result.discrete.t if race else result.t) > 20
    with pytest.raises(dvi.RunError, match="depends on something besides the weights"):
        run(throw=True)


class Recomputing(torch.autograd.Function):
    """x·w, whose gradient in w is taken with an x of its own."""

    @staticmethod
    def forward(ctx, w):
        return (w**2).sum()

    @staticmethod
    def backward(ctx, g):
        return 2 * g * normal(3)  # right where w is normal(3)


@pytest.mark.parametrize("make", [dvi.discrete, dvi.stable_flow])
def test_what_needs_the_gradient_only_has_it_checked(make):
    make(Problem(lambda w: w.square().sum(), normal(3)), GradientDescent(0.1))
    with pytest.raises(dvi.DerivativeError, match="the gradient is not that of the loss"):
        make(Problem(Recomputing.apply, normal(3)), GradientDescent(0.1))


class Auxiliary(nn.Module):
    """A model that leaves a part of its loss on itself, or hands it out."""

    def __init__(self, out=False):
        super().__init__()
        self.first, self.out, self.aux = nn.Linear(3, 2).to(F64), out, torch.zeros((), dtype=F64)

    def forward(self, x):
        h = self.first(x)
        self.aux = 0.1 * h.square().mean()
        return (h, self.aux) if self.out else h


def test_a_criterion_that_reads_what_forward_left_on_the_model_is_refused():
    for warm in (False, True):
        model = Auxiliary()
        if warm:
            model(X)
        with pytest.raises(ProblemError, match="the tensor aux that the model keeps, past w"):
            Problem.from_module(model, lambda out, y, model=model: F.mse_loss(out, y) + model.aux, X, Y)
    remedy = Problem.from_module(Auxiliary(out=True), lambda out, y: F.mse_loss(out[0], y) + out[1], X, Y)
    remedy.check()


class Caching(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self._cache = nn.Linear(3, 2).to(F64), None

    def forward(self, x):
        if self._cache is None:
            self._cache = self.first.weight.tanh()
        return x @ self._cache.T


def test_a_cache_of_weights_is_refused():
    cold, warm = Caching(), Caching()
    warm(X)
    with pytest.raises(ProblemError, match="so it has a cache"):
        Problem.from_module(cold, F.mse_loss, X, Y)
    with pytest.raises(ProblemError, match=r"uses the tensor _cache of the model.*a cache"):
        Problem.from_module(warm, F.mse_loss, X, Y)


@pytest.mark.parametrize("write", [lambda w: w.clamp_(-1, 1), lambda w: w.data.mul_(0.5)])
def test_a_loss_that_writes_into_its_weights_is_refused(write):
    def loss(w):
        write(w)
        return w.square().sum()

    with pytest.raises(ProblemError, match=r"writes into its weights: let it work on a copy"):
        Problem(loss, normal(3))


def test_the_callers_weights_are_never_written_to():
    calls = []

    def loss(w):
        calls.append(0)
        if len(calls) > 2:
            w.data.mul_(0.5)
        return w.square().sum()

    problem = Problem(loss, normal(3))
    w = normal(3, seed=4)
    before = w.clone()
    problem.value(w)
    problem.value_and_grad(w)
    assert torch.equal(w, before)


class Recorder:
    """Keeps what a layer gives: a hook with a memory."""

    def __init__(self, layer):
        self.seen = None
        layer.register_forward_hook(self.keep)

    def keep(self, module, inputs, output):
        self.seen = output


def test_a_criterion_may_read_what_a_hook_has_recorded():
    model = small()
    recorder = Recorder(model[1])
    problem = Problem.from_module(model, lambda out, y: F.mse_loss(out, y) + recorder.seen.square().mean(), X, Y)
    problem.check()
    model = small()
    (F.mse_loss(model(X), Y) + model[1](model[0](X)).square().mean()).backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert torch.allclose(problem.value_and_grad(problem.w0)[1], gradient, rtol=1e-12)
