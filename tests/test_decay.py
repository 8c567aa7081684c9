"""Decoupled weight decay: thresholds, steps and flows against closed forms, L2 regularisation and torch's own."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CubicLoss, examples, frame_of
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import eigh
from test_methods import agree, bowl, torch_trajectory, trajectory
from test_symbolic import the_page_says_what_the_derivation_holds
from torch.utils import _pytree as pytree

import dvi
import dvi.testing
from dvi.methods import Adam, AdamW, Filter, GradientDescent, HeavyBall, NAdam, Nesterov, RMSProp, RMSPropNorm
from dvi.solvers.nodes import empty_frame
from dvi.solvers.protocol import State
from dvi.solvers.svec import smat, svec

EPS = np.finfo(np.float64).eps
seeds = st.integers(0, 2**32 - 1)


class GDW(GradientDescent):
    """As a user declares it.  ``weight_decay`` may be anything that ``decay`` may give, over lr."""

    weight_decay: Any = 0.1

    def decay(self):
        if isinstance(self.weight_decay, list):
            return [(self.lr * x, n) for x, n in self.weight_decay]
        return self.lr * self.weight_decay

    ranges = {k: v for k, v in GradientDescent.ranges.items() if k != "weight_decay"}


class RMSPropW(RMSProp):
    weight_decay: float = 0.1

    def decay(self):
        return self.lr * self.weight_decay


class NormW(RMSPropNorm):
    weight_decay: float = 0.1

    def decay(self):
        return self.lr * self.weight_decay


@dataclass(frozen=True)
class Momentum:
    """A filter with one buffer, m_t = b m_{t−1} + n₀g_t + n₁g_{t−1}."""

    b: float
    n0: float
    n1: float


FILTERS = {
    "none": Momentum(0.0, 1.0, 0.0),
    "heavy ball": Momentum(0.7, 1.0, 0.0),
    "average": Momentum(0.9, 0.1, 0.0),
    "nesterov": Momentum(0.8, 1.8, -0.8),
}


class Plain(dvi.Method):
    """A fixed diagonal P, any decay, any filter with one buffer."""

    p: Any
    gamma: Any
    buffer: Any

    def P(self, nu):
        return dvi.Diagonal(torch.as_tensor(self.p))

    def Q(self):
        q = self.buffer
        return Filter([q.n0, q.n1], [1.0, -q.b]) if q.b else Filter()

    def decay(self):
        return torch.as_tensor(self.gamma)


# ---- the threshold --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILTERS)
@given(seed=seeds)
@examples(5)
def test_the_optimizer_leaves_stability_at_an_effective_sharpness_of_2(name, seed):
    """On a quadratic, weights of different decay: the optimizer's own matrix has its first root on the circle at −1."""
    rng, d, q = np.random.default_rng(seed), 4, FILTERS[name]
    p, gamma = rng.uniform(0.5, 2, d), rng.uniform(0, 0.4, d)
    root = rng.normal(size=(d, d))
    H = root @ root.T + 0.1 * np.eye(d)
    flow = dvi.central_flow(
        CubicLoss(np.ones(d), H, np.zeros((d, d, d))).problem(np.ones(d)), Plain(p, gamma, q), check=False
    )
    P = flow.calculus.P(flow.initial.nu, 0.0).apply(torch.eye(d, dtype=torch.float64)).numpy()
    Q = (q.n0 - q.n1) / (1 + q.b)
    # by hand: −u = (1 − γ)u − P⁻¹Q(−1)Hu
    np.testing.assert_allclose(2 * P, np.diag((2 - gamma) * p / Q), rtol=1e-12)
    edge = H * 2 / eigh(H, P, eigvals_only=True)[-1]

    def roots(H):
        """Of (w, m, g) before, by m = b m + n₀Hw + n₁g."""
        zero, one = np.zeros((d, d)), np.eye(d)
        m = np.hstack([q.n0 * H, q.b * one, q.n1 * one])
        w = np.hstack([np.diag(1 - gamma), zero, zero]) - m / p[:, None]
        return np.linalg.eigvals(np.vstack([w, m, np.hstack([H, zero, zero])]))

    at = roots(edge)
    # an eigenvalue of a matrix of condition 10³ at most
    assert np.abs(at + 1).min() < 1e-12
    assert np.abs(at).max() < 1 + 1e-12
    assert np.abs(roots((1 - 1e-6) * edge)).max() < 1 < np.abs(roots((1 + 1e-6) * edge)).max()


@pytest.mark.parametrize("decay", [0.0, 0.02, 0.3, 0.9])
@pytest.mark.parametrize("Q", [HeavyBall(1.0, 0.9).Q(), Adam(1.0).Q(), Nesterov(1.0, 0.9).Q(), NAdam(1.0).Q()])
def test_where_a_filter_escapes_under_decay(Q, decay):
    """The least λ at which (z − 1 + γ) D + λ N has a root on the circle, against the roots on a fine grid of λ."""
    frequency, sharpness = Q.escape_under(decay)
    assert frequency == np.pi
    assert sharpness == pytest.approx((2 - decay) / 2 * float(Q.threshold), rel=1e-12)

    def largest(scale):
        N, D = (np.pad(x, (0, 2 - len(x))) for x in (Q.numerator, Q.denominator))  # times z, in powers of z
        return np.abs(np.roots(np.polyadd(np.polymul([1.0, -1.0 + decay], D), scale * sharpness * N))).max()

    assert max(largest(s) for s in np.linspace(0.01, 0.999, 100)) < 1 < largest(1.001)


# ---- the steps ------------------------------------------------------------------------------------------------------


@given(seed=seeds, b=st.floats(0.0, 0.95), weight_decay=st.floats(0.0, 20.0))
@examples(4)
def test_adamw_is_torchs_for_200_steps(seed, b, weight_decay):
    cubic, w = bowl(seed)
    ours = trajectory(AdamW(0.003, b, 0.99, weight_decay=weight_decay), cubic, w, steps=200)
    theirs = torch_trajectory(
        lambda p: torch.optim.AdamW(p, lr=0.003, betas=(b, 0.99), weight_decay=weight_decay), cubic, w, steps=200
    )
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-9 * np.abs(theirs).max())  # see ROUNDING in test_methods


def halving(t):
    return 0.02 * 0.5 ** (t / 50)


def falling(t):
    return 3.0 / (1 + 0.05 * t)


def test_adamw_with_groups_and_schedules_is_torchs():
    """Two groups, no decay on the biases; the learning rate by a scheduler, the weight decay changed by hand."""
    shapes = ((2, 3), (2,))
    cubic, w = bowl(5, d=8)
    pieces = [torch.tensor(x) for x in np.split(w, [6])]
    parameters = [x.reshape(s).requires_grad_() for x, s in zip(pieces, shapes, strict=True)]
    groups = [{"params": parameters[:1]}, {"params": parameters[1:], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.02, betas=(0.8, 0.95), weight_decay=3.0)
    scheduler, loss = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.5 ** (t / 50)), cubic.loss(pieces[0])
    theirs = [w]
    for t in range(200):
        optimizer.param_groups[0]["weight_decay"] = falling(t)
        optimizer.zero_grad()
        loss(torch.cat([p.reshape(-1) for p in parameters])).backward()
        optimizer.step()
        scheduler.step()
        theirs.append(np.concatenate([p.detach().numpy().ravel() for p in parameters]))
    ours = trajectory(AdamW(halving, 0.8, 0.95, weight_decay=falling, shapes=shapes), cubic, w, steps=200)
    np.testing.assert_allclose(ours, np.stack(theirs), rtol=0, atol=1e-9 * np.abs(w).max())


@given(seed=seeds)
@examples(5)
def test_adam_on_a_penalised_problem_is_torchs_adam_with_weight_decay(seed):
    cubic, w = bowl(seed)
    optimizer = dvi.discrete(cubic.problem(w).penalised(0.7), Adam(0.003, 0.8, 0.99))
    y, seen = optimizer.initial, [w]
    _, g = optimizer.value_and_grad(y)
    for _ in range(100):
        y, _, g = optimizer.step(y, g)
        seen.append(y.w.numpy())
    theirs = torch_trajectory(
        lambda p: torch.optim.Adam(p, lr=0.003, betas=(0.8, 0.99), weight_decay=0.7), cubic, w, steps=100
    )
    agree(np.stack(seen), theirs)


# ---- gradient descent, where decay is a penalty ---------------------------------------------------------------------

LAMBDAS = {
    "one number": 0.3,
    "weight by weight": torch.linspace(0, 0.5, 6, dtype=torch.float64),
    "stretches": [(0.4, 2), (0.0, 1), (0.2, 3)],
}


def as_vector(weight_decay):
    if isinstance(weight_decay, list):
        return torch.cat([torch.full((n,), x, dtype=torch.float64) for x, n in weight_decay])
    return torch.as_tensor(weight_decay, dtype=torch.float64) * torch.ones(6, dtype=torch.float64)


@pytest.mark.parametrize("name", LAMBDAS)
def test_gradient_descent_with_decay_is_gradient_descent_with_a_penalty(name):
    """The same iterates, α, β, edge and drift: (2 − ηλ)/η − H is 2/η − (H + λ)."""
    cubic, w = bowl(3, d=6)
    problem, lr = cubic.problem(w), 0.05
    method, penalised = GDW(lr, LAMBDAS[name]), problem.penalised(as_vector(LAMBDAS[name]))
    other = [dvi.discrete(penalised, GradientDescent(lr)), None, None]
    y = other[0].initial
    _, g = other[0].value_and_grad(y)
    seen = [w]
    for _ in range(25):
        y, _, g = other[0].step(y, g)
        seen.append(y.w.numpy())
    agree(trajectory(method, cubic, w), np.stack(seen))

    U, X = torch.tensor(np.random.default_rng(0).normal(size=(6, 2))), np.array([[0.2, 0.1], [0.1, 0.3]])
    ours = dvi.central_flow(problem, method, check=False).linearise(problem.w0, {}, U)
    theirs = dvi.central_flow(penalised, GradientDescent(lr), check=False).linearise(problem.w0, {}, U)
    # some ten products of numbers of order one to a hundred
    for a, b in ((ours.alpha, theirs.alpha), (ours.beta, theirs.beta), (ours.gap, theirs.gap)):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.drift(X).w, theirs.drift(X).w, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("weight_decay", [0.5, [(0.6, 1), (0.0, 1), (0.3, 1)]])
@pytest.mark.parametrize("integrator", [dvi.RungeKutta(4, h=1 / 4), dvi.MacroStep(1e-4)])
def test_the_flow_along_a_curved_edge_in_closed_form(weight_decay, integrator):
    """The circle's exact weights, which slide along its edge from t = 1.3: the plateau is at (2 − ηλ)/η."""
    circle = dvi.problems.Circle(entry=1.3)
    weights = torch.tensor([0.6, 0.0, 0.3], dtype=torch.float64) if isinstance(weight_decay, list) else weight_decay

    def loss(w):
        """That of the circle without ½Σλw², which the decay adds."""
        return circle.loss(w) - 0.5 * (weights * w.square()).sum()

    flow = dvi.central_flow(dvi.Problem(loss, circle.problem.w0), GDW(circle.lr, weight_decay), check=False)
    run = dvi.solve(flow, steps=8, integrator=integrator, save=("w",), progress=False)
    error = max(np.linalg.norm(w - circle.weights(t).numpy()) for t, w in zip(run.t, run.series["w"], strict=True))
    # docs/mathematics.md: 3e-6 and 2e-4 for these integrators on the circle itself
    assert error < (1e-5 if isinstance(integrator, dvi.RungeKutta) else 5e-4)
    assert run.breakpoints[0][0] == pytest.approx(1.3, abs=0.01)
    H = torch.autograd.functional.hessian(loss, torch.tensor(run.series["w"][-1])).numpy()
    largest = eigh(H, np.diag(1 / circle.lr - 0.5 * as_vector(weight_decay).numpy()[:3]), eigvals_only=True)[-1]
    assert largest == pytest.approx(2, abs=1e-3)  # the flow's error in w, times a curvature of order 1/η


# ---- α and β --------------------------------------------------------------------------------------------------------


def rising(t):
    return 2.0 + 0.1 * t


SHAPES = ((2, 2), (2,))
METHODS = {
    "gd": GDW(0.02, 2.0),
    "gd, groups": GDW(0.02, [(3.0, 4), (0.0, 2)]),
    "gd, schedules": replace(GDW(halving, 2.0)),
    "rmsprop": RMSPropW(0.02, 0.9, 1e-3, weight_decay=2.0),
    "norm": NormW(0.02, 0.9, weight_decay=3.0),
    "adamw": AdamW(0.02, 0.7, 0.9, weight_decay=2.0),
    "adamw, groups": AdamW(0.02, 0.7, 0.9, weight_decay=2.0, shapes=SHAPES),
    "adamw, schedules": AdamW(halving, 0.7, 0.9, weight_decay=rising, shapes=SHAPES, bias_correction=False),
}


@pytest.mark.parametrize("name", METHODS)
def test_methods_with_decay_conform(name):
    dvi.testing.check_method(METHODS[name])


def decays(method, t, d):
    declared = method.at(t).decay()
    if isinstance(declared, list):
        return np.concatenate([np.full(n, x) for x, n in declared])
    return np.full(d, float(declared))


@pytest.mark.parametrize("name", METHODS)
@given(seed=seeds)
@examples(3)
def test_alpha_and_beta_are_the_rates_of_the_gap(name, seed):
    """The gap is made by hand, (2 − γ)P/Q(−1) − H, and moved along the flow's own drift."""
    rng, method, d = np.random.default_rng(seed), METHODS[name], 6
    cubic = CubicLoss.random(rng, d)
    w = rng.normal(size=d)
    flow = dvi.central_flow(cubic.problem(w), method, check=False, accuracy="paper")
    nu = pytree.tree_map(lambda x: torch.tensor(rng.uniform(0.5, 2, size=x.shape)), flow.initial.nu)
    U, X, t = rng.normal(size=(d, 2)), rng.normal(size=(2, 2)), 3.3
    X = X @ X.T
    lin = flow.linearise(torch.tensor(w), nu, torch.tensor(U), t=t)
    rate = lin.drift(X)

    def gap(s):
        now = method.at(t + s)
        P = now.P(pytree.tree_map(lambda x, dx: x + s * dx, nu, rate.nu))
        P = P.apply(torch.eye(d, dtype=torch.float64)).numpy() * (2 - decays(method, t + s, d)) / 2
        return U.T @ (float(now.Q().threshold) * P - cubic.hessian(w + s * rate.w.numpy())) @ U

    # five points: truncation s⁴, rounding ε/s
    s = 1e-3 / (1 + float(rate.w.norm()) + max([float(x.abs().max()) for x in pytree.tree_leaves(rate.nu)], default=0))
    slope = (8 * (gap(s) - gap(-s)) - (gap(2 * s) - gap(-2 * s))) / (12 * s)
    predicted = smat(lin.beta.numpy() @ svec(X)) - lin.alpha.numpy()
    tolerance = 1e-7 * np.abs(slope).max() + 30 * EPS * np.abs(gap(0.0)).max() / s
    np.testing.assert_allclose(lin.gap.numpy(), gap(0.0), rtol=0, atol=1e-11 * np.abs(gap(0.0)).max())
    assert np.abs(predicted - slope).max() < tolerance
    # and the new term is seen: without it the rates are others
    term = smat((lin.T @ torch.tensor(decays(method, t, d) * w)).numpy())
    assert np.abs(term).max() > 10 * tolerance


# ---- the flow of second order ---------------------------------------------------------------------------------------


def after(flow, steps):
    y = flow.initial
    _, g = flow.value_and_grad(y)
    for _ in range(steps):
        y, _, g = flow.step(y, g)
    return y, g


PHASES = {
    "gd": lambda h: GDW(0.08 * h, 3.0),
    "gd, groups": lambda h: GDW(0.08 * h, [(4.0, 4), (0.0, 2)]),
    "rmsprop": lambda h: RMSPropW(0.01 * h, 1 - 0.05 * h, 1e-3, weight_decay=20.0),
    "adamw": lambda h: AdamW(0.004 * h, 1 - 0.2 * h, 1 - 0.05 * h, weight_decay=20.0),
}


@pytest.mark.parametrize("name", PHASES)
def test_the_second_order_flow_is_of_second_order(name):
    """Half of all rates, twice the steps: the error falls to a quarter."""
    errors = []
    cubic, w = bowl(2, d=6)
    for h in (1.0, 0.5):
        problem, method = cubic.problem(w), PHASES[name](h)
        optimizer = dvi.discrete(problem, method)
        start, _ = after(optimizer, int(20 / h))
        end, _ = after(optimizer, int(40 / h))
        flow = dvi.stable_flow(problem, method, accuracy="second-order", check=False)
        run = dvi.solve(flow, int(20 / h), start=start, integrator=dvi.SemiImplicit(dt=1 / 8), progress=False)
        errors.append(float((run.w - end.w).norm() / (end.w - start.w).norm()))
    assert errors[0] < 5e-3
    assert 3 < errors[0] / errors[1] < 6  # 4, but for the next order


def test_where_nothing_oscillates_adamws_flow_is_20_times_closer_than_the_leading_order_drift():
    problem = dvi.problems.digits(network="mlp", loss="mse", n=60, width=8)
    method = AdamW(2e-4, 0.9, 0.95, weight_decay=50.0, shapes=problem.shapes)
    optimizer = dvi.discrete(problem, method)
    start, end = after(optimizer, 40)[0], after(optimizer, 70)[0]
    distance = {}
    for accuracy, integrator in (("paper", dvi.RungeKutta(4, h=1 / 4)), ("second-order", dvi.SemiImplicit(dt=1 / 4))):
        flow = dvi.stable_flow(problem, method, accuracy=accuracy, check=False)
        run = dvi.solve(flow, 30, start=start, integrator=integrator, progress=False)
        distance[accuracy] = float((run.w - end.w).norm())
    assert distance["second-order"] < distance["paper"] / 20
    assert distance["second-order"] < 1e-3 * float((end.w - start.w).norm())


@pytest.mark.parametrize("name", METHODS)
def test_the_central_map_is_the_optimizer_where_nothing_oscillates(name):
    cubic, w = bowl(4, d=6)
    problem, method = cubic.problem(w), METHODS[name]
    start, _ = after(dvi.discrete(problem, method), 10)
    flow = dvi.central_map(problem, method, check=False)
    y = State(start.w, start.nu, start.t, start.m)
    _, g = flow.value_and_grad(y)
    s = flow.stagger(y, g, 1.0)
    following, _ = after(dvi.discrete(problem, method), 11)
    end = flow.implicit_step(s, g, empty_frame(flow, y), 1.0).end(None)
    torch.testing.assert_close(end.w, following.w, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", ["gd", "gd, groups", "rmsprop", "adamw, groups"])
@pytest.mark.parametrize("dt", [0.25, 1.0])
def test_the_gap_at_the_end_of_a_semi_implicit_step(name, dt):
    """Against 2P̃ − H made at the end of the step, where H is linear in w: exact but for ν's answer to X."""
    rng, method = np.random.default_rng(0), METHODS[name]
    cubic, w = CubicLoss.random(rng, 6), rng.normal(size=6)
    flow = dvi.central_flow(cubic.problem(w), method, check=False, accuracy="second-order")
    y = State(torch.tensor(w), flow.initial.nu, 3.0, flow.initial.m)
    _, g = flow.value_and_grad(y)
    U = torch.tensor(rng.normal(size=(6, 2)))
    frame = frame_of(flow, y, U)
    s = flow.stagger(y, g, dt)
    step = flow.implicit_step(s, g, frame, dt)
    end = step.end(None)
    gamma = torch.tensor(decays(method, 3.0, 6))
    e = (1 - gamma) ** dt
    now = method.at(3.0)
    moved = torch.where(gamma > 0, (1 - e) / gamma, dt) * float(now.Q().gain) * now.P(end.nu).solve(end.m)
    torch.testing.assert_close(end.w, e * s.w - moved, rtol=1e-10, atol=1e-11)
    P = now.P(end.nu_now).apply(torch.eye(6, dtype=torch.float64)).numpy() * (2 - gamma.numpy()) / 2
    gap = U.numpy().T @ (float(now.Q().threshold) * P - cubic.hessian(end.w.numpy())) @ U.numpy()
    np.testing.assert_allclose(step.gap, gap, rtol=0, atol=1e-10 * np.abs(gap).max())


# ---- the other flows ------------------------------------------------------------------------------------------------


def test_the_stationary_nu_holds_the_edge_that_decay_lowers():
    problem = dvi.problems.digits(network="mlp", loss="mse", n=40, width=4)
    method = RMSPropW(0.01, 0.9, 1e-6, weight_decay=40.0)  # γ = 0.4
    flow = dvi.central_flow(problem, method, check=False)
    point = dvi.stationary(flow, tol=1e-8)
    assert point.k > 0
    P = method.P(point.nu)
    # by hand: Hu = (2 − γ)Pu
    torch.testing.assert_close(point.HU, 1.6 * P.apply(point.U), rtol=0, atol=1e-6 * float(point.HU.abs().max()))
    _, g = problem.value_and_grad(problem.w0)
    balance = g**2 + ((point.HU @ torch.tensor(point.X)) * point.HU).sum(dim=1)
    torch.testing.assert_close(point.nu["v"], balance, rtol=1e-6, atol=0)
    moving = dvi.stationary_flow(problem, method, check=False, tol=1e-6)
    look = moving.look(moving.settled(moving.initial))
    expected = -P.solve(g) - 0.4 * problem.w0
    pushed = 0.5 * (torch.tensor(svec(look.X)) @ look.frame.T)
    torch.testing.assert_close(look.rate, expected - P.solve(pushed), rtol=1e-4, atol=1e-6)
    with pytest.raises(dvi.SpecError, match="without weight decay"):
        dvi.stationary(flow, by="sdp")


def test_the_ablated_flow_decays():
    problem = dvi.problems.digits(network="mlp", loss="mse", n=40, width=4)
    method = RMSPropW(0.01, 0.9, 1e-6, weight_decay=20.0)
    flow = dvi.ablated_flow(problem, method, check=False)
    lin = flow.linearise(problem.w0, flow.initial.nu, torch.eye(problem.dim, 1, dtype=torch.float64))
    _, g = problem.value_and_grad(problem.w0)
    expected = -method.P(flow.initial.nu).solve(g) - 0.2 * problem.w0
    torch.testing.assert_close(lin.drift([[0.7]]).w, expected, rtol=1e-12, atol=1e-14)


def test_a_decay_of_zero_changes_nothing_but_rounding():
    problem = dvi.problems.digits(network="mlp", loss="mse", n=60, width=8)
    ours = dvi.compare(problem, AdamW(2e-2, 0.5, 0.99, weight_decay=0.0), 20, eigen_every=0, progress=False)
    theirs = dvi.compare(problem, Adam(2e-2, 0.5, 0.99), 20, eigen_every=0, progress=False)
    assert torch.equal(ours.discrete.w, theirs.discrete.w)
    assert ours.central.breakpoints[0][0] == pytest.approx(theirs.central.breakpoints[0][0])
    # rounding, enlarged by 20 steps of a flow at the edge
    torch.testing.assert_close(ours.central.w, theirs.central.w, rtol=0, atol=1e-9)


def test_in_float32_schedules_of_decay_stay_in_float32():
    problem = dvi.problems.digits(network="mlp", loss="mse", n=40, width=4, dtype=torch.float32)
    method = AdamW(halving, 0.5, 0.99, weight_decay=falling, shapes=problem.shapes)
    race = dvi.compare(problem, method, 4, runs=("discrete", "central", "map"), eigen_every=0, progress=False)
    assert {run.w.dtype for run in race.runs.values()} == {torch.float32}
    assert race.distance["discrete", "map"][-1] < 0.1 * float((race.discrete.w - problem.w0).norm())


# ---- in closed form -------------------------------------------------------------------------------------------------

DERIVED = {name: METHODS[name] for name in ("gd", "gd, schedules", "rmsprop", "norm", "adamw")}


@pytest.mark.parametrize("name", DERIVED)
def test_the_closed_form_is_the_compilers(name):
    rng, method, d, t = np.random.default_rng(1), METHODS[name], 6, 3.3
    cubic, w = CubicLoss.random(rng, d), rng.normal(size=d)
    U, X = rng.normal(size=(d, 2)), np.diag([0.2, 0.1])
    flow = dvi.central_flow(cubic.problem(w), method, check=False, accuracy="paper")
    nu = pytree.tree_map(lambda x: torch.tensor(rng.uniform(0.5, 2, size=x.shape)), flow.initial.nu)
    lin = flow.linearise(torch.tensor(w), nu, torch.tensor(U), t=t)
    arguments = (cubic.gradient(w), nu, U, cubic.hessian(w) @ U, lin.T, X)
    found = dvi.derive(method, accuracy="paper").evaluate(*arguments, t=t, w=w)
    for ours, theirs in ((found.alpha, lin.alpha), (found.beta, lin.beta), (found.w, lin.drift(X).w)):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-10 * float(np.abs(np.asarray(theirs)).max()))
    second = dvi.derive(method, accuracy="second-order").evaluate(*arguments, t=t, w=w, m=arguments[0])
    now, gamma = method.at(t), decays(method, t, d)
    step = gamma * w + float(now.Q().gain) * now.P(nu).solve(torch.tensor(arguments[0])).numpy()
    np.testing.assert_allclose(second.w, np.log(1 - gamma) / gamma * step, rtol=1e-10)
    with pytest.raises(dvi.SpecError, match="w=…"):
        dvi.derive(method).evaluate(*arguments, t=t)


@pytest.mark.parametrize("accuracy", ["paper", "second-order"])
@pytest.mark.parametrize("name", ["gd", "rmsprop", "norm"])
def test_latex_says_what_the_expressions_say(name, accuracy):
    the_page_says_what_the_derivation_holds(dvi.derive(METHODS[name], accuracy=accuracy))


def test_what_derive_prints():
    page = str(dvi.derive(AdamW(0.1, eps=0.0, bias_correction=False)))
    assert "c = (β₁ + 1)*(2 - η*λ)/(1 - β₁)" in page
    assert "dw/dt = (w + m/(λ*sqrt(ν)))*log(1 - η*λ)" in page
    assert "0 ⪯ Σ ⟂ cP - H ⪰ 0" in page
    assert r"c &= 2 - \eta \lambda" in dvi.derive(GDW).latex()
    with pytest.raises(dvi.SpecError, match="differs between weights"):
        dvi.derive(METHODS["adamw, groups"])


# ---- blocks, and what is refused ------------------------------------------------------------------------------------


class Blocked(dvi.Method):
    """A dense block that decays as one, and a scalar one."""

    decays: Any
    lr: float = 0.1

    def P(self, nu):
        A = torch.tensor([[2.0, 0.3, 0.0], [0.3, 1.0, 0.1], [0.0, 0.1, 3.0]], dtype=torch.float64)
        return dvi.Blocks([dvi.Dense(A), dvi.Scalar(1.5)], [3, 3]) / self.lr

    def decay(self):
        return self.decays


def test_blocks_with_a_decay_of_their_own():
    method = Blocked([(0.3, 3), (0.1, 3)])
    dvi.testing.check_method(method)
    cubic, w = bowl(1, d=6)
    flow = dvi.central_flow(cubic.problem(w), method, check=False)
    P = method.P({}).apply(torch.eye(6, dtype=torch.float64))
    gamma = torch.tensor([0.3, 0.3, 0.3, 0.1, 0.1, 0.1], dtype=torch.float64)
    metric = flow.calculus.P({}, 0.0).apply(torch.eye(6, dtype=torch.float64))
    torch.testing.assert_close(metric, P @ torch.diag(1 - gamma / 2), rtol=1e-12, atol=1e-13)
    # within the scalar block weights may differ, also where they are given weight by weight
    dvi.testing.check_method(Blocked([(0.3, 3), (torch.tensor([0.1, 0.0, 0.2], dtype=torch.float64), 3)]))


@pytest.mark.parametrize(
    ("decays", "words"),
    [
        ([(0.3, 2), (0.1, 4)], "differs between weights that .* mixes"),
        (torch.linspace(0, 0.3, 6, dtype=torch.float64), "differs between weights that .* mixes"),
        ([(0.3, 3), (0.1, 4)], "is for 7 weights; w has 6"),
        ([0.3, 0.1], "pairs"),
        (torch.zeros(5), r"shape \[5\] for 6 weights"),
        ("much", "gives a str"),
        (1.0, r"must lie in \[0, 1\)"),
        (-0.1, r"must lie in \[0, 1\)"),
        (torch.full((6,), torch.nan, dtype=torch.float64), r"must lie in \[0, 1\)"),
    ],
)
def test_a_decay_that_does_not_fit_is_refused(decays, words):
    cubic, w = bowl(1, d=6)
    with pytest.raises(dvi.SpecError, match=words):
        dvi.central_flow(cubic.problem(w), Blocked(decays), check=False)


def test_a_decay_that_leaves_its_range_later_ends_the_run_by_name():
    cubic, w = bowl(1, d=6)
    method = AdamW(0.1, weight_decay=lambda t: 5.0 if t < 3 else 20.0)
    with pytest.raises(dvi.RunError, match=r"AdamW.decay\(\) at t = 3 reaches from 2 to 2"):
        dvi.solve(dvi.discrete(cubic.problem(w), method), 6, progress=False)
    with pytest.raises(dvi.SpecError, match="weight_decay must be zero or positive"):
        AdamW(0.1, weight_decay=-1.0)


def test_a_schedule_that_is_lost_in_decay_is_found():
    class Lost(GradientDescent):
        def decay(self):
            return float(self.lr) * 2.0

    cubic, w = bowl(1, d=6)
    with pytest.raises(dvi.SpecError, match=r"schedule self\.lr"):
        dvi.central_flow(cubic.problem(w), Lost(lambda t: 0.1 / (1 + t)), check=False)


def test_a_penalised_problem():
    problem = dvi.problems.digits(network="mlp", loss="mse", n=40, width=4)
    d = problem.dim
    weights = torch.linspace(0, 1, d, dtype=torch.float64)
    for derivatives in ("autodiff", "mixed", "finite-difference"):
        base = dvi.problems.digits(network="mlp", loss="mse", n=40, width=4, derivatives=derivatives)
        new = base.penalised(weights)
        assert type(new) is type(base)
        assert new.shapes == base.shapes
        before = base.ledger.gradients
        value, g = new.value_and_grad(base.w0)
        assert (base.ledger.gradients, new.ledger.gradients) == (before, 1)
        expected, slope = problem.value_and_grad(base.w0)
        torch.testing.assert_close(value, expected + 0.5 * (weights * base.w0**2).sum())
        torch.testing.assert_close(g, slope + weights * base.w0)
        V = torch.eye(d, 2, dtype=torch.float64)
        # differences are good to 1e-7
        torch.testing.assert_close(
            new.hvp(base.w0, V), problem.hvp(base.w0, V) + weights[:, None] * V, rtol=0, atol=1e-5
        )
        new.check()
    for wrong, words in ((-1.0, "zero or positive"), (torch.zeros(3), "shape"), (float("inf"), "finite")):
        with pytest.raises(dvi.ProblemError, match=words):
            problem.penalised(wrong)
