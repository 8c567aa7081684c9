"""Optimizers as declared against torch's own and loops written by hand; schedules; preconditioners; what is refused."""

import math

import numpy as np
import pytest
import torch
from conftest import AdaGrad, CubicLoss, examples
from hypothesis import given
from hypothesis import strategies as st

import dvi
import dvi.testing
from dvi.methods import AdamW, FunctionMethod, GradientDescent, RMSProp, RMSPropNorm, as_method, validate
from dvi.methods.schedules import value_and_slope

EPS = np.finfo(np.float64).eps
seeds = st.integers(0, 2**32 - 1)
STEPS = 25

# 25 steps of a stable iteration: each adds a few roundings of w.  Where a coordinate's gradient passes through zero,
# RMSProp divides by a small √ν and enlarges them by up to 10⁵ or so.  A step done wrongly shows at 1e-3 and above.
ROUNDING = 1e-9


def bowl(seed, d=5):
    """A positive definite quadratic with a slight cubic term, far from its minimum; and where to start."""
    rng = np.random.default_rng(seed)
    A = rng.normal(size=(d, d))
    cubic = CubicLoss.random(rng, d)
    cubic.A, cubic.b, cubic.C = A @ A.T / d + np.eye(d), 5 * cubic.b, 0.01 * cubic.C
    return cubic, rng.normal(size=d)


def trajectory(method, cubic, w, steps=STEPS):
    """The iterates [steps + 1, d] of the discrete optimizer."""
    optimizer = dvi.discrete(cubic.problem(w), method)
    y, seen = optimizer.initial, [w]
    _, g = optimizer.value_and_grad(y)
    for _ in range(steps):
        y, _, g = optimizer.step(y, g)
        seen.append(y.w.numpy())
    return np.stack(seen)


def torch_trajectory(make, cubic, w, steps=STEPS):
    w = torch.tensor(w, requires_grad=True)
    optimizer, loss, seen = make([w]), cubic.loss(w.detach()), [w.detach().numpy().copy()]
    for _ in range(steps):
        optimizer.zero_grad()
        loss(w).backward()
        optimizer.step()
        seen.append(w.detach().numpy().copy())
    return np.stack(seen)


def agree(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=ROUNDING * np.abs(expected).max())
    assert np.abs(np.diff(expected, axis=0)).max(axis=1).min() > 1e-6  # it moves throughout


# ---- against torch.optim ------------------------------------------------------------------------------------------

TORCH = {
    "sgd": (GradientDescent(0.02), lambda p: torch.optim.SGD(p, lr=0.02)),
    "rmsprop": (RMSProp(0.01, 0.9, 1e-8), lambda p: torch.optim.RMSprop(p, lr=0.01, alpha=0.9, eps=1e-8)),
    "rmsprop, large eps": (RMSProp(0.5, 0.5, 2.0), lambda p: torch.optim.RMSprop(p, lr=0.5, alpha=0.5, eps=2.0)),
    "rmsprop, no eps": (RMSProp(0.01, 0.99), lambda p: torch.optim.RMSprop(p, lr=0.01, alpha=0.99, eps=0.0)),
    # Adam without momentum is RMSProp with bias correction: v̂ = v/(1 − β₂ᵗ), ε outside the root
    "adam": (
        RMSProp(0.01, 0.95, 1e-3, bias_correction=True),
        lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.0, 0.95), eps=1e-3),
    ),
    "adamw": (
        AdamW(0.01, 0.8, 0.95, 1e-3, weight_decay=0.5),
        lambda p: torch.optim.AdamW(p, lr=0.01, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.5),
    ),
    "adam, slow": (
        RMSProp(0.02, 0.999, bias_correction=True),
        lambda p: torch.optim.Adam(p, lr=0.02, betas=(0.0, 0.999), eps=0.0),
    ),
}


@pytest.mark.parametrize("name", TORCH)
@given(seed=seeds)
@examples(5)
def test_steps_are_those_of_torch_optim(name, seed):
    method, make = TORCH[name]
    cubic, w = bowl(seed)
    agree(trajectory(method, cubic, w), torch_trajectory(make, cubic, w))


@pytest.mark.parametrize("name", TORCH)
def test_methods_conform(name):
    dvi.testing.check_method(TORCH[name][0])


@given(seed=seeds)
@examples(5)
def test_adagrad_as_in_the_documentation(seed):
    assert repr(AdaGrad(lr=0.1)) == "AdaGrad(lr=0.1, eps=1e-08)"
    assert AdaGrad(0.1) == AdaGrad(lr=0.1)
    cubic, w = bowl(seed)
    expected = torch_trajectory(lambda p: torch.optim.Adagrad(p, lr=0.1, eps=1e-8), cubic, w)
    agree(trajectory(AdaGrad(lr=0.1), cubic, w), expected)
    assert dvi.central_flow(cubic.problem(w), AdaGrad(0.1), check=False).calculus.elementwise


# ---- against loops by hand ------------------------------------------------------------------------------------------


def by_hand(cubic, w, lr, beta2=None, eps=None, *, norm=False, corrected=False, steps=STEPS):
    """The paper's loops in numpy; hyperparameters as functions of the step t = 0, 1, …"""
    v, seen = 0.0, [w]
    for t in range(steps):
        g = cubic.gradient(w)
        if beta2 is None:
            w = w - lr(t) * g
        else:
            # ν_t is made with the gradient at w_t, before the step to w_{t+1}
            v = beta2(t) * v + (1 - beta2(t)) * ((g @ g) if norm else g**2)
            hat = v / (1 - beta2(t) ** (t + 1)) if corrected else v
            w = w - lr(t) * g / (np.sqrt(hat) + eps(t))
        seen.append(w)
    return np.stack(seen)


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("norm", [False, True])
@given(seed=seeds, lr=st.floats(1e-3, 0.05), beta2=st.floats(0.05, 0.999), eps=st.sampled_from([0.0, 1e-8, 0.3]))
@examples(5)
def test_rmsprop_loops(norm, corrected, seed, lr, beta2, eps):
    cubic, w = bowl(seed)
    method = (RMSPropNorm if norm else RMSProp)(lr, beta2, eps, corrected)
    expected = by_hand(cubic, w, lambda t: lr, lambda t: beta2, lambda t: eps, norm=norm, corrected=corrected)
    agree(trajectory(method, cubic, w), expected)


@given(seed=seeds, lr=st.floats(1e-4, 0.1))
@examples(5)
def test_gradient_descent_loop(seed, lr):
    cubic, w = bowl(seed)
    agree(trajectory(GradientDescent(lr), cubic, w), by_hand(cubic, w, lambda t: lr))


def test_a_triple_of_functions_is_a_method():
    cubic, w = bowl(0)
    triple = (
        lambda w: (torch.zeros_like(w),),
        lambda nu, g: (0.1 * (g**2 - nu[0]),),
        lambda nu: dvi.Diagonal((nu[0].sqrt() + 0.1) / 0.05),
    )
    agree(trajectory(triple, cubic, w), by_hand(cubic, w, lambda t: 0.05, lambda t: 0.9, lambda t: 0.1))
    assert isinstance(as_method(triple), FunctionMethod)
    assert as_method(triple).scheduled == ()


# ---- schedules --------------------------------------------------------------------------------------------------

LR = {
    "math": lambda t: 0.02 * 0.5 * (1 + math.cos(math.pi * float(t) / 40)) + 0.001,
    "torch": lambda t: 0.01 * (1 + torch.cos(torch.pi * t / 40)) + 0.001,
    "operators": lambda t: 0.02 / (1 + 0.1 * t),
}
BETA2 = {
    "math": lambda t: 1 - 0.3 * math.exp(-float(t) / 7) - 0.05,
    "torch": lambda t: 0.95 - 0.3 * torch.exp(-t / 7),
    "operators": lambda t: 0.6 + 0.01 * t,
}
EPSILON = {
    "math": lambda t: 0.1 * math.exp(-float(t) / 10),
    "torch": lambda t: 0.1 * torch.exp(-t / 10),
    "operators": lambda t: 0.1 / (1 + t),
}


def on_tensor(schedule):
    """The schedule as a function of a plain number, whatever it is written with."""
    return lambda t: float(schedule(torch.tensor(float(t), dtype=torch.float64)))


@pytest.mark.parametrize("written", ["math", "torch", "operators"])
@pytest.mark.parametrize("norm", [False, True])
def test_every_hyperparameter_may_be_a_schedule(written, norm):
    cubic, w = bowl(1)
    lr, beta2, eps = LR[written], BETA2[written], EPSILON[written]
    plain = [on_tensor(s) for s in (lr, beta2, eps)]
    make = RMSPropNorm if norm else RMSProp
    agree(trajectory(make(lr, beta2, eps), cubic, w), by_hand(cubic, w, *plain, norm=norm))
    agree(trajectory(GradientDescent(lr), cubic, w), by_hand(cubic, w, plain[0]))
    for i, one in enumerate([(lr, 0.9, 0.1), (0.01, beta2, 0.1), (0.01, 0.9, eps)]):
        method = make(*one)
        assert method.scheduled == (("lr", "beta2", "eps")[i],)
        loops = [plain[j] if j == i else (lambda t, x=one[j]: x) for j in range(3)]
        agree(trajectory(method, cubic, w), by_hand(cubic, w, *loops, norm=norm))
    scheduled = make(lr, 0.9, 0.1, bias_correction=True)
    loops = (plain[0], lambda t: 0.9, lambda t: 0.1)
    agree(trajectory(scheduled, cubic, w), by_hand(cubic, w, *loops, norm=norm, corrected=True))


SLOPES = {
    # schedule: (its slope, relative accuracy: rounding where it is made of torch or operators, else 1e-8, see _slope)
    "constant": (lambda t: 0.3, lambda t: 0.0, 1e-12),
    "linear": (lambda t: 0.01 * t + 1, lambda t: 0.01, 1e-8),
    "operators": (lambda t: 0.3 / (1 + 0.1 * t) ** 2, lambda t: -0.06 / (1 + 0.1 * t) ** 3, 1e-12),
    "torch": (lambda t: 2 + torch.cos(t / 10), lambda t: -math.sin(t / 10) / 10, 1e-12),
    "math": (lambda t: 2 + math.cos(t / 10), lambda t: -math.sin(t / 10) / 10, 1e-8),
    "math in a tensor": (
        lambda t: torch.tensor(2 + math.cos(t / 10), dtype=torch.float64),
        lambda t: -math.sin(t / 10) / 10,
        1e-8,
    ),
    "numpy": (lambda t: float(np.exp(-float(t) / 50)), lambda t: -math.exp(-t / 50) / 50, 1e-8),
    # linear warm-up, then a cosine: part of it operators, part of it math
    "mixed": (
        lambda t: (1 + 0.01 * t) * math.exp(-t / 50),
        lambda t: (0.01 - (1 + 0.01 * t) / 50) * math.exp(-t / 50),
        1e-8,
    ),
    "warm-up and cosine": (
        lambda t: 0.1 * min(1, (t + 1) / 100) * (1 + math.cos(math.pi * t / 400)),
        lambda t: (
            0.001 * (1 + math.cos(math.pi * t / 400)) - 0.001 * (t + 1) * math.pi / 400 * math.sin(math.pi * t / 400)
        ),
        1e-8,
    ),
    "pieces": (lambda t: 0.1 if t < 0.25 else 0.1 - 0.001 * (t - 0.25), lambda t: 0.0 if t < 0.25 else -0.001, 1e-8),
}


@pytest.mark.parametrize("name", SLOPES)
@pytest.mark.parametrize("t", [0.0, 0.75, 7.0, 42.5])
def test_the_slope_of_a_schedule(name, t):
    schedule, slope, accuracy = SLOPES[name]
    value, found = value_and_slope(schedule, t)
    assert value == pytest.approx(on_tensor(schedule)(t), rel=1e-14)
    assert found == pytest.approx(slope(t), rel=accuracy, abs=accuracy * 0.1)


@pytest.mark.parametrize("schedule", [lambda t: "fast", lambda t: None, lambda t: torch.ones(3)])
def test_what_is_no_schedule_is_refused(schedule):
    with pytest.raises(dvi.SpecError, match="schedule must map a time to a number"):
        GradientDescent(schedule)


def test_a_schedule_that_leaves_its_range_is_refused_where_it_does():
    cubic, w = bowl(0)
    with pytest.raises(dvi.SpecError, match=r"lr must be positive"):
        trajectory(GradientDescent(lambda t: 0.1 - 0.02 * t), cubic, w)
    with pytest.raises(dvi.SpecError, match=r"at t = 0.*beta2 must be in"):
        RMSProp(0.1, lambda t: 1.0 + t)


# ---- what is refused ----------------------------------------------------------------------------------------------

HYPERPARAMETERS = [
    (GradientDescent, {"lr": -0.1}, "lr must be positive"),
    (GradientDescent, {"lr": 0.0}, "lr must be positive"),
    (GradientDescent, {"lr": 0}, "lr must be positive"),
    (GradientDescent, {"lr": math.nan}, "lr must be finite"),
    (GradientDescent, {"lr": math.inf}, "lr must be finite"),
    (RMSProp, {"lr": 0.1, "beta2": 1.0}, r"beta2 must be in \[0, 1\)"),
    (RMSProp, {"lr": 0.1, "beta2": -0.1}, r"beta2 must be in \[0, 1\)"),
    (RMSPropNorm, {"lr": 0.1, "beta2": 1.5}, r"beta2 must be in \[0, 1\)"),
    (RMSPropNorm, {"lr": 0.1, "beta2": 0.9, "eps": -1e-8}, "eps must be zero or positive"),
    (RMSProp, {"lr": "fast", "beta2": 0.9}, "lr"),
    (RMSProp, {"lr": None, "beta2": 0.9}, "lr"),
]


@pytest.mark.parametrize(("make", "values", "words"), HYPERPARAMETERS)
def test_hyperparameters_out_of_range(make, values, words):
    with pytest.raises(dvi.SpecError, match=words):
        make(**values)


class Good(dvi.Method):
    """Every part of it is replaced in turn."""

    def init(self, w):
        return {"v": torch.zeros_like(w), "n": w.new_zeros(())}

    def f(self, nu, g):
        return {"v": 0.1 * (g**2 - nu["v"]), "n": torch.ones_like(nu["n"])}

    def P(self, nu):
        return dvi.Diagonal(nu["v"] ** 0.5 + 0.1)


def in_place(self, nu, g):
    nu["v"] += 0.1 * g**2
    return {"v": g**2, "n": torch.ones_like(nu["n"])}


SPECS = {
    "init with ints": ("init", lambda self, w: {"v": torch.zeros_like(w), "n": 0}, "floating-point tensors"),
    "init with an integer tensor": (
        "init",
        lambda self, w: {"v": torch.zeros_like(w), "n": torch.tensor(0)},
        "floating-point tensors",
    ),
    "init on another device": (
        "init",
        lambda self, w: {"v": torch.zeros_like(w), "n": torch.zeros((), dtype=w.dtype, device="meta")},
        "device|is on",
    ),
    "f with a part missing": ("f", lambda self, nu, g: {"v": g**2}, "another structure"),
    "f with a part too many": ("f", lambda self, nu, g: {**nu, "m": g}, "another structure"),
    "f as a tuple": ("f", lambda self, nu, g: (g**2, nu["n"]), "another structure"),
    "f of another shape": ("f", lambda self, nu, g: {"v": (g**2).sum(), "n": nu["n"]}, r"shape \[\]"),
    "f that broadcasts": ("f", lambda self, nu, g: {"v": g**2, "n": g}, r"shape \[5\]"),
    "f of another dtype": ("f", lambda self, nu, g: {"v": (g**2).float(), "n": nu["n"]}, "float32"),
    "f with a number": ("f", lambda self, nu, g: {"v": g**2, "n": 1.0}, "float"),
    "f in place": ("f", in_place, "in place"),
    "f with NaN": ("f", lambda self, nu, g: {"v": g * math.nan, "n": nu["n"]}, "not finite"),
    "P a tensor": ("P", lambda self, nu: nu["v"], "must be a preconditioner"),
    "P a number": ("P", lambda self, nu: 1.0, "must be a preconditioner"),
    "P None": ("P", lambda self, nu: None, "must be a preconditioner"),
    "Diagonal of a matrix": ("P", lambda self, nu: dvi.Diagonal(torch.diag(nu["v"])), r"shape \[d\]"),
    "Diagonal of a scalar": ("P", lambda self, nu: dvi.Diagonal(nu["n"]), r"Scalar\(p\)"),
    "Diagonal of a number": ("P", lambda self, nu: dvi.Diagonal(1.0), "float"),
    "Diagonal too short": ("P", lambda self, nu: dvi.Diagonal(nu["v"][:3] + 1), "act on vectors"),
    "Diagonal of length 1": ("P", lambda self, nu: dvi.Diagonal(nu["v"][:1] + 1), "act on vectors"),
    "P negative": ("P", lambda self, nu: dvi.Diagonal(-nu["v"] - 0.1), "not positive definite"),
    "P negative scalar": ("P", lambda self, nu: dvi.Scalar(-nu["n"]), "not positive definite"),
    "P zero": ("P", lambda self, nu: dvi.Scalar(0 * nu["n"]), "eps > 0"),
    "P zero diagonal": ("P", lambda self, nu: dvi.Diagonal(0 * nu["v"]), "P"),
    "P NaN": ("P", lambda self, nu: dvi.Diagonal(nu["v"] * math.nan), "NaN"),
    "P NaN scalar": ("P", lambda self, nu: dvi.Scalar(nu["n"] * math.nan), "not positive definite"),
    "P infinite": ("P", lambda self, nu: dvi.Diagonal(nu["v"] / 0), "infinite"),
    "P zero where the gradient is not": (
        "P",
        lambda self, nu: dvi.Diagonal(nu["v"] * (torch.arange(5) > 0)),
        "gradient is not zero",
    ),
    "a Scalar of a vector": ("P", lambda self, nu: dvi.Scalar(nu["v"] + 1), "Scalar|scalar"),
}


@pytest.mark.parametrize("name", SPECS)
def test_declarations_that_are_wrong(name):
    part, wrong, words = SPECS[name]
    method = type("Wrong", (Good,), {part: wrong})()
    w, g = torch.ones(5, dtype=torch.float64), torch.linspace(1, 2, 5, dtype=torch.float64)
    validate(Good(), w, g)
    with pytest.raises(dvi.SpecError, match=words):
        validate(method, w, g)


@pytest.mark.parametrize("what", [GradientDescent, "sgd", None, (1, 2, 3), (lambda w: w, lambda nu, g: nu)])
def test_what_is_no_method(what):
    with pytest.raises(dvi.SpecError, match=r"dvi.Method or a triple"):
        as_method(what)
    cubic, w = bowl(0)
    with pytest.raises(dvi.SpecError, match=r"GradientDescent\(lr=" if what is GradientDescent else "not a"):
        dvi.central_flow(cubic.problem(w), what, check=False)


def test_a_method_without_P_says_so():
    class Half(dvi.Method):
        lr: float = 0.1

    with pytest.raises(dvi.SpecError, match="declares no P"):
        validate(Half(), torch.ones(3), torch.ones(3))


def test_methods_are_values():
    with pytest.raises(AttributeError):
        GradientDescent(0.1).lr = 0.2
    assert {GradientDescent(0.1): 1}[GradientDescent(0.1)] == 1
    scheduled = RMSProp(lambda t: 0.1 + t, 0.9)
    scheduled.at(3.0)
    assert callable(scheduled.lr)  # `at` gives a copy


# ---- preconditioners ------------------------------------------------------------------------------------------------


def preconditioners(seed, d, kind):
    """A random preconditioner over six orders of magnitude, as a dense matrix and as it is."""
    rng = np.random.default_rng(seed)
    p = 10 ** rng.uniform(-3, 3, d)
    if kind == "dead":
        p[rng.permutation(d)[: max(1, d // 3)]] = 0
    if kind == "scalar":
        return dvi.Scalar(torch.tensor(p[0])), np.full(d, p[0])
    if kind == "number":
        return dvi.Scalar(float(p[0])), np.full(d, p[0])
    return dvi.Diagonal(torch.tensor(p)), p


@pytest.mark.parametrize("kind", ["scalar", "number", "diagonal", "dead"])
@given(seed=seeds, d=st.integers(1, 8), k=st.integers(0, 4))
def test_preconditioner_algebra(kind, seed, d, k):
    P, p = preconditioners(seed, d, kind)
    rng = np.random.default_rng(seed)
    live = (p > 0)[:, None]
    inverse = np.where(live[:, 0], 1 / np.where(p > 0, p, 1), 0)[:, None]
    V = torch.tensor(rng.normal(size=(d, k)))

    def same(actual, expected):
        # entry by entry, a handful of roundings each
        np.testing.assert_allclose(actual.numpy(), expected, rtol=20 * EPS, atol=0)

    same(P.apply(V), p[:, None] * V.numpy())
    same(P.solve(V), inverse * V.numpy())
    same(P.solve(P.apply(V)), live * V.numpy())
    same(P.sqrt(P.sqrt(V)), P.apply(V).numpy())
    same(P.inv_sqrt(P.inv_sqrt(V)), P.solve(V).numpy())
    same(P.inv_sqrt(P.sqrt(V)), live * V.numpy())
    for operation in (P.apply, P.solve, P.sqrt, P.inv_sqrt):
        assert operation(V).shape == V.shape
        for j in range(k):  # column by column
            assert torch.equal(operation(V)[:, j], operation(V[:, j]))
    if p.any():
        P.check()
        used = p[p > 0]
        # the harmonic mean of the rates 1/p
        assert float(P.effective_lr()) == pytest.approx(len(used) / used.sum(), rel=1e-13)
    dead = P.dead()
    if kind in ("diagonal", "dead"):
        assert np.array_equal(dead.numpy(), p == 0)
    else:
        assert dead is None


def test_dead_coordinates_have_no_derivative_either():
    """√ν has an infinite slope at 0: what a dead coordinate contributes to ∂P[ν̇]U is 0, not NaN."""
    U = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)

    def applied(v):
        return dvi.Diagonal(v**0.5).apply(U)

    v = torch.tensor([4.0, 0.0], dtype=torch.float64)
    _, rate = torch.func.jvp(applied, (v,), (torch.tensor([1.0, 0.0], dtype=torch.float64),))
    assert torch.equal(rate, torch.tensor([[0.25, 0.5], [0, 0]], dtype=torch.float64))
    P = dvi.Diagonal(v)
    P.check(torch.tensor([1.0, 0.0], dtype=torch.float64))
    with pytest.raises(dvi.NotPositiveDefiniteError, match="gradient is not zero"):
        P.check(torch.tensor([1.0, 1e-300], dtype=torch.float64))
