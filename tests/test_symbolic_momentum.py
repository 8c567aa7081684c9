"""Closed forms with momentum: c, Q₁, τ by hand; α, β and the flows of both accuracies against the compiler's."""

from functools import cache

import numpy as np
import pytest
import sympy
import torch
from conftest import CubicLoss, examples
from hypothesis import given
from hypothesis import strategies as st
from test_symbolic import (
    ROUNDING,
    AdaGrad,
    AdaGradNorm,
    Crossed,
    close,
    equal,
    seeds,
    the_page_says_what_the_derivation_holds,
    well_formed,
    x,
)
from torch.utils import _pytree as pytree

import dvi
from dvi.methods import (
    Adam,
    CentredRMSProp,
    Filter,
    GradientDescent,
    HeavyBall,
    NAdam,
    Nesterov,
    QuasiHyperbolic,
    RMSProp,
    RMSPropNorm,
)
from dvi.solvers.svec import svec
from dvi.symbolic.vectors import Total

g, m = x.g, x.m
beta, beta1, beta2, n, eta = sympy.symbols("beta beta1 beta2 n eta", positive=True)


class NormWithMomentum(RMSPropNorm):
    """A scalar P with a state, and an average of the last gradients."""

    momentum: float = 0.6

    def Q(self):
        return Filter([1.0], [1.0, -self.momentum])


class TwoBuffers(dvi.Method):
    """A filter of second order with a direct part, a state that is called m, numbers that are not hyperparameters."""

    lr: float
    b: float

    def init(self, w):
        return {"m": torch.zeros_like(w), "s": w.new_zeros(())}

    def f(self, nu, g):
        return {"m": 0.3 * (g**2 - nu["m"]), "s": (g**2).sum()}

    def P(self, nu):
        return dvi.Diagonal((nu["m"] + nu["s"]).sqrt() / self.lr)

    def Q(self):
        return Filter([0.7, 0.2 * self.b, 0.1], [1.0, -self.b, 0.1])


METHODS = {
    "heavy ball": HeavyBall(0.1, 0.8),
    "heavy ball, schedules": HeavyBall(lambda t: 0.3 / (1 + 0.1 * t), lambda t: 0.5 + 0.03 * t),
    "nesterov": Nesterov(0.1, 0.7),
    "quasi-hyperbolic": QuasiHyperbolic(0.1, 0.9, 0.6),
    "adam": Adam(0.1, 0.8, 0.9, 1e-2),
    "adam, no correction": Adam(0.1, 0.8, 0.9, 0.0, bias_correction=False),
    "nadam": NAdam(0.1, 0.8, 0.9, 1e-2),
    "scalar P": NormWithMomentum(0.3, 0.8, eps=0.1),
    "two buffers": TwoBuffers(0.3, 0.5),
}
# without momentum, for the flow of second order
PLAIN = {
    "gd": GradientDescent(lambda t: 0.3 / (1 + 0.1 * t)),
    "norm": RMSPropNorm(0.3, 0.8),
    "rmsprop": RMSProp(0.3, 0.8, eps=0.1, bias_correction=True),
    "rmsprop, schedules": RMSProp(lambda t: 0.3 + 0.01 * t, lambda t: 0.7 + 0.02 * t, 0.1),
    "adagrad": AdaGrad(0.3),
    "adagrad-norm": AdaGradNorm(0.3),
}
ALL = METHODS | PLAIN


@cache
def derived(name, accuracy):
    return dvi.derive(ALL[name], accuracy=accuracy)


# ---- c, Q₁, τ and the equations, by hand ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "c", "gain", "lag"),
    [
        (HeavyBall, 2 * (1 + beta), 1 / (1 - beta), beta / (1 - beta)),
        (Nesterov, 2 * (1 + beta) / (1 + 2 * beta), 1 / (1 - beta), beta**2 / (1 - beta)),
        (QuasiHyperbolic, 2 / (1 - n + n * (1 - beta) / (1 + beta)), 1, n * beta / (1 - beta)),
        (Adam, 2 * (1 + beta1) / (1 - beta1), 1, beta1 / (1 - beta1)),
        (NAdam, 2 * (1 + beta1) / ((1 - beta1) * (1 + 2 * beta1)), 1, beta1**2 / (1 - beta1)),
        (GradientDescent, 2, 1, 0),
    ],
)
def test_threshold_gain_and_lag_of_the_page_on_momentum(method, c, gain, lag):
    d = dvi.derive(method)
    names = {s.name: s for s in d.spec.hyperparameters.values()}
    for found, expected in ((d.threshold, c), (d.gain, gain), (d.lag, lag)):
        by_hand = sympy.sympify(expected).xreplace({s: names[s.name] for s in sympy.sympify(expected).free_symbols})
        assert sympy.simplify(found - by_hand) == 0


def test_numbers_of_a_filter_are_the_fractions_they_are_written_as():
    d = dvi.derive(Adam(0.1), numeric=True)
    assert (d.threshold, d.gain, d.lag) == (38, 1, 9)
    d = dvi.derive(HeavyBall(0.1, 0.9), numeric=True)
    assert (d.threshold, d.gain, d.lag) == (sympy.Rational(19, 5), 10, 9)


def test_the_flow_of_heavy_ball_and_of_adam_by_hand():
    d = dvi.derive(HeavyBall)
    b, lr = d.symbols["beta"], d.symbols["eta"]
    force = g + x.D3L / 2
    assert d.accuracy == "second-order"
    assert equal(d.flow.w.rhs, -lr / (1 - b) * m)
    assert equal(d.flow.m.rhs, (force - m) / (b / (1 - b) + sympy.Rational(1, 2)))
    assert equal(d.alpha, -lr / (1 - b) * Total(x.T_ab * g))
    assert equal(d.beta, lr / (1 - b) * Total(x.T_ab * x.T_cd) / 2)
    assert equal(d.sigma2, -2 * Total(x.dS * g) / Total(x.dS**2))
    paper = dvi.derive(HeavyBall, accuracy="paper")
    assert paper.flow.m is None
    assert equal(paper.flow.w.rhs, -lr / (1 - b) * force)

    d = dvi.derive(Adam(0.1, eps=0.0, bias_correction=False))
    nu, lr, b1, b2 = (d.symbols[name] for name in ("nu", "eta", "beta1", "beta2"))
    c = 2 * (1 + b1) / (1 - b1)
    assert equal(d.flow.w.rhs, -lr / sympy.sqrt(nu) * m)
    assert equal(d.flow.nu["v"].rhs, -sympy.log(b2) * (g**2 + x.HSH - nu))
    # HΣH = c²PΣP
    assert equal(d.at_edge().flow.nu["v"].rhs, -sympy.log(b2) * (g**2 + c**2 * nu / lr**2 * x.Sii - nu))
    paper = dvi.derive(Adam(0.1, eps=0.0, bias_correction=False), accuracy="paper")
    assert equal(paper.flow.nu["v"].rhs, (1 - b2) / b2 * (g**2 + x.HSH - nu))
    assert (paper.alpha, paper.beta) == (d.alpha, d.beta)


def test_second_order_without_momentum():
    d = dvi.derive(RMSProp, accuracy="second-order")
    nu, lr, b2 = (d.symbols[name] for name in ("nu", "eta", "beta2"))
    assert (d.threshold, d.gain, d.lag) == (2, 1, 0)
    assert equal(d.flow.w.rhs, -lr / sympy.sqrt(nu) * m)
    assert equal(d.flow.m.rhs, 2 * (g + x.D3L / 2 - m))
    assert equal(d.factor[0], -sympy.log(b2) / (1 - b2))
    assert dvi.derive(RMSProp).flow.m is None
    # a clock and a sum go as they do in the optimizer, J = 0
    corrected = dvi.derive(RMSProp(0.1, 0.9, bias_correction=True), accuracy="second-order")
    assert corrected.flow.nu["t"].rhs == 1
    assert equal(dvi.derive(AdaGrad, accuracy="second-order").flow.nu["s"].rhs, g**2 + x.HSH)


# ---- against the compiler -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
@given(seeds, st.integers(2, 6), st.integers(1, 3))
@examples(2)
def test_alpha_beta_and_the_flows_are_the_compilers(name, seed, d, k):
    rng = np.random.default_rng(seed)
    k, method = min(d, k), ALL[name]
    w, momentum = rng.normal(size=(2, d))
    cubic = CubicLoss.random(rng, d)
    problem = cubic.problem(w)
    paper, second = (dvi.central_flow(problem, method, check=False, accuracy=a) for a in ("paper", "second-order"))
    nu = pytree.tree_map(lambda v: torch.tensor(rng.uniform(0.2, 2, size=v.shape)), paper.initial.nu)
    U, X, t = rng.normal(size=(d, k)), rng.normal(size=(k, k)), float(rng.uniform(0, 5))
    X = X + X.T
    lin = paper.linearise(torch.tensor(w), nu, torch.tensor(U), t=t)
    drift = lin.drift(X)
    arguments = (cubic.gradient(w), nu, U, cubic.hessian(w) @ U, lin.T, X)
    free = np.abs(np.asarray(lin.T) @ np.asarray(drift.w)).max() + np.abs(svec(lin.alpha.numpy())).max()

    def compare_nu(found, expected):
        for part, other in zip(pytree.tree_leaves(found), pytree.tree_leaves(expected), strict=True):
            close(part, other)

    found = derived(name, "paper").evaluate(*arguments, t=t)
    close(found.beta, lin.beta)
    close(found.w, drift.w)
    compare_nu(found.nu, drift.nu)

    # α and β are those of the leading-order drift at either accuracy; ν has its logarithmic rate at second order
    derivation = derived(name, "second-order")
    there = derivation.evaluate(*arguments, t=t, m=momentum)
    compare_nu(there.nu, second.linearise(torch.tensor(w), nu, torch.tensor(U), t=t).drift(X).nu)
    for values in (found, there):
        # α may cancel: close to the largest term of its
        np.testing.assert_allclose(values.alpha, lin.alpha, rtol=0, atol=ROUNDING * free)
        close(values.beta, lin.beta)
    # dm/dt and dw/dt by hand, from the filter in numbers
    now = method.at(t)
    force = arguments[0] + 0.5 * svec(X) @ np.asarray(lin.T)
    close(there.w, -float(now.Q().gain) * now.P(nu).solve(torch.tensor(momentum)).numpy())
    close(there.m, (force - momentum) / (float(now.Q().lag) + 0.5))
    # on the slow manifold it is the leading-order drift
    rest = derivation.evaluate(*arguments, t=t)
    close(rest.w, drift.w)
    assert np.abs(rest.m).max() <= ROUNDING * np.abs(force).max()


@pytest.mark.parametrize("name", METHODS)
@given(seeds, st.integers(2, 6))
@examples(3)
def test_at_the_edge_sigma2_is_alpha_over_beta_and_the_edge_form_is_the_same(name, seed, d):
    """Put HU = cPU in by choosing H: then α/β is σ², and the forms with and without it agree."""
    rng = np.random.default_rng(seed)
    method, derivation = METHODS[name], derived(name, "second-order")
    gradient, u = rng.normal(size=(2, d))
    nu = pytree.tree_map(
        lambda v: torch.tensor(rng.uniform(0.2, 2, size=v.shape)), method.init(torch.zeros(d, dtype=torch.float64))
    )
    now = method.at(1.5)
    Hu = float(now.Q().threshold) * now.P(nu).apply(torch.tensor(u)).numpy()
    arguments = (gradient, nu, u[:, None], Hu[:, None], rng.normal(size=(1, d)))
    there, edge = (e.evaluate(*arguments, X=[[0.7]], t=1.5) for e in (derivation, derivation.at_edge()))
    close(edge.beta, there.beta)
    for a, b in zip(pytree.tree_leaves(edge.nu), pytree.tree_leaves(there.nu), strict=True):
        close(a, b)
    # σ² goes with uuᵀ, |u| = 1 for a scalar P; α may cancel, hence the size of its terms
    length = 1 if derivation.spec.diagonal else u @ u
    variance = there.alpha[0, 0] / there.beta[0, 0] * length
    size = (np.abs(there.alpha[0, 0]) + np.abs(there.w * arguments[-1]).sum()) / abs(there.beta[0, 0]) * length
    assert abs(there.sigma2 - variance) <= ROUNDING * size
    assert abs(edge.sigma2 - variance) <= ROUNDING * size


# ---- in print -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_latex_is_well_formed(name):
    for accuracy in ("paper", "second-order"):
        d = derived(name, accuracy)
        page = well_formed(d, parse=name in ("adam, no correction", "scalar P"))
        well_formed(d.at_edge(), parse=False)
        # where m is no momentum the letter is free for a part of ν
        assert page.count(r"\frac{dm}{dt}") == (accuracy == "second-order" or name == "two buffers")
        assert (d.flow.m is not None) == (accuracy == "second-order")
        assert (r"cP - H(w)" in page) == d.spec.momentum
        assert "Total" not in str(d)


@pytest.mark.parametrize("numeric", [False, True])
@pytest.mark.parametrize("name", ["heavy ball", "nesterov", "adam, no correction", "nadam", "scalar P", "rmsprop"])
def test_latex_says_what_the_expressions_say(name, numeric):
    d = dvi.derive(ALL[name], numeric=numeric, accuracy="second-order")
    the_page_says_what_the_derivation_holds(d)
    the_page_says_what_the_derivation_holds(d.at_edge())


def test_adam_in_text_and_in_latex():
    d = dvi.derive(Adam(0.1, eps=0.0, bias_correction=False))
    lines = [line.strip() for line in str(d).splitlines()]
    assert lines[:8] == [
        "Central flow of Adam",
        "dw/dt = -η*m/sqrt(ν)",
        "dm/dt = (∇L + ∇³L[Σ]/2 - m)/(τ + 1/2)",
        "dν/dt = -(∇L**2 + diag(HΣH) - ν)*log(β₂)",
        "0 ⪯ Σ ⟂ cP - H ⪰ 0",
        "P = diag(sqrt(ν)/η)",
        "c = 2*(β₁ + 1)/(1 - β₁)",
        "Q₁ = 1",
    ]
    page = d.latex()
    for line in (
        r"\frac{dw}{dt} &= - \frac{\eta m}{\sqrt{\nu}} \\",
        r"\frac{dm}{dt} &= \frac{\nabla L(w) + \frac{\nabla^3 L(w)[\Sigma]}{2} - m}{\tau + \frac{1}{2}} \\",
        r"\frac{d\nu}{dt} &= - \left(\nabla L(w)^{\odot 2} + \mathrm{diag}(H \Sigma H) - \nu\right) "
        r"\log{\left(\beta_{2} \right)} \\",
        r"0 \preceq \Sigma &\perp cP - H(w) \succeq 0 \\",
    ):
        assert line in page
    assert "dm/dt = 2*∇L + ∇³L[Σ] - 2*m" in str(dvi.derive(RMSProp, accuracy="second-order"))


# ---- what is refused ------------------------------------------------------------------------------------------------


def test_what_has_no_closed_form_is_refused_by_name():
    class Cycling(dvi.Method):
        lr: float

        def P(self, nu):
            return dvi.Scalar(1 / self.lr)

        def Q(self):
            return Filter([0.2, 0.9], [1.0])

    class Branching(Cycling):
        def Q(self):
            return Filter([1.0], [1.0, -0.5 if self.lr > 1 else -0.9])

    with pytest.raises(dvi.SpecError, match="period two"):
        dvi.derive(Cycling(0.1))
    with pytest.raises(dvi.SpecError, match=r"Branching.Q\(\) cannot be written in closed form: it compares"):
        dvi.derive(Branching(0.1))
    with pytest.raises(dvi.SpecError, match="parts of ν depend on one another"):
        dvi.derive(Crossed(), accuracy="second-order")
    with pytest.raises(ValueError, match="accuracy"):
        dvi.derive(HeavyBall, accuracy="third")


def test_letters_do_not_collide():
    class Two(dvi.Method):
        lr: float
        beta: float
        momentum: float

        def P(self, nu):
            return dvi.Scalar(self.beta / self.lr)

        def Q(self):
            return Filter([1.0], [1.0, -self.momentum])

    d = dvi.derive(Two(0.1, 0.5, 0.6))
    assert {field: str(s) for field, s in d.spec.hyperparameters.items()} == {
        "lr": "eta",
        "beta": "beta",
        "momentum": "momentum",
    }
    # the momentum's letter is m, so a part of ν of this name is called otherwise; without momentum it keeps it
    assert [str(leaf.symbol) for leaf in dvi.derive(TwoBuffers).spec.leaves] == ["nu_m", "s"]
    assert "m" in {str(leaf.symbol) for leaf in dvi.derive(CentredRMSProp).spec.leaves}
