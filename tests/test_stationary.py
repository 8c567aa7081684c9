"""Stationary ν: against the semidefinite program, duality bounds, closed forms, and the flow held at fixed w."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import AdaGrad, CubicLoss, examples
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import softplus

import dvi
from dvi.methods import GradientDescent, RMSProp, RMSPropNorm
from dvi.solvers import ccp
from dvi.solvers.protocol import State
from dvi.stationarity.anderson import Anderson
from dvi.stationarity.diagonal_sdp import LARGEST, stable_diagonal

seeds = st.integers(0, 2**32 - 1)


def quadratic(g, H):
    """A loss whose gradient and Hessian at 0 are g [d] and H [d, d]."""
    d = len(g)
    return CubicLoss(np.asarray(g), np.asarray(H), np.zeros((d, d, d))).problem(np.zeros(d))


def draw(rng, d, zeros=0):
    """Gradient and an indefinite Hessian whose scales differ by coordinate; some gradients exactly zero.

    The curvature is positive there, so that pᵢ ≥ Hᵢᵢ/2 > 0: else the optimum may have pᵢ = 0, a singular P.
    """
    A, scale = rng.normal(size=(d, d)), np.exp(rng.normal(size=d))
    g, H, none = scale * rng.normal(size=d), np.outer(scale, scale) * (A + A.T), rng.permutation(d)[:zeros]
    g[none] = 0.0
    H[none, none] = np.abs(H[none, none])
    return g, H


def objective(p, g, lr):
    return np.sum(p) + np.sum(g**2 / p) / lr**2


# ---- eq. (12) ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("d", "zeros"), [(1, 0), (2, 1), (6, 0), (6, 3), (15, 14), (25, 5), (60, 0)])
def test_fixed_point_and_semidefinite_program_agree(d, zeros):
    g, H = draw(np.random.default_rng(d + zeros), d, zeros)
    lr = 0.2
    flow = dvi.central_flow(quadratic(g, H), RMSProp(lr, 0.9), check=False)
    found = dvi.stationary(flow)
    reference = stable_diagonal(H, np.abs(g) / lr)
    p = np.sqrt(found.nu["v"].numpy()) / lr
    # the interior point method's p is off by about √gap of its objective, its gap is some 1e-13 to 1e-10 here
    np.testing.assert_allclose(p, reference.p, rtol=1e-6, atol=1e-6 * reference.p.max())
    assert objective(p, g, lr) == pytest.approx(reference.bounds.primal, rel=1e-8)
    assert -1e-9 <= reference.bounds.gap <= 1e-6
    proved = dvi.duality(flow, found)
    assert -1e-12 <= proved.gap <= 1e-6
    assert proved.primal == pytest.approx(objective(p, g, lr), rel=1e-6)
    assert np.linalg.eigvalsh(2 * np.diag(p) - H)[0] >= -1e-6 * p.max()
    # Σ is the multiplier in other units (errata): the flow's Σ is (η²/2) Σ̂
    D = found.D.numpy()
    np.testing.assert_allclose(2 / lr**2 * D @ D.T, reference.multiplier, atol=1e-4)


def test_sdp_as_a_stationary_point():
    g, H = draw(np.random.default_rng(3), 12)
    flow = dvi.central_flow(quadratic(g, H), RMSProp(0.2, 0.9), check=False)
    one, other = dvi.stationary(flow), dvi.stationary(flow, by="sdp")
    assert one.k == other.k > 0
    np.testing.assert_allclose(other.nu["v"], one.nu["v"], rtol=3e-6)  # √gap, twice since ν ~ p²
    np.testing.assert_allclose(other.covariance_diagonal, one.covariance_diagonal, atol=1e-5 * 0.2**2)
    assert dvi.duality(flow, other).gap <= 1e-6


@given(seeds, st.integers(2, 9), st.floats(0.01, 2))
@examples(8)
def test_no_feasible_preconditioner_is_better_prop_2(seed, d, lr):
    rng = np.random.default_rng(seed)
    g, H = draw(rng, d)
    flow = dvi.central_flow(quadratic(g, H), RMSProp(lr, 0.9), check=False)
    p = np.sqrt(dvi.stationary(flow).nu["v"].numpy()) / lr
    best = objective(p, g, lr)
    for size in (1e-3, 0.1, 1.0):
        other = p * np.exp(size * rng.normal(size=d))
        root = np.sqrt(other)
        other *= max(1.0, np.linalg.eigvalsh(H / np.outer(root, root))[-1] / 2)  # feasible
        assert objective(other, g, lr) >= best * (1 - 1e-7)  # p is 1000·tol = 1e-6 off the constraint at most
    # and in closed form: (26), (27)
    sigma = dvi.stationary(flow).covariance_diagonal.numpy()
    np.testing.assert_allclose(p**2 * (1 - 4 / lr**2 * sigma), g**2 / lr**2, atol=1e-7 * (p**2).max())


@given(seeds, st.integers(2, 7), st.booleans())
@examples(6)
def test_one_stationary_point_only_prop_3(seed, d, some_zero):
    """From different first guesses, and with gradients that are exactly zero."""
    g, H = draw(np.random.default_rng(seed), d, d // 2 if some_zero else 0)
    flow = dvi.central_flow(quadratic(g, H), RMSProp(0.3, 0.9), check=False)
    one = dvi.stationary(flow, seed=1)
    other = dvi.stationary(flow, seed=2, rank=2)
    # Errors of p are √gap at worst, and the gap at a relative residual of 1e-9 is about 1e-9 times a condition number.
    np.testing.assert_allclose(
        one.nu["v"].sqrt(), other.nu["v"].sqrt(), rtol=1e-5, atol=1e-6 * float(one.nu["v"].max().sqrt())
    )
    gaps = [dvi.duality(flow, point).gap for point in (one, other)]
    assert max(gaps) <= 1e-6


def test_the_bound_exposes_a_wrong_point():
    """The gap is a proof only if it is large where the point is not optimal."""
    g, H = draw(np.random.default_rng(6), 10)
    flow = dvi.central_flow(quadratic(g, H), RMSProp(0.4, 0.9), check=False)
    point = dvi.stationary(flow)
    assert point.k > 0
    doubled = replace(point, nu={"v": 4 * point.nu["v"]})
    halved = replace(point, X=0.5 * point.X)
    assert dvi.duality(flow, doubled).gap > 1e-2
    assert dvi.duality(flow, halved).gap > 1e-3


def test_semidefinite_program_refuses_what_it_cannot_do():
    with pytest.raises(dvi.MemoryLimitError, match="fixed point"):
        stable_diagonal(np.eye(LARGEST + 1), np.ones(LARGEST + 1))
    with pytest.raises(ValueError, match="symmetric"):
        stable_diagonal(np.triu(np.ones((3, 3))), np.ones(3))
    problem = quadratic(np.ones(2), np.eye(2))
    for method in (RMSPropNorm(0.1, 0.9), RMSProp(0.1, 0.9, eps=1e-3)):
        with pytest.raises(dvi.SpecError, match="convex program"):
            dvi.stationary(dvi.stable_flow(problem, method), by="sdp")


# ---- any spec that forgets --------------------------------------------------------------------------------------


class Entangled(dvi.Method):
    """Made up: averages of unlike things, coupled, f nonlinear in ν and in g, P a function of all of them."""

    draw: Any
    coupled: bool
    lr: Any = 0.2

    def init(self, w):
        return {"a": torch.zeros_like(w), "b": w.new_zeros(())}

    def f(self, nu, g):
        a, b = nu["a"], nu["b"]
        da = 0.2 * (g**2 + 0.3 * (self.draw["R"] @ g) ** 2 - a - 0.1 * a**3 / (1 + a**2))
        db = 0.4 * ((g**2).sum() - b)
        if self.coupled:
            da = da - 0.05 * torch.tanh(self.draw["K"] @ a + b)
            db = db + 0.05 * torch.tanh(a.sum())
        return {"a": da, "b": db}

    def P(self, nu):
        return dvi.Diagonal((softplus(nu["a"]) ** 0.5 + 0.3 * nu["b"] ** 0.5 + 0.01) / self.lr)


class PowerLaw(dvi.Method):
    """An average of g⊙² that enters with another power than ½."""

    lr: float
    power: float

    def init(self, w):
        return (torch.zeros_like(w),)

    def f(self, nu, g):
        return (0.1 * (g**2 - nu[0]),)

    def P(self, nu):
        return dvi.Diagonal(nu[0] ** self.power / self.lr)


def entangled(rng, d, coupled):
    draw = {name: torch.tensor(rng.normal(size=(d, d)) / np.sqrt(d)) for name in "RK"}
    return Entangled(draw, coupled)


METHODS = {
    "RMSProp": lambda rng, d: RMSProp(0.3, 0.95),
    "RMSProp, ε": lambda rng, d: RMSProp(0.3, 0.5, eps=0.1),
    "RMSProp-Norm": lambda rng, d: RMSPropNorm(0.3, 0.9),
    "entangled": lambda rng, d: entangled(rng, d, coupled=False),
    "coupled": lambda rng, d: entangled(rng, d, coupled=True),
    "quarter": lambda rng, d: PowerLaw(0.3, 0.25),
    "three quarters": lambda rng, d: PowerLaw(0.3, 0.75),
}


@pytest.mark.parametrize("name", METHODS)
@given(seed=seeds, d=st.integers(2, 7))
@examples(4)
def test_nothing_moves_and_the_constraint_holds(name, seed, d):
    """What the compiler makes of (ν, X): dν/dt = 0, 2P − H ⪰ 0, ⟨2P − H, Σ⟩ = 0."""
    rng = np.random.default_rng(seed)
    g, H = draw(rng, d)
    flow = dvi.central_flow(quadratic(g, H), METHODS[name](rng, d), check=False)
    point = dvi.stationary(flow)
    rate = flow.linearise(point.w, point.nu, point.U).drift(point.X).nu
    for dnu, nu in zip(torch.utils._pytree.tree_leaves(rate), torch.utils._pytree.tree_leaves(point.nu), strict=True):
        assert float(dnu.abs().max()) <= 1e-7 * float(nu.abs().max())
    P = flow.calculus.P(point.nu, 0.0).apply(torch.eye(d, dtype=torch.float64)).numpy()
    root = np.linalg.inv(np.linalg.cholesky(P))
    assert np.linalg.eigvalsh(root @ H @ root.T)[-1] <= 2 + 1.1e-6
    D = point.D.numpy()
    assert abs(np.sum((2 * P - H) * (D @ D.T))) <= 1e-7 * max(np.sum(P * (D @ D.T)), 1e-300)


@given(seeds, st.integers(1, 8), st.floats(0.01, 3), st.floats(0.1, 0.99))
@examples(10)
def test_rmsprop_norm_in_closed_form(seed, d, lr, beta2):
    """ν̄ = max(‖g‖², η²S²/4): the edge of stability, or the gradient if that is stable."""
    g, H = draw(np.random.default_rng(seed), d)
    point = dvi.stationary(dvi.stable_flow(quadratic(g, H), RMSPropNorm(lr, beta2)))
    S = max(np.linalg.eigvalsh(H)[-1], 0.0)
    expected = max(g @ g, lr**2 * S**2 / 4)
    assert float(point.nu["v"]) == pytest.approx(expected, rel=3e-6)  # S is held to 1000·tol
    trace = float(point.covariance_diagonal.sum())
    assert trace * S**2 == pytest.approx(expected - g @ g, abs=1e-5 * expected)


def test_where_the_held_flow_goes():
    """The ν-part of the central flow at fixed w, in small Euler steps, ends at the stationary ν."""
    g, H = draw(np.random.default_rng(11), 6)
    lr, beta2 = 0.5, 0.9
    flow = dvi.central_flow(quadratic(g, H), RMSProp(lr, beta2), check=False)
    point = dvi.stationary(flow)
    assert point.k >= 1
    w, nu, h = point.w, {"v": 30 * point.nu["v"].mean() * torch.ones_like(point.w)}, 2.0
    _, gradient = flow.problem.value_and_grad(w)
    for _ in range(150):
        V, AV = _eigenvectors(flow, State(w, nu, 0.0))
        lin = flow.linearised(State(w, nu, 0.0), gradient, flow.frame(State(w, nu, 0.0), V, AV))
        X = ccp.solve(lin.alpha - lin.gap / h, lin.beta).X  # the gap at the end of the step
        nu = {"v": nu["v"] + h * lin.drift(X).nu["v"]}
    # the start is forgotten, (1 − 0.22)^150; what remains is the tolerance of the stationary point
    np.testing.assert_allclose(nu["v"], point.nu["v"], rtol=1e-5)


def _eigenvectors(flow, y):
    A = flow.effective_hessian(y)(torch.eye(len(y.w), dtype=torch.float64))
    values, V = torch.linalg.eigh(0.5 * (A + A.T))
    near = values > 1.5
    return V[:, near], A @ V[:, near]


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (AdaGrad(0.1), "never forgets"),
        (GradientDescent(0.1), "no ν"),
        (RMSProp(0.1, 0.9, bias_correction=True), "bias_correction=False"),
    ],
)
def test_specs_without_a_stationary_point_are_refused(method, words):
    flow = dvi.stable_flow(quadratic(np.ones(3), np.eye(3)), method)
    with pytest.raises(dvi.SpecError, match=words):
        dvi.stationary(flow)


def test_what_is_not_reached_is_not_given():
    g, H = draw(np.random.default_rng(1), 10)
    flow = dvi.stable_flow(quadratic(g, H), RMSProp(0.2, 0.9))
    with pytest.raises(dvi.ConvergenceError, match="max_iterations"):
        dvi.stationary(flow, max_iterations=3)
    with pytest.raises(ValueError, match="fixed point"):
        dvi.stationary(flow, by="guess")


def test_a_first_rank_too_small_is_noticed():
    rng = np.random.default_rng(7)
    g, H = draw(rng, 30, zeros=25)
    flow = dvi.stable_flow(quadratic(g, H), RMSProp(0.2, 0.9))
    one, other = dvi.stationary(flow, rank=1), dvi.stationary(flow, rank=12)
    assert one.k == other.k >= 3
    np.testing.assert_allclose(one.nu["v"], other.nu["v"], rtol=1e-5, atol=1e-6 * float(other.nu["v"].max()))


# ---- near a known point -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
@given(seed=seeds, d=st.integers(3, 9), moved=st.floats(1e-3, 0.3))
@examples(4)
def test_from_a_point_nearby_as_from_nothing(name, seed, d, moved):
    """Subspaces that grow against the fixed point, whose iteration shares no step with them: one solution (Prop. 3)."""
    rng = np.random.default_rng(seed)
    (g, H), method = draw(rng, d), METHODS[name](rng, d)
    other_g, other_H = g * np.exp(moved * rng.normal(size=d)), H + moved * np.diag(np.abs(np.diag(H)))
    start = dvi.stationary(dvi.central_flow(quadratic(g, H), method, check=False))
    flow = dvi.central_flow(quadratic(other_g, other_H), method, check=False)
    found, reference = dvi.stationary(flow, start=start), dvi.stationary(flow)
    if name not in ("entangled", "coupled"):  # made up: they may have several
        for one, other in zip(*map(torch.utils._pytree.tree_leaves, (found.nu, reference.nu)), strict=True):
            # both have a relative residual of 1e-9, which a condition number of some hundreds magnifies
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6 * float(other.abs().max()))
    rate = flow.linearise(found.w, found.nu, found.U).drift(found.X).nu
    for dnu, nu in zip(*map(torch.utils._pytree.tree_leaves, (rate, found.nu)), strict=True):
        assert float(dnu.abs().max()) <= 1e-7 * float(nu.abs().max())
    assert found.sharpness <= 2 + 1.1e-6


def network_and_step():
    """RMSProp at the edge on a small network: the flow, its stationary point, and weights half a unit on."""
    problem = dvi.problems.digits(n=40, width=6, depth=1)
    flow = dvi.stationary_flow(problem, RMSProp(3e-3, 0.95), check=False, tol=1e-6)
    point = flow.settled(flow.initial)
    return flow, point, point.w + 0.5 * flow.look(point).rate


def test_from_a_point_nearby_on_a_network_at_a_fraction_of_the_products():
    flow, point, w = network_and_step()
    spent = [flow.spent()]
    for start in (point, None):
        found = dvi.stationary(flow, w, tol=1e-6, start=start, survey=False)
        assert dvi.duality(flow, found).gap <= 1e-6
        spent.append(flow.spent())
    near, far = np.diff(spent)
    assert near < 0.3 * far  # a fifth was seen, of the iteration that starts from nothing
    reference = dvi.stationary(flow, w)
    assert found.k == reference.k > 0
    found = dvi.stationary(flow, w, tol=1e-6, start=point)
    np.testing.assert_allclose(found.nu["v"], reference.nu["v"], atol=1e-6 * float(reference.nu["v"].max()))
    np.testing.assert_allclose(found.covariance_diagonal, reference.covariance_diagonal, atol=1e-4 * 3e-3**2)


def test_a_direction_that_the_start_is_blind_to_is_found():
    """A start whose block holds nothing of the second direction, in which alone the curvature has grown."""
    H = np.diag([8.0, 0.5, 0.4, 0.3, 0.2])
    method, g = RMSProp(0.5, 0.9), np.full(5, 0.3)
    start = dvi.stationary(dvi.central_flow(quadratic(g, H), method, check=False))
    keep = np.flatnonzero(np.abs(start.block.V[1].numpy()) < 1e-3).tolist()
    block = replace(start.block, V=start.block.V[:, keep], AV=start.block.AV[:, keep])
    block = replace(block, eigenvalues=block.eigenvalues[keep], residuals=block.residuals[keep])
    H[1, 1] = 8.0
    flow = dvi.central_flow(quadratic(g, H), method, check=False)
    found, blind = (dvi.stationary(flow, start=replace(start, block=block), survey=look) for look in (True, False))
    assert found.k == 2
    assert blind.k == 1  # which says that the first one did not find it by luck
    np.testing.assert_allclose(found.nu["v"], dvi.stationary(flow).nu["v"], rtol=1e-6)


def test_single_precision():
    g, H = draw(np.random.default_rng(2), 8)
    w = torch.zeros(8, dtype=torch.float32)
    loss = CubicLoss(g, H, np.zeros((8, 8, 8))).loss(w)
    single = dvi.stationary(dvi.stable_flow(dvi.Problem(loss, w), RMSProp(0.2, 0.9)))
    double = dvi.stationary(dvi.stable_flow(quadratic(g, H), RMSProp(0.2, 0.9)))
    assert single.nu["v"].dtype == torch.float32
    np.testing.assert_allclose(single.nu["v"], double.nu["v"], rtol=2e-3)  # eigenvalues to 1000·tol = 1e-2


def test_anderson_solves_a_linear_problem_in_its_dimension():
    rng = np.random.default_rng(0)
    A = torch.tensor(np.diag(rng.uniform(0.2, 0.99, 5)))
    b, x = torch.ones(5, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
    acceleration = Anderson(window=6)
    for _ in range(8):
        x = acceleration.next(x, A @ x + b)
    expected = torch.linalg.solve(torch.eye(5, dtype=torch.float64) - A, b)
    np.testing.assert_allclose(x, expected, rtol=1e-6)  # a Gram matrix squares the condition: half the digits
