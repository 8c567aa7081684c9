"""The flow with mini-batch noise in closed form: as typed by hand, and against a step of the compiled flow."""

from dataclasses import replace

import numpy as np
import pytest
import sympy
import torch
from conftest import CubicLoss

import dvi
from dvi.methods import AdamW, GradientDescent, RMSProp, RMSPropNorm, SpecError
from dvi.noise.step import NoisyStep
from dvi.symbolic.vectors import Bilinear, Image, Total, letters

x = letters()
N_X = x.N_ij / (x.lambda_i + x.lambda_j - x.lambda_i * x.lambda_j)


def equal(a, b):
    """The same expression?"""
    return sympy.simplify(sympy.expand(a - b)) == 0


class GDW(GradientDescent):
    weight_decay: float = 0.4

    def decay(self):
        return self.lr * self.weight_decay


class Powers(dvi.Method):
    """ν with parts whose entries are coupled through ‖g‖: of third and fourth order in g."""

    lr: float

    def init(self, w):
        return {"v": torch.zeros_like(w), "q": w.new_zeros(())}

    def f(self, nu, g):
        size = (g**2).sum()
        return {"v": 0.2 * (g * size - nu["v"]), "q": 0.3 * (size**2 - nu["q"])}

    def P(self, nu):
        return dvi.Diagonal((1 + nu["v"] ** 2 + nu["q"]).sqrt() / self.lr)


METHODS = {
    "gd": GradientDescent(0.03),
    "scheduled": GradientDescent(lambda t: 0.03 / (1 + t)),
    "decay": GDW(0.03),
    "rmsprop-norm": RMSPropNorm(0.1, 0.9),
    "rmsprop": RMSProp(0.1, 0.9, 1e-3, True),
    "powers": Powers(5.0),
}


def test_gradient_descent():
    d = dvi.derive(GradientDescent(0.1), noise=True)
    assert equal(d.w, -d.symbols["eta"] * (x.g + x.D3L / 2))
    assert equal(d.X, (1 - x.lambda_i) * (1 - x.lambda_j) * x.X_ij + x.N_ij)
    assert equal(d.stationary_X, N_X)
    assert (d.nu, d.stationary_nu) == ({}, {})


def test_rmsprop_norm():
    d = dvi.derive(RMSPropNorm(0.1, 0.9), noise=True)
    nu, eta, beta2 = (d.symbols[name] for name in ("nu", "eta", "beta2"))
    seen = Total(x.g**2) + Total(x.HSH) + Total(x.Nii)
    assert equal(d.w, -eta / sympy.sqrt(nu) * (x.g + x.D3L / 2))
    assert equal(d.nu["v"], (1 - beta2) * (seen - nu))
    assert equal(d.stationary_nu["v"].rhs, seen)
    assert equal(d.stationary_X, N_X)


def test_rmsprop():
    d = dvi.derive(RMSProp(0.1, 0.9, eps=1e-8, bias_correction=True), noise=True)
    nu, eta, beta2, epsilon, t = (d.symbols[name] for name in ("nu", "eta", "beta2", "epsilon", "t"))
    P = (sympy.sqrt(nu) / sympy.sqrt(1 - beta2**t) + epsilon) / eta
    assert equal(d.P, P)
    assert equal(d.w, -(x.g + x.D3L / 2) / P)
    assert equal(d.nu["v"], (1 - beta2) * (x.g**2 + x.HSH + x.Nii - nu))  # the rate of a step: not over β₂
    assert equal(d.stationary_nu["v"].rhs, x.g**2 + x.HSH + x.Nii)


def test_the_noise_is_where_the_oscillation_is():
    """¼ Σ Hess(‖g‖⁴)[C] = tr(C)‖g‖² + 2gᵀCg and so on, for C = HΣH + N."""
    d = dvi.derive(Powers(0.1), noise=True)
    size, both = Total(x.g**2), lambda kind, *a: kind(*a, x.HSigmaH) + kind(*a, x.N)
    trace = Total(x.HSH) + Total(x.Nii)
    q = size**2 + 2 * size * trace + 4 * both(Bilinear, x.g, x.g)
    assert equal(d.nu["q"], sympy.Rational(3, 10) * (q - d.symbols["q"]))
    v = x.g * size + x.g * trace + 2 * both(Image, x.g)
    assert equal(d.nu["v"], sympy.Rational(1, 5) * (v - d.symbols["v"]))


def test_limits_of_the_covariance():
    """Without decay the formula is the plain one, and it solves X⁺ = X with decay, too."""
    d = dvi.derive(GDW(0.1), noise=True)
    lam, eta = d.symbols["lambda"], d.symbols["eta"]
    assert equal(d.stationary_X.subs(lam, 0), N_X)
    assert equal(d.X.subs(x.X_ij, d.stationary_X), d.stationary_X)
    assert d.w.has(x.w)
    # one weight of curvature h: w⁺ = (1 − ηλ − ηh)w − ηε, where X = σ²(1 − ηλ/2)⁻¹... in Σ = X(1 − ηλ/2)η
    h, n = sympy.symbols("h n")
    U2 = eta / (1 - eta * lam / 2)  # UᵀP̃U = 1
    X = d.stationary_X.subs({x.lambda_i: h * U2, x.lambda_j: h * U2, x.N_ij: n * U2})
    assert equal(X * U2, eta**2 * n / (1 - (1 - eta * lam - eta * h) ** 2))


def test_what_has_no_closed_form_is_refused_by_name():
    with pytest.raises(SpecError, match=r"AdamW has momentum.*Companion"):
        dvi.derive(AdamW, noise=True)
    with pytest.raises(ValueError, match="leave accuracy out"):
        dvi.derive(RMSProp, noise=True, accuracy="paper")
    with pytest.raises(SpecError, match="w="):
        dvi.derive(GDW(0.1), noise=True).evaluate(
            np.ones(2), {}, np.eye(2), np.eye(2), np.ones((3, 2)), np.eye(2), np.eye(2)
        )


def cubics(d, n):
    """The mean of n random cubics: differences over pairs ±d are exact derivatives."""
    rng = np.random.default_rng(8)
    parts = [CubicLoss.random(rng, d) for _ in range(n)]
    b, A, C = (torch.from_numpy(np.stack([getattr(p, name) for p in parts])) for name in "bAC")
    A = A + 25 * torch.eye(d, dtype=torch.float64)

    def losses(w, b, A, C):
        cubic = torch.einsum("nijk,i,j,k->n", C, w, w, w)
        return b @ w + torch.einsum("nij,i,j->n", A, w, w) / 2 + cubic / 6

    return dvi.Problem.from_examples(losses, (b, A, C), torch.from_numpy(0.3 * rng.normal(size=d)))


@pytest.mark.parametrize("name", METHODS)
def test_a_step_of_the_compiled_flow(name):
    """w, ν and X after a step with an oscillation, N being the mean over pairs of the dense covariance."""
    method, d, B, n = METHODS[name], 5, 2, 6
    problem = cubics(d, n)
    settings = {"pairs": "all", "every": 99, "tol": 1e-11, "trust_every": 0, "trust": 1e9, "window": 1e3}
    flow = dvi.noisy_flow(problem, method, B, **settings)
    y, step = flow.initial, NoisyStep()
    memory = step.init(flow, y)
    block, k = memory.block, len(memory.block.M)
    assert k == d
    R = 0.05 * np.random.default_rng(1).normal(size=(k, k))
    X = R @ R.T
    memory = replace(memory, Z=X, look=flow.look(y, block.U, block.HU, block.M, X))

    def covariance(w):
        G = torch.cat([G for _, G in problem.mini_batches().each(w)]).numpy()
        return (n - B) / (B * (n - 1)) * np.cov(G.T, bias=True)

    size, V = np.linalg.eigh(X)
    N = covariance(y.w)
    for s, v in zip(size, V.T, strict=True):
        off = block.U @ torch.from_numpy(np.sqrt(s) * v)
        N = N + 0.5 * (covariance(y.w + off) + covariance(y.w - off)) - covariance(y.w)
    g = problem.value_and_grad(y.w)[1]
    U, HU = block.U, problem.hvp(y.w, block.U)
    T = problem.hessian_gradient(y.w, U)
    values = dvi.derive(method, noise=True).evaluate(g, y.nu, U, HU, T, X, N, t=y.t, w=y.w)

    result = step.step(flow, memory, y, 1.0)
    # derivatives by pairs of members of size 1e-2 lose four digits
    np.testing.assert_allclose(values.w, (result.y.w - y.w).numpy(), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(values.X, result.memory.Z, rtol=1e-9, atol=1e-11 * np.abs(values.X).max())
    assert np.abs(values.X - X).max() > 0.1 * np.abs(X).max()
    after, shared = flow.updated(y, memory.look), {"rtol": 1e-9, "atol": 1e-11}
    for part in y.nu:
        np.testing.assert_allclose(values.nu[part], (after[part] - y.nu[part]).numpy(), **shared)
    still = dvi.derive(method, noise=True).evaluate(g, y.nu, U, HU, T, values.stationary_X, N, t=y.t, w=y.w)
    np.testing.assert_allclose(still.X, values.stationary_X, rtol=1e-9)  # conditions of 1e2


def test_it_is_printed():
    d = dvi.derive(RMSProp, noise=True)
    assert "ν⁺ - ν = (1 - β₂)*(∇L**2 + diag(HΣH) + diag(N) - ν)" in str(d)
    assert "stationary: Xᵢⱼ = (UᵀNU)ᵢⱼ/(λᵢ + λⱼ - λᵢ*λⱼ)" in str(d)
    assert r"\mathrm{diag}(N)" in d.latex()
    assert d.latex().count("&=") == 6
