"""Weights that never get a gradient: their second moments are exactly zero, where a root is infinitely steep.

The right value of everything is that of the same model without those weights.
"""

import numpy as np
import pytest
import torch
from torch.func import vmap

import dvi
from dvi import methods as M
from dvi.compiler.tangents import derivative
from dvi.methods import Method

D = torch.float64
UNUSED = [(2, 2), (1,)]
LIVE = [(3, 2), (3,)]
DEAD = 5  # so many weights nothing reaches; they come first, where a factorisation begins

# α, β and the drift are sums over some ten weights of products of five or so numbers, and of matrix powers
ROUNDING = 1e-11


def loss(w):
    W, b = w[:6].reshape(3, 2), w[6:]
    x = torch.linspace(-1, 1, 8, dtype=w.dtype).reshape(4, 2)
    return ((torch.tanh(x @ W.T + b) - 0.3) ** 2).sum() + 0.1 * torch.cos(3 * w).sum()


W0 = torch.linspace(0.2, 1.1, 9, dtype=D)
PADDING = torch.full((DEAD,), 0.7, dtype=D)


def problems():
    """The model alone, and with weights that it does not use."""
    return dvi.Problem(loss, W0), dvi.Problem(lambda w: loss(w[DEAD:]), torch.cat([PADDING, W0]))


class Own(Method):
    """AdaGrad with a root of one's own."""

    lr: float = 0.1
    eps: float = 0.0

    def init(self, w):
        return {"v": torch.zeros_like(w)}

    def f(self, nu, g):
        return {"v": 0.1 * (g**2 - nu["v"])}

    def P(self, nu):
        return dvi.Diagonal((self.root(nu["v"]) + self.eps) / self.lr)

    def root(self, v):
        return v.sqrt()


class Power(Own):
    def root(self, v):
        return v**0.5


class Norms(Own):
    def root(self, v):
        return torch.linalg.vector_norm(v.sqrt()[:, None], dim=1)


class Rsqrt(Own):
    def root(self, v):
        return 1 / v.rsqrt()


class Third(Own):
    def root(self, v):
        return v ** (1 / 3) * (1 + v.sqrt().sum())  # coupled: one NaN would be everywhere


class Root(Method):
    """The root itself is the state, so that f is steep, too."""

    lr: float = 0.1
    eps: float = 1e-8

    def init(self, w):
        return {"u": torch.zeros_like(w)}

    def f(self, nu, g):
        return {"u": (0.9 * nu["u"] ** 2 + 0.1 * g**2).sqrt() - nu["u"]}

    def P(self, nu):
        return dvi.Diagonal((nu["u"] + self.eps) / self.lr)


class Coupled(Own):
    """F has a root in it, and couples the parts of ν."""

    def init(self, w):
        return {"v": torch.zeros_like(w), "r": w.new_zeros(())}

    def f(self, nu, g):
        r = nu["v"].sqrt().sum()
        return {"v": 0.1 * (g**2 - nu["v"]), "r": 0.1 * (r + g.abs().sum() - nu["r"])}

    def P(self, nu):
        return dvi.Diagonal((nu["v"].sqrt() + self.eps) * (1 + nu["r"]) / self.lr)


#: what makes a method from the shapes
METHODS = {
    "adagrad": lambda s: M.AdaGrad(0.1),
    "adagrad, no eps": lambda s: M.AdaGrad(0.1, 0.0),
    "adagrad-norm": lambda s: M.AdaGradNorm(0.1),
    "rmsprop": lambda s: M.RMSProp(0.1, 0.9, 1e-8),
    "rmsprop, corrected, no eps": lambda s: M.RMSProp(0.1, 0.9, bias_correction=True),
    "rmsprop, schedule": lambda s: M.RMSProp(lambda t: 0.1 * 0.99**t, 0.9, 1e-8),
    "centred": lambda s: M.CentredRMSProp(0.1, 0.9, 1e-4),
    "centred, no eps": lambda s: M.CentredRMSProp(0.1, 0.9, 0.0),
    "adam": lambda s: M.Adam(0.1, 0.5, 0.9),
    "adam, no eps": lambda s: M.Adam(0.1, 0.5, 0.9, 0.0),
    "nadam": lambda s: M.NAdam(0.1, 0.5, 0.9),
    "adafactor": lambda s: M.Adafactor(0.1, s, 0.9),
    "adafactor, no eps": lambda s: M.Adafactor(0.1, s, 0.9, 0.0),
    "shampoo": lambda s: M.Shampoo(0.1, s, eps=1e-3),
    "sqrt": lambda s: Own(),
    "sqrt, eps": lambda s: Own(eps=1e-8),
    "power, eps": lambda s: Power(eps=1e-8),
    "norms, eps": lambda s: Norms(eps=1e-8),
    "rsqrt, eps": lambda s: Rsqrt(eps=1e-8),
    "third, eps": lambda s: Third(eps=1e-8),
    "state is the root": lambda s: Root(),
    "coupled, eps": lambda s: Coupled(eps=1e-8),
}
SECOND = ("rmsprop", "state is the root", "coupled, eps", "sqrt")


def live(x, example):
    """The part of a state or a vector that the model without the unused weights has, too."""
    return x[..., DEAD:] if x.shape[-1] == len(PADDING) + len(W0) else x


def linearised(name, accuracy):
    """Α, β, the gap and the drift, without the unused weights and with them."""
    out = []
    U = torch.randn(9, 2, generator=torch.Generator().manual_seed(3), dtype=D)
    for problem, shapes, pad in zip(problems(), (LIVE, UNUSED + LIVE), (0, DEAD), strict=True):
        flow = dvi.central_flow(problem, METHODS[name](shapes), check=False, accuracy=accuracy)
        y = flow.initial
        lin = flow.linearise(y.w, y.nu, torch.cat([U.new_zeros(pad, 2), U]))
        drift = lin.drift(np.array([[0.3, 0.1], [0.1, 0.2]]))
        _, g = problem.value_and_grad(y.w)
        out.append((lin.alpha, lin.beta, lin.gap, drift.w[pad:], torch.tensor(flow.nu_decay(y, g))))
        if pad:
            assert not drift.w[:pad].any()  # and they stay where they are
    return out


def agree(name, accuracy):
    for alone, beside in zip(*linearised(name, accuracy), strict=True):
        assert torch.isfinite(alone).all()
        torch.testing.assert_close(
            beside, alone, rtol=ROUNDING, atol=ROUNDING * float(alone.abs().max()) if alone.numel() else 0
        )


@pytest.mark.parametrize("name", METHODS)
def test_the_flow_is_that_of_the_weights_that_move(name):
    agree(name, None)


@pytest.mark.parametrize("name", SECOND)
def test_at_second_order_too(name):
    agree(name, "second-order")


RUNS = {"centred": M.CentredRMSProp(0.1, 0.9, 1e-4), "own": Power(eps=1e-8)}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_that_without_the_unused_weights(name):
    # 12 steps at the edge; what is left are the eigenvectors, which a search finds to 1e-3 or so from other starts
    flows = [dvi.central_flow(problem, RUNS[name], check=False) for problem in problems()]
    runs = [dvi.solve(flow, 12, warm_start="auto", progress=False) for flow in flows]
    assert max(runs[0].k) > 0
    torch.testing.assert_close(runs[1].w[:DEAD], PADDING, rtol=0, atol=0)
    torch.testing.assert_close(runs[1].w[DEAD:], runs[0].w, rtol=0, atol=2e-3)


# ---- matrix state --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.25, 1.0, -1.0])
def test_a_factor_with_rows_of_zeros_is_the_factor_of_the_rest(p):
    generator = torch.Generator().manual_seed(0)
    G, R = (torch.randn(n, 5, generator=generator, dtype=D) for n in (2, 3))
    L = torch.zeros(4, 4, dtype=D)
    rest = torch.tensor([1, 3])
    L[rest[:, None], rest] = G @ G.T
    V = torch.randn(12, 2, generator=generator, dtype=D)
    whole, small = (dvi.Kronecker([A, R @ R.T], p) for A in (L, G @ G.T))
    moving = torch.zeros(4, 3, dtype=torch.bool)
    moving[rest] = True
    moving = moving.reshape(-1)
    g = moving.to(D)
    whole.check(g)
    assert torch.equal(whole.dead(), ~moving)
    for operation in ("apply", "solve", "sqrt", "inv_sqrt"):
        found, expected = torch.zeros_like(V), getattr(whole, operation)(V)
        found[moving] = getattr(small, operation)(V[moving])
        torch.testing.assert_close(expected, found)
    torch.testing.assert_close(whole.effective_lr(), small.effective_lr())
    with pytest.raises(M.NotPositiveDefiniteError, match="gradient is not zero"):
        whole.check(torch.ones(12, dtype=D))
    with pytest.raises(M.NotPositiveDefiniteError, match="P\\(ν\\) = 0"):
        dvi.Kronecker([torch.zeros(4, 4, dtype=D), R @ R.T], p).check()


def test_shampoo_without_eps_leaves_out_what_nothing_reaches():
    def square(w):
        W = w.reshape(2, 2)
        return ((torch.tanh(W @ torch.tensor([[1.0, 0.5], [-0.3, 1.2]], dtype=w.dtype)) - 0.3) ** 2).sum()

    def padded(w):  # an unused layer, an input that is always zero, and the weights of the others
        return square(w[6:].reshape(2, 3)[:, :2].reshape(-1))

    w = torch.tensor([0.9, -0.4, 0.2, 0.7], dtype=D)
    wide = torch.cat(
        [torch.full((6,), 0.7, dtype=D), torch.cat([w.reshape(2, 2), torch.ones(2, 1, dtype=D)], 1).reshape(-1)]
    )
    kept = torch.tensor([6, 7, 9, 10])
    U = torch.randn(4, 2, generator=torch.Generator().manual_seed(1), dtype=D)
    out = []
    for loss, start, shapes, index in ((square, w, [(2, 2)], torch.arange(4)), (padded, wide, [(3, 2), (2, 3)], kept)):
        flow = dvi.central_flow(dvi.Problem(loss, start), M.Shampoo(0.1, shapes, eps=0.0), check=False)
        basis = torch.zeros(len(start), 2, dtype=D)
        basis[index] = U
        lin = flow.linearise(flow.initial.w, flow.initial.nu, basis)
        out.append((lin.alpha, lin.beta, lin.gap, lin.drift(np.eye(2)).w[index]))
    for alone, beside in zip(*out, strict=True):
        torch.testing.assert_close(beside, alone, rtol=1e-9, atol=1e-9 * float(alone.abs().max()))


# ---- the mechanism -------------------------------------------------------------------------------------------------

STEEP = {  # a function of v and its derivative where v > 0
    "sqrt": (torch.sqrt, lambda v: 0.5 * v**-0.5),
    "power": (lambda v: v**0.3, lambda v: 0.3 * v**-0.7),
    "rsqrt": (lambda v: 1 / v.rsqrt(), lambda v: 0.5 * v**-0.5),
    "log": (lambda v: torch.exp(0.5 * torch.log(v)), lambda v: 0.5 * v**-0.5),
    "quotient": (lambda v: v / v.sqrt(), lambda v: 0.5 * v**-0.5),
    "list": (lambda v: torch.stack([v, v]).sqrt().mean(dim=0), lambda v: 0.5 * v**-0.5),
}


@pytest.mark.parametrize("name", STEEP)
def test_a_tangent_of_zero_contributes_zero(name):
    function, slope = STEEP[name]
    v, dv = torch.tensor([0.0, 4.0, 0.3], dtype=D), torch.tensor([0.0, 1.0, -2.0], dtype=D)
    expected = torch.tensor([0.0, 1.0, -2.0], dtype=D) * torch.cat([v.new_zeros(1), slope(v[1:])])
    torch.testing.assert_close(derivative(function, v, dv), expected)
    batch = vmap(lambda d: derivative(lambda v: function(v).sum(), v, d))(torch.stack([dv, 2 * dv]))
    torch.testing.assert_close(batch, torch.stack([expected.sum(), 2 * expected.sum()]))
    twice = derivative(lambda v: derivative(function, v, dv), v, dv)
    h = 1e-4
    expected = (slope(v[1:] + h * dv[1:]) - slope(v[1:] - h * dv[1:])) / (2 * h) * dv[1:]
    torch.testing.assert_close(twice, torch.cat([v.new_zeros(1), expected]), rtol=1e-6, atol=1e-7)


def test_what_begins_to_move_is_not_hidden():
    v, dv = torch.zeros(1, dtype=D), torch.ones(1, dtype=D)
    assert derivative(torch.sqrt, v, dv).isinf().all()
    assert derivative(lambda v: v.sqrt() * v.sqrt(), v, dv).isnan().all()  # 0·∞ with a zero that is no tangent


def test_weights_that_come_alive_are_followed():
    """w₁ gets a gradient once w₀ passes ½, and is at rest until then: against the equations by hand, with SciPy."""
    from scipy.integrate import solve_ivp

    lr, beta2, eps = 0.02, 0.9, 1e-8

    def loss(w):
        return 0.5 * (w[0] - 1) ** 2 + torch.relu(w[0] - 0.5) ** 3 * (w[1] - 1) ** 2

    def rate(t, y):
        (a, b), v = y[:2], y[2:]
        s = max(a - 0.5, 0.0)
        g = np.array([a - 1 + 3 * s**2 * (b - 1) ** 2, 2 * s**3 * (b - 1)])
        return np.concatenate([-lr * g / (np.sqrt(np.maximum(v, 0)) + eps), (1 - beta2) / beta2 * (g**2 - v)])

    flow = dvi.stable_flow(dvi.Problem(loss, torch.zeros(2, dtype=D)), M.RMSProp(lr, beta2, eps))
    y = np.concatenate([flow.initial.w.numpy(), flow.initial.nu["v"].numpy()])
    assert y[3] == 0.0
    expected = solve_ivp(rate, (0, 60), y, rtol=1e-9, atol=1e-14, max_step=0.02, method="LSODA").y[:2, -1]
    assert expected[1] > 0.05  # it has moved
    solution = dvi.solve(flow, 60, integrator=dvi.RungeKutta(order=4, tol=1e-7), progress=False)
    np.testing.assert_allclose(solution.w.numpy(), expected, atol=1e-4)
