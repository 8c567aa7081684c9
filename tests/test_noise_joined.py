"""Mini-batches where they meet weight decay, changed problems and optimizers of torch."""

import numpy as np
import pytest
import torch
from conftest import orthogonal
from torch import nn

import dvi
from dvi.methods import AdamW, GradientDescent, HeavyBall
from dvi.noise.companion import Companion

EXACT = {"pairs": "all", "every": 1, "tol": 1e-9, "trust_every": 0, "trust": 1e9, "window": 1e3, "max_directions": 99}
X = torch.randn(12, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.randn(12, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


class GDW(GradientDescent):
    """Gradient descent with decoupled decay: a number, or one for each weight."""

    gamma: object = 0.05
    ranges = {name: it for name, it in GradientDescent.ranges.items() if name != "gamma"}

    def decay(self):
        return self.gamma


class HeavyBallW(HeavyBall):
    gamma: object = 0.05

    def decay(self):
        return self.gamma


def network(width=4):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 2)).double()


def problem_of(model, **options):
    return dvi.Problem.from_module(model, nn.MSELoss(), X, Y, **options)


def replicas(problem, method, batch_size, steps, **settings):
    """The weights [steps, R, d] of replicas after each step."""
    optimizer = dvi.minibatch(problem, method, batch_size, **settings)
    y, seen = optimizer.spread_out(optimizer.initial), []
    _, G = optimizer.batch(y.w, 0)
    for step in range(1, steps + 1):
        y, _, G = optimizer.advanced(y, G, step)
        seen.append(y.w)
    return torch.stack(seen)


# ---- decoupled weight decay ---------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [1e3, 4.0], ids=["wide", "narrow"])
def test_decay_of_gradient_descent_is_a_penalty_for_the_flow(window):
    """(1 − γ)w − η∇L is a step on L + (γ/η)|w|²/2: the same path, the same Σ, the same directions cut off."""
    lr, gamma, steps = 0.5, 0.04, 8
    plain = problem_of(network(2))
    penalised = plain.penalised(gamma / lr)
    settings = {**EXACT, "window": window}
    a = dvi.solve(dvi.noisy_flow(plain, GDW(lr, gamma), 3, **settings), steps, progress=False)
    b = dvi.solve(dvi.noisy_flow(penalised, GradientDescent(lr), 3, **settings), steps, progress=False)
    # eigenvectors are found to 1e-9, and differ by that in their span where the block is not everything
    torch.testing.assert_close(a.w, b.w, rtol=0, atol=1e-7)
    np.testing.assert_allclose(a.series["trace"], b.series["trace"], rtol=1e-6, atol=1e-14)
    np.testing.assert_array_equal(a.series["directions"], b.series["directions"])
    np.testing.assert_allclose(a.series["noise"], b.series["noise"], rtol=1e-6)
    without = dvi.solve(dvi.noisy_flow(plain, GradientDescent(lr), 3, **settings), steps, progress=False)
    assert float((without.w - b.w).abs().max()) > 1e-2
    if window < 1e3:  # the decay makes directions relax that would not relax without it
        assert 0 < without.series["directions"][0] < a.series["directions"][0] < plain.dim


def test_decay_of_gradient_descent_is_a_penalty_for_replicas():
    lr, gamma = 0.5, 0.04
    plain = problem_of(network())
    a = replicas(plain, GDW(lr, gamma), 3, 20, replicas=3)
    b = replicas(plain.penalised(gamma / lr), GradientDescent(lr), 3, 20, replicas=3)
    torch.testing.assert_close(a, b, rtol=0, atol=1e-13)  # rounding of twenty steps
    assert float((replicas(plain, GradientDescent(lr), 3, 20, replicas=3) - a).abs().max()) > 1e-2


def quadratic(d=4, n=6):
    """ℓᵢ = ½wᵀHw + cᵢ·w with Σcᵢ = 0: noise of covariance Σ cᵢcᵢᵀ/n, whatever w."""
    rng = np.random.default_rng(3)
    R = orthogonal(rng, d)
    H = torch.from_numpy(R @ np.diag([1.6, 0.9, 0.5, 0.4]) @ R.T)
    c = rng.normal(size=(n, d))
    c = torch.from_numpy(c - c.mean(axis=0))
    w0 = torch.full((d,), 0.1, dtype=torch.float64)
    return dvi.Problem.from_examples(lambda w, c: 0.5 * w @ H @ w + c @ w, c, w0), H.numpy(), (c.T @ c / n).numpy()


UNEQUAL = torch.tensor([0.0, 0.3, 0.05, 0.15], dtype=torch.float64)


@pytest.mark.parametrize(("beta", "gamma"), [(0.0, 0.1), (0.0, UNEQUAL), (0.5, UNEQUAL)], ids=str)
def test_x_settles_where_the_closed_form_says_with_decay(beta, gamma):
    """Σ = AΣAᵀ + φηCη of the whole state (w, buffer), against the flow and against 2,000 replicas."""
    problem, H, C = quadratic()
    method = HeavyBallW(1.0, beta, gamma=gamma) if beta else GDW(1.0, gamma)
    G = np.diag(np.ones(4) * (gamma.numpy() if isinstance(gamma, torch.Tensor) else gamma))
    eye = np.eye(4)
    # m⁺ = βm + Hw + ε, w⁺ = (1 − Γ)w − m⁺
    A = np.block([[eye - G - H, -beta * eye], [H, beta * eye]])
    B = np.vstack([-eye, eye])
    optimizer = dvi.minibatch(problem, method, 2, replicas=2000)
    N = optimizer.sampling.factor(2, 6) * C
    both = B @ N @ B.T
    Z = np.linalg.solve(np.eye(64) - np.kron(A, A), both.ravel()).reshape(8, 8)
    expected = Z[:4, :4]

    solution = dvi.solve(dvi.noisy_flow(problem, method, 2, **EXACT), 80, progress=False)
    assert solution.series["directions"][-1] == 4
    # the slowest mode leaves 0.6⁸⁰; directions of the frame are found to 1e-9
    assert solution.series["trace"][-1] == pytest.approx(np.trace(expected), rel=1e-8)
    assert solution.predicted_loss[-1] == pytest.approx(0.5 * np.trace(H @ expected), rel=1e-8)

    found = np.cov(replicas(problem, method, 2, 50, replicas=2000)[-1].numpy().T)
    size = np.sqrt(np.outer(np.diag(expected), np.diag(expected)))
    assert (np.abs(found - expected) < 5 * size * np.sqrt(2 / 2000)).all()  # five standard deviations
    A0 = A + np.kron([[1, 0], [0, 0]], G)
    without = np.linalg.solve(np.eye(64) - np.kron(A0, A0), both.ravel()).reshape(8, 8)[:4, :4]
    assert (np.abs(found - without) > 5 * size * np.sqrt(2 / 2000)).any()  # what no decay would give


def test_the_spectral_radius_knows_of_decay():
    """X⁺ = ((1−γ)−λ)²X + sX in one direction."""
    Q = dvi.Filter()
    one = Companion.of(Q, np.array([[0.6]]), np.eye(1), np.array([[0.9]]))
    assert one.radius(np.full((1, 1, 1, 1), 0.05)) == pytest.approx(0.3**2 + 0.05, rel=1e-6)
    assert one.stationary(np.eye(1))[0, 0] == pytest.approx(1 / (1 - 0.3**2), rel=1e-12)


def test_the_first_step_of_the_flow_decays_as_the_optimizer():
    problem = problem_of(network())
    method = AdamW(1e-2, weight_decay=0.5, shapes=problem.shapes)
    flow, discrete = dvi.noisy_flow(problem, method, 3, trust_every=0), dvi.discrete(problem, method)
    y = flow.initial
    expected, *_ = discrete.step(y, problem.value_and_grad(y.w)[1])
    torch.testing.assert_close(dvi.solve(flow, 1, progress=False).w, expected.w, rtol=0, atol=1e-15)


def test_replicas_of_adamw_on_all_examples_are_the_optimizer():
    problem = problem_of(network())
    method = AdamW(lambda t: 1e-2 * (1 + 0.1 * t), weight_decay=0.5, shapes=problem.shapes)
    many = replicas(problem, method, 12, 12)
    one, seen = dvi.discrete(problem, method), []
    y = one.initial
    _, g = problem.value_and_grad(y.w)
    for _ in range(12):
        y, _, g = one.step(y, g)
        seen.append(y.w)
    torch.testing.assert_close(many[:, 0], torch.stack(seen), rtol=0, atol=1e-12)  # the order of sums over examples
