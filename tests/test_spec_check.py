"""A user's f and P are differentiated in two ways when they are compiled: what is lost is found and named."""

import itertools

import numpy as np
import pytest
import torch

import dvi
from dvi import methods as M
from dvi.methods import Method, SpecError

D = torch.float64
SHAPES = [(2, 3), (4,), ()]
LR_FALLS = lambda t: 0.1 * 0.99**t  # noqa: E731


def problem(dtype=D):
    def loss(w):
        return 0.5 * (torch.arange(1, 12, dtype=w.dtype) * w**2).sum() + torch.cos(w).prod() + 0.1 * (w**3).sum()

    return dvi.Problem(loss, torch.linspace(-1.0, 1.3, 11, dtype=dtype))


def compiled(method, dtype=D, **kw):
    return dvi.central_flow(problem(dtype), method, check=False, **kw)


class Norm(Method):
    lr: float = 0.1
    beta2: float = 0.9

    def init(self, w):
        return {"v": w.new_zeros(()), "t": w.new_zeros(())}

    def f(self, nu, g):
        return {"v": (1 - self.beta2) * (self.square(g) - nu["v"]), "t": torch.ones_like(nu["t"])}

    def P(self, nu):
        return dvi.Scalar((self.root(nu["v"] / (1 - self.beta2 ** nu["t"])) + 1e-8) / self.lr)

    def square(self, g):
        return (g**2).sum()

    def root(self, v):
        return v.sqrt()


# ---- accepted -----------------------------------------------------------------------------------------------------

BUILT_IN = {
    "gd": M.GradientDescent(0.1),
    "gd, schedule": M.GradientDescent(LR_FALLS),
    "norm": M.RMSPropNorm(0.1, 0.9),
    "rmsprop": M.RMSProp(0.1, 0.9, 1e-8),
    "rmsprop, corrected": M.RMSProp(0.1, 0.9, 1e-8, bias_correction=True),
    "rmsprop, schedules": M.RMSProp(LR_FALLS, lambda t: 1 - 1 / (t + 5), 1e-8),
    "centred": M.CentredRMSProp(0.1, 0.9, 1e-4),
    "adagrad": M.AdaGrad(0.1),
    "adagrad-norm": M.AdaGradNorm(0.1),
    "adafactor": M.Adafactor(0.1, SHAPES),
    "shampoo": M.Shampoo(0.1, SHAPES, eps=1e-2),
    "shampoo, average": M.Shampoo(0.1, SHAPES, beta2=0.9, eps=1e-2, one_sided=True),
    "normalized": M.NormalizedGD(0.1),
    "heavy ball": M.HeavyBall(LR_FALLS, 0.8),
    "nesterov": M.Nesterov(0.1, 0.8),
    "adam": M.Adam(0.1, 0.5, 0.9),
    "nadam": M.NAdam(LR_FALLS, 0.5, 0.9),
    "by hand": Norm(),
}


class Branch(Norm):
    """The gradient clipped to a norm by an if, as in a training loop: right on either side of the kink."""

    limit: float = 1.0

    def square(self, g):
        return (g**2).sum() if g.norm() < self.limit else self.limit * g.norm()


class Kinks(Method):
    """A kink near some entry or other of every vector: clamps, maxima, where, sign, a counter that is asked for."""

    lr: float = 0.1

    def init(self, w):
        return {"u": torch.zeros_like(w), "v": torch.zeros_like(w), "t": w.new_zeros(())}

    def f(self, nu, g):
        u = 0.1 * (torch.maximum(nu["u"], g.abs()) - nu["u"])
        v = 0.1 * (torch.where(g > 0.5, g**2, g.clamp(-1, 1).abs()) * g.sign().abs() - nu["v"])
        return {"u": u, "v": v, "t": torch.ones_like(nu["t"])}

    def P(self, nu):
        late = 1.0 if nu["t"] > 10 else 2.0
        return dvi.Diagonal(late * torch.clamp(nu["u"] + nu["v"], 0.3, 3.0) / self.lr)


@pytest.mark.parametrize("name", BUILT_IN)
def test_no_right_method_is_refused(name):
    compiled(BUILT_IN[name])


@pytest.mark.parametrize("method", [BUILT_IN[n] for n in ("rmsprop, corrected", "shampoo", "adafactor", "adam")])
def test_nor_in_float32(method):
    compiled(method, torch.float32)


@pytest.mark.parametrize("method", [Branch(limit=1e-3), Branch(limit=1e3), Kinks()], ids=repr)
def test_kinks_and_branches_are_not_taken_for_faults(method):
    compiled(method)


def test_many_weights_with_kinks_are_not_taken_for_faults():
    w = torch.randn(20_000, generator=torch.Generator().manual_seed(0), dtype=D)
    dvi.central_flow(dvi.Problem(lambda w: (w**2).sum(), w), Kinks(), check=False)


# ---- refused --------------------------------------------------------------------------------------------------------


class Wrong(torch.autograd.Function):
    """The root, with a derivative that is wrong."""

    generate_vmap_rule = True

    @staticmethod
    def forward(v):
        return v**0.5

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def jvp(ctx, dv):
        return 0.5 * dv

    @staticmethod
    def backward(ctx, cotangent):
        return 0.5 * cotangent


class Backward(torch.autograd.Function):
    """The square, with a backward pass and no jvp, as most are."""

    @staticmethod
    def forward(ctx, g):
        ctx.save_for_backward(g)
        return g**2

    @staticmethod
    def backward(ctx, cotangent):
        return 2 * ctx.saved_tensors[0] * cotangent


def without_grad(function):
    def wrapped(x):
        with torch.no_grad():
            return function(x)

    return wrapped


def in_place(g):
    s = g.clone()
    s *= s
    return s.sum()


SQUARES = {  # of ‖g‖², and what the message must name
    "item": (lambda g: g.norm().item() ** 2, r"\.item\(\)"),
    "float": (lambda g: float(g.norm()) ** 2, r"float"),
    "detach": (lambda g: (g.detach() ** 2).sum(), r"detach"),
    "half detached": (lambda g: (g.detach() * g).sum(), r"detach"),
    "data": (lambda g: (g.data**2).sum(), r"\.data"),
    "tolist": (lambda g: sum(x**2 for x in g.tolist()), r"tolist"),
    "numpy": (lambda g: torch.as_tensor(np.sum(g.numpy() ** 2)), r"numpy"),
    "detached numpy": (lambda g: torch.tensor(np.sum(g.detach().numpy() ** 2)), r"numpy"),
    "array": (lambda g: torch.as_tensor(np.asarray(g) @ np.asarray(g)), r"NumPy|numpy"),
    "inference": (torch.inference_mode()(lambda g: (g**2).sum()), r"no_grad"),
    "no jvp": (lambda g: Backward.apply(g).sum(), r"jvp"),
    "in place": (in_place, r"in place"),
}
ROOTS = {  # of v
    "item": (lambda v: v.sqrt().item(), r"\.item\(\)"),
    "float": (lambda v: float(v) ** 0.5, r"float"),
    "detach": (lambda v: v.detach().sqrt(), r"detach"),
    "numpy": (lambda v: float(np.sqrt(v.numpy())), r"numpy"),
    "wrong jvp": (Wrong.apply, r"autograd.Function"),
}


def variant(name, function):
    return type("Own", (Norm,), {name: staticmethod(function), "__annotations__": {}})()


@pytest.mark.parametrize("name", SQUARES)
def test_what_f_loses_is_found_and_named(name):
    function, word = SQUARES[name]
    with pytest.raises(SpecError, match=rf"^Own\.f\(nu, g\).*{word}"):
        compiled(variant("square", function))


@pytest.mark.parametrize("name", ROOTS)
def test_what_P_loses_is_found_and_named(name):
    function, word = ROOTS[name]
    with pytest.raises(SpecError, match=rf"^Own\.P\(nu\).*ν\['[vt]'\].*{word}"):
        compiled(variant("root", function))


def test_the_line_is_quoted():
    with pytest.raises(SpecError, match=r"in line \d+ of test_spec_check\.py \(.*g\.norm\(\)\.item\(\)"):
        compiled(variant("square", SQUARES["item"][0]))


class Counted(Norm):
    """The bias correction with a number: v's derivative is right, t's is lost."""

    def P(self, nu):
        return dvi.Scalar((nu["v"] / (1 - self.beta2 ** float(nu["t"]))) ** 0.5 / self.lr)


def test_the_part_of_nu_is_named():
    with pytest.raises(SpecError, match=r"Counted\.P\(nu\): its derivative in ν\['t'\].*float"):
        compiled(Counted())


class Backwards(Method):
    """Entry by entry, so that derivatives are taken backwards, which ``no_grad`` switches off."""

    def init(self, w):
        return {"v": torch.zeros_like(w)}

    def f(self, nu, g):
        with torch.no_grad():
            return {"v": 0.1 * (g**2 - nu["v"])}

    def P(self, nu):
        return dvi.Diagonal(nu["v"].sqrt() + 1e-3)


def test_no_grad_is_named():
    with pytest.raises(SpecError, match=r"Backwards\.f\(nu, g\).*no_grad"):
        compiled(Backwards())


class Scheduled(Method):
    lr: float

    def P(self, nu):
        return dvi.Scalar(1 / float(self.lr))


def test_a_schedule_that_P_makes_a_number_of_is_named():
    compiled(Scheduled(0.1))
    with pytest.raises(SpecError, match=r"Scheduled\.P\(nu\): its derivative in the schedule self\.lr.*float"):
        compiled(Scheduled(LR_FALLS))


# ---- not a function ---------------------------------------------------------------------------------------------

calls = itertools.count()
IMPURE = {
    "random f": ({"square": lambda self, g: (g**2).sum() * (1 + 0.1 * torch.rand(()))}, r"f\(nu, g\).*random"),
    "random P": ({"root": lambda self, v: v.sqrt() * (1 + 0.1 * torch.rand(()))}, r"P\(nu\).*random"),
    "counter in f": ({"square": lambda self, g: (g**2).sum() / (1 + next(calls))}, r"f\(nu, g\).*counter"),
    "random init": ({"init": lambda self, w: {"v": torch.rand((), dtype=w.dtype), "t": w.new_zeros(())}}, r"init\(w\)"),
    "f changes g": ({"square": lambda self, g: g.mul_(2).sum() ** 2}, r"f\(nu, g\) changes g in place"),
    "P changes v": ({"root": lambda self, v: v, "P": lambda self, nu: dvi.Scalar(nu["v"].add_(1))}, r"P.*in place"),
}


@pytest.mark.parametrize("name", IMPURE)
def test_a_declaration_that_is_no_function_is_refused(name):
    parts, words = IMPURE[name]
    method = type("Impure", (Norm,), {**parts, "__annotations__": {}})()
    with pytest.raises(SpecError, match=words):
        compiled(method)


def test_the_optimizer_itself_needs_no_derivatives():
    method, right = variant("square", SQUARES["item"][0]), Norm()
    runs = [dvi.solve(dvi.discrete(problem(), m), 5, eigen_every=0, progress=False) for m in (method, right)]
    torch.testing.assert_close(runs[0].w, runs[1].w)
