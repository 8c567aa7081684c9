"""The critical subspace against dense matrices, ARPACK and LOBPCG."""

import numpy as np
import pytest
import scipy.sparse.linalg as sla
import torch
from conftest import CubicLoss, examples, orthogonal
from hypothesis import example, given
from hypothesis import strategies as st

import dvi
from dvi.methods import GradientDescent, RMSProp, RMSPropNorm
from dvi.solvers.eigen.block_method import CriticalSubspace, Eigenblock
from dvi.solvers.eigen.tracker import EigenTracker
from dvi.solvers.protocol import State

EPS = np.finfo(np.float64).eps
seeds = st.integers(0, 2**32 - 1)
WANT = 1.8


class Counted:
    """A dense symmetric operator that counts its columns and blocks."""

    def __init__(self, A):
        self.A, self.blocks, self.columns = A, 0, 0

    def __call__(self, V):
        self.blocks += 1
        self.columns += V.shape[1]
        return self.A @ V


def spectrum(rng, d, kind):
    """d eigenvalues, some above WANT: what effective Hessians of networks look like, and worse."""
    bulk = np.sort(rng.exponential(0.15, d) - 0.05)[::-1].clip(max=1.5)
    if kind == "cluster":  # five within 1e-3 about 2, then a gap
        bulk[:5] = 2 + 1e-3 * rng.uniform(-1, 1, min(5, d))[: len(bulk[:5])]
    elif kind == "multiple":
        bulk[:3] = 2.0
    elif kind == "indefinite":  # a negative end ten times as large as the wanted one
        bulk[:3] = [2.0, 1.95, 1.9][: len(bulk[:3])]
        bulk[-4:] = rng.uniform(-20, -5, len(bulk[-4:]))
    elif kind == "close":  # the first that is not wanted is near the last that is
        bulk[:4] = [2.0, 1.9, WANT + 1e-3, WANT - 1e-3][: len(bulk[:4])]
    elif kind == "spread":
        bulk = np.r_[rng.uniform(WANT + 0.05, 2.2, 5), rng.uniform(-1, WANT - 0.1, d - 5)]
    elif kind == "far":
        bulk = bulk.clip(max=1.0)
    return np.sort(bulk)[::-1].copy()


KINDS = ["generic", "cluster", "multiple", "indefinite", "close", "spread", "far"]


def dense(rng, values, dtype=torch.float64):
    Q = orthogonal(rng, len(values))
    return torch.tensor(Q @ np.diag(values) @ Q.T).to(dtype), torch.tensor(Q).to(dtype)


def check_honest(A, block):
    """The block is what it says: orthonormal, its products right, its residuals those of its vectors."""
    eps = torch.finfo(A.dtype).eps
    V, size = block.V.double(), max(1.0, float(torch.linalg.matrix_norm(A.double(), 2)))
    m = block.size
    assert (V.T @ V - torch.eye(m, dtype=torch.float64)).abs().max() <= 50 * eps * m
    # Products are carried along by recombination, not made anew.  Nearly dependent search directions are kept down to
    # a Gram eigenvalue of max(1e-10, 10³ eps), which may blow rounding up by its inverse root; then some iterations.
    loss = 100 * eps / np.sqrt(max(1e-10, 1e3 * eps)) * size
    assert (block.AV.double() - A.double() @ V).norm(dim=0).max() <= loss
    residuals = (A.double() @ V - V * torch.as_tensor(block.eigenvalues)).norm(dim=0).numpy()
    assert np.abs(residuals - block.residuals).max() <= 2 * loss
    assert (np.diff(block.eigenvalues) <= 0).all()


@pytest.mark.parametrize("kind", KINDS)
@example(seed=12742, d=120)
@example(seed=12856111, d=120)
@given(seed=seeds, d=st.sampled_from([6, 30, 120]))
@examples(12)
def test_a_start_from_nothing_finds_all_that_is_wanted(kind, seed, d):
    rng = np.random.default_rng(seed)
    values = spectrum(rng, d, kind)
    A, Q = dense(rng, values)
    subspace = CriticalSubspace()
    block = subspace.start(Counted(A), A[0], WANT)
    check_honest(A, block)
    wanted = max(1, int((values > WANT).sum()))
    assert block.size >= min(d, wanted + subspace.slack)
    assert (block.residuals[:wanted] <= subspace.tol).all()
    # a Ritz value lies within its residual of an eigenvalue, and below the true one of its rank (Courant–Fischer)
    np.testing.assert_allclose(block.eigenvalues[:wanted], values[:wanted], atol=2 * subspace.tol, rtol=0)
    assert (block.eigenvalues <= values[: block.size] + 1e-8).all()  # the products' own error, see check_honest
    if d >= 30:
        arpack = np.sort(sla.eigsh(A.numpy(), wanted, which="LA", v0=np.ones(d))[0])[::-1]
        np.testing.assert_allclose(block.eigenvalues[:wanted], arpack, atol=2 * subspace.tol, rtol=0)
    if d >= 120:
        start = rng.normal(size=(d, wanted + 2))
        lobpcg = sla.lobpcg(A.numpy(), start, largest=True, tol=1e-5, maxiter=400)[0]
        np.testing.assert_allclose(block.eigenvalues[:wanted], np.sort(lobpcg)[::-1][:wanted], atol=2e-3, rtol=0)
    # the subspace above a gap is the eigenspace: ‖sin θ‖ ≤ ‖R‖/gap (Davis–Kahan)
    gap = values[wanted - 1] - (values[wanted] if wanted < d else -np.inf)
    if gap > 0.05 and kind != "far":
        leak = (Q[:, wanted:].T @ block.V[:, :wanted]).norm()
        assert leak <= 2 * np.linalg.norm(block.residuals[:wanted]) / gap + 1e-12


@given(seed=seeds, tol=st.sampled_from([1e-2, 1e-5, 1e-8]))
@examples(15)
def test_the_tolerance_asked_for_is_kept_and_values_are_good_to_its_square(seed, tol):
    rng = np.random.default_rng(seed)
    values = spectrum(rng, 60, "generic")
    values[:3] = [2.3, 2.0, 1.9]
    A, _ = dense(rng, values)
    block = CriticalSubspace(tol=tol).start(Counted(A), A[0], WANT)
    check_honest(A, block)
    assert (block.residuals[:3] <= tol).all()
    # error of a Ritz value ≤ ‖R‖²/gap over the block of three, gap ≥ 0.4 to the rest
    assert np.abs(block.eigenvalues[:3] - values[:3]).max() <= 3 * tol**2 / 0.4 + 1e3 * EPS


@pytest.mark.parametrize("d", [1, 2, 3])
@pytest.mark.parametrize("top", [2.5, 0.1, -1.0])
def test_fewer_dimensions_than_vectors(d, top):
    values = np.array([top, top - 0.2, top - 0.4])[:d]
    A, _ = dense(np.random.default_rng(d), values)
    subspace = CriticalSubspace(slack=2)
    block = subspace.start(Counted(A), A[0], WANT)
    check_honest(A, block)
    assert block.size <= d
    np.testing.assert_allclose(block.eigenvalues[0], values[0], atol=1e-5)  # 1e-3 squared over a gap of 0.2
    followed = subspace.survey(Counted(A), subspace.follow(Counted(A), block, WANT), WANT)
    check_honest(A, followed)
    assert followed.size <= d


def test_zero_operator():
    A = torch.zeros(20, 20, dtype=torch.float64)
    block = CriticalSubspace().start(Counted(A), A[0], WANT)
    check_honest(A, block)
    assert np.abs(block.eigenvalues).max() == 0


@example(seed=8)
@example(seed=27)  # products that are carried along for long gather errors larger than the residual
@example(seed=35590)  # steps are short within a cluster: without the last directions nothing converges
@given(seed=seeds)
@examples(8)
def test_float32(seed):
    rng = np.random.default_rng(seed)
    values = spectrum(rng, 80, "cluster")
    A, _ = dense(rng, values, torch.float32)
    for tol in (1e-3, 1e-12):  # the second is out of reach: it stops at what float32 can do, and does not fail
        block = CriticalSubspace(tol=tol).start(Counted(A), A[0], WANT)
        assert block.V.dtype == torch.float32
        check_honest(A, block)
        np.testing.assert_allclose(block.eigenvalues[:5], values[:5], atol=2e-3 if tol == 1e-3 else 2e-4, rtol=0)


def path(rng, d, moving):
    """A(s) = Q(s) diag(moving(s)) Q(s)ᵀ with a slowly turning Q."""
    Q, G = orthogonal(rng, d), rng.normal(size=(d, d))
    G = torch.tensor((G - G.T) / np.sqrt(d))

    def A(s):
        turned = torch.matrix_exp(0.3 * s * G) @ torch.tensor(Q)
        return turned @ torch.diag(torch.tensor(moving(s))) @ turned.T, turned

    return A


@pytest.mark.parametrize("seed", range(6))
def test_two_eigenvalues_cross_without_a_jump_of_the_subspace(seed):
    rng = np.random.default_rng(seed)
    d = 40
    rest = np.sort(rng.uniform(-1, 1.2, d - 3))

    def moving(s):  # λ₁ and λ₂ cross at s = ½ (exactly: the directions keep to their own values); a third stays at 1.95
        return np.r_[2.05 - 0.1 * s, 1.98 + 0.04 * s, 1.95, rest]

    A, subspace = path(rng, d, moving), CriticalSubspace()
    block = subspace.start(Counted(A(0.0)[0]), torch.zeros(d, dtype=torch.float64), WANT)
    previous = None
    for s in np.linspace(0, 1, 41):
        matrix, Q = A(s)
        block = subspace.follow(Counted(matrix), block, WANT)
        check_honest(matrix, block)
        np.testing.assert_allclose(block.eigenvalues[:3], np.sort(moving(s))[::-1][:3], atol=1e-4, rtol=0)
        projector = block.V[:, :3] @ block.V[:, :3].T
        exact = Q[:, :3] @ Q[:, :3].T
        # Davis–Kahan: three residuals of 1e-3 over a gap of 0.7
        assert torch.linalg.matrix_norm(projector - exact, 2) <= 2 * np.sqrt(3) * 1e-3 / 0.7
        if previous is not None:
            # the eigenspace itself turns by at most 0.3 ‖G‖ ds ≈ 0.3 · 2 · 2 · 1/40
            assert torch.linalg.matrix_norm(projector - previous, 2) <= 0.04
        previous = projector


@pytest.mark.parametrize("seed", range(6))
def test_following_is_cheap(seed):
    rng = np.random.default_rng(seed)
    rest = np.sort(rng.uniform(-1, 1.2, 57))
    A, subspace = path(rng, 60, lambda s: np.r_[2.0, 1.97, 1.9 + 0.05 * s, rest]), CriticalSubspace()
    block = subspace.start(Counted(A(0.0)[0]), torch.zeros(60, dtype=torch.float64), WANT)
    for s in np.linspace(0, 0.2, 11)[1:]:
        operator = Counted(A(s)[0])
        block = subspace.follow(operator, block, WANT)
        assert operator.blocks <= 12  # a warm start: a few products, where a start from nothing takes dozens


@given(seed=seeds)
@examples(15)
def test_an_eigenvalue_in_a_direction_the_block_cannot_see_is_found_by_a_survey(seed):
    rng = np.random.default_rng(seed)
    d = 50
    values = np.r_[2.0, 1.9, np.sort(rng.uniform(-1, 1, d - 2))[::-1]]
    A, Q = dense(rng, values)
    subspace = CriticalSubspace()
    # a block of exact eigenvectors, and a direction at a right angle to it that has risen above: following is blind
    V = Q[:, :3].clone()
    block = Eigenblock(V, A @ V, values[:3], np.zeros(3), draws=1)
    B = A + (2.2 - values[-1]) * torch.outer(Q[:, -1], Q[:, -1])
    blind = subspace.follow(Counted(B), block, WANT)
    assert blind.eigenvalues[0] < 2.1
    found = subspace.survey(Counted(B), blind, WANT)
    check_honest(B, found)
    np.testing.assert_allclose(found.eigenvalues[:3], [2.2, 2.0, 1.9], atol=1e-4, rtol=0)
    # a survey that finds nothing leaves the block as it is
    again = subspace.survey(Counted(B), found, WANT)
    assert again.V is found.V
    assert again.draws == found.draws + 1


@given(seed=seeds)
@examples(8)
def test_two_eigenvalues_that_enter_at_once_are_both_found(seed):
    rng = np.random.default_rng(seed)
    values = np.r_[1.9, np.sort(rng.uniform(-1, 1, 49))[::-1]]
    A, Q = dense(rng, values)
    V = Q[:, :2].clone()
    block = Eigenblock(V, A @ V, values[:2], np.zeros(2), draws=1)
    B = A + sum((2.1 + 0.1 * i - values[-i]) * torch.outer(Q[:, -i], Q[:, -i]) for i in (1, 2))
    found = CriticalSubspace().survey(Counted(B), CriticalSubspace().follow(Counted(B), block, WANT), WANT)
    np.testing.assert_allclose(found.eigenvalues[:3], [2.3, 2.2, 1.9], atol=1e-4, rtol=0)


@pytest.mark.parametrize("bad", [{"slack": 0}, {"tol": 0.0}])
def test_settings_that_would_miss_an_entry_are_refused(bad):
    with pytest.raises(ValueError, match="slack must be at least 1, tol positive"):
        CriticalSubspace(**bad)


def test_the_watch_surveys_on_its_own_and_misses_no_entry():
    """An eigenvalue enters from a direction at a right angle to everything followed, along a flow."""
    d = 30
    rng = np.random.default_rng(3)
    Q = torch.tensor(orthogonal(rng, d))
    values = np.r_[1.99, 1.9, np.sort(rng.uniform(-1, 1, d - 2))[::-1]]

    class Rising:
        def effective_hessian(self, y):
            now = values.copy()
            now[-1] = -1 + 0.05 * y.t  # reaches 1.99 at t = 59.8
            A = Q @ torch.diag(torch.tensor(now)) @ Q.T
            return lambda V: A @ V

        def basis(self, y, V):
            return V

    watch, seen, first = EigenTracker(survey_every=5.0), None, None
    for t in np.arange(0, 70, 0.5):
        seen = watch.update(Rising(), State(Q[0], {}, float(t)), seen, 0.5)
        if first is None and seen.eigenvalues[0] > 1.995:
            first = t
    assert first is not None
    assert first <= 61.0  # at 59.9, and nothing later than the step after it
    assert abs(float(seen.eigenvalues[0]) - (-1 + 0.05 * 69.5)) < 1e-3


def test_the_same_seed_gives_the_same_block_and_draws_are_counted():
    A, _ = dense(np.random.default_rng(0), spectrum(np.random.default_rng(0), 40, "cluster"))
    torch.manual_seed(1)
    one = CriticalSubspace().start(Counted(A), A[0], WANT)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    two = CriticalSubspace().start(Counted(A), A[0], WANT)
    assert torch.equal(one.V, two.V)  # bit for bit, whatever the global generator
    assert torch.equal(state, torch.get_rng_state())  # which is left alone
    other = CriticalSubspace(seed=1).start(Counted(A), A[0], WANT)
    assert not torch.equal(one.V, other.V)


def test_no_convergence_is_an_error_with_advice():
    values = 2 - 1e-7 * np.arange(200)
    A, _ = dense(np.random.default_rng(0), values)
    with pytest.raises(dvi.ConvergenceError, match=r"eigenpairs.*residual .* after 3 block products.*Loosen") as caught:
        CriticalSubspace(tol=1e-12, max_iterations=3).start(Counted(A), A[0], 1.999998)
    assert "float64" in str(caught.value)


def test_products_that_are_not_finite_are_an_error():
    A = torch.full((10, 10), float("nan"), dtype=torch.float64)
    with pytest.raises(dvi.ConvergenceError, match="not finite"):
        CriticalSubspace().start(Counted(A), torch.zeros(10, dtype=torch.float64), WANT)


# ---- the generalised problem (H, P) ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gd", "rmsprop-norm", "rmsprop"])
@given(seed=seeds, d=st.integers(4, 10), k=st.integers(1, 3))
@examples(12)
def test_the_basis_of_a_linearisation_solves_the_generalised_problem(name, seed, d, k):
    rng = np.random.default_rng(seed)
    lr = 0.3
    v = rng.uniform(0.2, 2, d) if name == "rmsprop" else np.full(d, rng.uniform(0.2, 2))
    p = np.full(d, 1 / lr) if name == "gd" else np.sqrt(v) / lr
    method, nu = {
        "gd": (GradientDescent(lr), {}),
        "rmsprop-norm": (RMSPropNorm(lr, 0.9), {"v": torch.tensor(v[0])}),
        "rmsprop": (RMSProp(lr, 0.9), {"v": torch.tensor(v)}),
    }[name]
    effective = np.r_[rng.uniform(1.96, 2.04, k), rng.uniform(-3, 1.9, d - k)]
    Q, root = orthogonal(rng, d), np.sqrt(p)
    H = Q @ np.diag(effective) @ Q.T * np.outer(root, root)
    w = rng.normal(size=d)
    cubic = CubicLoss.with_derivatives(rng, w, rng.normal(size=d), H)
    lin = dvi.central_flow(cubic.problem(w), method, check=False).linearise(torch.tensor(w), nu)
    U = lin.U.numpy()
    assert U.shape == (d, k)
    tol = EigenTracker().subspace.tol
    np.testing.assert_allclose(U.T @ (p[:, None] * U), np.eye(k), atol=1e3 * EPS)
    # ‖Av − λv‖ ≤ tol for A = P^{−1/2}HP^{−1/2}, v = P^{1/2}u:  HU − PUΛ = P^{1/2}R
    R = (H @ U - (p[:, None] * U) * lin.eigenvalues.numpy()) / root[:, None]
    assert np.linalg.norm(R, axis=0).max() <= tol + 1e3 * EPS
    expected = np.sort(effective)[::-1][:k]
    np.testing.assert_allclose(lin.eigenvalues.numpy(), expected, atol=2 * tol, rtol=0)
    # diag(2 − λ), as far as the vectors are orthogonal in H: to rounding for Ritz vectors
    np.testing.assert_allclose(lin.gap.numpy(), np.diag(2 - lin.eigenvalues.numpy()), atol=1e4 * EPS)
