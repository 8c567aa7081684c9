"""Mini-batches: random members of the oscillation, and the path that stands for what is outside the block."""

import numpy as np
import pytest
import torch
from conftest import noisy_quadratic, orthogonal
from scipy.linalg import solve_discrete_lyapunov

import dvi
from dvi.methods import GradientDescent, HeavyBall, RMSProp
from dvi.noise.path import Path, leak
from dvi.noise.step import NoisyStep, search


@pytest.mark.parametrize("turn", ["signs", "rotation"])
def test_what_is_tried_does_not_depend_on_the_basis_of_the_block(turn):
    """Rounding may flip an eigenvector, or turn a pair of them: the flow must not see it."""
    problem = dvi.problems.digits(n=30, width=3, classes=4)
    flow = dvi.noisy_flow(problem, RMSProp(0.01, 0.9, 1e-3), 5)
    y, rng = flow.initial, np.random.default_rng(0)
    block = search(flow, y, None)
    k = len(block.M)
    assert k >= 3
    X = rng.normal(size=(k, k))
    X = 1e-4 * X @ X.T
    Q = np.diag(rng.choice([-1.0, 1.0], k)) if turn == "signs" else orthogonal(rng, k)
    assert np.abs(Q - np.eye(k)).max() > 0.5
    path = Path(1e-2 * torch.randn(problem.dim, 1, dtype=torch.float64), None)
    T = torch.from_numpy(Q)
    a = flow.look(y, block.U, block.HU, block.M, X, path)
    b = flow.look(y, block.U @ T, block.HU @ T, Q.T @ block.M @ Q, Q.T @ X @ Q, path)
    assert float(a.force.norm()) > 1e-3
    for one, other in ((a.force, b.force), (a.outer, b.outer), (a.kicks, b.kicks), (a.bend["v"], b.bend["v"])):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-12)
    np.testing.assert_allclose(Q.T @ a.N @ Q, b.N, rtol=1e-8, atol=1e-14)
    assert a.rest == pytest.approx(b.rest, rel=1e-8)


def test_members_of_the_block_have_its_covariance():
    problem = dvi.problems.digits(n=30, width=3, classes=4)
    flow = dvi.noisy_flow(problem, RMSProp(0.01, 0.9, 1e-3), 5, pairs=20_000)
    block = search(flow, flow.initial, None)
    k = len(block.M)
    A = np.random.default_rng(0).normal(size=(k, k))
    members = flow.members(block.U, A @ A.T, 3.0)
    size = np.sqrt(np.outer(np.diag(A @ A.T), np.diag(A @ A.T)))
    assert np.abs(members @ members.T / 20_000 - A @ A.T).max() < (5 * size * np.sqrt(2 / 20_000)).max()  # five sd


@pytest.mark.parametrize("beta", [0.0, 0.6])
def test_paths_settle_at_the_covariance_of_the_optimizer_outside_the_block(beta):
    """3,000 paths, with a leak: Σ = AΣAᵀ + B(φC)Bᵀ of (δ, buffer), projected."""
    problem, H, C = noisy_quadratic()
    method = HeavyBall(1.0, beta) if beta else GradientDescent(1.0)
    flow = dvi.noisy_flow(problem, method, 2, max_directions=1, window=4.0, check=False)
    y = flow.initial
    U = search(flow, y, None).U
    turned, u = flow.precondition(y, U), (U / U.norm()).numpy()
    path, paths = Path.start(flow, y, 3000), 3000
    _, g = problem.value_and_grad(y.w)
    G = torch.cat([G for _, G in flow.batches.each(y.w)])
    for t in range(60):
        draws = flow.drawn(path, float(t))
        path = path.step(flow, y, torch.from_numpy(H) @ path.D + (draws @ G).T - g[:, None], 4.0).outside(U, turned)
    assert float((turned.T @ path.D).abs().max()) < 1e-12
    out = np.eye(4) - u @ u.T
    N = flow.factor * out @ C @ out
    eye, kappa = np.eye(4), leak(4.0)
    A = np.block([[(1 - kappa) * eye - H, -beta * eye], [H, beta * eye]])
    B = np.vstack([-eye, eye])
    expected = (out @ solve_discrete_lyapunov(A, B @ N @ B.T)[:4, :4] @ out) if beta else None
    if not beta:
        A = (1 - kappa) * eye - H
        expected = out @ solve_discrete_lyapunov(A, N) @ out
    found = (path.D @ path.D.T / paths).numpy()
    size = np.sqrt(np.outer(np.diag(expected), np.diag(expected)))
    assert np.abs(found - expected).max() < (5 * size * np.sqrt(2 / paths)).max()


@pytest.mark.parametrize("rate", [0.5, 1.0, 2.0, 3.0])
def test_the_leak_keeps_what_a_gaussian_average_leaves(rate):
    """x⁺ = (1−λ)x + noise about its own average with weights of width σ, in closed form, λσ = rate."""
    sigma = 40.0
    lam = rate / sigma
    s = np.arange(-200, 201)
    c = np.exp(-0.5 * (s / sigma) ** 2)
    c /= c.sum()
    kept = 1 - c @ (1 - lam) ** np.abs(s[:, None] - s) @ c
    leaky = (1 - (1 - lam) ** 2) / (1 - (1 - lam - leak(sigma)) ** 2)
    assert leaky == pytest.approx(kept, rel=0.05)
    assert abs((1 - (1 - lam) ** 2) / (1 - (1 - lam) ** 2) - kept) > 0.1  # what there would be without it


def test_the_averaged_loss_counts_what_is_outside_the_block():
    """On a quadratic with one direction in the block, ½⟨H, Σ⟩ in three quarters of the time."""
    problem, H, C = noisy_quadratic()
    settings = {"window": 50.0, "trust_every": 0, "max_directions": 1}
    exact = 0.5 * np.trace(H @ solve_discrete_lyapunov(np.eye(4) - H, C * 4 / 10))

    def averaged(**more):
        flow = dvi.noisy_flow(problem, GradientDescent(1.0), 2, **settings, **more, check=False)
        return dvi.solve(flow, 400, progress=False).predicted_loss[100:].mean()

    assert averaged() == pytest.approx(exact, rel=0.15)  # a path of 300 steps with relaxation times of one or two
    assert averaged(pairs="all") < 0.8 * exact  # which leaves them out, and says so


def test_a_step_with_ten_directions_costs_less_than_twelve_gradients():
    """Counted: three gradients a step, products for the directions, and the looks at the trust each 50 steps."""
    problem = dvi.problems.digits(n=60, width=6)
    solution = dvi.solve(dvi.noisy_flow(problem, GradientDescent(0.2), 10), 100, progress=False)
    assert solution.series["directions"].mean() > 9.5
    assert 3 < solution.ledger.per_unit_time(20, 100) <= 12


def test_predictions_count_the_path_too():
    """Outputs, gradients of single weights and tr Σ, of the block and the path together, at a node of the run."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)).double()
    x, y = torch.randn(12, 3).double(), torch.randn(12, 2).double()
    problem = dvi.Problem.from_module(model, torch.nn.MSELoss(), x, y)
    flow = dvi.noisy_flow(problem, GradientDescent(0.2), 3, max_directions=2, trust_every=0)
    observed = {"test_inputs": x[:5], "coordinates": (0, 3)}
    race = dvi.solve(flow, 9, progress=False, **observed)
    step, state = NoisyStep(), flow.initial
    memory = step.init(flow, state)
    for _ in range(9):
        result = step.step(flow, memory, state, 1.0)
        memory, state = result.memory, result.y
    node = step.observe(flow, memory, state)
    assert node.k == 2
    assert node.D is not None
    assert float(node.D.norm()) > 1e-2
    parts = [(node.U, torch.from_numpy(node.X)), (node.D, torch.eye(1, dtype=torch.float64))]
    added = [problem.output_curvature(state.w, x[:5], *part).detach().numpy() for part in parts]
    np.testing.assert_allclose(race.series["osc_outputs"][-1], sum(added), rtol=1e-9, atol=1e-13)
    assert np.abs(added[1]).max() > 0.1 * np.abs(added[0]).max()
    trace = np.trace(node.U.T.numpy() @ node.U.numpy() @ node.X) + float(node.D.square().sum())
    assert race.series["trace"][-1] == pytest.approx(trace, rel=1e-9)
    rows = node.HU[[0, 3]].numpy()
    inside = np.einsum("ij,jk,ik->i", rows, node.X, rows)
    outside = node.HD[[0, 3], 0].square().numpy()
    np.testing.assert_allclose(race.series["osc_coordinate_grad_sq"][-1], inside + outside, rtol=1e-9)


CHAOS = {
    "cross-entropy": (lambda: dvi.problems.digits(n=60, width=6, loss="ce"), 4.0, 3),
    "linear growth": (lambda: dvi.problems.digits(n=60, width=6), 20.0, 10),
}


@pytest.mark.parametrize("case", CHAOS)
def test_a_learning_rate_that_is_far_too_large_ends_in_words(case):
    make, lr, B = CHAOS[case]
    with pytest.raises(dvi.RunError, match=r"larger batches or a smaller lr") as caught:
        dvi.solve(dvi.noisy_flow(make(), GradientDescent(lr), B), 100, progress=False)
    assert caught.value.status is dvi.Status.CHAOTIC
    assert len(caught.value.result.t) <= 20  # averages begin after one window, 10 units; it is seen within the next


def test_batches_of_one_are_followed_or_end_in_words():
    problem = dvi.problems.digits(n=60, width=6)
    good = dvi.solve(dvi.noisy_flow(problem, GradientDescent(0.05), 1), 30, progress=False)
    assert good.status is dvi.Status.SUCCESS
    assert good.loss[-1] < good.loss[0]
    with pytest.raises(dvi.RunError) as caught:
        dvi.solve(dvi.noisy_flow(problem, GradientDescent(1.0), 1), 100, progress=False)
    assert caught.value.status in (dvi.Status.CHAOTIC, dvi.Status.DIVERGED)
    assert "lr" in str(caught.value)


def test_a_spectral_radius_above_one_is_told():
    """Where the second term of N alone keeps an oscillation alive."""
    problem = dvi.problems.digits(n=60, width=6)
    flow = dvi.noisy_flow(problem, GradientDescent(0.6), 4, trust_every=4, trust=1e9)
    solution = dvi.solve(flow, 12, progress=False, throw=False)
    radius = solution.series["radius"]
    told = [note for note in solution.notes if "spectral radius" in note]
    assert bool(told) == bool(np.nanmax(radius) > 1)
    assert told
