"""``Problem.check``: what it finds is said, wherever it was found and whatever is known of the cause."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dvi.problems import DerivativeError, NotFiniteError, Problem

F64 = torch.float64


def normal(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def seeded(make, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


# ---- faults, and layers that they hide in -----------------------------------------------------------------


class Forgets(torch.autograd.Function):
    """The sine, whose derivative of one order forgets what it depends on."""

    @staticmethod
    def forward(ctx, x, order):
        ctx.save_for_backward(x)
        ctx.order = order
        return x.sin()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        if ctx.order == 1:
            return 0.9 * g * x.cos(), None
        if ctx.order == 2:
            return g * x.detach().cos(), None
        return g * Slope.apply(x), None


class Slope(torch.autograd.Function):
    """The cosine, with a right first derivative and no second one."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.cos()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return -g * x.detach().sin()


class Sine(nn.Module):
    """The sine; with an order, one whose derivative of that order is wrong."""

    def __init__(self, order=0):
        super().__init__()
        self.order = order

    def forward(self, x):
        return Forgets.apply(x, self.order) if self.order else x.sin()


class Call(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def problem_with(layer, dtype=F64, criterion=F.mse_loss, **options):
    model = seeded(lambda: nn.Sequential(nn.Linear(6, 8), layer, nn.Linear(8, 3))).to(dtype)
    return Problem.from_module(
        model, criterion, normal(12, 6, seed=1, dtype=dtype), normal(12, 3, seed=2, dtype=dtype), **options
    )


@pytest.mark.parametrize("order", [1, 2, 3])
def test_the_finding_has_both_numbers(order):
    """The wrong entry is that of the derivative, the right one that of a difference, both along one direction."""
    with pytest.raises(DerivativeError, match=r"is off by [\d.]+%: .*but differences give") as caught:
        problem_with(Sine(order)).check()
    assert ("gradient", "second derivative", "third derivative")[order - 1] in str(caught.value)
    assert "module 1 (Sine)" in str(caught.value)


# ---- the culprit cannot be named ---------------------------------------------------------------------------


class Whole(nn.Module):
    """A layer with a fault, in a model of which something else cannot be tried alone."""

    def __init__(self, other):
        super().__init__()
        self.first, self.other, self.fault, self.last = nn.Linear(6, 8), other, Sine(2), nn.Linear(8, 3)

    def forward(self, x):
        return self.last(self.fault(self.use(self.first(x))))

    def use(self, x):
        return self.other(x)


class OnlyInside(nn.Module):
    """A module that needs what the whole model's forward pass sets up."""

    ready = False

    def forward(self, x):
        if not OnlyInside.ready:
            raise RuntimeError("not set up")
        return x.tanh()


class NeedsOthers(Whole):
    def use(self, x):
        OnlyInside.ready = True
        try:
            return self.other(x)
        finally:
            OnlyInside.ready = False


class WithSettings(nn.Module):
    def forward(self, settings):
        return settings["x"] * settings["scale"] if settings["on"] else settings["x"]


class NotTensors(Whole):
    def use(self, x):
        return self.other({"x": x, "scale": 0.5, "on": True, "name": "settings"})


class Autocast(Whole):
    def use(self, x):
        with torch.autocast("cpu", enabled=False):
            return self.other(x)


def evaluated(norm):
    norm.running_var.fill_(1.5)
    return norm.eval()


MODELS = {
    "batch norm in eval mode": lambda: Whole(evaluated(nn.BatchNorm1d(8))),
    "in-place ReLU": lambda: Whole(nn.ReLU(inplace=True)),
    "a module that cannot be called alone": lambda: NeedsOthers(OnlyInside()),
    "a module that is not given tensors": lambda: NotTensors(WithSettings()),
    "autocast inside": lambda: Autocast(nn.Tanh()),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_culprit_is_named_past_modules_that_are_in_the_way(name):
    model = seeded(MODELS[name]).to(F64)
    problem = Problem.from_module(model, F.mse_loss, normal(12, 6, seed=1), normal(12, 3, seed=2))
    with pytest.raises(DerivativeError, match=r"the second derivative is off by(.|\n)*module fault \(Sine\)"):
        problem.check()


def test_a_finding_outlives_a_model_that_cannot_be_tried_in_part():
    """Modules are tried alone as copies of what is itself a copy of the user's model."""

    class CopiedOnce(Sine):
        copy = False

        def __deepcopy__(self, memo):
            if self.copy:
                raise ZeroDivisionError("division by zero")
            twin = CopiedOnce(self.order)
            twin.copy = True
            return twin

    problem = problem_with(CopiedOnce(2))
    with pytest.raises(DerivativeError, match=r"second derivative is off by(.|\n)*not known.*division by zero"):
        problem.check()


def test_data_that_are_not_a_list_of_examples():
    """A graph: the model takes all nodes or none."""
    edges = torch.tensor([[0, 1, 2, 3, 10, 11], [1, 2, 3, 4, 11, 0]])

    class Graph(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.fault, self.last = nn.Linear(6, 8), Sine(2), nn.Linear(8, 3)

        def forward(self, x):
            h = self.first(x)
            return self.last(self.fault(h.index_add(0, edges[1], h[edges[0]])))

    problem = Problem.from_module(seeded(Graph).to(F64), F.mse_loss, normal(12, 6, seed=1), normal(12, 3, seed=2))
    with pytest.raises(DerivativeError, match=r"the second derivative is off by(.|\n)*module fault \(Sine\)"):
        problem.check()


def test_a_criterion_that_takes_all_examples_or_none():
    """Connectionist temporal classification: lengths belong to the batch as a whole."""

    def ctc(outputs, targets):
        log_p = outputs.log_softmax(-1)[:, :, None].transpose(1, 2).expand(12, 2, 3)
        return F.ctc_loss(log_p, targets.new_tensor([[1, 2], [2, 1]]).long(), [12, 12], [2, 2])

    problem_with(Sine(), criterion=ctc, derivatives="finite-difference").check()
    with pytest.raises(DerivativeError, match=r"the gradient is off by(.|\n)*module 1 \(Sine\)"):
        problem_with(Sine(1), criterion=ctc, derivatives="finite-difference").check()
    with pytest.raises(DerivativeError, match=r"a second derivative(.|\n)*the criterion"):
        problem_with(Sine(), criterion=ctc).check()


# ---- NaN is called NaN -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "w0", "message"),
    [
        (
            lambda w: torch.where(w > 0, w.sqrt(), w**2).sum(),
            [0.5, -0.5],
            "the gradient is not finite, although the loss is: NaN in 1 of 2 entries",
        ),
        (lambda w: w.norm() + (w**2).sum(), [0.0, 0.0], "the second derivative is not finite.*NaN in 2 of 2 entries"),
        (lambda w: w.abs().pow(2.5).sum(), [0.0, 1.0, 2.0], "the third derivative is not finite.*NaN in 1 of 3"),
        (lambda w: w.sqrt().sum(), [0.0, 1.0], "the gradient is not finite.*infinite in 1 of 2"),
    ],
)
def test_nan_is_called_nan(loss, w0, message):
    with pytest.raises(NotFiniteError, match=message) as caught:
        Problem(loss, torch.tensor(w0, dtype=F64)).check()
    assert "%" not in str(caught.value)


def test_nan_is_found_in_the_tensor_it_is_in():
    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 3)
            self.scale = nn.Parameter(torch.tensor([0.5, -0.5, 2.0]))

        def forward(self, x):
            return self.linear(x) * torch.where(self.scale > 0, self.scale.sqrt(), self.scale)

    problem = Problem.from_module(seeded(Root).to(F64), F.mse_loss, normal(9, 6, seed=1), normal(9, 3, seed=2))
    with pytest.raises(NotFiniteError, match=r"NaN in 1 of 24 entries, in scale \(1 of 3\)"):
        problem.check()


def test_a_loss_that_is_not_defined_far_away():
    """The second point comes nearer until the loss is finite there."""
    Problem(lambda w: -(1e-3 - (w - 1).square().sum()).log(), torch.ones(3, dtype=F64)).check()


# ---- right at w0 by accident -------------------------------------------------------------------------------


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.o = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.o(Recomputed.apply(self, x, *self.a.parameters()))


class Recomputed(torch.autograd.Function):
    """Recompute a block in the backward pass with the weights that the module holds then: its own."""

    @staticmethod
    def forward(ctx, module, x, *parameters):
        ctx.module = module
        ctx.save_for_backward(x)
        return torch.tanh(module.a(x))

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            parameters = tuple(ctx.module.a.parameters())
            again = torch.tanh(ctx.module.a(x))
            return None, None, *torch.autograd.grad(again, parameters, g)


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("derivatives", ["autodiff", "mixed", "finite-difference"])
def test_a_gradient_that_is_right_at_the_start_only(derivatives, dtype):
    """Differences of a wrong gradient agree with one another: the loss itself has to be asked."""
    model = seeded(Checkpointed).to(dtype)
    inputs, targets = normal(10, 6, seed=1, dtype=dtype), normal(10, 3, seed=2, dtype=dtype)
    shapes = {name: p.shape for name, p in model.named_parameters()}

    def loss(w):  # the weights are back in the module when the backward pass asks it again
        pieces = torch.split(w, [shape.numel() for shape in shapes.values()])
        named = {name: piece.view(shapes[name]) for name, piece in zip(shapes, pieces, strict=True)}
        return F.mse_loss(torch.func.functional_call(model, named, inputs), targets)

    w0 = torch.cat([p.detach().flatten() for p in model.parameters()])
    problem = Problem(loss, w0, derivatives=derivatives)
    with pytest.raises(DerivativeError, match="off by"):
        problem.check()


def test_a_cached_value():
    cache = {}

    def loss(w):
        if "curvature" not in cache:
            cache["curvature"] = w.detach().square().clone()
        return (cache["curvature"] * w).sum() + (w.pow(3) / 3 - cache["curvature"] * w).detach().sum()

    problem = Problem(loss, normal(4), derivatives="finite-difference")
    with pytest.raises(DerivativeError, match="the gradient is off by"):
        problem.check()


# ---- cost ----------------------------------------------------------------------------------------------------


def test_the_check_is_cheap():
    """At most 100 gradients: a twentieth of 500 steps of the cheapest central flow of the demo (4.3 a step)."""
    from dvi.problems import digits

    def flops(function):
        with FlopCounterMode(display=False) as counter:
            function()
        return counter.get_total_flops()

    for activation in ("tanh", "relu"):
        problem = digits(n=300, width=32, activation=activation)
        gradient = flops(lambda problem=problem: problem.value_and_grad(problem.w0))
        assert 8 * gradient < flops(problem.check) < 100 * gradient
