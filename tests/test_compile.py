"""α, β and the drift against the paper's closed forms, finite differences, dense algebra and convex optimisation."""

from typing import Any

import numpy as np
import pytest
import torch
from conftest import CubicLoss, examples, frame_of, orthogonal
from hypothesis import given
from hypothesis import strategies as st
from torch.func import hessian, jacrev
from torch.nn.functional import softplus
from torch.utils import _pytree as pytree

import dvi
from dvi.compiler import calculus as compiler
from dvi.compiler import jacobian_solve as coupled
from dvi.compiler.linearised import gram_of_pairs
from dvi.methods import GradientDescent, RMSProp, RMSPropNorm
from dvi.solvers import ccp
from dvi.solvers.protocol import State
from dvi.solvers.svec import dimension, smat, svec

EPS = np.finfo(np.float64).eps
seeds = st.integers(0, 2**32 - 1)

# α, β: sums of some d³ ≈ 300 products of numbers of order 1 to 10, in chains a few deep, with P inverted once; scales
# of specs reach 10².  1e-11 is about 10⁴ eps: wide enough for cancellation, far below any wrong factor.
ROUNDING = 1e-11


def symmetric(rng, k):
    M = rng.normal(size=(k, k))
    return M + M.T


def close(actual, expected, rtol=ROUNDING):
    """Equal relative to the largest entry."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=0, atol=rtol * max(1e-12, np.abs(expected).max(initial=0)))


def operator(apply, k):
    """The svec matrix of a linear map on symmetric k × k matrices."""
    return np.stack([svec(apply(smat(e))) for e in np.eye(dimension(k))], axis=1)


def covariance(lin, X):
    U = lin.U.numpy()
    return U @ X @ U.T


def at_edge(rng, d, k, p, below=1.0):
    """H with HU = 2PU on a k-dimensional U for P = diag(p), its other effective eigenvalues under ``below``; and U."""
    Q = orthogonal(rng, d)
    effective = Q @ np.diag(np.r_[np.full(k, 2.0), rng.uniform(-3, below, d - k)]) @ Q.T
    root = np.sqrt(p)
    return effective * np.outer(root, root), Q[:, :k] / root[:, None]


# ---- the paper's closed forms -----------------------------------------------------------------------------------


@given(seeds, st.integers(2, 7), st.floats(0.01, 3))
@examples(15)
def test_gradient_descent_one_direction_eq_4(seed, d, lr):
    rng = np.random.default_rng(seed)
    w, g = rng.normal(size=(2, d))
    H, U = at_edge(rng, d, 1, np.full(d, 1 / lr))
    cubic = CubicLoss.with_derivatives(rng, w, g, H)
    lin = dvi.central_flow(cubic.problem(w), GradientDescent(lr), check=False).linearise(torch.tensor(w), {})
    close(lin.eigenvalues, [2.0], 1e-5)  # an eigenvector to 1e-3 (its default) gives the eigenvalue to 1e-6

    lin = dvi.central_flow(cubic.problem(w), GradientDescent(lr), check=False).linearise(
        torch.tensor(w), {}, torch.tensor(U)
    )
    close(lin.eigenvalues, [2.0])
    u = U[:, 0] / np.linalg.norm(U)
    slope = cubic.C @ u @ u  # ∇S
    sigma_sq = max(0.0, 2 * slope @ -g / (slope @ slope))
    X = ccp.solve(lin.alpha, lin.beta).X
    close(covariance(lin, X), sigma_sq * np.outer(u, u), 1e-9)
    close(lin.drift(X).w, -lr * (g + 0.5 * sigma_sq * slope), 1e-9)


@given(seeds, st.integers(1, 3), st.floats(0.01, 3))
@examples(15)
def test_gradient_descent_many_directions_C32(seed, k, lr):
    rng = np.random.default_rng(seed)
    d = k + 3
    w, g = rng.normal(size=(2, d))
    H, U = at_edge(rng, d, k, np.full(d, 1 / lr))
    cubic = CubicLoss.with_derivatives(rng, w, g, H)
    lin = dvi.central_flow(cubic.problem(w), GradientDescent(lr), check=False).linearise(
        torch.tensor(w), {}, torch.tensor(U)
    )
    Q = U / np.sqrt(lr)  # orthonormal: Ḣ of the paper is written in it, Σ = Q(ηX)Qᵀ

    def T(S):
        return np.einsum("aij,ij->a", cubic.C, Q @ S @ Q.T)

    def T_transposed(v):
        return Q.T @ (cubic.C @ v) @ Q

    # with ẇ = −η[…] put in, Ḣ = η(T^T[−∇L] − ½ T^T T[Σ])
    close(lin.alpha, lr * lr * T_transposed(-g))
    close(lin.beta, lr * lr * lr * 0.5 * operator(lambda S: T_transposed(T(S)), k))
    assert np.array_equal(lin.beta, lin.beta.T)
    assert np.abs(lin.gap.numpy()).max() <= ROUNDING


def edge_norm(rng, d, k, lr):
    """RMSProp-Norm exactly at the edge: H with a k-fold top eigenvalue S, ν = η²S²/4."""
    S = rng.uniform(0.5, 4)
    nu = (lr * S / 2) ** 2
    H, U = at_edge(rng, d, k, np.full(d, np.sqrt(nu) / lr))
    w, g = rng.normal(size=d), rng.uniform(0.2, 1) * rng.normal(size=d)
    return CubicLoss.with_derivatives(rng, w, g, H), w, g, U, S, nu


def norm_flow(cubic, w, U, nu, lr, beta2):
    flow = dvi.central_flow(cubic.problem(w), RMSPropNorm(lr, beta2), check=False)
    return flow.linearise(torch.tensor(w), {"v": torch.tensor(nu, dtype=torch.float64)}, torch.tensor(U))


@given(seeds, st.integers(2, 7), st.floats(0.05, 2), st.floats(0.02, 0.99))
@examples(15)
def test_rmsprop_norm_one_direction_eqs_10_20_21(seed, d, lr, beta2):
    rng = np.random.default_rng(seed)
    cubic, w, g, U, S, nu = edge_norm(rng, d, 1, lr)
    lin = norm_flow(cubic, w, U, nu, lr, beta2)
    close(lin.eigenvalues, [2.0])
    u = U[:, 0] / np.linalg.norm(U)
    slope, c = cubic.C @ u @ u, (1 - beta2) / beta2
    eq_10 = (beta2 * -g @ slope + (1 - beta2) * (S**2 / 4 - g @ g / lr**2)) / (
        beta2 * 0.5 * slope @ slope + (1 - beta2) * S**2 / lr**2
    )
    eq_20 = (4 / (lr * S**2) * -g @ slope + c * 4 / (lr**3 * S**2) * (lr**2 * S**2 / 4 - g @ g)) / (
        2 / (lr * S**2) * slope @ slope + c * 4 / lr**3
    )
    close(eq_20, eq_10, 1e-9)
    X = ccp.solve(lin.alpha, lin.beta).X
    # α is a difference that may cancel; σ² is then known to eps |terms| / β
    scale = abs(eq_10) + (abs(g @ slope) + c * (S**2 / 4 + g @ g / lr**2)) / (0.5 * slope @ slope + c * S**2 / lr**2)
    sigma_sq = np.trace(covariance(lin, X))
    assert abs(sigma_sq - max(0.0, eq_10)) <= 1e-11 * scale
    drift = lin.drift(X)
    close(drift.w, -2 / S * (g + 0.5 * sigma_sq * slope), 1e-9)  # η/√ν = 2/S
    assert abs(float(drift.nu["v"]) - c * (g @ g + S**2 * sigma_sq - nu)) <= 1e-11 * c * (g @ g + S**2 * scale + nu)


@given(seeds, st.integers(1, 3), st.floats(0.05, 2), st.floats(0.02, 0.99))
@examples(15)
def test_rmsprop_norm_many_directions_C4(seed, k, lr, beta2):
    rng = np.random.default_rng(seed)
    d = k + 3
    cubic, w, g, U, S, nu = edge_norm(rng, d, k, lr)
    lin = norm_flow(cubic, w, U, nu, lr, beta2)
    c, scale_sq = (1 - beta2) / beta2, U[:, 0] @ U[:, 0]
    Q = U / np.sqrt(scale_sq)

    def TtT(X):
        return Q.T @ (cubic.C @ np.einsum("aij,ij->a", cubic.C, Q @ X @ Q.T)) @ Q

    alpha = 4 / (lr * S**2) * Q.T @ (cubic.C @ -g) @ Q + c * 4 / (lr**3 * S**2) * (lr**2 * S**2 / 4 - g @ g) * np.eye(k)
    beta = operator(lambda X: 2 / (lr * S**2) * TtT(X) + c * 4 / lr**3 * np.trace(X) * np.eye(k), k)
    # C.4 writes d/dt ν^{−1/2}H in the orthonormal Q, the compiler d/dt(H − 2P) in U = sQ, with Σ = Q(s²X)Qᵀ
    factor = np.sqrt(nu) * scale_sq
    terms = 4 / (lr * S**2) * np.linalg.norm(cubic.C @ g) + c * 4 / (lr**3 * S**2) * (lr**2 * S**2 / 4 + g @ g)
    assert np.abs(lin.alpha.numpy() - factor * alpha).max() <= ROUNDING * factor * terms
    close(lin.beta, factor * scale_sq * beta)
    close(lin.beta, lin.beta.T)


@given(seeds, st.integers(1, 3), st.floats(0.05, 2), st.floats(0.02, 0.99))
@examples(15)
def test_rmsprop_C5(seed, k, lr, beta2):
    rng = np.random.default_rng(seed)
    d = k + 3
    nu = rng.uniform(0.1, 3, d)
    p = np.sqrt(nu) / lr
    H, U = at_edge(rng, d, k, p)
    w, g = rng.normal(size=(2, d))
    cubic = CubicLoss.with_derivatives(rng, w, g, H)
    flow = dvi.central_flow(cubic.problem(w), RMSProp(lr, beta2), check=False)
    lin = flow.linearise(torch.tensor(w), {"v": torch.tensor(nu)}, torch.tensor(U))
    c = (1 - beta2) / beta2
    close(lin.eigenvalues, np.full(k, 2.0))

    def TtPT(X):
        return U.T @ (cubic.C @ (np.einsum("aij,ij->a", cubic.C, U @ X @ U.T) / p)) @ U

    alpha_w = U.T @ (cubic.C @ (-g / p)) @ U
    alpha_nu = c * (U.T * ((p**2 - g**2 / lr**2) / p)) @ U
    assert np.abs(lin.alpha.numpy() - alpha_w - alpha_nu).max() <= ROUNDING * (
        np.abs(alpha_w).max() + c * np.abs((U.T * ((p**2 + g**2 / lr**2) / p)) @ np.abs(U)).max() + 1
    )
    beta = operator(lambda X: 0.5 * TtPT(X) + c * 4 / lr**2 * (U.T * (p * np.diag(U @ X @ U.T))) @ U, k)
    # C.5 writes H Σ H = 4PΣP, so β is symmetric at the edge
    close(lin.beta, beta)
    close(lin.beta, lin.beta.T)


# ---- random specs -------------------------------------------------------------------------------------------------


class RandomSpec(dvi.Method):
    """A made-up optimizer: three leaves of different shapes, smooth f and P with random coefficients.

    ``coupled``: f mixes the entries of ν.  ``diagonal``: P is diagonal, else scalar.
    """

    draw: Any
    coupled: bool
    diagonal: bool
    lr: Any = 0.3
    beta2: Any = 0.8

    def init(self, w):
        return {"a": torch.zeros_like(w), "rest": (w.new_zeros(()), w.new_zeros(2, 2))}

    def f(self, nu, g):
        c, a, (b, m) = self.draw, nu["a"], nu["rest"]
        da = (1 - self.beta2) * (0.3 * g**2 + 0.1 * (c["R"] @ g) ** 2 + 0.2 * torch.sin(g) - a) + 0.1 * torch.sin(a)
        db = 0.3 * ((g**2).mean() + torch.tanh((g**2).sum()) * torch.cos(b) - b)
        dm = 0.4 * (torch.outer(g[:2], g[:2]) - m)
        if self.coupled:
            da = da + 0.1 * torch.tanh(c["K"] @ a + b) + 0.1 * m.sum() * g
            db = db + 0.1 * (c["k"] @ a) + 0.05 * m[0, 1] * a[0]
            dm = dm + 0.1 * (m @ c["M"])
        return {"a": da, "rest": (db, dm)}

    def P(self, nu):
        c, a, (b, m) = self.draw, nu["a"], nu["rest"]
        if self.diagonal:
            return dvi.Diagonal((softplus(c["K"] @ a + b * m[0, 0]) + 0.5) / self.lr)
        return dvi.Scalar((softplus(c["k"] @ a) + softplus(b + (m**2).sum()) + 0.5) / self.lr)


SCHEDULES = {
    "constant": {},
    "lr": {"lr": lambda t: 0.3 / (1 + 0.1 * t)},
    "lr and beta2": {
        "lr": lambda t: 0.2 + 0.1 * torch.sin(torch.as_tensor(t, dtype=torch.float64) * 0.7),
        "beta2": lambda t: 0.7 + 0.02 * t,
    },
}
cases = st.tuples(
    seeds, st.integers(2, 5), st.integers(1, 3), st.booleans(), st.booleans(), st.sampled_from([*SCHEDULES])
)


class Case:
    """A random spec on a random cubic, linearised at a random state in a random basis."""

    def __init__(self, case, covariance="gradient-covariance"):
        seed, d, k, coupled, diagonal, schedule = case
        self.rng = rng = np.random.default_rng(seed)
        draw = {"R": (d, d), "K": (d, d), "k": (d,), "M": (2, 2)}
        draw = {name: torch.tensor(rng.normal(size=shape) / np.sqrt(shape[-1])) for name, shape in draw.items()}
        self.method = RandomSpec(draw, coupled, diagonal, **SCHEDULES[schedule])
        self.cubic = CubicLoss.random(rng, d)
        self.w = rng.normal(size=d)
        self.t = float(rng.uniform(0, 5))
        self.nu = {
            "a": torch.tensor(rng.normal(size=d)),
            "rest": (torch.tensor(rng.normal(size=())), torch.tensor(rng.normal(size=(2, 2)))),
        }
        self.U = rng.normal(size=(d, min(k, d)))
        self.X = symmetric(rng, min(k, d))
        self.flow = dvi.central_flow(self.cubic.problem(self.w), self.method, check=False, covariance=covariance)

    @property
    def lin(self):
        return self.flow.linearise(torch.tensor(self.w), self.nu, torch.tensor(self.U), t=self.t)

    def flat_f(self):
        """f and ν flat: (f(ν_flat, g), ν_flat, unflatten)."""
        leaves, spec = pytree.tree_flatten(self.nu)
        shapes = [x.shape for x in leaves]

        def unflatten(flat):
            parts = flat.split([s.numel() for s in shapes])
            return pytree.tree_unflatten([p.reshape(s) for p, s in zip(parts, shapes, strict=True)], spec)

        method = self.method.at(self.t)
        return (lambda nu, g: flatten(method.f(unflatten(nu), g))), flatten(self.nu), unflatten


def flatten(tree):
    return torch.cat([x.reshape(-1) for x in pytree.tree_leaves(tree)])


def rates_of_the_gap(case, lin, rate):
    """The gap moves along the drift as α and β say."""
    dw = rate.w.numpy()

    def gap(s):
        nu = pytree.tree_map(lambda x, dx: x + s * dx, case.nu, rate.nu)
        P = case.method.at(case.t + s).P(nu).apply(torch.tensor(case.U)).numpy()
        return case.U.T @ (2 * P - case.cubic.hessian(case.w + s * dw) @ case.U)

    close(lin.gap, gap(0.0))
    # Five points: truncation ~ s⁴ G⁽⁵⁾/30 with the rates scaled out, 1e-12 relative to what makes up G'; rounding
    # eps |G|/s.  The first is asked for with room for the constants of softplus, sin and tanh composed.
    speed = 1 + np.linalg.norm(dw) + float(flatten(rate.nu).norm())
    s = 1e-3 / speed
    slope = (8 * (gap(s) - gap(-s)) - (gap(2 * s) - gap(-2 * s))) / (12 * s)
    size = np.abs(gap(0.0)).max() + np.linalg.norm(case.U) ** 2 * (np.abs(case.cubic.A).max() + 1)
    tolerance = 1e-9 * np.abs(slope).max() + 30 * EPS * size / s
    assert tolerance < 1e-4 * np.abs(slope).max()  # else this shows nothing
    predicted = smat(lin.beta.numpy() @ svec(case.X)) - lin.alpha.numpy()
    assert np.abs(slope - predicted).max() <= tolerance


def eq_31(covariance, case, lin, rate):
    """The drift by dense algebra."""
    f, nu, _ = case.flat_f()
    w, g, H = case.w, case.cubic.gradient(case.w), torch.tensor(case.cubic.hessian(case.w))
    Sigma = torch.tensor(case.U @ case.X @ case.U.T)
    if covariance == "full":
        b, A, C = (torch.tensor(x) for x in (case.cubic.b, case.cubic.A, case.cubic.C))
        bend = hessian(lambda w: f(nu, b + A @ w + 0.5 * (C @ w) @ w))(torch.tensor(w))
        curvature = 0.5 * torch.einsum("aij,ij->a", bend, Sigma)
    else:
        bend = hessian(lambda g: f(nu, g))(torch.tensor(g))
        curvature = 0.5 * torch.einsum("aij,ij->a", bend, H @ Sigma @ H)
    J = jacrev(lambda nu: f(nu, torch.tensor(g)))(nu)
    expected = torch.linalg.solve(torch.eye(len(nu), dtype=nu.dtype) + J, f(nu, torch.tensor(g)) + curvature)
    close(flatten(rate.nu), expected, 1e-10)  # I + ∂f/∂ν has a condition number of some 10
    P = case.method.at(case.t).P(case.nu)
    force = torch.tensor(g + 0.5 * np.einsum("aij,ij->a", case.cubic.C, Sigma.numpy()))
    close(-rate.w, P.solve(force))
    close(lin.drift(None).w, -P.solve(torch.tensor(g)))


def matrix_free(case, lin):
    """A coupled f, solved without its Jacobian as a matrix."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coupled, "DENSE_LIMIT", 0)
        free = case.lin
    # gmres stops at a relative residual of 1e-10, times the condition number of I + ∂f/∂ν and of α as a difference
    close(free.alpha, lin.alpha, 1e-7)
    close(free.beta, lin.beta, 1e-7)


def moved_and_turned(case, lin):
    """A frame moved along a cubic keeps its gap, and another basis of the same directions says the same."""
    flow, w = case.flow, case.w
    empty = torch.zeros(len(w), 0, dtype=torch.float64)
    assert flow.frame(State(torch.tensor(w), case.nu, case.t), empty, empty).k == 0
    U = torch.tensor(case.U)
    frame = frame_of(flow, State(torch.tensor(w), case.nu, case.t), U)
    moved = w + 0.3 * case.rng.normal(size=len(w))
    y = State(torch.tensor(moved), case.nu, case.t)
    P = case.method.at(case.t).P(case.nu).apply(U).numpy()
    gap = case.U.T @ (2 * P - case.cubic.hessian(moved) @ case.U)
    close(flow.linearised(y, flow.value_and_grad(y)[1], frame).gap, gap)  # T is constant on a cubic
    # another basis UB of the same subspace: Ḣ transforms by congruence
    B = case.rng.normal(size=2 * (U.shape[1],))
    there = flow.linearise(torch.tensor(w), case.nu, U @ torch.tensor(B), t=case.t)
    close(there.alpha, B.T @ lin.alpha.numpy() @ B, 1e-10)
    X = case.X
    expected = B.T @ smat(lin.beta.numpy() @ svec(B @ X @ B.T)) @ B
    close(smat(there.beta.numpy() @ svec(X)), expected, 1e-10)


@pytest.mark.parametrize("covariance", ["gradient-covariance", "full"])
@given(cases)
@examples(12)
def test_alpha_beta_and_the_drift_of_random_specs(covariance, case):
    """Several questions to one compiled case, since to compile it is what costs."""
    case = Case(case, covariance)
    lin = case.lin
    rate = lin.drift(case.X)
    eq_31(covariance, case, lin, rate)
    rates_of_the_gap(case, lin, rate)
    moved_and_turned(case, lin)
    if case.method.coupled:
        matrix_free(case, lin)
    # elementwise f and coupled ones are told apart; solved as a coupled one, an elementwise one gives the same
    assert case.flow.calculus.elementwise == (not case.method.coupled)
    case.flow.calculus.elementwise = False
    dense = case.lin
    for name in ("alpha", "beta"):
        close(getattr(dense, name), getattr(lin, name), 1e-10)


# ---- what follows from α and β --------------------------------------------------------------------------------------


@given(seeds, st.integers(1, 3), st.floats(0.05, 2))
@examples(25)
def test_lemma_2_the_ccp_is_the_projection_on_the_tangent_cone(seed, k, lr):
    cp = pytest.importorskip("cvxpy")
    rng = np.random.default_rng(seed)
    d = k + 4
    w, g = rng.normal(size=(2, d))
    H, U = at_edge(rng, d, k, np.full(d, 1 / lr))
    cubic = CubicLoss.with_derivatives(rng, w, g, H)
    lin = dvi.central_flow(cubic.problem(w), GradientDescent(lr), check=False).linearise(
        torch.tensor(w), {}, torch.tensor(U)
    )
    X = ccp.solve(lin.alpha, lin.beta).X
    Q, v, delta = U / np.sqrt(lr), -g, cp.Variable(d)
    slopes = [Q.T @ cubic.C[i] @ Q for i in range(d)]  # C is symmetric: C[i] is ∂H/∂wᵢ
    moved = cp.sum([(v[i] + delta[i]) * slopes[i] for i in range(d)])
    program = cp.Problem(cp.Minimize(cp.sum_squares(delta)), [0.5 * (moved + moved.T) << 0])
    program.solve(solver=cp.CLARABEL, tol_gap_abs=1e-9, tol_gap_rel=1e-9, tol_feas=1e-9)
    projection = v + delta.value
    # strongly convex with a gap of 1e-9: the minimiser to the square root, of ‖v‖
    assert np.linalg.norm(lin.drift(X).w.numpy() / lr - projection) <= 1e-4 * (1 + np.linalg.norm(v))
    # Proposition 1: dL/dt = −η ‖proj(−∇L)‖², so L falls, and no faster than along the gradient flow
    rate = float(lin.drift(X).w.numpy() @ g)
    assert abs(rate + lr * projection @ projection) <= 3e-4 * lr * (1 + g @ g)
    speed_sq = float(lin.drift(X).w @ lin.drift(X).w)
    assert abs(rate + speed_sq / lr) <= 1e-9 * lr * (g @ g)  # the CCP's own complementarity: a residual of 1e-10
    assert -lr * (g @ g) * (1 + ROUNDING) <= rate <= ROUNDING * lr * (g @ g)


def test_proposition_1_the_loss_falls_along_the_flow():
    rng = np.random.default_rng(5)
    lr = 0.3
    H, _ = at_edge(rng, 6, 2, np.full(6, 1 / lr))
    w = rng.normal(size=6)
    cubic = CubicLoss.with_derivatives(rng, w, rng.normal(size=6), H - 0.05 * np.eye(6) / lr)
    flow = dvi.central_flow(cubic.problem(w), GradientDescent(lr), check=False)
    solution = dvi.solve(flow, steps=2, integrator=dvi.Euler(1 / 64), save_every=1 / 16, progress=False)
    assert solution.breakpoints  # oscillations are there
    assert (np.diff(solution.loss) < 0).all()
    grad_sq, rate = solution.series["grad_sq"], solution.series["loss_rate"]
    assert (rate <= 0).all()
    assert (rate >= -lr * grad_sq * (1 + ROUNDING)).all()


@pytest.mark.parametrize("beta2", [0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("make", [RMSPropNorm, RMSProp])
def test_lemma_4_the_small_beta2_factor_follows_linear_targets_exactly(make, beta2):
    from scipy.integrate import solve_ivp

    d, a, b = 3, 2.0, 0.03
    w = torch.zeros(d, dtype=torch.float64)

    def gradient(t):  # the target f(t) = a + bt, for ‖g‖² and for every gᵢ²
        return torch.full((d,), float(np.sqrt((a + b * t) / (d if make is RMSPropNorm else 1))), dtype=torch.float64)

    method = make(0.1, beta2)
    nu = method.init(w)
    calculus = compiler.SpecCalculus(method, method.update(nu, gradient(0.0), 0.0), gradient(0.0))
    steps = int(60 / (1 - beta2)) if beta2 < 0.95 else 3200  # the transients β₂ᵗ and exp(−t(1−β₂)/β₂) are below 1e-13
    for t in range(steps + 1):
        nu = method.update(nu, gradient(float(t)), float(t))

    def rate(t, v):
        now = {"v": torch.tensor(v if make is RMSProp else v[0])}
        return np.atleast_1d(calculus.nu_rate(now, float(t), gradient(t))["v"].numpy())

    start = np.full(d if make is RMSProp else 1, a)
    flow = solve_ivp(rate, (0, steps), start, method="LSODA", rtol=1e-10, atol=1e-12).y[:, -1]
    exact = a + b * steps - beta2 / (1 - beta2) * b
    np.testing.assert_allclose(np.atleast_1d(nu["v"].numpy()), exact, rtol=1e-11)  # sums of 10³ terms
    np.testing.assert_allclose(
        flow, exact, rtol=1e-7
    )  # the integrator's 1e-10 per step, accumulated; uncorrected: b/ν ≥ 3e-4


# ---- what is refused ----------------------------------------------------------------------------------------------


class Shuffle(dvi.Method):
    """A coupled f whose I + ∂f/∂ν is singular: ν forgets its mean at once."""

    def init(self, w):
        return {"v": torch.zeros_like(w)}

    def f(self, nu, g):
        return {"v": g**2 - nu["v"].mean()}

    def P(self, nu):
        return dvi.Scalar(1.0 + (nu["v"] ** 2).sum())


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(RMSProp(0.1, 0.0), id="rmsprop"),
        pytest.param(RMSPropNorm(0.1, 0.0), id="rmsprop-norm"),
        pytest.param(RMSProp(0.1, lambda t: 0.0), id="scheduled"),
        pytest.param(Shuffle(), id="coupled"),
    ],
)
def test_nu_without_memory_is_refused_in_words(method):
    cubic = CubicLoss.random(np.random.default_rng(0), 3)

    def compile_and_linearise():
        flow = dvi.central_flow(cubic.problem(np.ones(3)), method, check=False)
        flow.linearise(flow.initial.w, flow.initial.nu, torch.eye(3, 1, dtype=torch.float64))

    with pytest.raises(dvi.SpecError, match=r"memory"):
        compile_and_linearise()


def test_beta2_zero_says_what_it_is_and_what_to_write():
    cubic = CubicLoss.random(np.random.default_rng(0), 3)
    with pytest.raises(dvi.SpecError, match=r"β₂ = 0.*Give it some memory"):
        dvi.central_flow(cubic.problem(np.ones(3)), RMSProp(0.1, 0.0), check=False)
    # the least that is advised compiles, and follows at 1/β₂ of f
    flow = dvi.central_flow(cubic.problem(np.ones(3)), RMSProp(0.1, 1e-3), check=False)
    g = torch.tensor(cubic.gradient(np.ones(3)))
    rate = flow.calculus.nu_rate({"v": torch.ones(3, dtype=torch.float64)}, 0.0, g)["v"]
    close(rate, 999 * (g**2 - 1), 1e-9)  # 1 − (1−β₂) loses three digits


def test_an_unknown_covariance_is_refused():
    cubic = CubicLoss.random(np.random.default_rng(0), 3)
    with pytest.raises(ValueError, match="gradient-covariance"):
        dvi.central_flow(cubic.problem(np.ones(3)), RMSProp(0.1, 0.9), check=False, covariance="half")


@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.integers(1, 60))
@examples(15)
def test_pairs_in_blocks_are_the_same_as_all_at_once(seed, k, block):
    """The Gram matrix of third derivatives in the metric of P, whatever part of P⁻¹Tᵀ is in memory at a time."""
    rng = np.random.default_rng(seed)
    d, n = 7, k * (k + 1) // 2
    root = rng.normal(size=(d, d))
    P = dvi.Dense(torch.tensor(root @ root.T + np.eye(d)))
    T, g = torch.tensor(rng.normal(size=(n, d))), torch.tensor(rng.normal(size=d))
    inverse = np.linalg.inv(root @ root.T + np.eye(d))
    slope, products = gram_of_pairs(P, T, g, block)
    # the condition number is at most some hundred
    np.testing.assert_allclose(slope, T.numpy() @ inverse @ g.numpy(), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(products, T.numpy() @ inverse @ T.numpy().T, rtol=1e-9, atol=1e-9)
