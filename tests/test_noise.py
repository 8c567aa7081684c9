"""The flow with mini-batch noise where it is known exactly: quadratics, the ramp, and the limits without noise."""

import pickle

import numpy as np
import pytest
import torch
from conftest import orthogonal, symmetric_cube

import dvi
from dvi.methods import GradientDescent, HeavyBall, Nesterov, RMSProp
from dvi.noise.companion import Companion
from dvi.noise.limit import smoothed_ccp
from dvi.solvers import ccp

EXACT = {"pairs": "all", "every": 5, "tol": 1e-9, "trust_every": 0, "trust": 1e9, "window": 1e3}


# ---- the covariance of an oscillation -----------------------------------------------------------------------


def formula(li, lj, beta):
    """The stationary covariance of two modes of heavy ball for unit noise (plain gradient descent at beta = 0)."""
    a, b = 1 + beta - li, 1 + beta - lj
    return 1 / (1 - a * b - beta**2 + beta * (a**2 + b**2 - 2 * beta * a * b) / (1 - beta**2))


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9])
def test_the_stationary_covariance_is_the_closed_form(beta):
    rng = np.random.default_rng(0)
    lam = np.array([1.7, 0.3, 1.1]) * (1 + beta)
    N = rng.normal(size=(3, 3))
    N = N @ N.T
    expected = np.array([[N[i, j] * formula(lam[i], lam[j], beta) for j in range(3)] for i in range(3)])
    Q = HeavyBall(0.1, beta).Q() if beta else dvi.Filter()
    X = Companion.of(Q, np.diag(lam), np.eye(3)).stationary(N)
    np.testing.assert_allclose(X, expected, rtol=1e-10)  # a linear system of condition 1e3
    if not beta:
        np.testing.assert_allclose(X, N / (lam[:, None] + lam - np.outer(lam, lam)), rtol=1e-10)


@pytest.mark.parametrize(
    "Q", [HeavyBall(0.1, 0.8).Q(), Nesterov(0.1, 0.8).Q(), dvi.Filter([0.5, 0.3, 0.1], [1.0, -0.4, 0.1])], ids=str
)
def test_any_filter_gives_what_its_impulse_response_gives(Q):
    """X = Σ_t h_t N h_tᵀ, h_t the deviation t steps after a unit of noise, by the filter at work."""
    rng = np.random.default_rng(1)
    R = orthogonal(rng, 2)
    M, S, N = R @ np.diag([0.9, 0.2]) @ R.T, np.array([[1.3, 0.2], [0.2, 0.8]]), np.array([[1.0, 0.4], [0.4, 0.5]])
    x, memory = np.zeros((2, 2)), Q.initial(torch.zeros(2, 2, dtype=torch.float64))
    X = np.zeros((2, 2))
    for t in range(4000):
        g = M @ x + (np.eye(2) if t == 0 else 0.0)
        m, memory = Q.step(torch.from_numpy(np.asarray(g)), memory)
        x = x - np.linalg.solve(S, m.numpy())
        X += x @ N @ x.T
    companion = Companion.of(Q, M, S)
    np.testing.assert_allclose(companion.stationary(N), X, rtol=1e-10)
    Z = np.zeros_like(companion.F)
    for _ in range(4000):
        Z = companion.step(Z, N)
    np.testing.assert_allclose(Z[:2, :2], X, rtol=1e-10)


def test_beyond_the_edge_there_is_no_stationary_covariance():
    with pytest.raises(ValueError, match="not stable"):
        Companion.of(dvi.Filter(), np.array([[2.1]]), np.eye(1)).stationary(np.eye(1))


@pytest.mark.parametrize("Q", [dvi.Filter(), HeavyBall(0.1, 0.5).Q()], ids=["plain", "momentum"])
def test_the_spectral_radius_is_that_of_the_dense_map(Q):
    rng = np.random.default_rng(2)
    k = 3
    A = rng.normal(size=(5, k, k))
    A = A + A.transpose(0, 2, 1)
    spread = 0.02 * np.einsum("iab,icd->abcd", A, A)
    companion = Companion.of(Q, np.diag([1.8, 0.7, 0.2]), np.eye(k))
    n = len(companion.F)

    def image(Z):
        T = np.einsum("abcd,bc->ad", spread, Z[:k, :k])
        return companion.F @ Z @ companion.F.T + companion.G @ T @ companion.G.T

    dense = np.stack([image(e.reshape(n, n)).ravel() for e in np.eye(n * n)], axis=1)
    expected = np.abs(np.linalg.eigvals(dense)).max()
    assert companion.radius(spread) == pytest.approx(expected, rel=1e-4)  # the power iteration stops at 1e-6 a step


# ---- a quadratic with additive noise ------------------------------------------------------------------------


def quadratic(scale=1.0, d=4, n=6):
    """ℓᵢ = ½wᵀHw + cᵢ·w with Σcᵢ = 0: noise of covariance Σ cᵢcᵢᵀ/n, whatever w."""
    rng = np.random.default_rng(3)
    R = orthogonal(rng, d)
    H = torch.from_numpy(scale * R @ np.diag([1.6, 0.9, 0.5, 0.4]) @ R.T)
    c = rng.normal(size=(n, d))
    c = torch.from_numpy(c - c.mean(axis=0))
    problem = dvi.Problem.from_examples(
        lambda w, c: 0.5 * w @ H @ w + c @ w, c, torch.full((d,), 0.1, dtype=torch.float64)
    )
    return problem, H.numpy(), (c.T @ c / n).numpy(), R


@pytest.mark.parametrize("beta", [0.0, 0.6])
def test_on_a_quadratic_x_is_the_closed_form(beta):
    """In the basis of eigenvectors of H, off-diagonals too; w stays at its minimum."""
    problem, H, C, R = quadratic(1 + beta)
    method = HeavyBall(1.0, beta) if beta else GradientDescent(1.0)
    flow = dvi.noisy_flow(problem, method, 2, **EXACT)
    assert flow.factor == pytest.approx(4 / (2 * 5))
    solution = dvi.solve(flow, 60, progress=False)  # the slowest mode of X leaves 0.6⁶⁰
    lam = np.diag(R.T @ H @ R)
    N = R.T @ C @ R * flow.factor
    expected = np.array([[N[i, j] * formula(lam[i], lam[j], beta) for j in range(4)] for i in range(4)])
    # the flow's own frame: eigenvectors in descending order, scaled so that UᵀP̃U = I, signs its own
    known = (1 + beta) * expected
    np.testing.assert_allclose(np.abs(solution.X[-1]), np.abs(known), rtol=1e-9, atol=1e-10 * np.abs(known).max())
    trace = float(np.trace(expected))
    assert solution.series["trace"][-1] == pytest.approx(trace, rel=1e-10)
    assert solution.predicted_loss[-1] == pytest.approx(0.5 * np.trace(H @ (R @ expected @ R.T)), rel=1e-9)
    assert float(solution.w.abs().max()) < 1e-6  # √0.6⁶⁰
    # the gradient of a batch: ⟨H², Σ⟩ + tr N
    batch = np.trace(H @ H @ R @ expected @ R.T) + flow.factor * np.trace(C)
    assert solution.series["batch_grad_sq"][-1] == pytest.approx(batch, rel=1e-9)


@pytest.mark.parametrize("replacement", [True, False])
@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_replicas_of_the_optimizer_have_that_covariance(beta, replacement):
    problem, H, C, R = quadratic(1 + beta)
    method = HeavyBall(1.0, beta) if beta else GradientDescent(1.0)
    optimizer = dvi.minibatch(problem, method, 2, replicas=4000, replacement=replacement)
    y = optimizer.spread_out(optimizer.initial)
    _, G = optimizer.batch(y.w, 0)
    for step in range(1, 61):
        y, _, G = optimizer.advanced(y, G, step)
    lam, N = np.diag(R.T @ H @ R), R.T @ C @ R * optimizer.sampling.factor(2, 6)
    expected = np.array([[N[i, j] * formula(lam[i], lam[j], beta) for j in range(4)] for i in range(4)])
    found = np.cov(R.T @ y.w.numpy().T)
    size = np.sqrt(np.outer(np.diag(expected), np.diag(expected)))
    assert np.abs(found - expected).max() < (5 * size * np.sqrt(2 / 4000)).max()  # five standard deviations
    wrong = {True: 4 / 5, False: 5 / 4}[replacement]  # what the other way to draw batches would give
    assert np.abs(found - wrong * expected).max() > (5 * size * np.sqrt(2 / 4000)).max()


# ---- both terms of the noise, and the noise in ν --------------------------------------------------------------


class Outer(dvi.Method):
    """ν averages the matrix ggᵀ, whose entries are coupled in g; and a quartic of each entry."""

    lr: float = 1e-2
    keep: float = 0.8

    def init(self, w):
        return {"G": torch.zeros(len(w), len(w), dtype=w.dtype), "q": torch.zeros_like(w)}

    def f(self, nu, g):
        return {
            "G": (1 - self.keep) * (torch.outer(g, g) - nu["G"]),
            "q": (1 - self.keep) * (torch.tanh(g) ** 2 - nu["q"]),
        }

    def P(self, nu):
        return dvi.Diagonal((nu["G"].diagonal() + nu["q"] + 1.0).sqrt() / self.lr)


class Square(dvi.Method):
    """ν averages |g|², and one entry of it each g²: local, and quadratic."""

    lr: float = 1e-2

    def init(self, w):
        return {"v": torch.zeros_like(w)}

    def f(self, nu, g):
        return {"v": 0.3 * (3 * g**2 + g - nu["v"])}

    def P(self, nu):
        return dvi.Diagonal((nu["v"].abs() + 1.0).sqrt() / self.lr)


def bent(small=1.0, d=3, n=5):
    """Examples whose gradients and Hessians differ: ℓᵢ = ½wᵀHᵢw + cᵢ·w."""
    rng = np.random.default_rng(4)
    H = rng.normal(size=(n, d, d))
    H = torch.from_numpy(H + H.transpose(0, 2, 1)) + 6 * torch.eye(d, dtype=torch.float64)
    c = torch.from_numpy(small * rng.normal(size=(n, d)))

    def losses(w, H, c):
        return 0.5 * torch.einsum("nij,i,j->n", H, w, w) + c @ w

    return dvi.Problem.from_examples(losses, (H, c), torch.from_numpy(small * rng.normal(size=d))), H, c


def oscillating(flow, X):
    """A look at the flow's start with oscillation covariance X in its whole space, and Σ."""
    y = flow.initial
    eye = torch.eye(len(y.w), dtype=torch.float64)
    HU = flow.problem.hvp(y.w, eye)
    return flow.look(y, eye, HU, HU.numpy(), X)


@pytest.mark.parametrize("method", [Square(), Outer()], ids=["local", "coupled"])
def test_noise_enters_nu_and_x_as_the_mean_over_all_batches_and_the_oscillation(method):
    """Where f is quadratic in g the mean of f is known exactly: over batches of one example, and over ±√r columns."""
    problem, H, c = bent()
    flow = dvi.noisy_flow(problem, method, 1, replacement=True, **EXACT)
    rng = np.random.default_rng(5)
    R = 0.1 * rng.normal(size=(3, 3))
    X = R @ R.T
    look = oscillating(flow, X)
    w, nu = problem.w0, flow.initial.nu
    size, V = np.linalg.eigh(X)
    deviations = [s * np.sqrt(3 * x) * v for x, v in zip(size, V.T, strict=True) for s in (1, -1)]  # covariance X
    gradients = [H[i] @ (w + torch.from_numpy(d)) + c[i] for i in range(5) for d in deviations]
    _, g = problem.value_and_grad(w)
    free = method.f(nu, g)
    for name in ("v", "G"):
        if name in nu:
            mean = torch.stack([method.f(nu, each)[name] for each in gradients]).mean(dim=0)
            torch.testing.assert_close(look.bend[name], mean - free[name], rtol=1e-10, atol=1e-12)
    # both terms of N: the covariance of gradients at fixed δ, averaged over δ
    N = sum(
        np.cov(np.stack([(H[i] @ (w + torch.from_numpy(d)) + c[i]).numpy() for i in range(5)]).T, bias=True)
        for d in deviations
    ) / len(deviations)
    np.testing.assert_allclose(look.N, N, rtol=1e-10, atol=1e-12)
    without = oscillating(flow, np.zeros((3, 3))).N
    assert np.abs(look.N - without).max() > 1e-2 * np.abs(N).max()  # the second term is there to be seen
    assert look.noise == pytest.approx(np.trace(N), rel=1e-10)
    # T(X) by differences of gradients is the second term
    second = np.einsum("abcd,bc->ad", flow.multiplied(flow.initial, torch.eye(3, dtype=torch.float64)), X)
    np.testing.assert_allclose(without + second, N, rtol=1e-7, atol=1e-9)


def test_where_f_is_not_quadratic_the_noise_enters_to_second_order():
    """tanh(g)²: the error is of fourth order in the noise."""
    errors = []
    for small in (0.02, 0.01):
        problem, H, c = bent(small)
        flow = dvi.noisy_flow(problem, Outer(), 1, replacement=True, **EXACT)
        look, w, nu = oscillating(flow, np.zeros((3, 3))), problem.w0, flow.initial.nu
        _, g = problem.value_and_grad(w)
        mean = torch.stack([Outer().f(nu, H[i] @ w + c[i])["q"] for i in range(5)]).mean(dim=0)
        expected = mean - Outer().f(nu, g)["q"]
        errors.append(float((look.bend["q"] - expected).abs().max() / expected.abs().max()))
    assert errors[1] < 0.35 * errors[0] < 0.1  # a quarter, were higher orders nothing


def test_replicas_of_a_users_optimizer_have_the_mean_nu_of_the_flow():
    """Square, with weights that move: ν of the flow against 1,500 replicas."""
    problem, *_ = bent(0.3)
    settings = {"replacement": True, "window": 1e3}
    flow = dvi.noisy_flow(problem, Square(lr=0.05), 2, **{**EXACT, **settings})
    solution = dvi.solve(flow, 60, progress=False)
    optimizer = dvi.minibatch(problem, Square(lr=0.05), 2, replicas=1500, **settings)
    y = optimizer.spread_out(optimizer.initial)
    _, G = optimizer.batch(y.w, 0)
    for step in range(1, 61):
        y, _, G = optimizer.advanced(y, G, step)
    v = y.nu["v"]
    error = v.std(dim=0) / 1500**0.5
    # what the flow leaves out: P varies with its own batch, a share lr of the effect
    assert bool(((solution.nu["v"] - v.mean(dim=0)).abs() < 5 * error + 0.02 * v.mean(dim=0)).all())
    full = dvi.solve(dvi.discrete(problem, Square(lr=0.05)), 60, progress=False).nu["v"]
    assert bool(((full - v.mean(dim=0)).abs() > 0.3 * v.mean(dim=0)).any())


# ---- the ramp -----------------------------------------------------------------------------------------------


def ramp(q, c, y0):
    """L = ½yx² − cy with noise of variance 2cq on x: E x² = 2c, and λ = y stays where λ(2−λ) = q."""
    s = (2 * c * q) ** 0.5
    data = torch.tensor([s, -s], dtype=torch.float64)

    def losses(w, s):
        return 0.5 * w[1] * w[0] ** 2 - c * w[1] + s * w[0]

    return dvi.Problem.from_examples(losses, data, torch.tensor([0.0, y0], dtype=torch.float64))


@pytest.mark.parametrize(("q", "c", "steps"), [(0.05, 0.01, 350), (0.3, 0.05, 150), (0.6, 0.05, 150), (0.9, 0.1, 150)])
def test_the_ramp_stops_at_its_plateau(q, c, steps):
    """The plateau does not depend on c, which is how fast it is reached."""
    plateau = 1 + (1 - q) ** 0.5
    problem = ramp(q, c, plateau - 0.02)
    flow = dvi.noisy_flow(problem, GradientDescent(1.0), 1, replacement=True, **{**EXACT, "max_directions": 1})
    solution = dvi.solve(flow, steps, progress=False)
    assert float(solution.w[1]) == pytest.approx(plateau, abs=1e-3)
    assert solution.X[-1][0, 0] == pytest.approx(2 * c, rel=1e-2)


def test_runs_on_the_ramp_stay_at_that_plateau():
    """Batches of one of the two examples, 1,000 replicas; time scales are 1/c."""
    q, c = 0.6, 4e-3
    plateau = 1 + (1 - q) ** 0.5
    optimizer = dvi.minibatch(ramp(q, c, plateau), GradientDescent(1.0), 1, replacement=True, replicas=1000)
    y = optimizer.spread_out(optimizer.initial)
    _, G = optimizer.batch(y.w, 0)
    kept = []
    for step in range(1, 801):
        y, _, G = optimizer.advanced(y, G, step)
        if step > 300:
            kept.append(y.w.square().mean(dim=0)[0].item())
            last = y.w[:, 1].mean().item()
    assert last == pytest.approx(plateau, abs=0.02)  # of first order in c, and the scatter √c/√1000
    assert np.mean(kept) == pytest.approx(2 * c, rel=0.03)


# ---- limits -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 4])
def test_without_noise_x_tends_to_the_complementarity_problems_linearly(k):
    rng = np.random.default_rng(k)
    n = k * (k + 1) // 2
    A, B = rng.normal(size=(k, k)), rng.normal(size=(n, n))
    alpha, beta = 0.1 * (A + A.T) + 0.05 * np.eye(k), B @ B.T + np.eye(n)
    N = np.eye(k) + 0.3
    X = ccp.solve(alpha, beta).X
    away = [np.linalg.norm(smoothed_ccp(alpha, beta, size * N) - X) / size for size in (1e-5, 1e-6)]
    assert away[0] > 0.1  # there is something to tend
    assert away[1] == pytest.approx(away[0], rel=1e-2)


def test_the_smoothed_problem_solves_its_equation():
    rng = np.random.default_rng(7)
    T = symmetric_cube(rng, 3)
    pairs = np.stack([T[i, j] * (1 if i == j else 2**0.5) for i in range(3) for j in range(i, 3)])
    alpha, beta, N = 0.05 * np.eye(3), 0.5 * pairs @ pairs.T + np.eye(6), 1e-2 * np.eye(3)
    X = smoothed_ccp(alpha, beta, N)
    K = dvi.solvers.svec.smat(beta @ dvi.solvers.svec.svec(X)) - alpha
    np.testing.assert_allclose(K @ X + X @ K - K @ X @ K, N, atol=1e-13)
    L = 2 * np.eye(3) - K  # X is what the step X ↦ (I−Λ)X(I−Λ) + N leaves as it is
    np.testing.assert_allclose((np.eye(3) - L) @ X @ (np.eye(3) - L) + N, X, atol=1e-13)


def test_with_little_noise_the_flow_is_at_the_edge_linearly():
    """On the ramp 2 − λ = q/2 to first order, and X is that of the complementarity problem."""
    away = []
    for q in (0.1, 0.05):
        problem = ramp(q, 0.01, 2 - q / 2)
        flow = dvi.noisy_flow(problem, GradientDescent(1.0), 1, replacement=True, **{**EXACT, "max_directions": 1})
        solution = dvi.solve(flow, 250, progress=False)
        away.append((2 - float(solution.w[1])) / q)
        central = dvi.central_flow(problem, GradientDescent(1.0))
        edge, u = torch.tensor([0.0, 2.0], dtype=torch.float64), torch.tensor([[1.0], [0.0]], dtype=torch.float64)
        lin = central.linearise(edge, {}, u)
        X = ccp.solve(lin.alpha.numpy(), lin.beta.numpy()).X
        assert solution.X[-1][0, 0] == pytest.approx(X[0, 0], rel=q)
    assert away[0] == pytest.approx(0.5, rel=0.05)
    assert away[1] == pytest.approx(0.5, rel=0.025)


def test_a_batch_of_all_examples_is_the_central_flow():
    problem, method = dvi.problems.digits(n=12, width=2, classes=3), RMSProp(0.01, 0.9, bias_correction=True)
    runs = {"steps": 5, "progress": False, "warm_start": 3, "check": False, "eigen_every": 0}
    with_batch = dvi.compare(problem, method, batch_size=12, runs=("noisy", "central", "sgd"), **runs)
    without = dvi.compare(problem, method, runs=("central", "discrete"), **runs)
    assert isinstance(dvi.noisy_flow(problem, method, 12, check=False), dvi.CentralFlow)
    for name in ("noisy", "central"):
        assert torch.equal(with_batch.runs[name].w, without.central.w)
        np.testing.assert_array_equal(with_batch.runs[name].loss, without.central.loss)
    assert any("there is no noise" in note for note in with_batch.notes)
    assert with_batch.sgd.about["replicas"] == 1


def test_the_first_step_is_the_optimizers_own():
    """All start from one point, where nothing oscillates: only ν knows of the noise."""
    problem = dvi.problems.digits(n=30, width=4)
    for method in (GradientDescent(0.1), HeavyBall(0.05), dvi.methods.Adam(1e-3)):
        flow = dvi.noisy_flow(problem, method, 3, trust_every=0)
        discrete = dvi.discrete(problem, method)
        y = flow.initial
        expected, *_ = discrete.step(y, problem.value_and_grad(y.w)[1])
        found = dvi.solve(flow, 1, progress=False)
        torch.testing.assert_close(found.w, expected.w, rtol=0, atol=1e-15)


def schedule(t):
    return 0.02 * (1 + 0.1 * t)


@pytest.mark.parametrize(
    "method",
    [GradientDescent(schedule), RMSProp(schedule, 0.9, 1e-3), dvi.methods.NAdam(1e-3), HeavyBall(0.05, 0.7)],
    ids=lambda m: type(m).__name__,
)
def test_on_batches_of_all_examples_the_optimizer_is_itself(method):
    """Schedules, filters and states, replica by replica, against one run of the full-batch optimizer."""
    problem = dvi.problems.digits(n=20, width=4)
    many = dvi.minibatch(problem, method, 20, replicas=3)
    one = dvi.discrete(problem, method)
    y, states = one.initial, []
    _, g = problem.value_and_grad(y.w)
    z = many.spread_out(many.initial)
    _, G = many.batch(z.w, 0)
    for step in range(1, 12):
        y, _, g = one.step(y, g)
        z, _, G = many.advanced(z, G, step)
        states.append(y.w)
    torch.testing.assert_close(z.w[0], y.w, rtol=0, atol=1e-12)  # the order in which examples are added up
    assert len(z.w) == 1


# ---- runs ---------------------------------------------------------------------------------------------------


def small(**options):
    return dvi.problems.digits(n=24, width=3, classes=4, **options)


RACE = {"runs": ("sgd", "noisy", "stable"), "batch_size": 4, "save_every": 2, "progress": False, "eigen_every": 8}
RACE |= {"check": False, "warm_start": 0}


def same(a, b):
    for name, run in a.runs.items():
        other = b.runs[name]
        assert torch.equal(run.w, other.w), name
        for field in ("t", "loss", "predicted_loss", "eigenvalues"):
            np.testing.assert_array_equal(getattr(run, field), getattr(other, field), err_msg=f"{name} {field}")
        for series, values in run.series.items():
            np.testing.assert_array_equal(values, other.series[series], err_msg=f"{name} {series}")
    for pair, values in a.distance.items():
        np.testing.assert_array_equal(values, b.distance[pair])


@pytest.mark.parametrize("method", [GradientDescent(0.15), dvi.methods.Adam(2e-3)], ids=["gd", "adam"])
def test_a_run_is_resumed_bit_for_bit(tmp_path, method):
    sampling = dvi.Sampling(replicas=3, window=2, trust_every=8, max_directions=4)
    race = {**RACE, "sampling": sampling}
    path = tmp_path / "race.h5"
    dvi.compare(small(), method, 8, path=path, **race)
    longer = dvi.compare(small(), method, 11, path=path, resume=True, **race)
    whole = dvi.compare(small(), method, 11, **race)
    same(longer, whole)
    same(dvi.load(path), whole)
    with pytest.raises(dvi.StoreError, match="batch_size"):
        dvi.compare(small(), method, 30, path=path, resume=True, **{**race, "batch_size": 6})


def test_a_race_is_drawn_pickled_and_told(tmp_path):
    pytest.importorskip("matplotlib")
    sampling = dvi.Sampling(replicas=2, window=2, trust_every=4, max_directions=3)
    race = dvi.compare(small(), GradientDescent(0.15), 6, **{**RACE, "sampling": sampling})
    figure = race.plot(tmp_path / "race.png")
    labels = {text.get_text() for legend in figure.legends for text in legend.get_texts()}
    assert {"optimizer on mini-batches, averaged", "flow with mini-batch noise", "predicted with noise"} <= labels
    assert (tmp_path / "race.png").stat().st_size > 10_000
    flow = pickle.loads(pickle.dumps(dvi.noisy_flow(small(), GradientDescent(0.15), 4, sampling)))
    again = dvi.solve(flow, 6, save_every=2, progress=False)
    assert torch.equal(again.w, race.noisy.w)
    assert race.noisy.series["loss_rate"][0] == pytest.approx(-0.15 * race.noisy.series["grad_sq"][0], rel=1e-6)


def test_seeds_decide_the_batches():
    problem = small()

    def ends(seed):
        return dvi.solve(dvi.minibatch(problem, GradientDescent(0.15), 4, seed=seed, window=1), 2, progress=False).w

    assert torch.equal(ends(1), ends(1))
    assert not torch.equal(ends(1), ends(2))


def test_what_is_shown_is_a_gaussian_average_of_each_replica():
    problem, sampling = small(), dvi.Sampling(replicas=2, window=3)
    optimizer = dvi.minibatch(problem, RMSProp(0.01, 0.9, 1e-3), 4, sampling)
    race = dvi.solve(optimizer, 12, progress=False, eigen_every=4)
    y = optimizer.spread_out(optimizer.initial)
    _, G = optimizer.batch(y.w, 0)
    path, squares = [y], [G.square().sum(dim=1)]
    for step in range(1, 25):
        y, _, G = optimizer.advanced(y, G, step)
        path.append(y)
        squares.append(G.square().sum(dim=1))
    for t in (0, 5, 12):
        steps = np.arange(max(0, t - 9), t + 10)
        c = np.exp(-0.5 * ((steps - t) / 3) ** 2)
        c = torch.from_numpy(c / c.sum())
        W = sum(w * path[s].w for w, s in zip(c, steps, strict=True))
        at = np.mean([float(problem.value(w)) for w in W])
        assert race.series["loss_of_average"][t] == pytest.approx(at, rel=1e-10)
        batch = sum(w * squares[s] for w, s in zip(c, steps, strict=True)).mean()
        assert race.series["batch_grad_sq"][t] == pytest.approx(float(batch), rel=1e-10)
        spread = sum(w * (path[s].w - W).square().sum(dim=1) for w, s in zip(c, steps, strict=True)).mean()
        assert race.series["window_trace"][t] == pytest.approx(float(spread), rel=1e-8)
        assert race.series["apart"][t] == pytest.approx(float(torch.linalg.vector_norm(W[0] - W[1])), rel=1e-10)
    assert np.isfinite(race.eigenvalues[[0, 4, 8, 12], 0]).all()
    assert np.isnan(race.eigenvalues[1, 0])


def test_epochs_pass_through_every_example():
    sampling = dvi.Sampling(epochs=True, replicas=3)
    for epoch in range(2):
        drawn = torch.cat([sampling.draw(4, 12, 3 * epoch + part) for part in range(3)], dim=1)
        assert drawn.sort(dim=1).values.tolist() == [list(range(12))] * 3
    assert sampling.draw(4, 12, 0).tolist() != sampling.draw(4, 12, 3).tolist()
    race = dvi.compare(small(), GradientDescent(0.1), 4, **{**RACE, "runs": ("sgd",), "sampling": sampling})
    assert race.sgd.about["batches"] == "in epochs"


def test_a_batch_size_and_its_runs_belong_together():
    problem, method = small(), GradientDescent(0.1)
    with pytest.raises(ValueError, match="they need one"):
        dvi.compare(problem, method, 2, runs=("noisy", "central"))
    with pytest.raises(ValueError, match="a batch size is for the runs"):
        dvi.compare(problem, method, 2, batch_size=4)
    with pytest.raises(ValueError, match="leave integrator out"):
        dvi.solve(dvi.noisy_flow(problem, method, 4), 2, integrator=dvi.MacroStep())
    with pytest.raises(ValueError, match="whole numbers"):
        dvi.solve(dvi.noisy_flow(problem, method, 4), 2, save_every=0.5)


def test_where_runs_are_chaotic_the_flow_stops_in_words():
    """ℓ = ½x² + ¼x⁴ ± 3x: the quartic term of the averaged loss is larger than the quadratic one."""

    def losses(w, s):
        return 0.5 * w[0] ** 2 + 0.25 * w[0] ** 4 + s * w[0]

    data = torch.tensor([3.0, -3.0], dtype=torch.float64)
    problem = dvi.Problem.from_examples(losses, data, torch.zeros(1, dtype=torch.float64))
    flow = dvi.noisy_flow(problem, GradientDescent(0.3), 1, replacement=True)
    with pytest.raises(dvi.RunError, match=r"jump about here.*larger batches") as caught:
        dvi.solve(flow, 200, progress=False)
    assert caught.value.status is dvi.Status.CHAOTIC
    assert len(caught.value.result.t) >= 10


def test_the_result_says_how_far_the_block_reaches():
    problem = dvi.problems.digits(n=60, width=6)
    flow = dvi.noisy_flow(problem, GradientDescent(0.2), 10, max_directions=3, trust_every=10)
    solution = dvi.solve(flow, 20, progress=False)
    assert any("in 3 to 3 directions" in note and "max_directions=3" in note for note in solution.notes)
    assert (solution.series["directions"] == 3).all()
    assert 0 < solution.series["outside"][-1] < 1
    assert solution.series["radius"][-1] > 0
    # the flow is a function of its seed alone
    again = dvi.solve(
        dvi.noisy_flow(problem, GradientDescent(0.2), 10, max_directions=3, trust_every=10), 20, progress=False
    )
    assert torch.equal(solution.w, again.w)


def test_a_dense_flow_agrees_with_the_librarys():
    """RMSProp on seven weights with dense Hessians and third derivatives: w, ν and Σ after some steps."""
    rng = np.random.default_rng(9)
    x, y = torch.from_numpy(rng.normal(size=(8, 2))), torch.from_numpy(0.3 * rng.normal(size=8))

    def losses(w, x, y):
        return 0.5 * (torch.tanh(x @ w[:4].view(2, 2) + w[4:6]) @ torch.stack([w[6], 0.5 - w[6]]) - y) ** 2

    problem = dvi.Problem.from_examples(losses, (x, y), torch.from_numpy(0.7 * rng.normal(size=7)))
    method, B, n, d = RMSProp(0.3, 0.9, 0.3), 7, 8, 7
    flow = dvi.noisy_flow(problem, method, B, **{**EXACT, "max_directions": d, "window": 10, "every": 1})
    batches, phi = problem.mini_batches(), (n - B) / (B * (n - 1))
    eye = torch.eye(d, dtype=torch.float64)

    def cov(w):
        G = torch.cat([G for _, G in batches.each(w)])
        G = G - G.mean(dim=0)
        return phi * G.T @ G / n

    def p_of(v):
        return (v.sqrt() + 0.3) / 0.3

    def block(H, p):
        lam, V = torch.linalg.eigh(H / (p.sqrt()[:, None] * p.sqrt()))
        return V[:, lam > 0.1] / p.sqrt()[:, None]

    w, v = problem.w0, flow.initial.nu["v"]
    g, H = problem.value_and_grad(w)[1], problem.hvp(w, eye)
    N, F = cov(w), torch.zeros_like(w)
    torch.testing.assert_close(v, 0.1 * (g**2 + N.diagonal()), rtol=1e-10, atol=1e-14)
    U = block(H, p_of(v))
    X = torch.zeros(U.shape[1], U.shape[1], dtype=torch.float64)
    for _ in range(6):
        p = p_of(v)
        S = torch.linalg.inv(U.T * p @ U)
        A = torch.eye(len(X), dtype=torch.float64) - S @ U.T @ H @ U
        Sigma = U @ (A @ X @ A.T + S @ U.T @ N @ U @ S) @ U.T
        w = w - (g + F) / p
        g, H = problem.value_and_grad(w)[1], problem.hvp(w, eye)
        U = block(H, p)
        X = U.T * p @ Sigma @ (U.T * p).T
        Sigma = U @ X @ U.T
        F = 0.5 * problem.hessian_gradient_of(w, eye, Sigma)
        N, (size, Q) = cov(w), torch.linalg.eigh(Sigma)
        for s, q in zip(size.clamp(min=0), Q.T, strict=True):
            N = N + 0.5 * sum(cov(w + sign * s.sqrt() * q) - cov(w) for sign in (1, -1))
        v = v + 0.1 * (g**2 + N.diagonal() + ((H @ Sigma) * H).sum(dim=1) - v)
    solution = dvi.solve(flow, 6, progress=False)
    assert float(Sigma.trace()) > 1e-5
    assert 0 < len(X) < d
    # the pairs of the flow are of finite size: here third derivatives were taken, and the rest is of fourth order
    assert solution.series["trace"][-1] == pytest.approx(float(Sigma.trace()), rel=3e-3)
    torch.testing.assert_close(solution.w, w, rtol=0, atol=1e-4)
    assert float(torch.linalg.vector_norm(w - problem.w0)) > 0.1
    torch.testing.assert_close(solution.nu["v"], v, rtol=1e-2, atol=1e-9)
