"""Ablated flows against the paper's −(2/S)∇L, and Lemma 3 (re-derived: its β₂ sign and its η factor are corrected)."""

import numpy as np
import pytest
import torch
from conftest import AdaGrad, CubicLoss, examples, orthogonal
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import solve_ivp

import dvi
from dvi.methods import GradientDescent, RMSProp, RMSPropNorm
from dvi.solvers import ccp
from dvi.solvers.protocol import State
from dvi.solvers.svec import smat, svec

seeds = st.integers(0, 2**32 - 1)


def trough(y):
    """A bent trough: L = ½(2 + z + ½ sin 2z) x² + ¼(y − 1)² + 0.3 y z − z, sharpness rising with z."""
    x, u, z = y
    s = 2 + z + 0.5 * torch.sin(2 * z)
    return 0.5 * s * x**2 + 0.25 * (u - 1) ** 2 + 0.1 * u**2 * z**2 - z + 0.1 * z**2


def edge_state(problem, method):
    """RMSProp-Norm's state exactly at the edge: ν = η²S²/4."""
    H = problem.hvp(problem.w0, torch.eye(problem.dim, dtype=torch.float64))
    S = float(torch.linalg.eigvalsh(H)[-1])
    return State(problem.w0, {"v": torch.tensor((method.lr * S / 2) ** 2, dtype=torch.float64)}, 0.0)


def test_rmsprop_norm_without_its_penalty_is_the_papers_ablated_flow():
    """dw/dt = −(2/S(w))∇L(w) (Fig. 5), as long as the flow stays at the edge."""
    w0 = torch.tensor([0.0, 0.2, 0.3], dtype=torch.float64)
    problem = dvi.Problem(trough, w0)
    method = RMSPropNorm(lr=0.9, beta2=0.5)
    flow = dvi.ablated_flow(problem, method)
    start, steps = edge_state(problem, method), 2
    found = dvi.solve(
        flow, steps, start=start, integrator=dvi.RungeKutta(order=4, tol=1e-7), save_every=0.5, progress=False
    )
    np.testing.assert_allclose(found.eigenvalues[:, 0], 2.0, atol=1e-6)  # at the edge throughout
    assert all(float(X.sum()) > 0 for X in found.X)

    def rate(_, w):
        w = torch.tensor(w)
        S = torch.linalg.eigvalsh(problem.hvp(w, torch.eye(3, dtype=torch.float64)))[-1]
        return (-2 / S * problem.value_and_grad(w)[1]).numpy()

    exact = solve_ivp(rate, (0, steps), w0.numpy(), rtol=1e-10, atol=1e-12).y[:, -1]
    length = np.linalg.norm(exact - w0.numpy())
    assert length > 0.3
    np.testing.assert_allclose(found.w, exact, atol=1e-5 * length)  # RungeKutta holds the edge to about 1e-7
    # MacroStep's 1e-3 √h a step; what oscillates does not act on w, and loosens no tolerance (it would be off by 3e-3)
    default = dvi.solve(flow, steps, start=start, progress=False)
    assert np.linalg.norm(default.w.numpy() - exact) <= 1.5e-3
    with_penalty = dvi.solve(dvi.central_flow(problem, method), steps, start=start, progress=False)
    # the penalty is felt: the central flow goes elsewhere, to where it is flatter
    assert np.linalg.norm(with_penalty.w.numpy() - exact) > 1e-2 * length


@given(seeds, st.integers(1, 3), st.sampled_from(["RMSProp", "RMSProp-Norm", "AdaGrad"]))
@examples(12)
def test_only_the_push_on_w_is_gone(seed, k, name):
    """α and dν/dt are the central flow's, dw/dt = −P⁻¹g whatever X is, and β lacks ½TP⁻¹Tᵀ."""
    rng, d = np.random.default_rng(seed), k + 4
    method = {"RMSProp": RMSProp(0.3, 0.9), "RMSProp-Norm": RMSPropNorm(0.3, 0.9), "AdaGrad": AdaGrad(0.3)}[name]
    problem = CubicLoss.random(rng, d).problem(rng.normal(size=d))
    central = dvi.central_flow(problem, method, check=False, edge_hessian="edge")
    ablated = dvi.ablated_flow(problem, method, check=False)
    y, U, X = central.initial, torch.tensor(rng.normal(size=(d, k))), np.eye(k) + 0.1
    one, other = central.linearise(y.w, y.nu, U), ablated.linearise(y.w, y.nu, U)
    np.testing.assert_array_equal(other.alpha, one.alpha)
    P = central.calculus.P(y.nu, 0.0)
    push = (0.5 * one.T @ P.solve(one.T.T)).numpy()
    np.testing.assert_allclose(one.beta - other.beta, push, atol=1e-12 * float(one.beta.abs().max()))
    _, g = problem.value_and_grad(y.w)
    np.testing.assert_array_equal(other.drift(X).w, -P.solve(g))
    for a, b in zip(*(torch.utils._pytree.tree_leaves(lin.drift(X).nu) for lin in (one, other)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_rmsprop_keeps_the_constraint_without_its_penalty():
    """Two coupled troughs and RMSProp: the multiplier then comes from ν alone."""

    def loss(w):
        a, b, z = w
        return 0.5 * (1 + z) * a**2 + 0.5 * (1.2 + z**2) * b**2 + 0.3 * a * b - 0.5 * z + 0.2 * (a - b) * z

    problem = dvi.Problem(loss, torch.tensor([0.4, -0.3, 0.1], dtype=torch.float64))
    flow = dvi.ablated_flow(problem, RMSProp(0.15, 0.8))
    found = dvi.solve(flow, 20, integrator=dvi.MacroStep(tol=1e-4), progress=False)
    assert np.nanmax(found.eigenvalues[5:, 0]) <= 2.01  # MacroStep's tolerance on the constraint
    assert found.k.max() >= 1


@pytest.mark.parametrize("method", [RMSProp(0.3, 0.9), RMSPropNorm(0.3, 0.9)])
def test_beta_is_monotone_also_with_a_direction_below_the_edge(method):
    """Eigenvectors of unlike eigenvalues: with H times them, RMSProp-Norm's β has an eigenvalue of −5 % beside 1."""
    rng = np.random.default_rng(0)
    problem = CubicLoss(np.ones(5), np.diag([2.0, 1.0, 0.5, 0.3, 0.1]), np.zeros((5, 5, 5))).problem(np.zeros(5))
    flow = dvi.ablated_flow(problem, method, check=False)
    y, U = flow.initial, torch.eye(5, 3, dtype=torch.float64)
    beta = flow.linearise(y.w, y.nu, U).beta.numpy()
    values = np.linalg.eigvalsh(beta + beta.T)
    assert values[0] >= -1e-12 * values[-1]
    X = ccp.solve(np.diag(rng.random(3)), beta).X
    assert np.trace(X) > 0


def test_what_cannot_be_ablated_is_refused():
    problem = dvi.Problem(trough, torch.zeros(3, dtype=torch.float64))
    with pytest.raises(dvi.SpecError, match="gradient flow"):
        dvi.ablated_flow(problem, GradientDescent(0.1))
    with pytest.raises(ValueError, match="curvature penalty"):
        dvi.ablated_flow(problem, RMSProp(0.1, 0.9), without="momentum")


def test_compare_runs_it_beside_the_central_flow():
    problem = dvi.problems.digits(n=40, width=4, depth=1)
    runs = ("discrete", "central", "ablated")
    race = dvi.compare(problem, RMSPropNorm(0.05, 0.9), 8, runs=runs, progress=False)
    assert race.ablated.name == "ablated"
    assert race.distance["central", "ablated"][-1] > 0


# ---- Lemma 3 ----------------------------------------------------------------------------------------------------


class AtTheEdge:
    """RMSProp-Norm at w with a k-fold sharpness S, ν = η²S²/4 whatever η is, Σ ≻ 0; U orthonormal here."""

    def __init__(self, seed, k, lr=None):
        rng = np.random.default_rng(seed)
        d = k * (k + 1) // 2 + 4
        self.k, self.S = k, rng.uniform(1, 4)
        Q = orthogonal(rng, d)
        self.U = Q[:, :k]
        H = Q @ np.diag(np.r_[np.full(k, self.S), rng.uniform(-1, 0.5, d - k)]) @ Q.T
        self.w = rng.normal(size=d)
        probe = CubicLoss.with_derivatives(rng, self.w, np.zeros(d), H)
        T = [svec(self.U.T @ slab @ self.U) for slab in probe.C]  # [d, n], svec
        # a gradient whose sharpening Tᵀ(−g) is positive definite, so that Σ ≻ 0 for every β₂
        B = rng.normal(size=(k, k))
        aim = svec(np.eye(k) + 0.2 * (B @ B.T) / k)
        self.g = -np.linalg.lstsq(np.array(T).T, aim, rcond=None)[0] * rng.uniform(0.2, 2)
        if lr:  # as large as normalised gradient descent has it at the edge, or so
            self.g *= rng.uniform(0.2, 1.5) * lr * self.S / 2 / np.linalg.norm(self.g)
        self.cubic = CubicLoss(self.g - probe.A @ self.w - 0.5 * probe.C @ self.w @ self.w, probe.A, probe.C)
        self.T = np.array(T).T  # [n, d]

    @classmethod
    def oscillating(cls, seed, k, lr, beta2):
        """The first from this seed on with Σ ≻ 0, which the lemma asks for; by eq. 10 for k directions."""
        for s in range(seed, seed + 100):
            at, eye, c = cls(s, k, lr), svec(np.eye(k)), (1 - beta2) / beta2
            alpha = at.T @ -at.g + c * (at.S**2 / 4 - at.g @ at.g / lr**2) * eye
            beta = 0.5 * at.T @ at.T.T + c * at.S**2 / lr**2 * np.outer(eye, eye)
            sigma = smat(np.linalg.solve(beta, alpha))
            if np.linalg.eigvalsh(sigma)[0] > 1e-3 * abs(np.trace(sigma)):
                return at
        raise AssertionError("none of a hundred oscillates in all directions")

    def look(self, lr, beta2):
        """Σ [k, k] in U, and dH/dt on U, of the central flow."""
        p = self.S / 2  # √ν/η
        flow = dvi.central_flow(self.cubic.problem(self.w), RMSPropNorm(lr, beta2), check=False)
        nu = {"v": torch.tensor((lr * p) ** 2, dtype=torch.float64)}
        lin = flow.linearise(torch.tensor(self.w), nu, torch.tensor(self.U / np.sqrt(p)))
        X = ccp.solve(lin.alpha, lin.beta).X
        return X / p, self.U.T @ (self.cubic.C @ lin.drift(X).w.numpy()) @ self.U

    def inverse_on_identity(self, lr, beta2):
        """β̂⁻¹[I] and β̂_w β̂⁻¹[I] (C.4.1), dense."""
        eye = svec(np.eye(self.k))
        beta_w = 0.5 * self.T @ self.T.T
        beta = beta_w + (1 - beta2) / beta2 * self.S**2 / lr**2 * np.outer(eye, eye)
        return np.linalg.solve(beta, eye), beta_w @ np.linalg.solve(beta, eye)


def derivative(f, x):
    """Central difference of f at x > 0, off by (1e-4 x)² relative to the third derivative: 1e-7 here."""
    h = 1e-4 * x
    return [(a - b) / (2 * h) for a, b in zip(f(x + h), f(x - h), strict=True)]


cases = given(seed=seeds, lr=st.floats(0.1, 2), beta2=st.floats(0.1, 0.9))
each_k = pytest.mark.parametrize("k", [1, 2, 3])


@each_k
@cases
@examples(3)
def test_lemma_3_learning_rate(seed, k, lr, beta2):
    """∂Σ/∂η = 2(1−β₂)/(η³β₂) β̂⁻¹[I] (‖g‖² + S² tr Σ), and ∂(dH/dt)/∂η on U is −C·I with C ≥ 0."""
    at = AtTheEdge.oscillating(seed, k, lr, beta2)
    sigma, _ = at.look(lr, beta2)
    assert np.linalg.eigvalsh(sigma)[0] > 0
    d_sigma, d_bend = derivative(lambda x: at.look(x, beta2), lr)
    inverse, through = at.inverse_on_identity(lr, beta2)
    factor = 2 * (1 - beta2) / (lr**3 * beta2) * (at.g @ at.g + at.S**2 * np.trace(sigma))
    scale = np.abs(sigma).max() / lr  # differences of Σ, known to about 1e-10 of it
    np.testing.assert_allclose(d_sigma, factor * smat(inverse), atol=1e-5 * scale + 1e-5 * np.abs(d_sigma).max())
    np.testing.assert_allclose(smat(through), through[0] * np.eye(k), atol=1e-9)  # a multiple of I, below 1
    C = 2 / at.S * factor * through[0]
    assert C >= 0
    np.testing.assert_allclose(d_bend, -C * np.eye(k), atol=1e-5 * (C + np.linalg.norm(at.T) * scale))


@each_k
@cases
@examples(3)
def test_lemma_3_beta2_with_its_sign_put_right(seed, k, lr, beta2):
    """∂(dH/dt)/∂β₂ on U is −C·I, and C ≥ 0 exactly where tr Σ at β₂ = 1 is the *larger* one."""
    at = AtTheEdge.oscillating(seed, k, lr, beta2)
    sigma, _ = at.look(lr, beta2)
    assert np.linalg.eigvalsh(sigma)[0] > 0
    d_sigma, d_bend = derivative(lambda x: at.look(lr, x), beta2)
    inverse, through = at.inverse_on_identity(lr, beta2)
    bracket = at.S**2 / 4 - at.g @ at.g / lr**2 - at.S**2 / lr**2 * np.trace(sigma)
    scale = np.abs(sigma).max() / beta2
    size = 1e-5 * (at.S**2 / 4 + at.g @ at.g / lr**2) / beta2**2
    np.testing.assert_allclose(
        d_sigma, -bracket / beta2**2 * smat(inverse), atol=1e-5 * scale + size * np.abs(inverse).max()
    )
    C = -2 / at.S / beta2**2 * through[0] * bracket
    np.testing.assert_allclose(
        d_bend, -C * np.eye(k), atol=1e-5 * np.linalg.norm(at.T) * scale + size * np.abs(through).max()
    )
    descent = np.trace(smat(np.linalg.solve(0.5 * at.T @ at.T.T, at.T @ -at.g)))  # tr Σ at β₂ = 1: gradient descent
    normalised = lr**2 / 4 - at.g @ at.g / at.S**2  # at β₂ = 0: normalised gradient descent
    if abs(descent - normalised) > 1e-3 * (abs(descent) + abs(normalised)):
        assert (C > 0) == (descent > normalised)
        # and tr Σ lies between the two
        assert min(descent, normalised) - 1e-9 <= np.trace(sigma) <= max(descent, normalised) + 1e-9


def test_lemma_3_both_signs_of_beta2_occur():
    signs = set()
    for lr in (0.1, 3.0, 30.0):
        at = AtTheEdge(3, 1)
        descent = np.trace(smat(np.linalg.solve(0.5 * at.T @ at.T.T, at.T @ -at.g)))
        signs.add(descent > lr**2 / 4 - at.g @ at.g / at.S**2)
    assert signs == {True, False}
