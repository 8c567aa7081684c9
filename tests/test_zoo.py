"""Every optimizer through the same invariants.  A new one is a line in ZOO.

The columns: how it is made from a learning rate and the shapes of the parameters, a learning rate at which a small
network reaches the edge of stability, what its steps are compared with, whether β is symmetric at the edge, and why
there is no closed form where there is none.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CubicLoss, orthogonal
from scipy.linalg import sqrtm
from torch import nn
from torch.utils import _pytree as pytree

import dvi
from dvi import methods
from dvi.methods import validate
from dvi.methods.per_weight import PerWeight
from dvi.solvers import ccp
from dvi.solvers.svec import smat, svec

EPS = np.finfo(np.float64).eps
SHAPES = ((2, 3), (2,))  # of the parameters of the analytic losses: a matrix and a bias
D = 8
METRIC = torch.diag(torch.linspace(0.5, 2, D, dtype=torch.float64)) + 0.1


# ---- what an update is compared with: torch.optim, or a loop in numpy ------------------------------------------------


def by_torch(make):
    """The iterates [steps + 1, d] of a torch optimizer, each parameter a tensor of its own."""

    def run(cubic, w, steps):
        pieces = np.split(w, np.cumsum([np.prod(shape) for shape in SHAPES])[:-1])
        parameters = [torch.tensor(x.reshape(s)).requires_grad_() for x, s in zip(pieces, SHAPES, strict=True)]
        optimizer, loss = make(parameters), cubic.loss(torch.tensor(w))
        seen = [w]
        for _ in range(steps):
            optimizer.zero_grad()
            loss(torch.cat([p.reshape(-1) for p in parameters])).backward()
            optimizer.step()
            seen.append(np.concatenate([p.detach().numpy().ravel() for p in parameters]))
        return np.stack(seen)

    return run


def by_hand(update, state):
    """The iterates of a loop: ``update(state, g, t)`` gives the next state and the step taken."""

    def run(cubic, w, steps):
        now, seen = state(), [w]
        for t in range(steps):
            now, step = update(now, cubic.gradient(w), t)
            w = w - step
            seen.append(w)
        return np.stack(seen)

    return run


def adafactor_of_torch(parameters):
    """torch.optim.Adafactor at step 2 of its schedule, clipping and relative step sizes put out of action."""
    # its step is max(eps₂, RMS(w)) · min(lr, 1/√t) and its β₂ is 1 − t^−0.8
    optimizer = torch.optim.Adafactor(parameters, lr=1e-5, beta2_decay=-0.8, eps=(None, 2e3), d=1e300, foreach=False)
    for p in parameters:
        state = {"step": torch.tensor(1.0)}
        if p.ndim > 1:
            state |= {"row_var": torch.zeros_like(p[..., :1]), "col_var": torch.zeros_like(p[:1])}
        else:
            state["variance"] = torch.zeros_like(p)
        optimizer.state[p] = state
    return optimizer


class GradientDescentW(methods.GradientDescent):
    """Decoupled weight decay, which for gradient descent is L2 regularisation."""

    weight_decay: float = 0.05

    def decay(self):
        return self.lr * self.weight_decay


def adamw_with_groups(parameters):
    """No decay on what is no matrix."""
    groups = [
        {"params": [p for p in parameters if p.ndim > 1]},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.02, betas=(0.5, 0.9), eps=1e-8, weight_decay=0.1)


def with_decay(P, now):
    """P(I − Γ/2)."""
    like = torch.zeros(D, dtype=torch.float64)
    return P if now.decay() is None else P.weighted(PerWeight.of(now.decay(), like).map(lambda x: 1 - x / 2))


def nadam_of_torch(parameters):
    """torch.optim.NAdam when its bias corrections and its warm-up of β₁ have faded."""
    optimizer = torch.optim.NAdam(parameters, lr=0.02, betas=(0.5, 0.9), eps=1e-8)
    for p in parameters:
        optimizer.state[p] = {"step": torch.tensor(1e6), "mu_product": torch.tensor(0.0)}
        optimizer.state[p] |= {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
    return optimizer


def quasi_hyperbolic_step(lr, decay, share):
    """As in the source (Ma & Yarats 2019, eqs. 3 and 4)."""

    def update(average, g, t):
        average = decay * average + (1 - decay) * g
        return average, lr * ((1 - share) * g + share * average)

    return by_hand(update, lambda: 0.0)


def shampoo_step(decay, new, eps, one_sided, lr, beta=0.0):
    """Shampoo by scipy's square roots (a Schur method; no eigenvectors), of a momentum buffer if asked for."""

    def root(A, k):
        A = A + eps * np.eye(len(A))
        return np.linalg.inv(sqrtm(A) if k == 1 else sqrtm(sqrtm(A)))

    def update(state, g, t):
        L, R, B, m = state
        G, b = g[:6].reshape(2, 3), g[6:]
        m = beta * m + g
        M, k = m[:6].reshape(2, 3), m[6:]
        L, R, B = decay * L + new * G @ G.T, decay * R + new * G.T @ G, decay * B + new * np.outer(b, b)
        step = root(L, 1) @ M if one_sided else root(L, 2) @ M @ root(R, 2)
        return (L, R, B, m), lr * np.concatenate([step.ravel(), root(B, 1) @ k])

    return by_hand(update, lambda: (np.zeros((2, 2)), np.zeros((3, 3)), np.zeros((2, 2)), 0.0))


def adagrad_with_momentum_step(lr, beta):
    def update(state, g, t):
        s, m = state[0] + g**2, beta * state[1] + g
        return (s, m), lr * m / (np.sqrt(s) + 1e-8)

    return by_hand(update, lambda: (0.0, 0.0))


def norm_step(lr, decay, new):
    def update(s, g, t):
        s = decay * s + new * g @ g
        return s, lr * g / np.sqrt(s)

    return by_hand(update, lambda: 0.25 if decay == 1 else 0.0)


# ---- the zoo --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """One optimizer and what is known of it."""

    make: Callable[[Any, Any], dvi.Method]
    edge: float  # a learning rate at which the network below gets to the edge of stability within 4 steps
    reference: Callable[..., Any]  # the update at the learning rate 0.02
    symmetric: bool = True  # is β symmetric where HU = cPU?
    refused: str = ""  # what `dvi.derive` says where it has no closed form
    tol: float = 1e-3  # of the semi-implicit step with momentum; 1e-3 is its default


ZOO = {
    "gradient descent": Kind(
        lambda lr, s: methods.GradientDescent(lr), 1.65, by_torch(lambda p: torch.optim.SGD(p, lr=0.02))
    ),
    "preconditioned": Kind(
        lambda lr, s: methods.Preconditioned(dvi.Dense(METRIC) if s == SHAPES else dvi.Scalar(1.3), lr),
        2.1,
        by_hand(lambda _, g, t: (None, 0.02 * np.linalg.solve(METRIC.numpy(), g)), lambda: None),
        refused="only dvi.Scalar and dvi.Diagonal",
    ),
    "adagrad": Kind(
        lambda lr, s: methods.AdaGrad(lr, 1e-8), 0.45, by_torch(lambda p: torch.optim.Adagrad(p, lr=0.02, eps=1e-8))
    ),
    "adagrad-norm": Kind(lambda lr, s: methods.AdaGradNorm(lr, 0.5), 2.4, norm_step(0.02, 1, 1)),
    "rmsprop": Kind(
        lambda lr, s: methods.RMSProp(lr, 0.9, 1e-8),
        0.05,
        by_torch(lambda p: torch.optim.RMSprop(p, lr=0.02, alpha=0.9, eps=1e-8)),
    ),
    "adam without momentum": Kind(
        lambda lr, s: methods.RMSProp(lr, 0.9, 1e-8, bias_correction=True),
        0.05,
        by_torch(lambda p: torch.optim.Adam(p, lr=0.02, betas=(0.0, 0.9), eps=1e-8)),
    ),
    "rmsprop, centred": Kind(
        lambda lr, s: methods.CentredRMSProp(lr, 0.9, 1e-3),
        0.03,
        by_torch(lambda p: torch.optim.RMSprop(p, lr=0.02, alpha=0.9, eps=1e-3, centered=True)),
    ),
    "rmsprop-norm": Kind(lambda lr, s: methods.RMSPropNorm(lr, 0.9), 0.3, norm_step(0.02, 0.9, 0.1)),
    "normalised": Kind(
        lambda lr, s: methods.NormalizedGD(lr),
        0.3,
        by_hand(lambda _, g, t: (None, 0.02 * g / np.sqrt(g @ g)), lambda: None),
        refused="singular",
    ),
    "adafactor": Kind(
        lambda lr, s: methods.Adafactor(lr, s, beta2=lambda t: 1 - (t + 2) ** -0.8),
        0.05,
        by_torch(adafactor_of_torch),
        symmetric=False,
        refused="shapes",
    ),
    "shampoo": Kind(
        lambda lr, s: methods.Shampoo(lr, s, eps=1e-3),
        0.45,
        shampoo_step(1, 1, 1e-3, False, 0.02),
        symmetric=False,
        refused="shapes",
    ),
    "shampoo, averages": Kind(
        lambda lr, s: methods.Shampoo(lr, s, beta2=0.9, eps=1e-3),
        0.1,
        shampoo_step(0.9, 0.1, 1e-3, False, 0.02),
        symmetric=False,
        refused="shapes",
    ),
    "shampoo, one-sided": Kind(
        lambda lr, s: methods.Shampoo(lr, s, eps=1e-3, one_sided=True),
        0.45,
        shampoo_step(1, 1, 1e-3, True, 0.02),
        refused="shapes",
    ),
    "heavy ball": Kind(
        lambda lr, s: methods.HeavyBall(lr, 0.5),
        1.9,
        by_torch(lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.5)),
    ),
    "nesterov": Kind(
        lambda lr, s: methods.Nesterov(lr, 0.5),
        1.2,
        by_torch(lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.5, nesterov=True)),
    ),
    "quasi-hyperbolic": Kind(
        lambda lr, s: methods.QuasiHyperbolic(lr, 0.5, 0.7), 2.5, quasi_hyperbolic_step(0.02, 0.5, 0.7)
    ),
    "adam": Kind(
        lambda lr, s: methods.Adam(lr, 0.5, 0.9, 1e-8),
        0.095,
        by_torch(lambda p: torch.optim.Adam(p, lr=0.02, betas=(0.5, 0.9), eps=1e-8)),
    ),
    "adamw": Kind(
        lambda lr, s: methods.AdamW(lr, 0.5, 0.9, 1e-8, weight_decay=0.1),
        0.1,
        by_torch(lambda p: torch.optim.AdamW(p, lr=0.02, betas=(0.5, 0.9), eps=1e-8, weight_decay=0.1)),
    ),
    "adamw, groups": Kind(
        lambda lr, s: methods.AdamW(lr, 0.5, 0.9, 1e-8, weight_decay=0.1, shapes=s),
        0.11,
        by_torch(adamw_with_groups),
        refused="differs between weights",
    ),
    "gradient descent, decoupled decay": Kind(
        lambda lr, s: GradientDescentW(lr), 1.65, by_torch(lambda p: torch.optim.SGD(p, lr=0.02, weight_decay=0.05))
    ),
    "nadam": Kind(lambda lr, s: methods.NAdam(lr, 0.5, 0.9, 1e-8), 0.05, by_torch(nadam_of_torch), tol=5e-4),
}
every_kind = pytest.mark.parametrize("kind", ZOO.values(), ids=ZOO)


class ShampooWithMomentum(methods.Shampoo):
    """A user's optimizer: matrix state, and a filter of one's own."""

    momentum: float = 0.5

    def Q(self):
        return dvi.Filter([1.0], [1.0, -self.momentum])


class AdaGradWithMomentum(methods.AdaGrad):
    """The same of a diagonal P that only adds up."""

    momentum: float = 0.5

    def Q(self):
        return dvi.Filter([1.0], [1.0, -self.momentum])


OWN = {
    "shampoo, momentum": Kind(
        lambda lr, s: ShampooWithMomentum(lr, s, eps=1e-3),
        0.4,
        shampoo_step(1, 1, 1e-3, False, 0.02, 0.5),
        symmetric=False,
        refused="shapes",
    ),
    "shampoo, averages, momentum": Kind(
        lambda lr, s: ShampooWithMomentum(lr, s, beta2=0.9, eps=1e-3),
        0.1,
        shampoo_step(0.9, 0.1, 1e-3, False, 0.02, 0.5),
        symmetric=False,
        refused="shapes",
    ),
    "adagrad, momentum": Kind(lambda lr, s: AdaGradWithMomentum(lr, 1e-8), 0.4, adagrad_with_momentum_step(0.02, 0.5)),
}
with_own = pytest.mark.parametrize("kind", [*ZOO.values(), *OWN.values()], ids=[*ZOO, *OWN])


def bowl(seed, d=D):
    """A positive definite quadratic with a slight cubic term, far from its minimum; and where to start."""
    rng = np.random.default_rng(seed)
    A = rng.normal(size=(d, d))
    cubic = CubicLoss.random(rng, d)
    cubic.A, cubic.b, cubic.C = A @ A.T / d + np.eye(d), 5 * cubic.b, 0.01 * cubic.C
    return cubic, rng.normal(size=d)


def network():
    """Three inputs, four tanh, two outputs, twelve examples: 24 weights in two matrices and a bias."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2, bias=False)).double()
    generator = torch.Generator().manual_seed(0)
    inputs, targets = (torch.randn(12, n, generator=generator, dtype=torch.float64) for n in (3, 2))
    return dvi.Problem.from_module(
        model, lambda out, y: 0.5 * (out - y).square().sum(-1).mean(), inputs, targets, name="small network"
    )


def after(method, cubic, w, steps):
    """(w, ν) after some steps of the optimizer."""
    optimizer = dvi.discrete(cubic.problem(w), method)
    y = optimizer.initial
    _, g = optimizer.value_and_grad(y)
    for _ in range(steps):
        y, _, g = optimizer.step(y, g)
    return y


def flat(tree):
    return torch.cat([x.reshape(-1) for x in pytree.tree_leaves(tree)] or [torch.zeros(0, dtype=torch.float64)])


# ---- the declaration ------------------------------------------------------------------------------------------------


@with_own
def test_the_declaration_holds_together(kind):
    method = kind.make(0.02, SHAPES)
    cubic, w = bowl(0)
    g = torch.tensor(cubic.gradient(w))
    nu = validate(method, torch.tensor(w), g)  # structure, shapes, dtypes, nothing changed in place, P ≻ 0
    assert all(x.dtype == torch.float64 for x in pytree.tree_leaves(nu))
    assert repr(method).startswith(type(method).__name__ + "(")
    assert method == kind.make(0.02, SHAPES) or "preconditioner" in method.hyperparameters() or method.scheduled
    with pytest.raises(dvi.SpecError, match="lr must be positive"):
        kind.make(-1.0, SHAPES)


@with_own
def test_P_is_positive_definite_and_its_operations_agree(kind):
    method = kind.make(0.02, SHAPES)
    cubic, w = bowl(1)
    y = after(method, cubic, w, 20)
    P = method.at(y.t).P(y.nu)
    P.check(torch.tensor(cubic.gradient(y.w.numpy())))
    dense = P.apply(torch.eye(D, dtype=torch.float64)).numpy()
    # entries over the condition number of P, 10⁴ at most here
    tolerance = 1e5 * EPS * np.abs(dense).max()
    np.testing.assert_allclose(dense, dense.T, rtol=0, atol=tolerance)
    values = np.linalg.eigvalsh(dense)
    assert 0 < values[0] < values[-1] < 1e4 * values[0] or values[0] == values[-1] > 0
    V = torch.tensor(np.random.default_rng(0).normal(size=(D, 2)))
    np.testing.assert_allclose(P.solve(torch.tensor(dense) @ V), V, rtol=0, atol=1e5 * EPS * float(V.abs().max()))
    np.testing.assert_allclose(P.sqrt(P.sqrt(V)), dense @ V.numpy(), rtol=0, atol=tolerance)
    np.testing.assert_allclose(P.inv_sqrt(P.sqrt(V)), V, rtol=0, atol=1e5 * EPS * float(V.abs().max()))
    assert float(P.effective_lr()) == pytest.approx(D / np.trace(dense), rel=1e-9)


@with_own
def test_a_hundred_steps_are_the_published_ones(kind):
    cubic, w = bowl(2)
    optimizer = dvi.discrete(cubic.problem(w), kind.make(0.02, SHAPES))
    y, seen = optimizer.initial, [w]
    _, g = optimizer.value_and_grad(y)
    for _ in range(100):
        y, _, g = optimizer.step(y, g)
        seen.append(y.w.numpy())
    expected = kind.reference(cubic, w, 100)
    # each step adds a few roundings; where a gradient passes through zero, a small √ν enlarges them 10⁵ times.  The
    # roots of scipy for Shampoo are good to about 1e-11.  A step done wrongly shows at 1e-3 and above.
    np.testing.assert_allclose(np.stack(seen), expected, rtol=0, atol=1e-9 * np.abs(expected).max())
    assert np.abs(np.diff(expected, axis=0)).max(axis=1).min() > 1e-6  # it moves throughout


# ---- α and β --------------------------------------------------------------------------------------------------------


@with_own
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_alpha_and_beta_are_the_rates_of_the_gap(kind, seed):
    rng = np.random.default_rng(seed)
    method = kind.make(0.02, SHAPES)
    cubic, w = bowl(seed)
    cubic.C = CubicLoss.random(rng, D).C
    y = after(method, cubic, 0.3 * w, 6)
    # with momentum α and β are those of the leading-order drift
    flow = dvi.central_flow(cubic.problem(w), method, check=False, accuracy="paper")
    k = 1 + seed
    U, X = rng.normal(size=(D, k)), 1e-3 * orthogonal(rng, k)
    X = X @ X.T + np.diag(rng.uniform(0, 1e-4, k))
    lin = flow.linearise(y.w, y.nu, torch.tensor(U), t=y.t)
    rate = lin.drift(X)

    def gap(s):
        nu = pytree.tree_map(lambda x, dx: x + s * dx, y.nu, rate.nu)
        now = method.at(y.t + s)
        PU = with_decay(now.P(nu), now).apply(torch.tensor(U)).numpy()
        return U.T @ (float(now.Q().threshold) * PU - cubic.hessian(y.w.numpy() + s * rate.w.numpy()) @ U)

    # Five points: truncation s⁴ G⁽⁵⁾/30.  √ν and the roots of matrices vary over ν/ν̇ of the smallest entry or
    # eigenvalue, so that is what s is taken a thousandth of; rounding eps |G|/s.
    relative = (flat(rate.nu).abs() / flat(y.nu).abs().clamp(min=1e-3)).max() if len(flat(y.nu)) else 0.0
    s = 1e-3 / (1 + float(rate.w.norm()) + float(relative))
    slope = (8 * (gap(s) - gap(-s)) - (gap(2 * s) - gap(-2 * s))) / (12 * s)
    tolerance = 1e-7 * np.abs(slope).max() + 30 * EPS * np.abs(gap(0.0)).max() / s
    assert tolerance < 1e-3 * np.abs(slope).max()  # else this shows nothing
    np.testing.assert_allclose(lin.gap.numpy(), gap(0.0), rtol=0, atol=1e-10 * np.abs(gap(0.0)).max())
    predicted = smat(lin.beta.numpy() @ svec(X)) - lin.alpha.numpy()
    assert np.abs(slope - predicted).max() <= tolerance


@with_own
def test_beta_at_the_edge_is_symmetric_where_it_is_said_to_be(kind):
    rng = np.random.default_rng(7)
    method = kind.make(0.02, SHAPES)
    cubic, w = bowl(7)
    y = after(method, cubic, w, 6)
    now = method.at(y.t)
    P = with_decay(now.P(y.nu), now).scaled(float(now.Q().threshold) / 2)  # its edge is at 2
    V = torch.tensor(orthogonal(rng, D))
    U, PU = P.inv_sqrt(V[:, :3]), P.sqrt(V[:, :3])
    rest = P.sqrt(V[:, 3:])
    H = 2 * PU @ PU.T + rest @ rest.T  # HU = 2PU with this P, and effective eigenvalues of 1 beside
    edge = CubicLoss.with_derivatives(rng, y.w.numpy(), cubic.gradient(y.w.numpy()), H.numpy())
    flow = dvi.central_flow(edge.problem(y.w.numpy()), method, check=False, accuracy="paper")
    beta = flow.linearise(y.w, y.nu, U, t=y.t).beta.numpy()
    asymmetry = np.abs(beta - beta.T).max() / np.abs(beta).max()
    assert asymmetry < 1e-9 if kind.symmetric else asymmetry > 1e-5
    if not flow.calculus.stateless:  # the part of ν is there: without it symmetry would say nothing
        T = flow.problem.hessian_gradient(y.w, U)
        loss_part = (0.5 * T @ now.P(y.nu).solve(T.T)).numpy() * float(now.Q().gain)
        assert np.abs(beta - loss_part).max() > 1e-5 * np.abs(beta).max()


@with_own
def test_the_closed_form_is_the_compilers_or_is_refused_by_name(kind):
    method = kind.make(0.02, SHAPES)
    if kind.refused:
        with pytest.raises(dvi.SpecError, match=kind.refused):
            dvi.derive(method)
        return
    rng = np.random.default_rng(11)
    cubic, w = bowl(11)
    y = after(method, cubic, w, 6)
    U, X = rng.normal(size=(D, 2)), np.diag([2e-3, 1e-3])
    flow = dvi.central_flow(cubic.problem(w), method, check=False, accuracy="paper")
    lin = flow.linearise(y.w, y.nu, torch.tensor(U), t=y.t)
    w = y.w.numpy()
    found = dvi.derive(method, accuracy="paper").evaluate(
        cubic.gradient(w), y.nu, U, cubic.hessian(w) @ U, lin.T, X, t=y.t, w=w
    )
    drift = lin.drift(X)
    # sums of some d² products; √(v − m²) cancels, by a factor of 10³ or less here
    for name, actual, expected in (
        ("α", found.alpha, lin.alpha),
        ("β", found.beta, lin.beta),
        ("w", found.w, drift.w),
        ("ν", flat(pytree.tree_map(torch.as_tensor, found.nu)), flat(drift.nu)),
    ):
        size = np.abs(np.asarray(expected)).max(initial=0)
        np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), rtol=0, atol=1e-9 * size, err_msg=name)


# ---- the flows ------------------------------------------------------------------------------------------------------


@with_own
def test_the_stable_flow_follows_the_optimizer_where_nothing_oscillates(kind):
    problem = network()
    method = kind.make(kind.edge / 20, problem.shapes)
    race = dvi.compare(problem, method, 30, runs=("discrete", "stable"), warm_start=5, eigen_every=0, progress=False)
    start = dvi.solve(dvi.discrete(problem, method), 5, eigen_every=0, progress=False).w
    off = race.distance["discrete", "stable"][-1] / float((race.stable.w - start).norm())
    # a flow leaves out terms of order η λ, here 0.1 at most, and of order 1/t or 1 − β₂ = 0.1 in how P changes
    assert off < 0.05


def through_the_edge(kind, *integrators, accuracy=None):
    """A central flow, its runs of 12 units by each integrator, and which part of the stable flow's distance is theirs.

    One flow is solved by all: what it traces of the method, most of the cost, is made once.
    """
    problem = network()
    method = kind.make(kind.edge, problem.shapes)
    flow = dvi.central_flow(problem, method, accuracy=accuracy)
    settings = {"save": ("w",), "progress": False}
    runs = [dvi.solve(flow, 12, integrator=it, warm_start="auto", **settings) for it in integrators]
    settings["warm_start"] = int(runs[0].about["warm_start"])
    optimizer = dvi.solve(dvi.discrete(problem, method), 12, eigen_every=0, **settings)
    stable = dvi.solve(dvi.stable_flow(problem, method, accuracy=accuracy), 12, **settings)
    off = [np.linalg.norm(run.series["w"][-1] - optimizer.series["w"][-1]) for run in (*runs, stable)]
    return flow, [(run, distance / off[-1]) for run, distance in zip(runs, off, strict=False)]


# The two that differ from Shampoo in a factor or an exponent go through the edge at second order, below.
@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ZOO if name not in ("shampoo, averages", "shampoo, one-sided")])
def test_the_central_flow_goes_through_the_edge(name):
    kind = ZOO[name]
    momentum = not kind.make(kind.edge, SHAPES).Q().trivial
    flow, [(central, distance)] = through_the_edge(
        kind, dvi.SemiImplicit(tol=kind.tol) if momentum else dvi.MacroStep(1e-3)
    )
    assert central.breakpoints[0][1] == "enter"
    assert central.breakpoints[0][0] < 4
    # an arrival is overrun by the second order of a step, an eigenvector is known to 1e-3 and its eigenvalue to 1e-6
    assert np.nanmax(central.eigenvalues) < 2 + 5e-3
    # cP − H ⪰ 0 on the critical directions, which are looked for anew
    lin = flow.linearise(central.w, central.nu, t=central.about["warm_start"] + 12)
    assert len(lin.gap) >= 1
    assert np.linalg.eigvalsh(lin.gap.numpy())[0] > -5e-3
    # and the CCP there, its β symmetric or not, has a solution that oscillates
    solved = ccp.solve(lin.alpha - lin.gap, lin.beta)
    assert np.trace(solved.X) > 0
    assert abs(np.sum(solved.X * solved.S)) <= 1e-9 * np.abs(lin.alpha.numpy()).max() * np.trace(solved.X)
    # It is the flow that the optimizer follows: without oscillations it goes elsewhere
    assert distance < 0.8


@pytest.mark.slow
@pytest.mark.parametrize("integrator", [dvi.Euler(1 / 4), dvi.MacroStep(1e-3)], ids=["euler", "macro step"])
def test_which_HU_acts_on_nu_changes_nothing_that_a_finer_integrator_would_not(integrator):
    """On the exact flow HU = 2PU wherever Σ ≠ 0, so the two readings differ by the integrator's own error only."""
    ends = {}
    for reading in ("computed", "edge"):
        problem = network()
        flow = dvi.central_flow(problem, methods.RMSProp(0.05, 0.9), check=False, edge_hessian=reading)
        solution = dvi.solve(flow, 10, integrator=integrator, warm_start=7, progress=False)
        assert np.trace(solution.X[-1]) > 0
        ends[reading] = solution.w
    apart = float((ends["computed"] - ends["edge"]).norm())
    assert 0 < apart < 5e-3  # Euler ¼ and this tol are good to a few 1e-3 here; a path of about 1
    with pytest.raises(ValueError, match="edge_hessian"):
        dvi.central_flow(problem, methods.GradientDescent(0.1), check=False, edge_hessian="exact")


def test_the_two_readings_of_HU_are_one_on_the_constraint_and_two_off_it():
    rng = np.random.default_rng(3)
    cubic, w = bowl(3)
    method = methods.RMSProp(0.02, 0.9)
    y = after(method, cubic, w, 6)
    P = method.P(y.nu)
    V = torch.tensor(orthogonal(rng, D))
    for effective, same in ((2.0, True), (1.5, False)):
        H = effective * P.sqrt(V[:, :2]) @ P.sqrt(V[:, :2]).T
        loss = CubicLoss.with_derivatives(rng, y.w.numpy(), cubic.gradient(y.w.numpy()), H.numpy())
        beta = [
            dvi.central_flow(loss.problem(y.w.numpy()), method, check=False, edge_hessian=reading)
            .linearise(y.w, y.nu, P.inv_sqrt(V[:, :2]))
            .beta
            for reading in ("computed", "edge", "integrator")
        ]
        assert torch.equal(beta[0], beta[2])  # `linearise` takes HU as it is
        difference = float((beta[0] - beta[1]).abs().max() / beta[0].abs().max())
        assert difference < 1e-12 if same else difference > 1e-2


SECOND_ORDER = {name: ZOO[name] for name in ("shampoo", "shampoo, averages", "shampoo, one-sided", "adafactor")} | OWN


@pytest.mark.parametrize("kind", SECOND_ORDER.values(), ids=SECOND_ORDER)
@pytest.mark.parametrize("seed", [0, 1])
def test_at_second_order_a_step_of_one_is_the_optimizers_where_nothing_oscillates(kind, seed):
    """With matrix state, too: 30 steps, to the roundings of both."""
    cubic, w = bowl(seed)
    method = kind.make(0.02, SHAPES)
    flow = dvi.stable_flow(cubic.problem(w), method, accuracy="second-order")
    ours = dvi.solve(flow, 30, integrator=dvi.SemiImplicit(dt=1.0), progress=False, save=("w",)).series["w"]
    run = dvi.discrete(cubic.problem(w), method)
    y, seen = run.initial, [w]
    _, g = run.value_and_grad(y)
    for _ in range(30):
        y, _, g = run.step(y, g)
        seen.append(y.w.numpy())
    # half-steps of ν are taken back and made again: roundings of ν, enlarged by small √ν as above
    np.testing.assert_allclose(ours, np.stack(seen), rtol=0, atol=1e-9 * np.abs(seen).max())
    assert np.abs(np.diff(seen, axis=0)).max(axis=1).min() > 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("name", ["shampoo, averages", "shampoo, one-sided", "shampoo, momentum"])
def test_at_second_order_matrix_state_goes_through_the_edge(name):
    steps = (dvi.SemiImplicit(dt=0.5), dvi.SemiImplicit(dt=0.25))
    _, runs = through_the_edge(SECOND_ORDER[name], *steps, accuracy="second-order")
    over = []
    for central, distance in runs:
        assert central.breakpoints[0][1] == "enter"
        assert distance < 0.8
        over.append(np.nanmax(central.eigenvalues) - 2)
        assert np.nanmax(central.eigenvalues[-3:]) < 2 + 5e-3
    # an arrival is overrun by the second order of a step
    assert over[0] < 0.05
    assert over[1] < over[0] / 2 or over[1] < 1e-3


# ---- what does not fit ----------------------------------------------------------------------------------------------


class Adadelta(dvi.Method):
    """Zeiler's Adadelta with the delayed copy of u that its P needs; as on the page docs/zoo.md."""

    lr: float
    beta2: float = 0.9
    eps: float = 1e-6

    def init(self, w):
        return {"v": torch.zeros_like(w), "u": torch.zeros_like(w), "before": torch.zeros_like(w)}

    def f(self, nu, g):
        dv = (1 - self.beta2) * (g**2 - nu["v"])
        step_sq = (nu["u"] + self.eps) / (nu["v"] + dv + self.eps) * g**2
        return {"v": dv, "u": (1 - self.beta2) * (step_sq - nu["u"]), "before": nu["u"] - nu["before"]}

    def P(self, nu):
        return dvi.Diagonal(((nu["v"] + self.eps) / (nu["before"] + self.eps)) ** 0.5 / self.lr)


def test_adadelta_fits_the_discrete_form_but_has_no_flow():
    cubic, w = bowl(4)
    method, now = Adadelta(1.0), torch.tensor(w)
    nu, seen = method.init(now), [w]
    for t in range(100):
        g = torch.tensor(cubic.gradient(now.numpy()))
        nu = method.update(nu, g, t)
        now = now - method.P(nu).solve(g)
        seen.append(now.numpy())
    expected = by_torch(lambda p: torch.optim.Adadelta(p, lr=1.0, rho=0.9, eps=1e-6))(cubic, w, 100)
    np.testing.assert_allclose(np.stack(seen), expected, rtol=0, atol=1e-9 * np.abs(expected).max())
    with pytest.raises(dvi.SpecError, match="memory"):
        dvi.central_flow(cubic.problem(w), method, check=False)


def test_normalised_gd_lends_its_norm_the_memory_of_a_small_beta2():
    cubic, w = bowl(5)
    for memory in (0.1, 0.01):
        flow = dvi.central_flow(cubic.problem(w), methods.NormalizedGD(0.1, memory=memory), check=False)
        g, v = torch.tensor(cubic.gradient(w)), torch.tensor(2.0, dtype=torch.float64)
        rate = flow.calculus.nu_rate({"v": v}, 0.0, g)["v"]
        assert float(rate) == pytest.approx(float(g @ g - v) / memory, rel=1e-12)
        assert flow.calculus.nu_decay({"v": v}, 0.0, g) == pytest.approx(1 / memory, rel=1e-12)
    with pytest.raises(dvi.SpecError, match=r"memory must be in \(0, 1\)"):
        methods.NormalizedGD(0.1, memory=0.0)


@pytest.mark.parametrize("make", [methods.RMSProp, methods.RMSPropNorm], ids=["sign descent", "normalised"])
def test_methods_without_memory_are_refused_in_words(make):
    cubic, w = bowl(0)
    with pytest.raises(dvi.SpecError, match=r"β₂ = 0.*no differential equation"):
        dvi.central_flow(cubic.problem(w), make(0.1, 0.0), check=False)


# ---- matrix state ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [methods.Shampoo, methods.Adafactor])
def test_shapes_must_add_up_to_the_weights(make):
    cubic, w = bowl(0)
    with pytest.raises(dvi.SpecError, match=r"2×3 = 6 weights, but the problem has 8.*shapes=problem.shapes"):
        dvi.central_flow(cubic.problem(w), make(0.1, ((2, 3),)), check=False)
    with pytest.raises(dvi.SpecError, match=r"nothing = 0 weights"):
        dvi.central_flow(cubic.problem(w), make(0.1, ()), check=False)


def test_problems_know_their_shapes():
    assert network().shapes == ((4, 3), (4,), (2, 4))
    cubic, w = bowl(0)
    assert cubic.problem(w).shapes == ((8,),)
    # without shapes of its own a problem is one vector: Shampoo is then full-matrix AdaGrad
    flow = dvi.central_flow(cubic.problem(w), methods.Shampoo(0.1, cubic.problem(w).shapes), check=False)
    assert [x.shape for x in pytree.tree_leaves(flow.initial.nu)] == [(8, 8)]


def test_a_tensor_of_many_dimensions_has_a_matrix_for_each():
    g = torch.tensor(np.random.default_rng(0).normal(size=12))
    method = methods.Shampoo(1.0, ((2, 3, 2),), eps=0.5)
    nu = method.update(method.init(torch.zeros_like(g)), g, 0.0)
    G, dense = g.reshape(2, 3, 2).numpy(), np.eye(1)
    for axes in ("iab,jab->ij", "aib,ajb->ij", "abi,abj->ij"):
        values, Q = np.linalg.eigh(np.einsum(axes, G, G) + 0.5 * np.eye(G.shape[axes.index("i")]))
        dense = np.kron(dense, (Q * values ** (1 / 6)) @ Q.T)
    np.testing.assert_allclose(method.P(nu).apply(torch.eye(12, dtype=g.dtype)).numpy(), dense, atol=1e-13)
    sided = methods.Shampoo(1.0, ((2, 3, 2), ()), eps=0.5, one_sided=True)
    nu = sided.update(sided.init(torch.zeros(13, dtype=g.dtype)), torch.cat([g, g[:1]]), 0.0)
    assert [x.shape for x in pytree.tree_leaves(nu)] == [(2, 2), (1, 1)]
    sided.P(nu).check(torch.cat([g, g[:1]]))


def test_weights_that_no_example_reaches():
    """A dead input: a column of the gradient is zero for ever.  ε keeps it in P, or it drops out (Adafactor, ε = 0)."""
    g = torch.tensor([1.0, 0.0, 2.0, 3.0, 0.0, -1.0, 0.5, 0.5], dtype=torch.float64)
    for method, dead in (
        (methods.Shampoo(0.1, SHAPES), 0),
        (methods.Adafactor(0.1, SHAPES), 0),
        (methods.Adafactor(0.1, SHAPES, eps=0.0), 2),
        (methods.AdaGrad(0.1, 0.0), 2),
    ):
        P = method.P(validate(method, torch.zeros_like(g), g))
        assert int(P.dead().sum() if P.dead() is not None else 0) == dead
        assert torch.equal(P.solve(g)[[1, 4]], torch.zeros(2, dtype=g.dtype))
        assert bool(P.solve(g).isfinite().all())
