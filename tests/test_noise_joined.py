"""Mini-batches where they meet weight decay, changed problems and optimizers of torch."""

import copy

import numpy as np
import pytest
import torch
from conftest import noisy_quadratic
from torch import nn
from torch.utils import _pytree as pytree

import dvi
from dvi.methods import AdamW, GradientDescent, HeavyBall
from dvi.noise.companion import Companion
from dvi.problems import ProblemError
from dvi.solvers.protocol import State

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


UNEQUAL = torch.tensor([0.0, 0.3, 0.05, 0.15], dtype=torch.float64)


@pytest.mark.parametrize(("beta", "gamma"), [(0.0, 0.1), (0.0, UNEQUAL), (0.5, UNEQUAL)], ids=str)
def test_x_settles_where_the_closed_form_says_with_decay(beta, gamma):
    """Σ = AΣAᵀ + φηCη of the whole state (w, buffer), against the flow and against 2,000 replicas."""
    problem, H, C = noisy_quadratic(0.1)
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


# ---- changed problems ---------------------------------------------------------------------------------------


def gradients(problem):
    """The gradients of single examples at w0, and of a batch of three."""
    batches = problem.mini_batches()
    singly = torch.cat([G for _, G in batches.each(problem.w0)])
    _, one = batches.batches(problem.w0[None], torch.tensor([[0, 4, 7]]))
    return singly, one[0]


LAM = 0.7
CHANGES = {
    "penalised": (lambda p: p.penalised(LAM), lambda g, w: g + LAM * w),
    "by weight": (
        lambda p: p.penalised(torch.linspace(0, 1, p.dim).double()),
        lambda g, w: g + torch.linspace(0, 1, len(w)).double() * w,
    ),
    "negated": (lambda p: p.negated(), lambda g, w: -g),
    "negated, penalised": (lambda p: p.negated().penalised(LAM), lambda g, w: LAM * w - g),
    "penalised, negated": (lambda p: p.penalised(LAM).negated(), lambda g, w: -g - LAM * w),
}


def plain_problem(kind):
    if kind == "module":
        return problem_of(network())
    if kind == "chunks":
        return problem_of(network(), chunk_size=5)
    w0 = torch.linspace(-1, 1, 8).double()
    return dvi.Problem.from_examples(
        lambda w, x, y: (torch.tanh(x @ w[:6].view(3, 2)) * w[6:] - y).square().mean(1), (X, Y), w0
    )


@pytest.mark.parametrize("kind", ["module", "chunks", "examples"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_the_loss_changes_that_of_every_batch(kind, change):
    plain = plain_problem(kind)
    make, expected = CHANGES[change]
    for before, after in zip(gradients(plain), gradients(make(plain)), strict=True):
        torch.testing.assert_close(after, expected(before, plain.w0), rtol=0, atol=1e-14)


@pytest.mark.parametrize("kind", ["module", "chunks", "examples"])
def test_a_moved_start_is_where_batches_are_drawn(kind):
    plain = plain_problem(kind)
    w = plain.w0 + 0.3
    moved = plain.penalised(LAM).starting_at(w)
    losses, G = plain.mini_batches().batches(w[None], torch.tensor([[1, 2]]))
    there, H = moved.mini_batches().batches(moved.w0[None], torch.tensor([[1, 2]]))
    torch.testing.assert_close(H, G + LAM * w, rtol=0, atol=1e-14)
    torch.testing.assert_close(there, losses + 0.5 * LAM * w.square().sum(), rtol=1e-14, atol=0)
    torch.testing.assert_close(dvi.noisy_flow(moved, GradientDescent(0.1), 3).initial.w, w, rtol=0, atol=0)


@pytest.mark.parametrize("chunk_size", [None, 5])
def test_a_penalty_and_decay_of_the_module_are_in_every_batch(chunk_size):
    def penalty(p):
        return 0.3 * p["0.weight"].pow(4).sum()

    plain = problem_of(network())
    both = problem_of(network(), penalty=penalty, weight_decay=0.2, chunk_size=chunk_size)
    w = plain.w0
    extra = 0.2 * w
    extra[plain.parameter_slices["0.weight"]] += 1.2 * w[plain.parameter_slices["0.weight"]] ** 3
    for before, after in zip(gradients(plain), gradients(both), strict=True):
        torch.testing.assert_close(after, before + extra, rtol=0, atol=1e-14)


def test_a_sum_is_refused_by_name_whatever_is_added():
    problem = dvi.Problem.from_module(network(), nn.MSELoss(reduction="sum"), X, Y)
    for changed in (problem.penalised(LAM), problem.negated()):
        with pytest.raises(ProblemError, match='reduction="mean"'):
            changed.mini_batches()


# ---- optimizers of torch ------------------------------------------------------------------------------------


def two_groups(model, kind=torch.optim.AdamW, **more):
    decaying = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": decaying, "weight_decay": 0.3}, {"params": others, "weight_decay": 0.0, "lr": 5e-3}]
    return kind(groups, lr=2e-2, **more)


def trained(model, optimizer, batches):
    """A user's loop over batches of examples; the weights after each step."""
    seen = []
    for which in batches:
        optimizer.zero_grad()
        nn.MSELoss()(model(X[which]), Y[which]).backward()
        optimizer.step()
        seen.append(torch.cat([p.detach().reshape(-1) for p in model.parameters()]))
    return torch.stack(seen)


KINDS = {
    "AdamW": {"kind": torch.optim.AdamW},
    "Adam, ascending": {"kind": torch.optim.Adam, "maximize": True},
    "SGD": {"kind": torch.optim.SGD, "momentum": 0.8, "nesterov": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_replicas_from_a_state_are_torchs_own_steps(kind):
    """Groups, penalty, sign, and what the optimizer remembers: against torch on the same batches."""
    model = network()
    optimizer = two_groups(model, **KINDS[kind])
    problem = problem_of(model)
    trained(model, optimizer, [range(12)] * 4)
    settings = {"replicas": 2, "seed": 5}
    run = dvi.minibatch(problem, optimizer, 3, **settings)
    sampling, torchs = dvi.Sampling(**settings), []
    for r in range(2):
        again = copy.deepcopy(model)
        other = two_groups(again, **KINDS[kind])
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        torchs.append(trained(again, other, [sampling.draw(3, 12, step)[r] for step in range(6)]))
    y = run.spread_out(run.initial)
    _, G = run.batch(y.w, 0)
    # replicas begin with the ν that a first update makes on average; here each takes its own
    if not run.calculus.stateless:
        nus = [updated(run, run.method.at(0.0).init(w), g) for w, g in zip(y.w, G, strict=True)]
        y = State(y.w, pytree.tree_map(lambda *of: torch.stack(of), *nus), y.t, y.m)
    seen = []
    for step in range(1, 7):
        y, _, G = run.advanced(y, G, step)
        seen.append(y.w)
    torch.testing.assert_close(torch.stack(seen), torch.stack(torchs, dim=1), rtol=0, atol=1e-12)  # order of sums


def updated(run, nu, g):
    return pytree.tree_map(torch.add, nu, run.method.at(0.0).f(nu, g))


def test_a_race_of_a_torch_optimizer_goes_on_from_its_state():
    model = network()
    optimizer = two_groups(model)
    problem = problem_of(model)
    trained(model, optimizer, [range(12)] * 4)
    here = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    settings = {"sampling": dvi.Sampling(replicas=2, window=2, trust_every=0), "progress": False, "eigen_every": 0}
    race = dvi.compare(problem, optimizer, 4, batch_size=3, runs=("sgd", "noisy", "central"), warm_start=0, **settings)
    assert race.distance["noisy", "central"][0] == 0
    for flow in (dvi.noisy_flow(problem, optimizer, 3, trust_every=0), dvi.minibatch(problem, optimizer, 3)):
        assert torch.equal(flow.initial.w, here)
        assert flow.problem is not problem
    alone = dvi.solve(dvi.noisy_flow(problem, optimizer, 3, settings["sampling"]), 4, progress=False)
    assert torch.equal(alone.w, race.noisy.w)
    # a batch of all examples is torch's own training
    whole = replicas(problem, optimizer, 12, 4)
    torch.testing.assert_close(whole[:, 0], trained(model, optimizer, [range(12)] * 4), rtol=0, atol=1e-12)


def test_an_optimizers_penalty_is_counted_in_every_batch():
    """weight_decay of torch.optim.SGD, and maximize=True, in the flow: as the problem with both made by hand."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, weight_decay=0.3, maximize=True)
    problem = problem_of(model)
    by_hand = problem.negated().penalised(0.3)
    settings = {"trust_every": 0, "window": 5}
    a = dvi.solve(dvi.noisy_flow(problem, optimizer, 3, **settings), 6, progress=False)
    b = dvi.solve(dvi.noisy_flow(by_hand, GradientDescent(0.2), 3, **settings), 6, progress=False)
    assert torch.equal(a.w, b.w)
    np.testing.assert_array_equal(a.loss, b.loss)
