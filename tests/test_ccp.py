"""The CCP solver against an independent verification, CVXPY, Lemma 5 of the paper, and its symmetries.

The conditions of Definition 8 are checked here with plain numpy in the units of the instance: nothing of the solver,
nor its svec, is used for that.
"""

import cvxpy as cp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dvi.solvers import ccp
from dvi.solvers.ccp import CCPError, CCPResult, cascade
from dvi.solvers.ccp.interior_point import centre, interior_point
from dvi.solvers.ccp.newton import newton
from dvi.solvers.ccp.scaling import Problem
from dvi.solvers.ccp.verification import Verdict

ACCEPTED = 1e-10  # what the solver promises
EPS = np.finfo(np.float64).eps


# --- an independent verification ------------------------------------------------------------------------------------


def vec(M):
    i, j = np.triu_indices(len(M))
    return M[i, j] * np.where(i == j, 1.0, np.sqrt(2.0))


def mat(v):
    k = int(np.sqrt(2 * len(v)))
    i, j = np.triu_indices(k)
    M = np.zeros((k, k))
    M[i, j] = M[j, i] = v / np.where(i == j, 1.0, np.sqrt(2.0))
    return M


def residuals(alpha, beta, X):
    """Return the backward residual, relative to |α| + |β||X|, and the strict one, relative to |α|.

    The backward one is the size, up to a small factor, of the least change of (α, β) that X solves exactly. |β| is the
    spectral norm, the smallest of the usual ones, which makes this stricter than what the solver reports.
    """
    alpha_unit, beta_unit = np.abs(alpha).max(), np.abs(beta).max()
    a, b = alpha / alpha_unit, beta / beta_unit
    X = X / alpha_unit * beta_unit
    S = mat(b @ vec(X)) - a
    size_X, size_a = np.linalg.norm(X), np.linalg.norm(a)
    scale = size_a + np.linalg.norm(b, 2) * size_X
    defect = max(-np.linalg.eigvalsh(S)[0], 0.0)
    outside = 0.0
    if size_X > 0:
        defect = max(defect, abs(np.sum(X * S)) / size_X)
        outside = max(-np.linalg.eigvalsh(X)[0], 0.0) / size_X
    return max(outside, defect / scale), max(outside, defect / size_a)


def assert_solves(alpha, beta, result):
    assert isinstance(result, CCPResult)
    assert np.array_equal(result.X, result.X.T)
    backward, strict = residuals(alpha, beta, result.X)
    assert backward <= ACCEPTED, result.path
    assert strict <= 1e-6, result.path
    assert 0.0 <= result.residual <= ACCEPTED
    S = mat(beta @ vec(result.X)) - alpha
    # S is a difference of terms of size |α| + |β||X|, summed in another order
    scale = np.linalg.norm(alpha) + np.linalg.norm(beta) * np.linalg.norm(result.X)
    assert np.linalg.norm(result.S - S) <= 1e-12 * scale


# --- instances ------------------------------------------------------------------------------------------------------


def dimension(k):
    return k * (k + 1) // 2


def congruence(G):
    """The matrix of H ↦ G H Gᵀ, column by column from the definition."""
    n = dimension(len(G))
    return np.array([vec(G @ mat(e) @ G.T) for e in np.eye(n)]).T


def symmetric(rng, k):
    M = rng.normal(size=(k, k))
    return 0.5 * (M + M.T)


def orthogonal(rng, k):
    return np.linalg.qr(rng.normal(size=(k, k)))[0]


def generic(rng, k):
    n = dimension(k)
    J = rng.normal(size=(n, 2 * n))
    return symmetric(rng, k) + rng.uniform(-1, 1) * np.sqrt(k) * np.eye(k), J @ J.T / (2 * n)


def ill_conditioned(rng, k):
    n = dimension(k)
    Q = orthogonal(rng, n)
    beta = (Q * np.logspace(0, -8, n)) @ Q.T
    return symmetric(rng, k), 0.5 * (beta + beta.T)


def scaled(rng, k):
    alpha, beta = generic(rng, k)
    return alpha * 10 ** rng.uniform(-12, 12), beta * 10 ** rng.uniform(-12, 12)


def graded(rng, k):
    """Critical directions that move at rates 10⁴ apart: entries of β are up to 10¹⁶ apart."""
    alpha, beta = generic(rng, k)
    g = 10 ** rng.uniform(-2, 2, k)
    C = congruence(np.diag(g))
    return g[:, None] * alpha * g, C @ beta @ C.T


def graded_apart(rng, k):
    """α and β graded independently."""
    alpha, beta = generic(rng, k)
    C = congruence(np.diag(10 ** rng.uniform(-1, 1, k)))
    g = 10 ** rng.uniform(-1, 1, k)
    return g[:, None] * alpha * g, C @ beta @ C.T


def rank_deficient_alpha(rng, k):
    _, beta = generic(rng, k)
    V = rng.normal(size=(k, rng.integers(1, k + 1)))
    return (V * rng.choice([-1.0, 1.0], V.shape[1])) @ V.T, beta


def solution(rng, k, strict):
    """X ⪰ 0, S ⪰ 0 with XS = 0, and X + S ≻ 0 if `strict`."""
    Q = orthogonal(rng, k)
    rank_X = rng.integers(1, k + 1)
    rank_S = k - rank_X if strict else rng.integers(0, k - rank_X + 1)
    x, s = np.zeros(k), np.zeros(k)
    x[:rank_X] = rng.uniform(0.1, 2, rank_X)
    s[k - rank_S :] = rng.uniform(0.1, 2, rank_S)
    return (Q * x) @ Q.T, (Q * s) @ Q.T


def feasible(rng, k, beta, strict):
    X, S = solution(rng, k, strict)
    alpha = mat(beta @ vec(X)) - S
    return 0.5 * (alpha + alpha.T), beta


def singular(rng, k):
    """β of random rank, α such that there is a solution."""
    n = dimension(k)
    J = rng.normal(size=(n, rng.integers(1, n + 1)))
    return feasible(rng, k, J @ J.T / J.shape[1], strict=True)


def not_strict(rng, k):
    """X + S is singular: the solution is not differentiable in α."""
    return feasible(rng, k, generic(rng, k)[1], strict=False)


def not_symmetric(rng, k):
    alpha, beta = generic(rng, k)
    K = rng.normal(size=beta.shape)
    return alpha, beta + 10 ** rng.uniform(-1, 1) * (K - K.T) / np.sqrt(len(K))


def singular_not_symmetric_not_strict(rng, k):
    n = dimension(k)
    J = rng.normal(size=(n, rng.integers(1, n + 1)))
    r = J.shape[1]
    K = rng.normal(size=(r, r))
    return feasible(rng, k, J @ (np.eye(r) + (K - K.T) / np.sqrt(r)) @ J.T / r, strict=False)


CLASSES = [
    generic,
    ill_conditioned,
    scaled,
    graded,
    graded_apart,
    rank_deficient_alpha,
    singular,
    not_strict,
    not_symmetric,
    singular_not_symmetric_not_strict,
]
# 20,100 instances in all; few where one takes 10 ms and more
COUNTS = {1: 300, 2: 500, 3: 450, 4: 350, 5: 200, 6: 120, 8: 70, 10: 15, 14: 4, 20: 1}


def test_the_sweep_is_as_large_as_promised():
    assert len(CLASSES) * sum(COUNTS.values()) >= 20_000


@pytest.mark.parametrize("k", COUNTS)
@pytest.mark.parametrize("make", CLASSES)
def test_every_instance_is_solved(make, k):
    for i in range(COUNTS[k]):
        alpha, beta = make(np.random.default_rng([CLASSES.index(make), k, i]), k)
        assert_solves(alpha, beta, ccp.solve(alpha, beta))


@given(st.sampled_from(CLASSES), st.integers(1, 6), st.integers(0, 2**32 - 1))
@settings(max_examples=300, deadline=None)
def test_instances_of_any_seed_are_solved(make, k, seed):
    alpha, beta = make(np.random.default_rng(seed), k)
    assert_solves(alpha, beta, ccp.solve(alpha, beta))


@st.composite
def monotone(draw):
    """Any α, and any β = JJᵀ + K − Kᵀ + 1: zeros, repeated and tiny entries, which random numbers never hit."""
    k = draw(st.integers(1, 4))
    n = dimension(k)
    # below 1e-290 X has fewer digits than a float64 should
    a = draw(hnp.arrays(np.float64, (k, k), elements=st.floats(-1e6, 1e6).map(lambda x: x if abs(x) > 1e-290 else 0.0)))
    J = draw(hnp.arrays(np.float64, (n, n), elements=st.floats(-1e2, 1e2)))
    K = draw(hnp.arrays(np.float64, (n, n), elements=st.floats(-1e2, 1e2)))
    return 0.5 * (a + a.T), J @ J.T + K - K.T + np.eye(n)


@given(monotone())
@settings(max_examples=300, deadline=None)
def test_any_strongly_monotone_problem_has_a_solution(problem):
    alpha, beta = problem
    result = ccp.solve(alpha, beta)
    if np.abs(alpha).max() > 0:
        assert_solves(alpha, beta, result)
    else:
        assert not result.X.any()


def test_the_verification_can_fail():
    rng = np.random.default_rng(0)
    alpha, beta = not_symmetric(rng, 3)
    X = ccp.solve(alpha, beta).X
    assert np.linalg.norm(X) > 0.1
    assert residuals(alpha, beta, X)[0] <= ACCEPTED
    for wrong in (X * (1 + 1e-8), X - 1e-8 * np.eye(3), X + 1e-8 * np.eye(3), np.zeros((3, 3)), -X):
        assert residuals(alpha, beta, wrong)[0] > ACCEPTED
    # the skew part of β matters: leaving it out solves another problem
    assert residuals(alpha, beta, ccp.solve(alpha, 0.5 * (beta + beta.T)).X)[0] > 1e-3


# --- closed forms and references ------------------------------------------------------------------------------------


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_one_critical_direction(alpha, beta):
    result = ccp.solve([[alpha]], [[beta]])
    # one division
    assert result.X[0, 0] == pytest.approx(max(alpha, 0.0) / beta, rel=2 * EPS, abs=0.0)
    assert result.path == ("scalar" if alpha > 0 else "zero")


def test_no_critical_direction():
    result = ccp.solve(np.zeros((0, 0)), np.zeros((0, 0)))
    assert result.X.shape == result.S.shape == (0, 0)
    assert (result.residual, result.path) == (0.0, "empty")


@pytest.mark.parametrize("k", [1, 2, 5])
def test_no_oscillation_where_every_eigenvalue_falls(k):
    alpha, beta = generic(np.random.default_rng(k), k)
    alpha = -alpha @ alpha
    result = ccp.solve(alpha, beta)
    assert not result.X.any()
    assert np.array_equal(result.S, -alpha)
    assert result.path == "zero"


@pytest.mark.parametrize("k", [2, 3, 6])
def test_identity_projects_onto_the_cone(k):
    """β = 1: X is the projection of α onto the cone (Moreau), in closed form by eigenvalues."""
    alpha = symmetric(np.random.default_rng(k), k)
    eigenvalues, V = np.linalg.eigh(alpha)
    X = ccp.solve(alpha, np.eye(dimension(k))).X
    # the projection is 1-Lipschitz, and the solver's error in S at most 1e-12 (|α| + |X|)
    assert np.linalg.norm(X - (V * np.maximum(eigenvalues, 0)) @ V.T) <= 1e-11 * np.linalg.norm(alpha)


@pytest.mark.parametrize("k", [2, 3, 4])
@pytest.mark.parametrize("seed", range(6))
def test_agrees_with_cvxpy(k, seed):
    """CVXPY minimises ½⟨X, βX⟩ − ⟨α, X⟩ over X ⪰ 0 (Lemma 5), with Clarabel's relative gap of 1e-8."""
    alpha, beta = generic(np.random.default_rng([k, seed]), k)
    variable = cp.Variable((k, k), symmetric=True)
    i, j = np.triu_indices(k)
    weights = np.where(i == j, 1.0, np.sqrt(2.0))
    x = cp.multiply(weights, cp.hstack([variable[p, q] for p, q in zip(i, j, strict=True)]))
    objective = 0.5 * cp.sum_squares(np.linalg.cholesky(beta).T @ x) - vec(alpha) @ x
    problem = cp.Problem(cp.Minimize(objective), [variable >> 0])
    problem.solve(solver=cp.CLARABEL)
    assert problem.status == cp.OPTIMAL

    X = ccp.solve(alpha, beta).X
    value = 0.5 * vec(X) @ beta @ vec(X) - vec(alpha) @ vec(X)
    gap = 1e-7 * (1 + abs(value))  # ten times Clarabel's own tolerance
    assert value == pytest.approx(problem.value, abs=gap)
    # strong convexity: ½ μ |X − X*|² is at most the gap
    mu = np.linalg.eigvalsh(beta)[0]
    assert np.linalg.norm(X - variable.value) <= np.sqrt(2 * gap / mu)


# --- Lemma 5 --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 3, 5])
@pytest.mark.parametrize("seed", range(20))
def test_solutions_of_a_singular_problem_differ_in_the_kernel(k, seed):
    """Lemma 5.2, quantitatively: ⟨Δ, βΔ⟩ ≤ −⟨X, S'⟩ − ⟨X', S⟩ + … ≤ residual · (|X| + |X'|) · scale."""
    rng = np.random.default_rng([k, seed])
    n = dimension(k)
    J = rng.normal(size=(n, rng.integers(1, n + 1)))
    beta = J @ J.T / J.shape[1]
    X, S = solution(rng, k, strict=True)
    alpha = mat(beta @ vec(X)) - S
    found = ccp.solve(alpha, beta).X
    difference = vec(found - X)
    scale = np.linalg.norm(alpha) + np.linalg.norm(beta, 2) * np.linalg.norm(found)
    # measured residuals are below 1e-11; k for ⟨X', S⟩ ≥ −|tr X'| |λ_min(S)|
    bound = 4e-11 * k * (np.linalg.norm(found) + np.linalg.norm(X)) * scale
    assert difference @ beta @ difference <= bound


def test_a_singular_problem_has_several_solutions():
    """β sees only X₁₁, α pushes there: X₂₂ is free, and a warm start with another X₂₂ is as good."""
    alpha, beta = np.diag([1.0, 0.0]), np.diag([1.0, 0.0, 0.0])
    first = ccp.solve(alpha, beta)
    second = ccp.solve(alpha, beta, warm=np.diag([1.0, 5.0]))
    for result in (first, second):
        assert_solves(alpha, beta, result)
        assert result.X[0, 0] == pytest.approx(1.0, abs=1e-9)  # β = 1 there: the accepted residual, times |α| + |β||X|


def error_bound(alpha, beta):
    """How far two X may be apart that solve a problem to 1e-12, which the solver reaches where β is well conditioned.

    A defect of size δ in the normal map moves X by at most κ δ/μ with κ = |β|/μ, μ the smallest eigenvalue of sym β.
    """
    mu = np.linalg.eigvalsh(0.5 * (beta + beta.T))[0]
    size = np.linalg.norm(alpha) * (1 + np.linalg.norm(beta, 2) / mu)  # |X| ≤ |α|/μ
    return 1e-12 * size / mu * np.linalg.norm(beta, 2) / mu


@pytest.mark.parametrize("make", [generic, not_symmetric, rank_deficient_alpha])
@pytest.mark.parametrize("k", [2, 3, 5])
def test_the_solution_of_a_definite_problem_is_unique(make, k):
    """Lemma 5: whatever the start, the answer is the same; garbage as a warm start only costs time."""
    rng = np.random.default_rng(k)
    alpha, beta = make(rng, k)
    cold = ccp.solve(alpha, beta)
    close = ccp.solve(1.001 * alpha, beta)
    starts = [
        cold,
        close,
        close.X,
        torch.from_numpy(close.X),
        np.zeros((k, k)),
        1e30 * np.eye(k),
        -np.eye(k),
        1e-300 * np.ones((k, k)),
        rng.normal(size=(k, k)),
        np.full((k, k), np.nan),
        np.full((k, k), np.inf),
        np.eye(k + 1),
        np.zeros(0),
    ]
    for warm in starts:
        result = ccp.solve(alpha, beta, warm=warm)
        assert_solves(alpha, beta, result)
        assert np.linalg.norm(result.X - cold.X) <= error_bound(alpha, beta)


@given(st.sampled_from(CLASSES), st.integers(2, 5), st.integers(0, 2**32 - 1), st.sampled_from([1e-6, 1e-3, 0.1]))
@settings(max_examples=150, deadline=None)
def test_warm_starts_along_a_path(make, k, seed, step):
    alpha, beta = make(np.random.default_rng(seed), k)
    result = ccp.solve(alpha, beta)
    for i in range(3):
        alpha, beta = alpha * (1 + step), beta * (1 + i * step)
        result = ccp.solve(alpha, beta, warm=result)
        assert_solves(alpha, beta, result)


def test_warm_starts_save_iterations():
    cold = warm = 0
    for seed in range(30):
        alpha, beta = generic(np.random.default_rng(seed), 4)
        start = ccp.solve(alpha, beta)
        cold += ccp.solve(1.0001 * alpha, beta).iterations
        warm += ccp.solve(1.0001 * alpha, beta, warm=start).iterations
    assert warm < 0.6 * cold  # measured: 0.46


# --- symmetries -----------------------------------------------------------------------------------------------------


@given(st.sampled_from([generic, not_symmetric, not_strict]), st.integers(1, 5), st.integers(0, 2**32 - 1))
@settings(max_examples=100, deadline=None)
def test_a_rotated_basis_rotates_the_solution(make, k, seed):
    rng = np.random.default_rng(seed)
    alpha, beta = make(rng, k)
    Q = orthogonal(rng, k)
    C = congruence(Q)
    X, rotated = ccp.solve(alpha, beta).X, ccp.solve(Q @ alpha @ Q.T, C @ beta @ C.T).X
    assert np.linalg.norm(rotated - Q @ X @ Q.T) <= error_bound(alpha, beta)


@given(
    st.sampled_from(CLASSES), st.integers(1, 5), st.integers(0, 2**32 - 1), st.integers(-99, 99), st.integers(-99, 99)
)
@settings(max_examples=100, deadline=None)
def test_units_do_not_matter(make, k, seed, p, q):
    """X scales with α/β, to the last digit for powers of two: the solver works in units of its own."""
    alpha, beta = make(np.random.default_rng(seed), k)
    X = ccp.solve(alpha, beta)
    other = ccp.solve(np.ldexp(alpha, p), np.ldexp(beta, q))
    assert np.array_equal(other.X, np.ldexp(X.X, p - q))
    assert np.array_equal(other.S, np.ldexp(X.S, p))
    assert (other.path, other.residual) == (X.path, X.residual)


# --- the cascade ----------------------------------------------------------------------------------------------------


def test_every_rung_is_used():
    """A rung that no instance reaches would be dead, or untested."""
    paths = set()
    for make in (generic, ill_conditioned, singular):
        for seed in range(60):
            alpha, beta = make(np.random.default_rng(seed), 1 + seed % 4)
            first = ccp.solve(alpha, beta)
            paths |= {first.path, ccp.solve(alpha * 1.01, beta, warm=first).path}
    assert paths == {"zero", "scalar", "interior", "newton", "newton, warm", "newton, again", "interior point"}


@pytest.mark.parametrize("make", CLASSES)
def test_the_interior_point_method_needs_no_help(make, monkeypatch):
    """It is the rung that must not fail: solve everything with it, Newton only polishing at the end."""
    whole = cascade.newton

    def only_polish(problem, x, s, max_iterations, tolerance, **options):
        return whole(problem, x, s, 0 if max_iterations > 6 else max_iterations, tolerance, **options)

    monkeypatch.setattr(cascade, "newton", only_polish)
    for seed in range(40):
        alpha, beta = make(np.random.default_rng(seed), 2 + seed % 4)
        assert_solves(alpha, beta, ccp.solve(alpha, beta))


@pytest.mark.parametrize("make", [ill_conditioned, singular, not_symmetric])
def test_the_interior_point_method_goes_on_from_where_it_stopped(make):
    """Newton's method is tried in between; where it fails nothing may be lost."""
    for seed in range(20):
        problem = Problem.scaled(*make(np.random.default_rng(seed), 2 + seed % 4), equilibrate=True)
        whole, _ = interior_point(problem, centre(problem.k), 60, 1e-13)
        first, at = interior_point(problem, centre(problem.k), 60, 1e-13, strict=3e-2)
        # |b x − a − s| ≤ 0.03 |a|, whatever the size of x
        assert np.linalg.norm(problem.b @ at.x - problem.a - at.s) <= 0.03 * np.linalg.norm(problem.a)
        second, _ = interior_point(problem, at, 60, 1e-13)
        assert np.array_equal(second.x, whole.x)
        assert np.array_equal(second.s, whole.s)
        assert first.iterations + second.iterations == whole.iterations


def test_newton_takes_over_before_the_interior_point_method_has_arrived():
    """Where β has condition 1e8, that saves half of the interior point method's iterations, which cost most."""
    instances = [ill_conditioned(np.random.default_rng(seed), 5) for seed in range(30)]
    found = [result for result in (ccp.solve(*instance) for instance in instances) if result.path == "interior point"]
    assert len(found) > 20
    assert np.mean([result.iterations for result in found]) <= 16  # with Newton's; measured: 14, and 18 without
    assert max(result.residual for result in found) <= 1e-14  # and nothing of the accuracy is given up


@pytest.mark.parametrize("make", [generic, rank_deficient_alpha, not_symmetric])
def test_newton_never_raises_the_defect(make):
    """Far from the solution full steps may diverge; the line search lets |F| = γ|β[X] − α − S| only fall."""
    for seed in range(30):
        rng = np.random.default_rng(seed)
        problem = Problem.scaled(*make(rng, 4), equilibrate=False)
        G, H = rng.normal(size=(2, 4, 4))
        start = vec(100 * G @ G.T), vec(H @ H.T)
        defects = []
        for steps in range(10):
            found = newton(problem, *start, max_iterations=steps, tolerance=1e-13)
            defects.append(np.linalg.norm(problem.b @ found.x - problem.a - found.s))
        # found.s is (X − Z)/γ and rounds at the size of X/γ
        assert (np.diff(defects) <= 1e-12 * defects[0]).all()


def test_each_part_of_the_verification_refuses():
    """What the other two parts let pass."""
    beta = np.diag([1.0, 1.0, 2e-11])
    plain = Problem.scaled(np.diag([1.0, 0.0]), beta, equilibrate=False)
    assert Verdict.of(plain, np.diag([1.0, 0.0])).accepted
    # S₂₂ = 0.02 and X₂₂ = 1e9: small beside |β||X|, not beside |α|
    loose = Verdict.of(plain, np.diag([1.0, 1e9]))
    assert loose.residual <= ACCEPTED
    assert loose.growth <= 1e10
    assert not loose.accepted
    # a solution, to all digits, but of a size that is decided by the last digits of β
    large = Verdict.of(Problem.scaled(np.diag([0.0, 1.0]), beta, equilibrate=False), np.diag([0.0, 0.5e11]))
    assert large.residual <= ACCEPTED
    assert large.strict <= 1e-6
    assert not large.accepted
    wrong = Verdict.of(plain, np.diag([1.0 + 1e-9, 0.0]))
    assert wrong.strict <= 1e-6
    assert wrong.growth <= 1e10
    assert not wrong.accepted


# --- input ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64])
def test_tensors_of_any_dtype(dtype):
    alpha = torch.tensor([[1.0, 2.0], [2.0, -3.0]]).to(dtype)
    beta = torch.diag(torch.tensor([1.0, 2.0, 3.0])).to(dtype)
    if dtype.is_floating_point:
        alpha.requires_grad_()
    result = ccp.solve(alpha, beta)
    assert result.X.dtype == np.float64
    # these numbers are exact in every dtype
    assert np.array_equal(result.X, ccp.solve([[1, 2], [2, -3]], np.diag([1, 2, 3])).X)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_tensors_of_a_gpu():
    alpha, beta = generic(np.random.default_rng(0), 4)
    result = ccp.solve(torch.from_numpy(alpha).cuda(), torch.from_numpy(beta).cuda())
    assert np.array_equal(result.X, ccp.solve(alpha, beta).X)


@pytest.mark.parametrize("make", CLASSES)
def test_input_is_left_as_it_was(make):
    alpha, beta = make(np.random.default_rng(0), 3)
    copies = alpha.copy(), beta.copy()
    for array in (alpha, beta):
        array.setflags(write=False)
    result = ccp.solve(alpha, np.asfortranarray(beta))
    assert np.array_equal(result.X, ccp.solve(alpha, beta).X)
    assert np.array_equal(alpha, copies[0])
    assert np.array_equal(beta, copies[1])
    assert not np.shares_memory(result.S, alpha)


def test_strict_floating_point_settings_do_not_matter():
    with np.errstate(all="raise"):
        for make in CLASSES:
            alpha, beta = make(np.random.default_rng(1), 3)
            ccp.solve(alpha, beta, warm=1e300 * np.eye(3))


def test_rounding_in_alpha_is_not_an_asymmetry():
    alpha, beta = generic(np.random.default_rng(0), 3)
    noisy = alpha + 1e-12 * np.triu(np.ones((3, 3)), 1)
    assert_solves(0.5 * (noisy + noisy.T), beta, ccp.solve(noisy, beta))
    # single precision has single precision's rounding
    noisy = torch.from_numpy(alpha + 1e-6 * np.triu(np.ones((3, 3)), 1))
    ccp.solve(noisy.float(), beta)
    with pytest.raises(CCPError, match="α must be symmetric"):
        ccp.solve(noisy, beta)


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_entries_that_are_not_finite(k, bad):
    alpha, beta = generic(np.random.default_rng(0), k)
    with pytest.raises(CCPError, match="α is not finite"):
        ccp.solve(np.where(np.eye(k) > 0, bad, alpha), beta)
    beta[-1, 0] = bad
    with pytest.raises(CCPError, match="β is not finite"):
        ccp.solve(alpha, beta)


@pytest.mark.parametrize(
    ("alpha", "beta", "message"),
    [
        (np.zeros(3), np.eye(3), r"α must be a square matrix \[k, k\], and has shape \(3,\)"),
        (np.zeros((2, 3)), np.eye(3), r"α must be a square matrix"),
        (1.0, np.eye(1), r"α must be a square matrix"),
        (np.eye(2), np.eye(2), r"β must be \[3, 3\].* k = 2, and has shape \(2, 2\)"),
        (np.eye(2), np.eye(4), r"β must be \[3, 3\]"),
        (np.eye(1), 1.0, r"β must be \[1, 1\]"),
        (np.zeros((0, 0)), np.eye(1), r"β must be \[0, 0\]"),
        (np.eye(2), np.zeros((2, 2, 2, 2)), r"β must be \[3, 3\]"),
        (np.array([[0.0, 1.0], [0.0, 0.0]]), np.eye(3), "α must be symmetric"),
        (1j * np.eye(2), np.eye(3), "α must hold real numbers"),
        (torch.eye(2), 1j * torch.eye(3), "β must hold real numbers"),
        ([["a"]], np.eye(1), "α must hold real numbers"),
    ],
)
def test_malformed_input(alpha, beta, message):
    with pytest.raises(CCPError, match=message):
        ccp.solve(alpha, beta)


@pytest.mark.parametrize("size", [1.0, 1e-3, 1e-9])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_a_problem_that_is_not_monotone_is_refused_with_the_direction(k, size):
    rng = np.random.default_rng(k)
    n = dimension(k)
    Q = orthogonal(rng, n)
    K = rng.normal(size=(n, n))
    eigenvalues = np.linspace(1.0, 2.0, n)
    eigenvalues[0] = -size
    beta = 1e5 * ((Q * eigenvalues) @ Q.T + K - K.T)
    with pytest.raises(CCPError, match=r"not monotone[\s\S]*P\(ν\)") as caught:
        ccp.solve(np.eye(k), beta)
    D = vec(caught.value.direction)
    assert D @ beta @ D < 0


def test_rounding_is_not_a_lack_of_monotonicity():
    """β = JJᵀ of low rank has eigenvalues −1e-17 |β|."""
    alpha, beta = singular(np.random.default_rng(3), 4)
    beta = beta - 1e-13 * np.linalg.norm(beta, 2) * np.eye(len(beta))
    assert np.linalg.eigvalsh(beta)[0] < 0
    assert_solves(alpha, beta, ccp.solve(alpha, beta))


@pytest.mark.parametrize("k", [1, 2, 3, 5])
@pytest.mark.parametrize("seed", range(15))
def test_a_problem_without_a_bounded_solution_is_refused_with_the_direction(k, seed):
    """α pushes along some D ⪰ 0 in ker β: ½⟨X, βX⟩ − ⟨α, X⟩ falls without bound. Lemma 5.1 as printed excludes this."""
    rng = np.random.default_rng([k, seed])
    n = dimension(k)
    V = rng.normal(size=(k, rng.integers(1, k + 1)))
    d = vec(V @ V.T)
    d /= np.linalg.norm(d)
    P = np.eye(n) - np.outer(d, d)
    beta = P @ generic(rng, k)[1] @ P if k > 1 else np.zeros((1, 1))
    alpha = symmetric(rng, k)
    alpha += (rng.uniform(0.1, 1.0) - vec(alpha) @ d) * mat(d)
    with pytest.raises(CCPError, match=r"no bounded solution[\s\S]*third derivative") as caught:
        ccp.solve(alpha, beta)
    D = caught.value.direction
    assert np.linalg.eigvalsh(D)[0] >= -1e-6  # of norm 1, and positive semidefinite in the limit |X| → ∞ only
    assert np.linalg.norm(beta @ vec(D)) <= 1e-5 * np.linalg.norm(beta)
    assert np.sum(alpha * D) > 0


def test_a_quadratic_loss_has_no_solution():
    """No third derivative: β = 0, while α wants to pass the edge."""
    with pytest.raises(CCPError, match="as on a quadratic loss") as caught:
        ccp.solve(np.diag([1.0, -1.0]), np.zeros((3, 3)))
    np.testing.assert_allclose(caught.value.direction, np.diag([1.0, 0.0]), atol=1e-15)
    assert not ccp.solve(-np.eye(2), np.zeros((3, 3))).X.any()


def test_a_solution_too_large_for_its_digits_is_refused():
    """|X||β|/|α| = 1e11: β's smallest eigenvalue is not known to the digits needed."""
    with pytest.raises(CCPError, match="no bounded solution, or one too large"):
        ccp.solve(np.diag([1e-12, 1.0]), np.diag([1.0, 1.0, 1e-11]))


def test_overflow_is_an_error():
    with pytest.raises(CCPError, match="could not be solved"):
        ccp.solve([[1e300]], [[1e-300]])


def test_the_error_is_a_value_error():
    with pytest.raises(ValueError, match="α"):
        ccp.solve([[np.nan]], [[1.0]])
