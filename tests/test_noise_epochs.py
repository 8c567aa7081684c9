"""Mini-batches in epochs: exact covariances, what an epoch adds to the average gradient and to ν, and replicas."""

from itertools import permutations

import numpy as np
import pytest
import torch
from conftest import noisy_quadratic

import dvi
from dvi.methods import GradientDescent, HeavyBall
from dvi.noise.companion import Companion
from dvi.noise.epochs import Epoch, in_epoch, memory
from dvi.noise.step import NoisyStep

EXACT = {"pairs": "all", "every": 1, "tol": 1e-9, "trust_every": 0, "trust": 1e9, "window": 1e3, "epochs": True}


def in_full(F, G, N, parts):
    """Covariances [parts + 1] of z at each batch of an epoch that repeats, by the joint covariance of all its noise."""
    k, n = len(N), len(F)
    joint = np.kron(np.eye(parts) * (1 + 1 / (parts - 1)) - 1 / (parts - 1), N)
    maps = []  # z_j = Fʲ z₀ + B_j e
    for j in range(parts + 1):
        B = np.zeros((n, parts * k))
        for i in range(j):
            B[:, i * k : (i + 1) * k] = np.linalg.matrix_power(F, j - 1 - i) @ G
        maps.append((np.linalg.matrix_power(F, j), B))
    A, B = maps[-1]
    Z = np.linalg.solve(np.eye(n * n) - np.kron(A, A), (B @ joint @ B.T).ravel()).reshape(n, n)
    covariances = [A @ Z @ A.T + B @ joint @ B.T for A, B in maps]
    e = [np.eye(parts * k)[j * k : (j + 1) * k] for j in range(parts)]
    crossed = [maps[j][1] @ joint @ e[j].T for j in range(parts)]  # of z and the noise of the same step
    return covariances, crossed


@pytest.mark.parametrize("beta", [0.0, 0.7])
def test_the_map_of_an_epoch_is_that_of_noise_that_sums_to_zero(beta):
    rng, k, m = np.random.default_rng(0), 2, 4
    M, N = np.array([[1.1, 0.2], [0.2, 0.3]]), np.array([[1.0, 0.4], [0.4, 0.5]])
    Q = HeavyBall(1.0, beta).Q() if beta else dvi.Filter()
    plain = Companion.of(Q, M, np.eye(k) + 0.1 * rng.normal() ** 2)
    covariances, crossed = in_full(plain.F, plain.G, N, m)
    n = len(plain.F)
    Z = np.zeros((n + k, n + k))
    for step in range(100 * m):
        map, share = in_epoch(plain, step % m, m)
        Z = map.step(Z, share * N)
        np.testing.assert_allclose(Z[n:, n:], _sum(step % m + 1, m) * N, atol=1e-12)
        if step >= 99 * m:
            np.testing.assert_allclose(Z[:n, :n], covariances[step % m + 1], rtol=1e-9, atol=1e-12)
    # 𝓜N/(m−1) is the covariance of x and the noise of the same step, on average over the epoch
    mean = sum(c[:k] for c in crossed) / m
    np.testing.assert_allclose(memory(plain, m) @ N / (m - 1), mean, rtol=1e-10)


def _sum(j, m):
    """The variance of the sum of j batches of m, over that of one."""
    return j * (m - j) / (m - 1)


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_on_a_quadratic_the_flow_is_exact_at_every_batch_of_an_epoch(beta):
    problem, H, C = noisy_quadratic()
    method = HeavyBall(1.0, beta) if beta else GradientDescent(1.0)
    flow = dvi.noisy_flow(problem, method, 2, **EXACT, check=False)  # at the minimum there is no slope to compare
    m = flow.parts
    assert m == 3
    solution = dvi.solve(flow, 120, progress=False)
    plain = Companion.of(method.Q() if beta else dvi.Filter(), H, np.eye(4))
    N = flow.factor * C
    covariances, crossed = in_full(plain.F, plain.G, N, m)
    for t in range(118, 121):
        assert solution.series["trace"][t] == pytest.approx(np.trace(covariances[t % m][:4, :4]), rel=1e-8)
    # the squared gradient of a batch is H δ + e: E|Hδ|² + tr N + 2 tr(H E[δeᵀ]), the last on average over an epoch
    expected = [np.trace(H @ Z[:4, :4] @ H) + np.trace(N) for Z in covariances[:m]]
    expected = np.mean(expected) + 2 * np.mean([np.trace(H @ c[:4]) for c in crossed])
    assert solution.series["batch_grad_sq"][117:120].mean() == pytest.approx(expected, rel=1e-8)
    assert abs(expected / (np.trace(N) + np.mean([np.trace(H @ Z[:4, :4] @ H) for Z in covariances[:m]])) - 1) > 0.05
    # replicas of the optimizer on batches in epochs
    optimizer = dvi.noise.optimizer.MiniBatchOptimizer(
        problem, method, 2, dvi.Sampling(replicas=2000, epochs=True), check=False
    )
    y, seen = optimizer.spread_out(optimizer.initial), []
    _, G = optimizer.batch(y.w, 0)
    for step in range(1, 31):
        seen.append(float(G.square().sum(dim=1).mean()))
        y, _, G = optimizer.advanced(y, G, step)
    found = np.trace(np.cov(y.w.numpy().T))
    assert found == pytest.approx(np.trace(covariances[0][:4, :4]), rel=5 * (2 / 2000) ** 0.5)
    assert np.mean(seen[-3 * m :]) == pytest.approx(expected, rel=0.05)


def bent(n=6, d=3):
    """Examples whose gradients and Hessians differ: ℓᵢ = ½wᵀHᵢw + cᵢ·w."""
    rng = np.random.default_rng(4)
    H = rng.normal(size=(n, d, d))
    H = torch.from_numpy(H + H.transpose(0, 2, 1)) + 6 * torch.eye(d, dtype=torch.float64)
    c = torch.from_numpy(rng.normal(size=(n, d)))

    def losses(w, H, c):
        return 0.5 * torch.einsum("nij,i,j->n", H, w, w) + c @ w

    return dvi.Problem.from_examples(losses, (H, c), torch.from_numpy(rng.normal(size=d))), H, c


def test_an_epoch_moves_the_mean_of_all_orders_as_the_flow():
    """The mean over all 90 ways to divide six examples into three batches; the flow is right to second order in lr."""
    problem, H, c = bent()
    orders = {tuple(tuple(sorted(p[i : i + 2])) for i in (0, 2, 4)) for p in permutations(range(6))}
    assert len(orders) == 90
    errors, drifts = [], []
    for lr in (4e-3, 2e-3):
        ends = []
        for order in orders:
            w = problem.w0
            for batch in order:
                rows = list(batch)
                w = w - lr * (torch.einsum("nij,j->ni", H[rows], w) + c[rows]).mean(dim=0)
            ends.append(w)
        mean = torch.stack(ends).mean(dim=0)
        flow = dvi.noisy_flow(problem, GradientDescent(lr), 2, **EXACT)
        errors.append(float((dvi.solve(flow, 3, progress=False).w - mean).norm()))
        full = dvi.solve(dvi.discrete(problem, GradientDescent(lr)), 3, progress=False).w
        drifts.append(float((full - mean).norm()))
    assert drifts[0] / drifts[1] == pytest.approx(4, rel=0.1)
    assert errors[0] < 0.1 * drifts[0]
    assert errors[0] / errors[1] > 6  # of third order


def test_the_drift_is_the_dense_formula():
    """1/(n(n−1)) Σᵢ Hᵢ 𝓜(gᵢ − g), with momentum."""
    problem, H, c = bent()
    method, m, n = HeavyBall(0.05, 0.6), 3, 6
    flow = dvi.noisy_flow(problem, method, 2, **EXACT, max_directions=3)
    y = flow.initial
    found = NoisyStep().init(flow, y)
    assert len(found.block.M) == 3
    w = y.w
    G = torch.einsum("nij,j->ni", H, w) + c
    mean = H.mean(dim=0)
    # what a unit of gradient has become after l more steps: heavy ball by hand
    eye, total = torch.eye(3, dtype=torch.float64), torch.zeros(3, 3, dtype=torch.float64)
    x, buffer, kernel = -0.05 * eye, eye, []
    for _ in range(m - 1):
        kernel.append(-x)
        buffer = 0.6 * buffer + mean @ x
        x = x - 0.05 * buffer
    for j in range(m):
        total = total + sum(kernel[:j], torch.zeros_like(total)) / m
    expected = torch.einsum("nij,jk,nk->i", H, total, G - G.mean(dim=0)) / (n * (n - 1))
    torch.testing.assert_close(found.drift, expected, rtol=1e-6, atol=1e-9)  # a difference over √ε


def test_outside_the_block_one_number_stands_for_the_curvature():
    """Where H is a multiple of P there, it is exact: the drift and the echo with one direction in the block."""
    problem, *_ = bent()
    flow = dvi.noisy_flow(problem, GradientDescent(0.05), 2, **EXACT, max_directions=3)
    y, g = flow.initial, flow.problem.value_and_grad(flow.initial.w)[1]
    U = (0.05**0.5) * torch.eye(3, dtype=torch.float64)
    isotropic = np.diag([0.4, 0.3, 0.3])
    ends, echoes = [], []
    for k in (3, 1):
        M = isotropic[:k, :k]
        epoch = Epoch.of(flow, 0.0, Companion.of(dvi.Filter(), M, np.eye(k)), M, 3, 0.3)
        ends.append(epoch.drift(flow, flow.batches, y, g, U[:, :k]))
        turned = flow.precondition(y, U[:, :k])
        G = torch.cat([G for _, G in flow.batches.each(y.w)])
        echoes.append(epoch.echoed(G, U[:, :k], turned, U[:, :k].T @ turned))
    torch.testing.assert_close(*ends, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(*echoes, rtol=1e-12, atol=1e-14)


class Square(dvi.Method):
    """ν averages g²: local, and quadratic."""

    lr: float = 1e-2

    def init(self, w):
        return {"v": torch.zeros_like(w)}

    def f(self, nu, g):
        return {"v": 0.1 * (g**2 - nu["v"])}

    def P(self, nu):
        return dvi.Diagonal((1.0 + 0 * nu["v"]) / self.lr)


class Coupled(Square):
    """The same, with a coupled part that nothing reads, so that the curvature of f is taken of rows of gradients."""

    def init(self, w):
        return {"v": torch.zeros_like(w), "G": torch.zeros(len(w), len(w), dtype=w.dtype)}

    def f(self, nu, g):
        return {"v": 0.1 * (g**2 - nu["v"]), "G": 0.1 * (torch.outer(g, g) - nu["G"])}


def test_replicas_in_epochs_have_the_mean_nu_of_the_flow():
    problem, *_ = bent()
    method, settings = Square(0.12), {**EXACT, "max_directions": 3}
    solution = dvi.solve(dvi.noisy_flow(problem, method, 2, **settings), 60, progress=False)
    optimizer = dvi.minibatch(problem, method, 2, replicas=800, epochs=True)
    y, seen = optimizer.spread_out(optimizer.initial), []
    _, G = optimizer.batch(y.w, 0)
    for step in range(1, 61):
        y, _, G = optimizer.advanced(y, G, step)
        if step > 57:
            seen.append(y.nu["v"].mean(dim=0))
    # over an epoch, since the flow spreads its effect on ν evenly over it
    v, error = sum(seen) / 3, y.nu["v"].std(dim=0) / 800**0.5
    assert bool(((solution.nu["v"] - v).abs() < 5 * error + 0.04 * v).all())
    plain = {**settings, "epochs": False}
    other = dvi.solve(dvi.noisy_flow(problem, method, 2, **plain), 60, progress=False).nu["v"]
    assert bool(((other - v).abs() > 0.1 * v).any())


def test_a_coupled_method_sees_the_same_epochs_as_a_local_one():
    problem, *_ = bent()
    ends = []
    for method in (Square(0.12), Coupled(0.12)):
        flow = dvi.noisy_flow(problem, method, 2, **{**EXACT, "max_directions": 3})
        ends.append(dvi.solve(flow, 4, progress=False).nu)
    torch.testing.assert_close(ends[1]["v"], ends[0]["v"], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(ends[1]["G"].diagonal(), ends[0]["v"], rtol=1e-9, atol=1e-12)


def test_epochs_are_resumed_bit_for_bit_and_told(tmp_path):
    problem = dvi.problems.digits(n=24, width=3, classes=4)
    sampling = dvi.Sampling(epochs=True, replicas=2, window=2, trust_every=0, max_directions=3)
    race = {"batch_size": 4, "runs": ("sgd", "noisy"), "warm_start": 0, "progress": False, "eigen_every": 0}
    race |= {"check": False, "sampling": sampling}
    path = tmp_path / "race.h5"
    dvi.compare(problem, GradientDescent(0.15), 7, path=path, **race)
    longer = dvi.compare(problem, GradientDescent(0.15), 11, path=path, resume=True, **race)
    whole = dvi.compare(problem, GradientDescent(0.15), 11, **race)
    for name in ("sgd", "noisy"):
        assert torch.equal(longer.runs[name].w, whole.runs[name].w)
        np.testing.assert_array_equal(longer.runs[name].loss, whole.runs[name].loss)
    assert whole.noisy.about["batches"] == "in epochs"
    with pytest.raises(ValueError, match="batch_size=5 does not divide the 24 examples"):
        dvi.noisy_flow(problem, GradientDescent(0.1), 5, epochs=True)
