"""What the macro step promises: looks when they are needed, stiff forces, error estimates that are told."""

import re
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pytest
import torch
from conftest import examples, orthogonal
from hypothesis import assume, example, given
from hypothesis import strategies as st

import dvi
from dvi.methods import GradientDescent
from dvi.problems.exact.edge import MatrixSweep
from dvi.runs.sampling import breakpoints
from dvi.solvers import bending, followed, gap, secant
from dvi.solvers.critical import Eigenblock
from dvi.solvers.errors import ConvergenceError, StepError
from dvi.solvers.followed import Followed
from dvi.solvers.here import Here, Stiffness
from dvi.solvers.macro_attempt import Accepted, Rejected
from dvi.solvers.protocol import State
from dvi.solvers.secant import Secant
from dvi.solvers.watch import LOOSE, Sighting, Watch

LR = 0.5


def run(flow, integrator, steps, **options):
    return dvi.solve(flow, steps, integrator=integrator, progress=False, save=("w",), **options)


# ---- eigenvectors are sought only where one may come near 2 ---------------------------------------------------


def test_far_from_the_edge_few_looks_are_enough_and_the_entry_is_seen():
    """The effective sharpness rises linearly from 0.12 to 2 in 130 units."""
    problem = MatrixSweep([0.36, 0.1], [9.4, 9.0], lr=0.2, seed=3)
    flow = dvi.central_flow(problem.problem, GradientDescent(problem.lr), check=False)
    solution = run(flow, dvi.MacroStep(), 160)
    first = problem.entry_times[0]
    assert 100 < first < 150
    entered = [t for t, kind, _ in solution.breakpoints if kind == "enter"]
    assert len(entered) == 1
    assert abs(entered[0] - first) < 1.0  # the step that ends at the entry begins at most this before it
    exact = np.stack([problem.weights(float(t)).numpy() for t in solution.t])
    # linear between breakpoints: what is left is the landing, at most what one step may be off, tol √h_max
    assert np.abs(solution.series["w"] - exact).max() < 1e-3 * 20**0.5
    assert np.nanmax(solution.eigenvalues) < 2 + 1e-3
    until = next(i for i, t in enumerate(solution.ledger.t) if t > 50)
    spent = solution.ledger.counts[until]
    # two searches with a survey each (about 15 products for 5 dimensions), and some two products in 15 units
    assert spent["hvps"] < 60
    assert spent["third_derivatives"] == 0
    # eigenvalues are recorded where they were looked at, and joined in between
    assert np.isfinite(solution.eigenvalues[:, 0]).all()
    # (the largest eigenvalue rises linearly: two of its values give a third)
    values = solution.eigenvalues[[20, 50, 80], 0]
    assert values[1] == pytest.approx((values[0] + values[2]) / 2, abs=1e-3)


def test_an_eigenvalue_that_speeds_up_is_not_missed():
    """η = 0.05/(1 − t/90): the effective sharpness rises ever faster, from 0.09 to beyond 2."""
    problem = MatrixSweep([0.01, 0.01], [8.2, 7.0], lr=0.2, seed=1)
    flow = dvi.central_flow(problem.problem, GradientDescent(lambda t: 0.05 / (1 - t / 90)), check=False)
    solution = run(flow, dvi.MacroStep(), 85)
    fine = run(flow, dvi.Euler(1 / 4), 85)
    assert fine.breakpoints[0][1] == solution.breakpoints[0][1] == "enter"
    assert solution.breakpoints[0][0] == pytest.approx(fine.breakpoints[0][0], abs=1.0)
    assert np.nanmax(solution.eigenvalues) < 2 + 1e-3
    # tol √h over the dozen steps, up to 20 long, that the run takes, add up to 0.025; Euler's own error is 1e-3
    assert np.linalg.norm(solution.series["w"] - fine.series["w"], axis=1).max() < 0.01


def overtaking(rates, gaps):
    """A sweep in which the eigenvalue that is lowest at the start comes first, exactly decoupled from the others."""
    toy = MatrixSweep(rates, gaps, lr=0.2)
    return toy, dvi.central_flow(toy.problem, GradientDescent(toy.lr), check=False)


@given(st.floats(1.1, 1.9), st.floats(0.1, 0.9))
@examples(10)
def test_an_eigenvalue_that_overtakes_all_in_sight_is_not_missed(ahead, behind):
    """No residual of the others shows it; it is looked for when one twice as fast as those in sight could be there."""
    toy, flow = overtaking([0.6 * ahead, 0.6, 0.6 * behind], [8.7, 8.5, 8.3])
    solution = run(flow, dvi.MacroStep(), toy.entry_times[0] + 5)
    # no step is cut to less than h_start = 1/4 to land
    assert solution.breakpoints[0][0] == pytest.approx(toy.entry_times[0], abs=0.25)
    assert solution.breakpoints[0][1:] == ("enter", 1)


@pytest.mark.parametrize("make", [dvi.MacroStep, partial(dvi.Euler, 0.25), partial(dvi.RungeKutta, 4)])
def test_what_was_missed_is_told(make):
    """One that nobody looked for is far above 2 when it is found."""
    _, flow = overtaking([1, 0.6, 0.3], [9, 8.5, 8])
    solution = run(flow, make(watch=Watch(survey_every=60)), 65)
    (note,) = [note for note in solution.notes if "above 2" in note]
    sharpness, t = (float(x) for x in re.search(r"up to ([\d.]+) at t = ([\d.]+)\.", note).groups())
    assert 50 < t < 62
    # the time is that of the end of a step of 1/16, in which it may have been pushed back already
    assert sharpness == pytest.approx(0.2 + 0.04 * t, abs=0.04 / 16 + 1e-3)


def test_a_look_far_from_the_edge_is_not_content_with_any_vector():
    """Where most eigenvalues are small a lost vector has a small residual; the leading one is found all the same."""
    d = 200
    rng = np.random.default_rng(0)
    Q = torch.tensor(orthogonal(rng, d))
    A = Q @ torch.diag(torch.tensor(np.r_[1.0, rng.uniform(0, 0.05, d - 1)])) @ Q.T
    lost = Q[:, 1:3].clone()
    values = (lost * (A @ lost)).sum(0).numpy()
    block = Eigenblock(lost + 0.01 * Q[:, :1], A @ lost, values, np.full(2, 0.01), draws=1)
    seen = Sighting(block, np.zeros(2), 0.0, 0.0)

    class Moved:
        def effective_hessian(self, y):
            return lambda V: A @ V

        def basis(self, y, V):
            return V

    found = Watch().look(Moved(), State(Q[0], {}, 1.0), seen, 1.0)
    assert found.eigenvalues[0] == pytest.approx(1.0, abs=0.05)


# ---- where the force of oscillations is stiff -----------------------------------------------------------------


@given(st.integers(0, 2**32 - 1), st.integers(1, 2), st.integers(2, 6))
@examples(40)
def test_the_secant_is_the_implicit_trapezoid_rule_for_a_force_of_low_rank(seed, m, d):
    """J = −Σ a v⟨v, ·⟩_P over m directions v: then Y = JS, and δ = c + ½Jδ is solved as a dense system is."""
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(d, d))
    P = root @ root.T + np.eye(d)
    V = np.linalg.solve(np.linalg.cholesky(P).T, orthogonal(rng, d)[:, :m])  # orthonormal in the metric of P
    S, c = rng.normal(size=(d, m)), rng.normal(size=d)
    assume(np.linalg.cond(V.T @ P @ S) < 100)
    J = -(V * rng.uniform(1, 50, m)) @ V.T @ P
    Y = J @ S
    found = Secant.of(*(torch.tensor(M) for M in (S, Y, P @ Y)))
    exact = np.linalg.solve(np.eye(d) - 0.5 * J, c)
    shares = np.linalg.solve(V.T @ P @ S, V.T @ P @ exact)
    if np.abs(shares).max() < 1:  # a secant is not extrapolated beyond the steps it was learned from
        # the condition numbers of the system, of P and of the Gram matrix of Y multiply: 26, some thousand, 50² · 100²
        rtol, atol = (1e-8, 1e-9) if m == 1 else (1e-4, 1e-5)
        np.testing.assert_allclose(c + 0.5 * Y @ found.implicit(torch.tensor(c)), exact, rtol=rtol, atol=atol)
        np.testing.assert_allclose(found.parts(torch.tensor(exact)), shares, rtol=rtol, atol=0.0 if m == 1 else atol)
    # a force that pushes along, or pulls back gently, is left alone
    for factor in (-1.0, 1e-3):
        gentle = Secant.of(*(torch.tensor(factor * M if M is not S else S) for M in (S, Y, P @ Y)))
        assert not gentle.stiff
        assert not gentle.implicit(torch.tensor(c)).any()
        assert not gentle.parts(torch.tensor(c)).any()


def stiff_problem(q, slope, start):
    """L = −y + ½(y + Σqz²)x² − Σbz: at the edge σ² = 2, z goes to b/2q, at the rate ηqσ² were y free to follow."""
    q, slope, start = (torch.tensor(x, dtype=torch.float64) for x in (q, slope, start))

    def loss(w):
        x, y, z = w[0], w[1], w[2:]
        return -y + 0.5 * (y + (q * z**2).sum()) * x**2 - (slope * z).sum()

    rest = slope / (2 * q)
    w0 = torch.cat([torch.tensor([0.0, 3.0], dtype=torch.float64), rest * start])
    return dvi.central_flow(dvi.Problem(loss, w0), GradientDescent(LR), check=False), rest


def test_a_stiff_force_of_oscillations_does_not_force_tiny_steps(monkeypatch):
    flow, rest = stiff_problem([40.0], [2.0], [0.5])
    solution = run(flow, dvi.MacroStep(), 30)
    assert [kind for _, kind, _ in solution.breakpoints] == ["enter"]
    np.testing.assert_allclose(solution.w[2:], rest, atol=1e-4)
    at_rest = LR * np.array([np.trace(X) for X in solution.X[-20:]])  # Σ = UXUᵀ with UᵀU = η
    np.testing.assert_allclose(at_rest, 2.0, rtol=1e-3)
    # without it, and with frozen frames: the shortest steps, and what they cost (8.3 times as many here)
    monkeypatch.setattr(Followed, "suits", lambda *_: False)
    monkeypatch.setattr(secant, "_STIFF", np.inf)
    assert len(run(flow, dvi.MacroStep(), 30).ledger.t) > 7 * len(solution.ledger.t)


def following(flow, asked, rate=1.0, always=False):
    """Run with the first step with a direction at the edge made as if short steps had shown that the force is stiff."""
    integrator = dvi.MacroStep()
    y = State(flow.problem.w0, {}, 0.0)
    memory, states = integrator.init(flow, y), [y]
    while y.t < asked - 1e-9:
        here = memory.here
        if here is not None and here.frame.k and (always or here.stiffness is None):
            memory = replace(memory, here=replace(here, stiffness=Stiffness(rate)))
        result = integrator.step(flow, memory, y, asked - y.t)
        y, memory = result.y, result.memory
        states.append(y)
    return states, memory


@pytest.mark.parametrize(
    ("q", "slope", "start"),
    [([40.0], [2.0], [0.5]), ([58.9, 42.7, 40.8], [2.4, 1.8, 1.3], [1.2, 1.0, 0.8])],
)
def test_stages_that_follow_the_frame_take_long_steps_where_the_force_is_stiff(q, slope, start):
    flow, rest = stiff_problem(q, slope, start)
    states, memory = following(flow, 30.0)
    y, steps = states[-1], np.diff([y.t for y in states])
    np.testing.assert_allclose(y.w[2:], rest, atol=1e-4)
    assert max(steps) > 2.0  # some 50 rates of the force; the step of the paper's scheme would have to be below 0.02
    lin = flow.linearised(y, memory.here.g, memory.here.frame)
    np.testing.assert_allclose(lin.gap, 0.0, atol=1e-4)
    np.testing.assert_allclose(lin.drift(gap.multiplier(flow, lin, 0.0)).w, 0.0, atol=1e-3)


@given(st.lists(st.tuples(st.floats(2.0, 60.0), st.floats(0.5, 3.0), st.floats(0.7, 1.3)), min_size=1, max_size=3))
@examples(15)
def test_the_rate_of_a_followed_step_is_that_of_the_dense_jacobian(draws):
    """Of the drift with X of Baumgarte type, eigenvectors and third derivatives taken at each point, by differences."""
    flow, _ = stiff_problem(*zip(*draws, strict=True))
    (*_, y), memory = following(flow, 2.0)
    assume(memory.here.frame.k == 1 and 2 - memory.here.seen.eigenvalues[0] < 1e-3)

    def drift(w):
        state = State(w, {}, y.t)
        A = flow.effective_hessian(state)(torch.eye(len(w), dtype=w.dtype))
        v = torch.linalg.eigh(A)[1][:, -1:]
        lin = flow.linearised(state, flow.gradient(state), flow.frame(state, v, A @ v))
        return lin.drift(gap.multiplier(flow, lin, gap.baumgarte(0.1))).w

    step = 1e-6 * torch.eye(len(y.w), dtype=y.w.dtype)
    J = np.stack([((drift(y.w + e) - drift(y.w - e)) / 2e-6).numpy() for e in step], axis=1)
    watch = Watch(dvi.solvers.critical.CriticalSubspace(tol=1e-6))
    attempt = Followed(flow, watch, 1e-3, replace(memory.here, stiffness=Stiffness(1.0)), y, 0.1, False)
    start = {"w": y.w, "nu": y.nu, "t": y.t, "z": np.zeros(1)}
    for _ in range(7):  # as many steps that start there: some evaluations at first, then one or two each
        _, attempt._stiffness = attempt._begin(start)
    found = attempt._stiffness
    exact = np.abs(np.linalg.eigvals(J)).max()
    # J is not normal: what one evaluation gives may be more than the spectral radius, but not above its norm
    assert 0.9 * exact < found.rate < 1.1 * np.linalg.norm(J, 2)


@pytest.mark.parametrize("speed", [0.1, 0.3, 0.6])
@pytest.mark.parametrize("rate", [1.0, 20.0])
def test_directions_that_arrive_at_followed_steps_are_not_held_back(monkeypatch, speed, rate):
    """Three eigenvalues rise to 2 one after the other, at r = 0.004 to 0.024 per unit; γ = 2 keeps one r/2e below 2.

    So γ is larger, if the force's own rate is; else the step before an arrival holds its frame.
    """
    problem = MatrixSweep([speed] * 3, [0.1, 0.3, 0.5], lr=0.2, seed=1)
    flow = dvi.central_flow(problem.problem, GradientDescent(problem.lr), check=False)
    asked = problem.entry_times[-1] + 10

    def worst(states):
        return max(float((y.w - problem.weights(y.t)).norm()) for y in states)

    states, memory = following(flow, asked, rate, always=True)
    assert memory.here.frame.k == 3
    assert worst(states) < followed._HELD_BACK / np.e / 0.2 + 1e-3  # in w, over |T| = 0.2; and tol
    if speed > 0.5:
        monkeypatch.setattr(followed, "_HELD_BACK", np.inf)
        monkeypatch.setattr(followed, "_PULL", 0.0)
        assert worst(following(flow, asked, rate, always=True)[0]) > 0.015


def test_a_followed_step_that_would_take_too_many_stages_is_shortened(monkeypatch):
    """With fewer it would be unstable; the rate that was found is handed on, so that it need not be sought again."""
    flow, _ = stiff_problem([40.0], [2.0], [0.5])
    (*_, y), memory = following(flow, 2.0)
    here = replace(memory.here, stiffness=Stiffness(40.0))
    monkeypatch.setattr(followed, "_MOST", 50.0)
    watch = Watch(dvi.solvers.critical.CriticalSubspace(tol=1e-4))
    tried = Followed(flow, watch, 1e-3, here, y, 20.0, False).run()
    assert isinstance(tried, Rejected)
    assert tried.stiffness is not None
    assert tried.stiffness.direction is not None
    assert tried.stiffness.factor == 1.0  # it has not failed
    assert tried.h * followed._SAFE * tried.stiffness.rate == pytest.approx(0.8 * 50.0)


def test_following_ends_where_it_is_not_the_stiffness_that_keeps_steps_short():
    """Twenty stages cost as much as ten steps with a frozen frame, which were of 0.01."""
    flow, _ = stiff_problem([40.0], [2.0], [0.5])
    (*_, y), memory = following(flow, 2.0)

    def kept(h, error, vain=0, stages=18):
        here = replace(memory.here, stiffness=Stiffness(40.0, held=0.01, vain=vain))
        return Followed(flow, Watch(), 1e-3, here, y, h, False)._kept(stages, error)

    assert kept(0.11, 2e-3).vain == 0  # it pays
    assert kept(0.09, 0.5e-3).vain == 1  # not yet, but steps grow
    assert kept(0.09, 0.5e-3, vain=1) is None
    assert kept(0.09, 1e-5, vain=1).vain == 0  # they double
    assert kept(0.09, 2e-3) is None  # longer ones would be wrong, frozen or not


def test_what_is_held_at_the_end_of_a_followed_step_is_not_on_its_way():
    """Its gap is being closed at the rate γ; taken for a rise, that would ask for a larger γ, and end the following."""
    flow, _ = stiff_problem([40.0], [2.0], [0.5])
    (*_, y), memory = following(flow, 2.0)
    frame = gap.anchored(flow, y, memory.here.frame, np.array([[4e-3]]))
    lin = flow.linearised(y, memory.here.g, frame)
    X = gap.multiplier(flow, lin, 50.0)
    assert X[0, 0] > 0
    assert (lin.alpha - lin.beta @ X)[0, 0] == pytest.approx(50.0 * 4e-3)
    held = gap.approaching(flow, lin, np.zeros(1), 1.0, X)
    assert held is not None
    assert np.isinf(held.arrivals()).all()
    # Nor is it at rest: without X, as if none were near the edge, a step would start to where w is never pushed to.
    assert not held.none_within(2.0)
    assert Followed.suits(replace(memory.here, approach=held), y, 2.0)
    free = gap.approaching(flow, lin, np.zeros(1), 1.0, np.zeros((1, 1)))
    assert free is not None
    assert free.rates[0] == pytest.approx(lin.alpha[0, 0])


@pytest.mark.parametrize("where", ["a stage", "the look at the end"])
def test_a_step_that_runs_away_while_it_follows_is_tried_again(monkeypatch, where):
    """At last with a frozen frame, if all followed ones run away."""
    flow, _ = stiff_problem([40.0], [2.0], [0.5])
    look, failures = Watch.look, []

    def runs_away(self, at, sharp=1.0):
        raise ConvergenceError("the stages run away")

    def blind(self, *args, **options):
        if not failures:  # once: by differences it may find nothing where the stages have gone
            failures.append(where)
            raise ConvergenceError("no eigenvectors there")
        return look(self, *args, **options)

    (*_, y), memory = following(flow, 2.0)
    here = replace(memory.here, stiffness=Stiffness(100.0))
    assert Followed.suits(here, y, memory.h)
    if where == "a stage":
        monkeypatch.setattr(Followed, "_stage", runs_away)
    else:
        monkeypatch.setattr(Watch, "look", blind)
    result = dvi.MacroStep().step(flow, replace(memory, here=here), y, 30.0)
    assert where == "a stage" or failures
    assert result.y.t > y.t
    assert bool(torch.isfinite(result.y.w).all())


@pytest.mark.parametrize(
    ("q", "slope", "start"),
    [([5.9, 49.7], [2.8, 2.2], [1.2, 1.0]), ([58.9, 42.7, 40.8], [2.4, 1.8, 1.3], [1.2, 1.0, 0.8])],
)
def test_where_corrections_reverse_one_another_two_directions_are_stiff(monkeypatch, q, slope, start):
    flow, rest = stiff_problem(q, slope, start)
    solution = run(flow, dvi.MacroStep(), 30)
    np.testing.assert_allclose(solution.w[2:], rest, atol=1e-3)
    monkeypatch.setattr(Followed, "suits", lambda *_: False)
    frozen = run(flow, dvi.MacroStep(), 30)
    np.testing.assert_allclose(frozen.w[2:], rest, atol=1e-3)
    monkeypatch.setattr(bending, "_REVERSED", -2.0)  # without the step before: twice as many
    assert len(run(flow, dvi.MacroStep(), 30).ledger.t) > 2 * max(len(solution.ledger.t), len(frozen.ledger.t))


@pytest.mark.parametrize(
    ("q", "slope", "start"),
    [([5.0, 5.0, 80.0], [1.0, 1.0, 3.0], [0.7, 1.2, 0.5]), ([58.9, 42.7, 40.8], [2.4, 1.8, 1.3], [1.2, 1.0, 0.8])],
)
def test_with_three_stiff_directions_following_takes_fewer_steps(monkeypatch, q, slope, start):
    flow, rest = stiff_problem(q, slope, start)
    fast = run(flow, dvi.MacroStep(), 30)
    np.testing.assert_allclose(fast.w[2:], rest, atol=1e-3)
    monkeypatch.setattr(Followed, "suits", lambda *_: False)  # 77 and 273 steps, 92 and 245
    assert len(run(flow, dvi.MacroStep(), 30).ledger.t) > 2 * len(fast.ledger.t)


# ---- a critical eigenvector that turns towards another ------------------------------------------------------


@dataclass(frozen=True)
class Turning:
    """L = ½xᵀAx − a y − b z with A = [[y, rz], [rz, (2 − δ)/η]]: the critical vector turns to the other as z grows.

    At rest its slope is b/(2ar), z = δb/(2ηar²), X = 2a(1 + slope²); z relaxes at the rate η²r²X/δ per unit time.
    """

    r: float
    delta: float
    a: float
    b: float
    lr: float = 0.1

    @property
    def slope(self):
        return self.b / (2 * self.a * self.r)

    @property
    def z(self):
        return self.delta * self.slope / (self.lr * self.r)

    @property
    def X(self):
        return 2 * self.a * (1 + self.slope**2)

    @property
    def rate(self):
        return self.lr**2 * self.r**2 * self.X / self.delta

    @property
    def flow(self):
        def loss(w):
            u, v, y, z = w
            sharp = y * u**2 + 2 * self.r * z * u * v + (2 - self.delta) / self.lr * v**2
            return 0.5 * sharp - self.a * y - self.b * z

        z = 1.5 * self.z  # and y such that the critical eigenvalue is a little below 2
        y = (2 - 1e-3) / self.lr - (self.r * z) ** 2 / (self.delta / self.lr)
        start = torch.tensor([0.0, 0.0, y, z], dtype=torch.float64)
        return dvi.central_flow(dvi.Problem(loss, start), GradientDescent(self.lr), check=False)


@examples(20)
@given(
    st.floats(3.0, 60.0),
    st.floats(0.1, 0.6),
    st.floats(0.5, 3.0),
    st.floats(0.2, 3.0).flatmap(lambda x: st.sampled_from([x, -x])),
)
@example(100.0, 0.2, 1.0, 2.0)  # 1,000 per unit time: without its neighbour it diverges
@example(34.4, 0.58, 2.4, 1.5)  # 98 per unit time: without its neighbour it takes nine times the gradients
def test_an_eigenvector_that_turns_fast_is_held_together_with_its_neighbour(r, delta, a, ratio):
    problem = Turning(r, delta, a, a * ratio)
    assume(problem.rate > 8)
    solution = run(problem.flow, dvi.MacroStep(h_max=1.0), 30)
    # after more than 100 relaxation times
    assert float(solution.w[3]) == pytest.approx(problem.z, rel=0.05, abs=1e-3)  # tol
    at_rest = 0.1 * np.array([np.trace(X) for X in solution.X[-10:]])
    assert np.median(at_rest) == pytest.approx(problem.X, rel=0.02)
    assert not any("diverged" in note for note in solution.notes)


def test_without_its_neighbour_the_steps_are_short_or_in_vain(monkeypatch):
    gentle, fast, integrator = Turning(30.0, 0.2, 1.0, 2.0), Turning(100.0, 0.2, 1.0, 2.0), dvi.MacroStep(h_max=1.0)
    held = run(gentle.flow, integrator, 30)
    assert [X.shape[0] for X in held.X[-5:]] == [2] * 5
    assert [kind for _, kind, _ in held.breakpoints] == ["enter"]  # held is not at the edge
    monkeypatch.setattr(gap, "_COUPLED", np.inf)
    monkeypatch.setattr(Here, "neighbour", False)
    turning = run(fast.flow, integrator, 30)
    monkeypatch.setattr(Followed, "suits", lambda *_: False)
    alone = run(gentle.flow, integrator, 30)
    assert max(X.shape[0] for X in alone.X) == 1
    assert alone.ledger.counts[-1]["gradients"] > 3 * held.ledger.counts[-1]["gradients"]
    assert run(fast.flow, integrator, 30, throw=False).status is dvi.Status.DIVERGED
    # … but not where the stages follow it as it turns
    monkeypatch.undo()
    exact = run(fast.flow, dvi.MacroStep(1e-5, h_max=1.0), 30)
    np.testing.assert_allclose(turning.w, exact.w, atol=1e-3)


def test_what_a_coupled_neighbour_does_to_the_force():
    """Against the closed form: u = e₁, v = e₂ at z = 0, T_uu = η∂_y, T_uv = ηr∂_z."""
    problem = Turning(30.0, 0.4, 1.0, 0.0)
    flow, lr = problem.flow, problem.lr
    y = State(torch.tensor([0.0, 0.0, 2 / lr, 0.0], dtype=torch.float64), {}, 0.0)
    _, g = flow.value_and_grad(y)
    V = torch.eye(4, dtype=torch.float64)[:, :2]
    frame = flow.frame(y, V, flow.effective_hessian(y)(V))
    lin = flow.linearised(y, g, frame)
    X = np.diag([2.0, 0.0])
    rate = lr**3 * problem.r**2 * 2.0 / (problem.delta)  # x|T_uv|²/δ: x = 2 in the frame, T_uv = ηr, P⁻¹ = η
    found = gap.coupled(lin, X, 1.01 * 4 / rate)
    assert found.bound == 2
    # e₁ + εe₂ has the force 2x T_uv ε beside x T_uu; a residual of one is an ε of 1/δ
    assert found.turn == pytest.approx(2 * problem.r / problem.delta, rel=1e-12)
    assert gap.coupled(lin, X, 0.99 * 4 / rate) == LOOSE
    assert gap.coupled(lin, np.diag([0.0, 0.0]), 1e9) == LOOSE  # what does not oscillate does not pull


# ---- error estimates that cannot be met ---------------------------------------------------------------------


def test_steps_that_could_not_be_short_enough_are_told():
    problem = dvi.problems.digits(network="mlp", loss="mse", n=60, width=8)
    flow = dvi.central_flow(problem, GradientDescent(0.1), check=False)
    solution = run(flow, dvi.MacroStep(1e-7, h_min=0.25), 3, warm_start=3)
    (note,) = [note for note in solution.notes if "as short as allowed" in note]
    assert "central flow: 12 of " in note
    assert "lower h_min, or loosen tol" in note
    assert not any("as short as allowed" in note for note in run(flow, dvi.MacroStep(1e-3), 3, warm_start=3).notes)


def test_a_step_that_is_less_than_its_error_is_refused():
    integrator = dvi.MacroStep(1e-3)
    y = State(torch.zeros(3, dtype=torch.float64), {}, 2.0)

    def accepted(moved, error):
        end = State(y.w + moved / 3**0.5, {}, 2.0625)
        return Accepted(end, None, np.zeros((0, 0)), None, None, None, error)

    integrator._require_sense(y, 1 / 16, accepted(0.2, 0.3))  # 0.3·√h = 0.075, large but less than the step
    integrator._require_sense(y, 1 / 16, accepted(0.001, 0.09))  # 90 tol: told, not refused
    words = r"t = 2: a step of 0.0625 moves w by 0.05 .* 300 times what tol allows. Lower h_min"
    with pytest.raises(StepError, match=words):
        integrator._require_sense(y, 1 / 16, accepted(0.05, 0.3))


def test_a_cost_per_unit_time_holds_the_first_step_and_all_later_ones():
    problem = dvi.problems.digits(network="mlp", loss="mse", n=60, width=8)
    solution = run(dvi.central_flow(problem, GradientDescent(0.1), check=False), dvi.Euler(0.5), 4)
    cost = solution.ledger
    total = cost.counts[-2]  # the last entry is the look at the end
    expected = sum(cost.ledger.weights[kind] * count for kind, count in total.items()) / 4
    assert cost.per_unit_time() == pytest.approx(expected)
    # the first step holds the search for eigenvectors, which is most of it
    assert cost.per_unit_time(0, 0.5) > 2 * cost.per_unit_time(0.5, 4)
    halves = 0.5 * (cost.per_unit_time(0, 2) + cost.per_unit_time(2, 4))
    assert halves == pytest.approx(expected)


def test_an_arrival_within_a_step_is_dated_by_its_share_of_X():
    """X is the mean over a step: a tenth of the next one's means that the direction arrived in its last tenth."""

    def node(t, *variances, at=(2.0, 2.0)):
        return {"t": t, "X": np.diag(variances), "eigenvalues": np.array(at)}

    nodes = [
        node(0.0, at=(1.8, 1.5)),
        node(1.0, 0.1, at=(1.9, 1.5)),
        node(6.0, 1.0, at=(2.0, 1.7)),
        node(8.0, 1.1, 0.9),
    ]
    nodes.append(node(9.0, 1.1, 1.0))
    assert breakpoints(nodes) == [(pytest.approx(1 + 0.9 * 5), "enter", 1), (8.0, "enter", 2)]


def test_an_entry_that_was_not_foreseen_to_the_day_is_dated_all_the_same():
    """On the sweep entries are known; landing a little late leaves a little X in the step before."""
    problem = MatrixSweep([0.9, 0.5], [4.0, 3.7], lr=0.2, seed=3)
    flow = dvi.central_flow(problem.problem, GradientDescent(problem.lr), check=False)
    times = [t for t, _, _ in run(flow, dvi.MacroStep(), 45).breakpoints]
    assert times == pytest.approx(sorted(problem.entry_times), abs=0.25)  # no step is cut to less to land
