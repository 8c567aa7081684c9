"""Closed forms against the paper's, typed by hand, and against what the compiler finds by automatic differentiation."""

import re
import subprocess
import sys
from functools import cache
from typing import Any

import numpy as np
import pytest
import sympy
import torch
from conftest import AdaGrad, CubicLoss, examples
from hypothesis import given
from hypothesis import strategies as st
from latex_reader import Reader
from sympy.core.function import AppliedUndef
from torch.nn.functional import softplus
from torch.utils import _pytree as pytree

import dvi
from dvi.methods import GradientDescent, RMSProp, RMSPropNorm
from dvi.solvers.svec import smat, svec
from dvi.symbolic.printing import latex
from dvi.symbolic.vectors import Bilinear, Entry, Image, Total, along, contract, directional, entry, letters

seeds = st.integers(0, 2**32 - 1)
x = letters()
g, S, dS = x.g, x.S, x.dS

# Two evaluations of the same formula, differently arranged: sums of some hundred products of numbers of order 1 to 10,
# fractional powers, and a few differences that cancel a digit or two.  1e-11 is about 10⁴ eps, as in test_compile.py.
ROUNDING = 1e-11


def equal(a, b):
    """The same expression?"""
    return sympy.simplify(sympy.expand(a - b)) == 0


# ---- the paper's closed forms, as sympy ---------------------------------------------------------------------------


def symbols_of(d):
    return (d.symbols.get(name) for name in ("nu", "eta", "beta2"))


def test_gradient_descent_eqs_4_16():
    d = dvi.derive(GradientDescent(0.1))
    eta = d.symbols["eta"]
    assert equal(d.P, 1 / eta)
    assert equal(d.flow.w.rhs, -eta * (g + x.D3L / 2))
    assert (d.flow.nu, d.stationary_nu, d.factor.shape) == ({}, {}, (0, 0))
    assert equal(d.sigma2, 2 * Total(dS * -g) / Total(dS**2))
    assert equal(d.alpha, -eta * Total(x.T_ab * g))
    assert equal(d.beta, eta * Total(x.T_ab * x.T_cd) / 2)


def test_rmsprop_norm_eqs_10_19_20():
    d = dvi.derive(RMSPropNorm(0.1, 0.9))
    nu, eta, beta2 = symbols_of(d)
    c = (1 - beta2) / beta2
    assert equal(d.flow.w.rhs, -eta / sympy.sqrt(nu) * (g + x.D3L / 2))
    assert equal(d.flow.nu["v"].rhs, c * (Total(g**2) + Total(x.HSH) - nu))
    assert d.factor == sympy.Matrix([[1 / beta2]])
    eq_10 = (beta2 * Total(-g * dS) + (1 - beta2) * (S**2 / 4 - Total(g**2) / eta**2)) / (
        beta2 * Total(dS**2) / 2 + (1 - beta2) * S**2 / eta**2
    )
    eq_20 = (4 / (eta * S**2) * Total(-g * dS) + c * 4 / (eta**3 * S**2) * (eta**2 * S**2 / 4 - Total(g**2))) / (
        2 / (eta * S**2) * Total(dS**2) + c * 4 / eta**3
    )
    assert equal(d.sigma2, eq_10)
    assert equal(d.sigma2, eq_20)
    # eq. 19 with ν = η²S²/4: S² tr Σ
    edge = d.at_edge().flow.nu["v"].rhs
    assert equal(edge.subs(nu, eta**2 * S**2 / 4), c * (Total(g**2) + S**2 * Total(x.Sii) - eta**2 * S**2 / 4))
    # C.4 writes d/dt ν^{−1/2}H where this is d/dt(H − 2P): the same up to √ν
    UU = Total(x.U_a * x.U_b)
    alpha = eta / nu * -Total(x.T_ab * g) + c / (eta * nu) * (nu - Total(g**2)) * UU
    assert equal(d.alpha, sympy.sqrt(nu) * alpha)


def test_rmsprop_C5_and_eqs_24_26():
    d = dvi.derive(RMSProp(0.1, 0.9))
    nu, eta, beta2 = symbols_of(d)
    c, P = (1 - beta2) / beta2, sympy.sqrt(nu) / eta
    assert d.spec.diagonal
    assert equal(d.P, P)
    assert equal(d.flow.w.rhs, -eta / sympy.sqrt(nu) * (g + x.D3L / 2))
    assert equal(d.flow.nu["v"].rhs, c * (g**2 + x.HSH - nu))
    assert equal(d.at_edge().flow.nu["v"].rhs, c * (g**2 + 4 * nu / eta**2 * x.Sii - nu))
    assert equal(d.stationary_nu["v"].rhs, g**2 + x.HSH)
    assert equal(d.at_edge().stationary_nu["v"].rhs, g**2 + 4 / eta**2 * nu * x.Sii)  # eq. 26
    ab, cd = x.U_a * x.U_b, x.U_c * x.U_d
    assert equal(d.alpha, -Total(x.T_ab * g / P) + c * Total(ab / P * (P**2 - g**2 / eta**2)))
    assert equal(d.at_edge().beta, Total(x.T_ab * x.T_cd / P) / 2 + c * 4 / eta**2 * Total(P * ab * cd))
    assert equal(d.at_edge().P_pushed * 2, c * 4 / eta**2 * P * x.Sii)
    assert equal(d.at_edge().sigma2, d.sigma2)
    alpha = -Total(x.Tuu * g / P) + c * Total(x.u**2 / P * (P**2 - g**2 / eta**2))
    beta = Total(x.Tuu**2 / P) / 2 + c * 4 / eta**2 * Total(P * x.u**4)
    assert equal(d.sigma2, alpha / beta)


def test_bias_correction_and_epsilon_C7():
    d = dvi.derive(RMSProp(0.1, 0.9, eps=1e-8, bias_correction=True))
    nu, eta, beta2 = symbols_of(d)
    t, epsilon = d.symbols["t"], d.symbols["epsilon"]
    hat = sympy.sqrt(nu) / sympy.sqrt(1 - beta2**t)
    assert equal(d.P, (hat + epsilon) / eta)
    assert d.factor == sympy.diag(1 / beta2, 1)
    assert d.flow.nu["t"].rhs == 1
    by_hand = (1 - beta2) / beta2 * (g**2 - nu) * hat / (2 * nu * eta)
    by_hand += hat * beta2**t * sympy.log(beta2) / (2 * (1 - beta2**t) * eta)
    assert equal(d.P_free, by_hand)


def test_a_schedule_adds_its_slope_C7():
    d = dvi.derive(GradientDescent(lambda t: 0.1 / (1 + t)))
    eta = d.symbols["eta(t)"]
    UU = Total(x.U_a * x.U_b)
    # −2 ∂P/∂t = 2η′/η²
    assert equal(d.alpha, -eta * Total(x.T_ab * g) + 2 * sympy.Derivative(eta, x.t) / eta**2 * UU)
    shown = dvi.derive(GradientDescent(lambda t: 0.1 / (1 + t)), numeric=True)
    assert equal(shown.P, 10 * (1 + x.t))
    opaque = dvi.derive(GradientDescent(lambda t: 0.1 if t < 5 else 0.05), numeric=True)
    assert opaque.P.has(sympy.Function("eta", real=True, positive=True)(x.t))


def test_adagrad_only_adds_up():
    d = dvi.derive(AdaGrad(0.1))
    assert d.factor == sympy.Matrix([[1]])
    assert equal(d.flow.nu["s"].rhs, g**2 + x.HSH)
    assert d.stationary_nu == {}


def test_numbers_in_place_of_letters():
    d = dvi.derive(RMSProp(lr=0.1, beta2=0.9, eps=1e-3), numeric=True)
    nu = d.symbols["nu"]
    assert equal(d.flow.nu["v"].rhs, (g**2 + x.HSH - nu) / 9)
    assert equal(d.P, 10 * (sympy.sqrt(nu) + sympy.Rational(1, 1000)))
    assert d.spec.hyperparameters == {}


def test_a_class_has_letters_for_what_it_must_be_given():
    d, of_instance = dvi.derive(RMSProp), dvi.derive(RMSProp(0.1, 0.9))
    assert equal(d.alpha, of_instance.alpha)
    assert not d.P.has(sympy.Symbol("epsilon"))  # 0, unless it is given
    assert {field: str(s) for field, s in d.spec.hyperparameters.items()} == {"lr": "eta", "beta2": "beta2"}
    assert repr(d).startswith("derive(<class")


def test_letters_do_not_collide():
    class Awkward(dvi.Method):
        u: float
        g: float

        def init(self, w):
            return {"S": torch.zeros_like(w), "u": w.new_zeros(())}

        def f(self, nu, g):
            return {"S": self.g * (g**2 - nu["S"]), "u": (g**2).sum() * self.u}

        def P(self, nu):
            return dvi.Diagonal(nu["S"] ** 2 + nu["u"] + self.g)

    d = dvi.derive(Awkward(0.3, 0.5))
    assert {str(leaf.symbol) for leaf in d.spec.leaves} == {"nu_S", "nu_u"}
    assert {str(s) for s in d.spec.hyperparameters.values()} == {"u_0", "g_0"}
    check(Awkward(0.3, 0.5), 3, 4, 2)


def test_clocks_and_hyperparameters_have_letters_of_their_own():
    class Clocks(dvi.Method):
        """Two clocks, one called like a hyperparameter, and a hyperparameter called like the state."""

        eta: float
        nu: float

        def init(self, w):
            return {"v": torch.zeros_like(w), "eta": w.new_zeros(()), "n": w.new_zeros(())}

        def f(self, nu, g):
            return {
                "v": self.nu * (g**2 - nu["v"]),
                "eta": torch.ones_like(nu["eta"]),
                "n": torch.ones_like(nu["n"]),
            }

        def P(self, nu):
            return dvi.Diagonal((nu["v"] + self.eta / nu["eta"]) * (1 + 1 / nu["n"]))

    d = dvi.derive(Clocks(0.3, 0.5))
    names = [str(leaf.symbol) for leaf in d.spec.leaves] + [str(s) for s in d.spec.hyperparameters.values()]
    assert len(set(names)) == 5, names
    check(Clocks(0.3, 0.5), 3, 4, 2)


def test_a_condition_that_is_not_solved_for_nu_is_put_on_the_edge_too():
    d = dvi.derive(METHODS["norm of powers"])
    (condition,) = d.stationary_nu.values()
    (edge,) = d.at_edge().stationary_nu.values()
    assert condition.rhs == edge.rhs == 0
    assert condition.has(x.HSH, x.HSigmaH)
    assert not edge.has(x.HSH, x.HSigmaH)


# ---- against the compiler -----------------------------------------------------------------------------------------


def close(actual, expected, rtol=ROUNDING):
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=0, atol=rtol * max(1e-12, np.abs(expected).max(initial=0)))


@cache
def derived(name):
    return dvi.derive(METHODS[name])


def check(method, seed, d, k, derivation=None, rtol=ROUNDING):
    """α, β and the drift of the closed form are the compiler's, at a random state in a random basis."""
    rng = np.random.default_rng(seed)
    k = min(d, k)
    w = rng.normal(size=d)
    cubic = CubicLoss.random(rng, d)
    flow = dvi.central_flow(cubic.problem(w), method, check=False)
    nu = pytree.tree_map(lambda v: torch.tensor(rng.uniform(0.2, 2, size=v.shape)), flow.initial.nu)
    U = rng.normal(size=(d, k))
    X = rng.normal(size=(k, k))
    X, t = X + X.T, float(rng.uniform(0, 5))
    lin = flow.linearise(torch.tensor(w), nu, torch.tensor(U), t=t)
    derivation = derivation or dvi.derive(method)
    found = derivation.evaluate(cubic.gradient(w), nu, U, cubic.hessian(w) @ U, lin.T, X, t=t)
    drift = lin.drift(X)
    # α and the rates are differences that may cancel: close to the largest term of theirs
    free = np.abs(np.asarray(lin.T) @ np.asarray(drift.w)).max() + np.abs(svec(lin.alpha.numpy())).max()
    np.testing.assert_allclose(found.alpha, lin.alpha, rtol=0, atol=rtol * free)
    close(found.beta, lin.beta, rtol)
    close(found.w, drift.w, rtol)
    for part, expected in zip(pytree.tree_leaves(found.nu), pytree.tree_leaves(drift.nu), strict=True):
        close(part, expected, rtol)
    return derivation


class AdaGradNorm(dvi.Method):
    lr: float

    def init(self, w):
        return (w.new_zeros(()),)

    def f(self, nu, g):
        return ((g**2).sum(),)

    def P(self, nu):
        return dvi.Scalar(nu[0].sqrt() / self.lr)


class Crossed(dvi.Method):
    """Sums inside of functions, a vector that follows a scalar, parts that follow one another."""

    lr: float = 0.3
    beta2: float = 0.8
    diagonal: bool = True

    def init(self, w):
        return {
            "v": torch.zeros_like(w),
            "rest": {"m": torch.zeros_like(w), "s": w.new_zeros(())},
            "n": w.new_zeros(()),
        }

    def f(self, nu, g):
        v, m, s = nu["v"], nu["rest"]["m"], nu["rest"]["s"]
        return {
            "v": (1 - self.beta2) * (g**2 * torch.tanh(g @ g) + s - v) + 0.1 * m,
            "rest": {
                "m": 0.3 * (g * torch.log1p((g**2).mean()) - m) + 0.1 * torch.sin(s) * v,
                "s": 0.4 * ((g @ g) * g.sum() - torch.sin(s)),
            },
            "n": torch.ones_like(nu["n"]),
        }

    def P(self, nu):
        v, m, s = nu["v"], nu["rest"]["m"], nu["rest"]["s"]
        scale = (softplus(s) + (v * m).mean() ** 2 + 1 / nu["n"]) / self.lr
        return dvi.Diagonal(scale + torch.exp(0.1 * v) * m**2) if self.diagonal else dvi.Scalar(scale)


class RandomSpec(dvi.Method):
    """An optimizer nobody would write: what f gathers, how ν forgets, and how P depends on it are drawn."""

    gather: str
    forget: str
    shape: str
    lr: float
    beta2: float
    p: float
    q: float
    eps: float

    def init(self, w):
        return {"v": w.new_zeros(()) if "norm" in self.gather else torch.zeros_like(w)}

    def f(self, nu, g):
        b, v = 1 - self.beta2, nu["v"]
        gathered = {
            "power": lambda: abs(g) ** self.q,
            "polynomial": lambda: g.square() + self.p * g**4 - g**3 / 5,
            "log": lambda: torch.log1p(g**2) + torch.exp(-torch.abs(g)),
            "signs": lambda: g * torch.sign(g) * torch.sigmoid(g),
            "relative": lambda: g**2 / (g**2).mean(),
            "norm": lambda: torch.linalg.vector_norm(g) ** self.q,
            "norm of powers": lambda: (abs(g) ** self.q).sum() * (g**2).mean().sqrt(),
        }[self.gather]()
        return {"v": {"ema": b * (gathered - v), "sum": gathered, "odd": b * (gathered - torch.tanh(v))}[self.forget]}

    def P(self, nu):
        v = nu["v"]
        p = {
            "power": v**self.p,
            "root": torch.sqrt(v + self.eps),
            "exp": torch.exp(self.q * v / 10),
            "log": torch.log1p(v),
        }
        if self.shape == "mean":
            return dvi.Scalar((v.square().mean() ** self.p + self.eps) / self.lr)
        p = (p[self.shape] + self.eps) / self.lr
        return dvi.Diagonal(p) if v.ndim else dvi.Scalar(p)


eta = 0.3
TRIPLE = (
    lambda w: {"s": w.new_zeros(())},
    lambda nu, g: {"s": (g**2).sum()},
    lambda nu: dvi.Scalar(nu["s"].sqrt() / eta),
)
METHODS = {
    "gd": GradientDescent(0.3),
    "gd, schedule": GradientDescent(lambda t: 0.3 / (1 + 0.1 * t)),
    "norm": RMSPropNorm(0.3, 0.8),
    "norm, all": RMSPropNorm(0.3, 0.8, eps=0.1, bias_correction=True),
    "rmsprop": RMSProp(0.3, 0.8),
    "rmsprop, eps": RMSProp(0.3, 0.8, eps=0.1),
    "rmsprop, bias": RMSProp(0.3, 0.8, bias_correction=True),
    "rmsprop, all": RMSProp(lambda t: 0.3 * torch.exp(-0.1 * torch.as_tensor(t)), 0.8, 0.1, bias_correction=True),
    "rmsprop, schedules": RMSProp(lambda t: 0.3 + 0.01 * t, lambda t: 0.7 + 0.02 * t, 0.1),
    "adagrad": AdaGrad(0.3),
    "adagrad-norm": AdaGradNorm(0.3),
    "triple": TRIPLE,
    "relative": RandomSpec("relative", "ema", "power", 0.3, 0.8, 0.5, 2.0, 0.1),
    "norm of powers": RandomSpec("norm of powers", "odd", "mean", 0.3, 0.8, 0.5, 3.0, 0.1),
    "crossed": Crossed(),
    "crossed, scalar P": Crossed(diagonal=False),
}


@pytest.mark.parametrize("name", METHODS)
@given(seeds, st.integers(2, 6), st.integers(1, 3))
@examples(2)
def test_alpha_beta_and_drift_are_the_compilers(name, seed, d, k):
    check(METHODS[name], seed, d, k, derived(name))


@given(
    st.sampled_from(["power", "polynomial", "log", "signs", "relative", "norm", "norm of powers"]),
    st.sampled_from(["ema", "sum", "odd"]),
    st.sampled_from(["power", "root", "exp", "log", "mean"]),
    st.tuples(st.floats(0.1, 2), st.floats(0.2, 0.95), st.floats(0.2, 1.5), st.floats(2, 4), st.floats(0.01, 0.5)),
    seeds,
)
@examples(15)
def test_random_specs_are_the_compilers(gather, forget, shape, numbers, seed):
    method = RandomSpec(gather, forget, shape, *(round(x, 3) for x in numbers))
    well_formed(check(method, seed, 4, 2), parse=False)


@pytest.mark.parametrize("name", [name for name in METHODS if "crossed" not in name])
@given(seeds, st.integers(2, 6))
@examples(3)
def test_at_the_edge_sigma2_is_the_solution_of_the_ccp_and_the_edge_form_is_the_same(name, seed, d):
    """Put HU = 2PU in by choosing H: then α/β is σ², and the forms with and without it agree."""
    rng = np.random.default_rng(seed)
    method, derivation = METHODS[name], derived(name)
    w, gradient, u = rng.normal(size=(3, d))
    flow = dvi.central_flow(CubicLoss.random(rng, d).problem(w), method, check=False)
    nu = pytree.tree_map(lambda v: torch.tensor(rng.uniform(0.2, 2, size=v.shape)), flow.initial.nu)
    P = flow.calculus.P(nu, 1.5).apply(torch.tensor(u)).numpy()
    arguments = (gradient, nu, u[:, None], 2 * P[:, None], rng.normal(size=(1, d)))
    there, edge = (e.evaluate(*arguments, X=[[0.7]], t=1.5) for e in (derivation, derivation.at_edge()))
    close(edge.beta, there.beta)
    for a, b in zip(pytree.tree_leaves(edge.nu), pytree.tree_leaves(there.nu), strict=True):
        close(a, b)
    # σ² goes with uuᵀ, |u| = 1 for a scalar P; X with the u that is given.  α may cancel, hence the terms' size.
    length = 1 if derivation.spec.diagonal else u @ u
    variance = there.alpha[0, 0] / there.beta[0, 0] * length
    size = (np.abs(there.alpha[0, 0]) + np.abs(there.w * arguments[-1]).sum()) / abs(there.beta[0, 0]) * length
    assert abs(there.sigma2 - variance) <= ROUNDING * size
    assert there.sigma2 == pytest.approx(edge.sigma2, rel=1e-12)


def test_evaluate_takes_hyperparameters_by_field():
    rng = np.random.default_rng(0)
    gradient, nu, U, HU, T = rng.normal(size=4), {"v": np.ones(4)}, *rng.normal(size=(2, 4, 2)), rng.normal(size=(3, 4))
    of_class, of_instance = dvi.derive(RMSProp), dvi.derive(RMSProp(0.2, 0.7))
    expected = of_instance.evaluate(gradient, nu, U, HU, T)
    close(of_class.evaluate(gradient, nu, U, HU, T, lr=0.2, beta2=0.7).beta, expected.beta)
    close(dvi.derive(RMSProp(0.2, 0.7), numeric=True).evaluate(gradient, nu, U, HU, T).beta, expected.beta)
    assert expected.sigma2 is None
    with pytest.raises(dvi.SpecError, match=r"beta2 has no value"):
        of_class.evaluate(gradient, nu, U, HU, T, lr=0.2)
    with pytest.raises(dvi.SpecError, match=r"no symbol for beta; there are lr, beta2"):
        of_class.evaluate(gradient, nu, U, HU, T, lr=0.2, beta=0.7)


# ---- the calculus of entries --------------------------------------------------------------------------------------


@given(seeds, st.integers(2, 5))
@examples(10)
def test_directional_derivatives_and_contraction_against_dense_tensors(seed, d):
    rng = np.random.default_rng(seed)
    h, k, v = x.HU_c, x.HU_d, entry("v")
    e = g * sympy.exp(-Total(g**2)) * v + Total(g**3 * v) ** 2 * g + Total(g * sympy.cos(Total(g * v)))
    second = directional(directional(e, {g: h}), {g: k})
    numbers = {name: rng.normal(size=d) for name in "gvhk"}
    M = rng.normal(size=(d, d))
    M = M @ M.T

    def f(g):
        v = torch.tensor(numbers["v"])
        return g * torch.exp(-(g**2).sum()) * v + (g**3 * v).sum() ** 2 * g + (g * torch.cos((g * v).sum())).sum()

    bend = torch.func.hessian(f)(torch.tensor(numbers["g"])).numpy()
    functions = {
        "Total": np.sum,
        "Image": lambda b, _: M @ (b * np.ones(d)),
        "Bilinear": lambda a, b, _: (a * np.ones(d)) @ M @ (b * np.ones(d)),
    }
    value = sympy.lambdify([g, v, h, k], second, modules=[functions, "numpy"])(*(numbers[name] for name in "gvhk"))
    close(value, bend @ numbers["k"] @ numbers["h"])
    contracted = contract(second, h, k)
    arguments = [g, v, x.HSH, x.HSigmaH]
    value = sympy.lambdify(arguments, contracted, modules=[functions, "numpy"])(
        numbers["g"], numbers["v"], np.diag(M), 0
    )
    close(value, np.einsum("aij,ij->a", bend, M))
    # one direction: M = hhᵀ
    value = sympy.lambdify([g, v, h], along(contracted, h), modules=[functions, "numpy"])(*(numbers[n] for n in "gvh"))
    close(value, bend @ numbers["h"] @ numbers["h"])


def test_sums_are_canonical():
    a, b, s = entry("a"), entry("b"), sympy.Symbol("s")
    assert Total(s * (a + 2 * b) * a) == s * (Total(a**2) + 2 * Total(a * b))
    assert Total((a + 2 * b) * a) == Total(a**2) + 2 * Total(a * b) == Total(a**2 + 2 * a * b)
    assert Total(s + a) == s * x.d + Total(a)
    assert Total(a * Total(b)) == Total(a) * Total(b)
    assert Bilinear(2 * a, b, x.Sigma) == 2 * Bilinear(b, a, x.Sigma)
    assert Image(s * a, x.Sigma) == s * Image(a, x.Sigma)
    with pytest.raises(ValueError, match="directional"):
        Total(a**2).diff(a)


# ---- in print -----------------------------------------------------------------------------------------------------


def well_formed(d, parse=True):
    """Balanced braces and brackets, and every equation is mathematics to matplotlib (which takes its time)."""
    mathtext = pytest.importorskip("matplotlib.mathtext").MathTextParser("path")
    page = d.latex()
    first, *lines, last = page.splitlines()
    assert (first, last) == (r"\begin{align*}", r"\end{align*}")
    assert all(line.endswith(r" \\") for line in lines[:-1])
    for line in lines:
        line = line.removesuffix(r" \\")
        assert line.count("&") == 1
        depth = 0
        for character in re.sub(r"\\[{}]", "", line):
            depth += (character == "{") - (character == "}")
            assert depth >= 0
        assert depth == 0
        assert len(re.findall(r"\\left\b", line)) == len(re.findall(r"\\right\b", line))
        if parse:  # mathtext knows no \tfrac
            mathtext.parse("$" + line.replace("&", "").replace(r"\tfrac12", r"\frac{1}{2}") + "$")
    return page


def test_the_check_of_latex_can_fail():
    class Broken:
        def __init__(self, line):
            self.line = line

        def latex(self):
            return "\\begin{align*}\n" + self.line + "\n\\end{align*}"

    for line in (r"a &= \frac{1}{2", r"a &= \left[b", r"a &= \nosuchmacro{b}", "a = b"):
        with pytest.raises((AssertionError, ValueError)):
            well_formed(Broken(line))


@pytest.mark.parametrize("name", METHODS)
def test_latex_is_well_formed(name):
    d = derived(name)
    well_formed(d, parse="crossed" not in name)
    if "crossed" not in name:
        well_formed(d.at_edge(), parse=name in ("norm", "rmsprop"))
        well_formed(dvi.derive(METHODS[name], numeric=True), parse=name in ("norm", "rmsprop"))
    assert d._repr_latex_() == d.latex()
    assert "Total" not in str(d)


class Warmed(dvi.Method):
    """Bias corrections that multiply P, as Adam's: sums of hyperparameters as factors."""

    lr: float
    beta1: float
    beta2: float

    def init(self, w):
        return {"v": torch.zeros_like(w), "t": w.new_zeros(())}

    def f(self, nu, g):
        return {"v": (1 - self.beta2) * (g**2 - nu["v"]), "t": torch.ones_like(nu["t"])}

    def P(self, nu):
        v = nu["v"] / (1 - self.beta2 ** nu["t"])
        return dvi.Diagonal((1 - self.beta1 ** nu["t"]) * v.sqrt() / self.lr)


class Product(dvi.Method):
    """Sums of vectors as factors, above and below the line."""

    lr: float
    eps: float

    def init(self, w):
        return {"v": torch.zeros_like(w), "s": torch.zeros_like(w)}

    def f(self, nu, g):
        return {"v": 0.1 * (g**2 - nu["v"]), "s": 0.2 * (g**2 - nu["s"])}

    def P(self, nu):
        return dvi.Diagonal((nu["v"].sqrt() + self.eps) * (nu["s"].sqrt() + self.eps) / self.lr)


COUPLED = (
    "relative",
    "norm of powers",
    "crossed",
    "crossed, scalar P",
)  # HΣH stands in products, which is not read back
READ = {name: method for name, method in METHODS.items() if name not in COUPLED}
READ |= {
    "adagrad": AdaGrad(0.25),
    "warmed": Warmed(0.1, 0.9, 0.99),
    "product": Product(0.1, 0.25),
}  # ε/η to 15 digits is exact


def same(a, b):
    """Equal in numbers: random vectors of four weights, random scalars, schedules and slopes."""
    rng = np.random.default_rng(0)
    for kind in (sympy.Derivative, AppliedUndef):
        atoms = sorted(a.atoms(kind) | b.atoms(kind), key=str)
        names = {atom: sympy.Symbol(f"{kind.__name__}_{i}") for i, atom in enumerate(atoms)}
        a, b = a.xreplace(names), b.xreplace(names)
    symbols = sorted(a.free_symbols | b.free_symbols, key=str)
    numbers = [rng.uniform(0.2, 0.9, size=4 if isinstance(symbol, Entry) else ()) for symbol in symbols]
    numbers = [4 if symbol == x.d else value for symbol, value in zip(symbols, numbers, strict=True)]
    functions = [{"Total": lambda e: np.sum(e * np.ones(4))}, "numpy"]
    left, right = (sympy.lambdify(symbols, e, modules=functions)(*numbers) for e in (a, b))
    return np.allclose(left, right, rtol=1e-11, atol=1e-11)


def the_page_says_what_the_derivation_holds(d):
    """Read back, every equation of the LaTeX page, and every part in LaTeX, is the expression itself."""
    states = [leaf.symbol for leaf in d.spec.leaves]
    clocks = [leaf.symbol for leaf in d.spec.leaves if leaf.clock]
    momentum = [] if d.flow.m is None else [x.m]
    time = [] if sympy.Symbol("t", real=True, positive=True) in clocks else [x.t]
    reader = Reader([*states, *d.spec.hyperparameters.values(), *momentum, *time])
    for e in (1 / d.P, g / d.P, d.P_free, d.P_pushed, *d.sigma2_parts, d.alpha, d.beta):
        assert same(reader.read(latex(e)), e), latex(e)

    # The page has matrices [k, k] by name; they are read by the entry ab, and for an oscillation Σ = u_c u_dᵀ.
    expected = {r"\frac{dw}{dt}": d.flow.w.rhs, r"\alpha": d.alpha, r"\beta[\Sigma]": d.beta, r"\sigma^2": d.sigma2}
    expected["P"] = d.P if d.spec.diagonal else d.P * sympy.Symbol("I")
    if d.flow.m is not None:
        expected[r"\frac{dm}{dt}"] = d.flow.m.rhs
    for leaf in d.spec.leaves:
        if not leaf.clock:
            expected[rf"\frac{{d{sympy.latex(leaf.symbol)}}}{{dt}}"] = d.flow.nu[leaf.name].rhs
    if d.spec.momentum or d.spec.decay != 0:
        expected["c"] = d.threshold
    if d.spec.momentum:
        expected |= {"Q_1": d.gain, r"\tau": d.lag}
    expected |= {rf"\text{{stationary: }} {latex(e.lhs)}": e.rhs for e in d.stationary_nu.values()}
    found = reader.read_page(d.latex())
    found[r"\alpha"] = found[r"\alpha"].xreplace({sympy.Symbol("I"): Total(x.U_a * x.U_b)})
    found[r"\beta[\Sigma]"] = found[r"\beta[\Sigma]"].xreplace(
        {sympy.Symbol("I"): Total(x.U_a * x.U_b), x.HSH: x.HU_c * x.HU_d, x.Sii: x.U_c * x.U_d}
    )
    if r"\frac{dm}{dt}" in found:
        found[r"\frac{dm}{dt}"] = found[r"\frac{dm}{dt}"].xreplace({sympy.Symbol("tau"): d.lag})
    assert set(found) == set(expected)
    for left, right in expected.items():
        assert same(found[left], right), left


@pytest.mark.parametrize("numeric", [False, True])
@pytest.mark.parametrize("name", READ)
def test_latex_says_what_the_expressions_say(name, numeric):
    d = dvi.derive(READ[name], numeric=numeric)
    the_page_says_what_the_derivation_holds(d)
    the_page_says_what_the_derivation_holds(d.at_edge())


def test_the_reader_of_latex_tells_a_missing_bracket():
    d = dvi.derive(RMSProp)
    nu, eta, beta2 = symbols_of(d)
    reader = Reader([nu, eta, beta2])
    assert reader.read(r"\left(1 - \beta_{2}\right) \frac{\sqrt{\nu}}{\eta}") == (1 - beta2) * sympy.sqrt(nu) / eta
    assert reader.read(r"1 - \beta_{2} \frac{\sqrt{\nu}}{\eta}") == 1 - beta2 * sympy.sqrt(nu) / eta
    assert reader.read(r"-\|\nabla L(w)\|^{2} \nu \odot \nabla L(w)^{\odot 3}") == -Total(g**2) * nu * g**3
    assert reader.read(r"2 \left\langle \nabla S(w), \frac{-\nabla L(w)}{2} \right\rangle") == -Total(dS * g)
    with pytest.raises(AssertionError):
        reader.read(r"\nu + \alpha")


def test_gradient_descent_reads_as_C3():
    page = dvi.derive(GradientDescent).latex()
    for line in (
        r"\frac{dw}{dt} &= - \eta \left(\nabla L(w) + \frac{\nabla^3 L(w)[\Sigma]}{2}\right) \\",
        r"\alpha &= \mathcal{T}^{\mathsf{T}}{\left(- \eta \nabla L(w) \right)} \\",
        r"\sigma^2 &= - \frac{2 \left\langle \nabla S(w), \nabla L(w) \right\rangle}{\|\nabla S(w)\|^{2}}",
    ):
        assert line in page


def test_rmsprop_norm_reads_as_C4():
    page = dvi.derive(RMSPropNorm).latex()
    for line in (
        r"\frac{dw}{dt} &= - \frac{\eta \left(\nabla L(w) + \frac{\nabla^3 L(w)[\Sigma]}{2}\right)}{\sqrt{\nu}} \\",
        r"\frac{d\nu}{dt} &= \frac{\left(1 - \beta_{2}\right) "
        r"\left(\|\nabla L(w)\|^{2} + \mathrm{tr}(H \Sigma H) - \nu\right)}{\beta_{2}} \\",
    ):
        assert line in page


def test_rmsprop_reads_as_C5():
    d = dvi.derive(RMSProp)
    page = d.latex()
    for line in (
        r"\frac{dw}{dt} &= - \frac{\eta \left(\nabla L(w) + \frac{\nabla^3 L(w)[\Sigma]}{2}\right)}{\sqrt{\nu}} \\",
        r"\frac{d\nu}{dt} &= \frac{\left(1 - \beta_{2}\right) "
        r"\left(\nabla L(w)^{\odot 2} + \mathrm{diag}(H \Sigma H) - \nu\right)}{\beta_{2}} \\",
        r"P &= \mathrm{diag}{\left(\frac{\sqrt{\nu}}{\eta} \right)} \\",
    ):
        assert line in page
    assert r"\frac{4 \mathrm{diag}(\Sigma) \odot \nu}{\eta^{2}}" in d.at_edge().latex()


def test_in_text():
    lines = str(dvi.derive(RMSProp)).splitlines()
    assert lines[0] == "Central flow of RMSProp"
    assert lines[1].strip() == "dw/dt = -η*(∇L + ∇³L[Σ]/2)/sqrt(ν)"
    assert lines[2].strip() == "dν/dt = (1 - β₂)*(∇L**2 + diag(HΣH) - ν)/β₂"


# ---- what is refused ----------------------------------------------------------------------------------------------


def declared(f=None, P=None, init=None, **fields: Any):
    """A method with one vector ν, and what differs."""
    return dvi.methods.FunctionMethod(
        init or (lambda w: {"v": torch.zeros_like(w)}),
        f or (lambda nu, g: {"v": g**2 - nu["v"] / 2}),
        P or (lambda nu: dvi.Diagonal(nu["v"] + 1)),
    )


class Shampoo(dvi.Preconditioner):
    """Another structure."""

    apply = solve = inv_sqrt = sqrt = effective_lr = check = None


REFUSED = {
    "a branch": (dict(f=lambda nu, g: {"v": g**2 if g.sum() > 0 else g}), "compares"),
    "a truth": (dict(f=lambda nu, g: {"v": g**2 if g.sum() else g}), "branches on the value"),
    "a number": (dict(f=lambda nu, g: {"v": g * float(g.sum())}), "needs the value"),
    "clamp": (dict(f=lambda nu, g: {"v": torch.clamp(g**2, max=1.0)}), "clamp.*switches"),
    "a method": (dict(f=lambda nu, g: {"v": (g**2).clamp(max=1.0)}), "clamp.*switches"),
    "maximum": (dict(f=lambda nu, g: {"v": torch.maximum(g**2, nu["v"])}), "maximum.*switches"),
    "an unknown function": (dict(f=lambda nu, g: {"v": torch.lgamma(g)}), "uses lgamma"),
    "in place": (dict(f=lambda nu, g: {"v": g.clone().mul_(2)}), "mul_.* in place"),
    "entries": (dict(f=lambda nu, g: {"v": g * g[0]}), "part of a vector"),
    "a matrix": (dict(f=lambda nu, g: {"v": torch.ones(3, 3, dtype=g.dtype) @ g}), r"a tensor of shape \[3, 3\]"),
    "partial sums": (dict(f=lambda nu, g: {"v": g * g.sum(dim=0, keepdim=True)}), "keepdim=True"),
    "max norm": (dict(f=lambda nu, g: {"v": g * g.norm(float("inf"))}), "not smooth"),
    "scalar for vector": (dict(f=lambda nu, g: {"v": (g**2).sum()}), "is a scalar, .* itself a vector"),
    "structure": (dict(f=lambda nu, g: {"u": g**2}), "another structure"),
    "coupled": (dict(f=lambda nu, g: {"v": g**2 - nu["v"].mean()}), "sum over the entries of ν"),
    "no memory": (dict(f=lambda nu, g: {"v": g**2 - nu["v"]}), "no differential equation"),
    "another P": (dict(P=lambda nu: Shampoo()), "P.nu. is a Shampoo"),
    "no P": (dict(P=lambda nu: nu["v"]), "P.nu. is a SymbolTensor"),
    "vector in Scalar": (dict(P=lambda nu: dvi.Scalar(nu["v"])), "write Diagonal"),
    "scalar in Diagonal": (dict(P=lambda nu: dvi.Diagonal(nu["v"].sum())), "write Scalar"),
    "a matrix state": (dict(init=lambda w: {"v": w.new_zeros(2, 2)}), r"shape \[2, 2\]"),
    "not a number": (dict(f=lambda nu, g: {"v": g * float("nan")}), "no place in a closed form"),
    "a bug": (dict(f=lambda nu, g: {"v": g**2 + None}), "a NoneType"),
    "a missing part": (dict(f=lambda nu, g: {"v": nu["m"]}), "KeyError"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_closed_form_is_refused_by_name(case):
    parts, words = REFUSED[case]
    with pytest.raises(dvi.SpecError, match=words):
        dvi.derive(declared(**parts))


def test_the_room_is_loaded_when_a_closed_form_is_asked_for():
    """sympy takes its time to load."""
    code = "import sys, dvi; assert 'dvi.symbolic' not in sys.modules; dvi.symbolic.Values; dvi.derive"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_method_that_is_none():
    with pytest.raises(dvi.SpecError, match="triple"):
        dvi.derive(3)
    with pytest.raises(dvi.SpecError, match=r"no differential"):
        dvi.derive(RMSProp(0.1, 0.0))


def test_every_function_in_the_table_means_what_it_means_in_torch():
    """Each function that is written as a formula, evaluated there, is torch's."""
    from dvi.symbolic.tensors import SymbolTensor

    value = torch.tensor([0.3, 0.7, 1.2], dtype=torch.float64)
    other = torch.tensor([0.9, 0.4, 2.0], dtype=torch.float64)
    a, b = entry("a"), entry("b")
    one = """
        sqrt rsqrt square reciprocal exp exp2 expm1 log log1p abs sign sin cos tan sinh cosh tanh asinh atan neg sigmoid
        absolute negative arctan
    """
    two = "add sub subtract mul multiply div divide true_divide pow float_power dot vdot inner matmul"
    calls = [(getattr(torch, name), (value,)) for name in one.split()]
    calls += [(getattr(torch, name), (value, other)) for name in two.split()]
    calls += [(f, (value,)) for f in (torch.sum, torch.mean, torch.norm, torch.numel, softplus, torch.zeros_like)]
    calls += [(lambda x: x.norm(3), (value,)), (lambda x: torch.linalg.vector_norm(x, 1), (value,))]
    calls += [(lambda x: torch.full_like(x, 3.5), (value,)), (torch.ones_like, (value,))]
    calls += [
        (lambda x, y: torch.lerp(x, y, 0.3), (value, other)),
        (lambda x, y: torch.addcmul(x, y, y, value=2), (value, other)),
    ]
    calls += [
        (lambda x, y: torch.addcdiv(x, x, y, value=2), (value, other)),
        (lambda x, y: torch.sub(x, y, alpha=2), (value, other)),
    ]
    calls += [(lambda x, y: 2 - x / y + 3 * (-y) ** 2 + 2**x + 1 / y + abs(x) @ +y, (value, other))]
    calls += [
        (lambda x: softplus(x, beta=2), (value,)),
        (lambda x: x.sub(1).add(2).mul(3).div(4).pow(2).clone(), (value,)),
    ]
    calls += [(lambda x: torch.rsub(x, 2), (value,)), (lambda x: x.true_divide(3), (value,))]
    for function, arguments in calls:
        symbols = [a, b][: len(arguments)]
        found = function(*(SymbolTensor(s, 1) for s in symbols)).expr.xreplace({x.d: sympy.Integer(3)})
        evaluated = sympy.lambdify([a, b], found, modules=[{"Total": np.sum}, "numpy"])(value.numpy(), other.numpy())
        expected = np.asarray(function(*arguments))
        np.testing.assert_allclose(np.broadcast_to(evaluated, expected.shape), expected, rtol=1e-14)


def test_smat_is_what_alpha_is_written_in():
    """evaluate reads T in svec order, as problem.hessian_gradient gives it."""
    rng = np.random.default_rng(1)
    d = dvi.derive(GradientDescent(0.5))
    T, U, gradient = rng.normal(size=(3, 4)), rng.normal(size=(4, 2)), rng.normal(size=4)
    found = d.evaluate(gradient, {}, U, U, T)
    close(found.alpha, smat(-0.5 * T @ gradient))
    close(found.beta, 0.25 * T @ T.T)


def test_an_array_is_still_no_diagonal():
    with pytest.raises(dvi.NotPositiveDefiniteError, match=r"not a ndarray"):
        dvi.Diagonal(np.ones(3))
