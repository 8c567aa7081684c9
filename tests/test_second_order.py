"""Flows with momentum as a state: the rate of ν, the semi-implicit step, its order, and O(η²) from the optimizer."""

import inspect

import numpy as np
import pytest
import torch
from conftest import AdaGrad, CubicLoss, examples, frame_of
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import solve_ivp
from scipy.linalg import fractional_matrix_power, logm
from test_methods import bowl, seeds
from test_zoo import ShampooWithMomentum

import dvi
from dvi.compiler import exact_rates as forgetting
from dvi.methods import Adam, GradientDescent, HeavyBall, Nesterov, RMSProp, RMSPropNorm
from dvi.problems.exact.edge import MatrixSweep
from dvi.solvers.protocol import State
from dvi.solvers.svec import smat, svec

EPS = np.finfo(np.float64).eps

# Methods whose filter has one buffer and no direct part, or none: at dt = 1 the flow's step is the optimizer's.
SAME = {
    "gradient descent": lambda lr: GradientDescent(lr),
    "heavy ball": lambda lr: HeavyBall(lr / 4, 0.7),
    "rmsprop-norm": lambda lr: RMSPropNorm(lr, 0.9),
    "rmsprop": lambda lr: RMSProp(lr / 50, 0.9),
    "adam": lambda lr: Adam(lr, 0.8, 0.9),
    "adagrad": lambda lr: AdaGrad(lr),
    "scheduled": lambda lr: HeavyBall(lambda t: lr / (4 + 0.1 * t), 0.5),
    "scheduled momentum": lambda lr: HeavyBall(lr / 4, lambda t: 0.8 - 0.5 * 0.9**t),
    "scheduled averages": lambda lr: Adam(lr, lambda t: 0.8 - 0.5 * 0.9**t, lambda t: 0.9 - 0.2 * 0.9**t, 1e-8, False),
}


def stable(cubic, w, method, steps, dt, **options):
    flow = dvi.stable_flow(cubic.problem(w), method, accuracy="second-order")
    return dvi.solve(flow, steps, integrator=dvi.SemiImplicit(dt=dt), progress=False, save=("w",), **options)


def advanced(run, y, steps):
    """The optimizer's state after some steps, and the gradient there."""
    _, g = run.value_and_grad(y)
    for _ in range(steps):
        y, _, g = run.step(y, g)
    return y, g


def optimizer(cubic, w, method, steps):
    """The iterates w_0 … w_steps themselves."""
    run, y = dvi.discrete(cubic.problem(w), method), None
    y, seen = run.initial, [w]
    _, g = run.value_and_grad(y)
    for _ in range(steps):
        y, _, g = run.step(y, g)
        seen.append(y.w.numpy())
    return np.stack(seen)


# ---- ν's rate ---------------------------------------------------------------------------------------------------


@given(J=st.floats(-0.99, 3) | st.floats(-1e-4, 1e-4), h=st.floats(0.05, 2))
def test_factors_in_closed_form(J, h):
    rate, change = (float(forgetting.factor(torch.tensor(J, dtype=torch.float64), x)) for x in (None, h))
    if abs(J) > 1e-3:
        # log1p and a power, each to an eps or two, and a quotient; 1/J at most 1e3
        assert rate == pytest.approx(np.log1p(J) / J, rel=1e-12)
        assert change == pytest.approx(((1 + J) ** h - 1) / J, rel=1e-10)
    else:
        assert rate == pytest.approx(1 - J / 2, abs=J**2)
        assert change == pytest.approx(h, abs=abs(J) * (h + h**2))
    assert float(forgetting.factor(torch.tensor(J, dtype=torch.float64), 1.0)) == pytest.approx(1, abs=1e-11)


def test_factor_is_smooth_across_its_series():
    """Both branches around |J| = 1e-5: they meet to the terms left out."""
    for h in (None, 0.5, 1.5):
        for J in (1e-5, -1e-5):
            below, above = (
                float(forgetting.factor(torch.tensor(J * s, dtype=torch.float64), h)) for s in (0.999, 1.001)
            )
            assert below == pytest.approx(above, abs=1e-7)  # the factor's own slope times 2e-8
            exact = np.log1p(0.999 * J) / (0.999 * J) if h is None else np.expm1(h * np.log1p(0.999 * J)) / (0.999 * J)
            assert below == pytest.approx(exact, abs=1e-10)  # eps/J


@given(seed=seeds, n=st.integers(1, 5), h=st.floats(0.1, 2))
@examples(15)
def test_the_coupled_factor_is_the_matrix_function(seed, n, h):
    rng = np.random.default_rng(seed)
    J = -0.5 * np.eye(n) + 0.3 * rng.normal(size=(n, n)) / np.sqrt(n)
    if np.linalg.eigvals(np.eye(n) + J).real.min() < 0.05 or np.abs(np.linalg.eigvals(J)).min() < 1e-2:
        return
    rate = np.real(logm(np.eye(n) + J)) @ np.linalg.inv(J)
    change = (fractional_matrix_power(np.eye(n) + J, h) - np.eye(n)) @ np.linalg.inv(J)
    condition = np.linalg.cond(J)
    np.testing.assert_allclose(forgetting.matrix(J, None), rate, atol=1e-11 * condition)
    np.testing.assert_allclose(forgetting.matrix(J, h), change, atol=1e-10 * condition)
    np.testing.assert_array_equal(forgetting.matrix(J, 1.0), np.eye(n))


def test_a_large_coupled_state_is_refused():
    n = forgetting.DENSE_LIMIT + 1
    with pytest.raises(dvi.SpecError, match='accuracy="paper"'):
        forgetting.matrix(np.zeros((n, n)), 0.5)


# ---- without oscillation ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SAME)
@given(seed=seeds)
@examples(2)
def test_a_step_of_one_is_the_optimizers(name, seed):
    """The central map where nothing oscillates: 30 steps of the optimizer, to the roundings of both."""
    cubic, w = bowl(seed)
    method = SAME[name](0.05)
    ours = stable(cubic, w, method, 30, 1.0).series["w"]
    theirs = optimizer(cubic, w, method, 30)
    # rmsprop divides by small √ν: see ROUNDING in test_methods
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-9 * np.abs(theirs).max())


def reference(cubic, lr, beta, steps, w):
    """Heavy ball's flow with the momentum state, by another code: m starts cold, at −½."""
    gain, lag = 1 / (1 - beta), beta / (1 - beta) + 0.5
    d, g0 = len(w), cubic.gradient(w)
    m0 = 0.5 * (1 - beta) * g0  # halfway between 0 at −½ and u₀/Q₁ at ½

    def rhs(t, y):
        return np.concatenate([-lr * gain * y[d:], (cubic.gradient(y[:d]) - y[d:]) / lag])

    out = solve_ivp(rhs, (0, steps), np.concatenate([w, m0]), method="DOP853", rtol=1e-11, atol=1e-12)
    return out.y[:d, -1]


@given(seed=seeds)
@examples(5)
def test_the_semi_implicit_step_is_of_second_order(seed):
    """Against the differential equation integrated by scipy: halving dt divides the error by four."""
    cubic, w = bowl(seed)
    lr, beta = 0.02, 0.8
    exact = reference(cubic, lr, beta, 12, w)
    errors = [
        np.linalg.norm(stable(cubic, w, HeavyBall(lr, beta), 12, dt).w.numpy() - exact) for dt in (1 / 4, 1 / 8, 1 / 16)
    ]
    slopes = np.log2(np.array(errors[:-1]) / errors[1:])
    assert errors[-1] < 1e-3 * np.linalg.norm(w)
    assert slopes.min() > 1.8 or errors[-1] < 1e-10


@pytest.mark.parametrize("make", [GradientDescent, lambda lr: RMSProp(lr / 5, 0.98), lambda lr: HeavyBall(lr / 2, 0.5)])
def test_second_order_in_the_learning_rate(make):
    """Halving η (and doubling the steps): this distance falls by about four; the paper's, which falls by two, is over
    ten times larger even where η is largest.

    Started after as many steps of the optimizer, past the transient of an average that starts empty.
    """
    cubic, w = bowl(11)
    problem = cubic.problem(w)
    ends = {}
    for lr, steps in ((0.08, 20), (0.04, 40), (0.02, 80)):
        method = make(lr)
        run = dvi.discrete(problem, method)
        start, _ = advanced(run, run.initial, steps)
        y, _ = advanced(run, start, steps)
        second = dvi.solve(
            dvi.stable_flow(problem, method, accuracy="second-order"),
            steps,
            integrator=dvi.SemiImplicit(dt=1 / 8),
            start=start,
            progress=False,
        )
        ends[lr] = float((second.w - y.w).norm())
        if isinstance(method, HeavyBall) or lr < 0.08:
            continue
        paper = dvi.solve(
            dvi.stable_flow(problem, method), steps, integrator=dvi.RungeKutta(4, h=0.25), start=start, progress=False
        )
        assert float((paper.w - y.w).norm()) > 10 * ends[lr]
    errors = [ends[lr] for lr in (0.08, 0.04, 0.02)]
    assert errors[0] / errors[1] > 3
    assert errors[1] / errors[2] > 3


# ---- on the constraint ------------------------------------------------------------------------------------------


def test_the_sweep_has_its_exact_solution():
    """On a matrix sweep the force is constant, so momentum changes nothing but the step in which X sets in."""
    problem = MatrixSweep([0.6, 0.5], [0.3, 0.2], lr=0.2, decay=0.0, seed=1)
    flow = dvi.central_flow(problem.problem, GradientDescent(0.2), accuracy="second-order")
    for dt in (1.0, 0.5, 0.25):
        solution = dvi.solve(flow, 30, integrator=dvi.SemiImplicit(dt=dt), progress=False, save=("w",))
        error = max(
            float(np.linalg.norm(w - problem.weights(t).numpy()))
            for t, w in zip(solution.t, solution.series["w"], strict=True)
        )
        # within the step of an entry a corner is cut: half a step of the speed η|C| ≤ 0.2·0.4
        assert error < 0.04 * dt
        assert all(kind == "enter" for _, kind, _ in solution.breakpoints)
        assert solution.breakpoints[-1][2] == 2
        # the step that holds the arrival: at t = 2 and 2.5, which is one step where dt = 1
        for time, (t, _, _) in zip(
            sorted(problem.entry_times)[-len(solution.breakpoints) :], solution.breakpoints, strict=True
        ):
            assert t - 1e-9 <= time <= t + dt + 1e-9
        assert solution.series["trace"][-1] == pytest.approx(float(problem.variances(29.0).sum()), rel=2e-3)


def edge_state(seed, k=2, d=6):
    """A random cubic, somewhere; with a frame of k arbitrary directions."""
    rng = np.random.default_rng(seed)
    cubic, w = CubicLoss.random(rng, d), rng.normal(size=d)
    return rng, cubic, w, torch.tensor(rng.normal(size=(d, k)))


# matrix state and a filter of the user's own, too
STEPPED = SAME | {"shampoo": lambda lr: ShampooWithMomentum(lr, ((2, 2), (2,)), beta2=0.9, eps=1e-2)}


@pytest.mark.parametrize("name", ["gradient descent", "heavy ball", "rmsprop", "rmsprop-norm", "adam", "shampoo"])
@given(seed=seeds, dt=st.sampled_from([0.25, 0.5, 1.0]))
@examples(6)
def test_the_gap_at_the_end_of_a_step(name, seed, dt):
    """gap + β[X] is Uᵀ(2P̃ − H)U where the step ends with X: exactly without ν, to first order in X with it.

    But for one term: X also changes the P(ν) that this very step moves w with: a constant O(dt²) in the gap.
    """
    rng, cubic, w, U = edge_state(seed)
    flow = dvi.central_flow(cubic.problem(w), STEPPED[name](0.1), check=False, accuracy="second-order")
    y = State(torch.tensor(w), flow.initial.nu, 3.0, flow.initial.m)
    _, g = flow.value_and_grad(y)
    frame = frame_of(flow, y, U)
    s = flow.stagger(y, g, dt)
    step = flow.implicit_step(s, g, frame, dt)
    X = smat(rng.normal(size=3))
    X = 1e-9 * X @ X.T

    P_middle = flow.calculus.P(step.end(None).nu, max(0.0, s.t + dt / 2 - 0.5))

    def gap(end):
        w = s.w - dt * flow.calculus.speed(s.t) * P_middle.solve(end.m)
        P = flow.calculus.P(end.nu_now, max(0.0, end.t - 0.5))
        H = cubic.hessian(w.numpy())
        return 2 * (U.T @ P.apply(U)).numpy() - U.numpy().T @ H @ U.numpy()

    free, opened = gap(step.end(None)), smat(step.beta @ svec(X))
    scale = np.abs(free).max()
    np.testing.assert_allclose(step.gap, free, atol=1e-11 * scale)
    actual = (gap(step.end(X)) - gap(step.end(-X))) / 2
    # without ν the map is linear; with it, the central difference leaves (1e-9 · the ratio of scales of ν, up to 10⁶)²
    allowed = 1e-10 * scale + (0 if flow.calculus.stateless else 1e-4 * np.abs(opened).max())
    np.testing.assert_allclose(actual, opened, atol=allowed)


def test_blocks_agree_with_single_steps():
    """Frames kept over a block against frames made anew at every step: the tolerance is what they may differ by."""
    problem = dvi.problems.digits(network="mlp", loss="mse", n=100, width=16)
    for method in (GradientDescent(0.35), RMSProp(2e-3, 0.95)):
        flow = dvi.central_flow(problem, method, check=False, accuracy="second-order")
        options = {"progress": False, "warm_start": "auto"}
        fine = dvi.solve(flow, 30, integrator=dvi.SemiImplicit(dt=0.5, tol=0), **options)
        blocks = dvi.solve(flow, 30, integrator=dvi.SemiImplicit(dt=0.5, tol=3e-4), **options)
        assert len(fine.X[-1]) >= 1
        assert float((fine.w - blocks.w).norm()) < 30 * 3e-4  # at most some tens of blocks, each within tol
        assert blocks.ledger.per_unit_time(0, 30) < 0.7 * fine.ledger.per_unit_time(0, 30)
        assert np.nanmax(blocks.eigenvalues) < 2.02
        assert np.nanmax(fine.eigenvalues) < 2.02


def test_leading_order_drift_is_offered_and_crude():
    """accuracy="paper" with momentum is −Q₁P⁻¹(g + …): twenty times further from the optimizer than the state."""
    cubic, w = bowl(5)
    method = HeavyBall(0.01, 0.9)
    there = optimizer(cubic, w, method, 60)[-1]
    leading = dvi.solve(
        dvi.stable_flow(cubic.problem(w), method, accuracy="paper"),
        60,
        integrator=dvi.RungeKutta(4, h=0.1),
        progress=False,
    )
    state = stable(cubic, w, method, 60, 0.25)
    assert np.linalg.norm(leading.w.numpy() - there) > 20 * np.linalg.norm(state.w.numpy() - there)


# ---- what is refused, and what goes on --------------------------------------------------------------------------


def test_integrators_and_flows_that_do_not_go_together():
    cubic, w = bowl(1)
    with pytest.raises(ValueError, match="SemiImplicit"):
        dvi.solve(dvi.central_flow(cubic.problem(w), HeavyBall(0.01)), 3, integrator=dvi.Euler(), progress=False)
    with pytest.raises(ValueError, match="take MacroStep"):
        dvi.solve(
            dvi.central_flow(cubic.problem(w), GradientDescent(0.01)), 3, integrator=dvi.SemiImplicit(), progress=False
        )
    with pytest.raises(ValueError, match="accuracy"):
        dvi.central_flow(cubic.problem(w), GradientDescent(0.01), accuracy="third")
    for bad in ({"dt": 0.0}, {"dt": 2.0}, {"tol": -1.0}, {"h_max": 0.1}, {"budget": 0.0}):
        with pytest.raises(ValueError, match="SemiImplicit"):
            dvi.SemiImplicit(**bad)
    # as the first argument of MacroStep it would be the tolerance, and as that of Euler the step
    with pytest.raises(TypeError, match=r"SemiImplicit\(dt=0.001\) or SemiImplicit\(tol=0.001\)"):
        dvi.SemiImplicit(1e-3)
    assert list(inspect.signature(dvi.SemiImplicit).parameters)[:2] == ["dt", "tol"]


def test_a_semi_implicit_run_ends_when_it_exceeds_its_budget():
    cubic, w = bowl(2)
    flow = dvi.central_flow(cubic.problem(w), HeavyBall(0.02, 0.8))
    free = dvi.solve(flow, 60, progress=False)
    cost = free.ledger.per_unit_time()
    assert dvi.solve(flow, 60, progress=False, integrator=dvi.SemiImplicit(budget=3 * cost)).t[-1] == 60
    few = dvi.solve(flow, 60, progress=False, integrator=dvi.SemiImplicit(budget=0.5 * cost), throw=False)
    assert few.status is dvi.Status.OVER_BUDGET
    assert few.t[-1] < 60
    assert any("are allowed" in note for note in few.notes)


def test_a_flow_with_momentum_goes_on_from_its_own_state():
    """Stopped at t = 10 and started again from (w, ν, m): the same to second order in dt."""
    cubic, w = bowl(2)
    for method in (HeavyBall(0.02, 0.8), Nesterov(0.01, 0.8), Adam(0.01, 0.8, 0.9)):
        flow = dvi.stable_flow(cubic.problem(w), method)
        assert flow.inertial
        whole = dvi.solve(flow, 20, progress=False)
        process = dvi.solve(flow, 10, progress=False)
        first = dvi.solve(flow, 10, progress=False, integrator=dvi.SemiImplicit(dt=0.125))
        assert float((process.w - first.w).norm()) < 0.05 * float((first.w - torch.tensor(w)).norm())
        assert whole.status is dvi.Status.SUCCESS


# ---- the central map --------------------------------------------------------------------------------------------


def test_the_map_is_the_optimizer_where_nothing_oscillates():
    problem = dvi.problems.digits(network="mlp", loss="mse", n=60, width=8)
    race = dvi.compare(problem, HeavyBall(0.02, 0.6), 12, runs=("discrete", "map"), progress=False)
    assert len(race.map.X[-1]) == 0
    # both are shown as ¼(w₋ + 2w + w₊); 12 steps of a stable iteration in float64
    assert race.distance["discrete", "map"].max() < 1e-13 * float(problem.w0.norm())
    assert float((race.map.w - race.discrete.w).norm()) < 0.1  # the optimizer's own last iterate
    assert race.about["accuracy"] == "second-order"


def test_the_map_at_the_edge_predicts():
    """From a start just below the edge: closer to the optimizer's average than the stable flow is, by far."""
    problem = dvi.problems.digits(network="mlp", loss="mse", n=100, width=16)
    race = dvi.compare(problem, GradientDescent(0.3), 60, runs=("discrete", "map", "stable"), progress=False)
    assert len(race.map.X[-1]) >= 1
    assert race.distance["discrete", "map"][-1] < 0.4 * race.distance["discrete", "stable"][-1]
    assert np.nanmax(race.map.eigenvalues) < 2.1
    # one gradient a step in the stages, the rest for eigenvectors and third derivatives
    assert race.map.ledger.gradients < 2.5 * 61


def test_the_map_is_made_of_whole_steps():
    cubic, w = bowl(3)
    problem, method = cubic.problem(w), GradientDescent(0.05)
    with pytest.raises(ValueError, match="whole"):
        dvi.compare(problem, method, 4, runs=("map",), save_every=0.5, progress=False)
    with pytest.raises(ValueError, match="dt=1"):
        dvi.solve(dvi.central_map(problem, method), 4, integrator=dvi.SemiImplicit(dt=0.5), progress=False)
    thinned = dvi.compare(problem, method, 9, runs=("discrete", "map"), save_every=2, progress=False)
    assert thinned.t.tolist() == [0, 2, 4, 6, 8, 9]
    assert thinned.distance["discrete", "map"].max() < 1e-12


@pytest.mark.parametrize("runs", [("discrete", "map"), ("discrete", "central", "stable")])
def test_momentum_and_the_map_resume_bit_for_bit(tmp_path, monkeypatch, runs):
    problem = dvi.problems.digits(network="mlp", loss="mse", n=60, width=8)
    method = Adam(2e-3, 0.8, 0.95)
    options = {"runs": runs, "progress": False, "warm_start": 5, "check": False, "checkpoint_every": 0.0}
    whole = dvi.compare(problem, method, 30, **options)

    evaluate, calls = type(problem).value_and_grad, 0

    def interrupted(self, w):
        nonlocal calls
        calls += 1
        if calls == 40:
            raise KeyboardInterrupt
        return evaluate(self, w)

    monkeypatch.setattr(type(problem), "value_and_grad", interrupted)
    with pytest.raises(KeyboardInterrupt):
        dvi.compare(problem, method, 30, path=tmp_path / "race.h5", **options)
    monkeypatch.undo()
    rest = dvi.compare(problem, method, 30, path=tmp_path / "race.h5", resume=True, **options)
    for pair, values in whole.distance.items():
        np.testing.assert_array_equal(rest.distance[pair], values)


def test_momentum_is_warmed_up_before_a_comparison():
    """An empty buffer makes the first steps short, which only a filter with one buffer shares with its flow."""
    problem = dvi.problems.digits(network="mlp", loss="mse", n=60, width=8)
    method = Nesterov(0.01, 0.8)
    race = dvi.compare(problem, method, 20, runs=("discrete", "central"), progress=False)
    assert race.about["warm_start"] == np.ceil(4 * (0.8**2 / 0.2 + 0.5))
    assert any("Warm start" in note for note in race.notes)
    cold = dvi.compare(problem, method, 20, runs=("discrete", "central"), progress=False, warm_start=0)
    assert race.distance["discrete", "central"][-1] < 0.5 * cold.distance["discrete", "central"][-1]


@pytest.mark.parametrize("make", [dvi.stable_flow, dvi.central_flow])
def test_the_loss_is_right_where_momentum_swings_faster_than_steps_are_long(make):
    """Here the cubic through the losses at the ends of steps is up to a fifth of the largest loss away, and below 0."""
    h = torch.tensor([1.0, 0.05], dtype=torch.float64)
    problem = dvi.Problem(lambda w: (h * w * w).sum() / 2, torch.ones(2, dtype=torch.float64))
    flow = make(problem, dvi.methods.HeavyBall(0.3, 0.9))
    run = dvi.solve(flow, 60, eigen_every=0, save=("w",), progress=False)
    loss = run.series["w"] ** 2 @ h.numpy() / 2
    assert np.abs(run.loss - loss).max() < 0.01 * loss.max()


def test_the_optimizer_is_recorded_at_whole_steps_only():
    cubic, w = bowl(3)
    with pytest.raises(ValueError, match="whole"):
        dvi.compare(cubic.problem(w), GradientDescent(0.05), 4, save_every=0.5, progress=False)


@pytest.mark.parametrize("runs", [("discrete", "map"), ("central",)])
def test_longer_runs_of_the_semi_implicit_step(tmp_path, runs):
    """Forty units made sixty by resuming, against sixty at once: bit for bit."""
    problem = dvi.problems.digits(network="mlp", loss="mse", n=60, width=8)
    method = HeavyBall(0.1, 0.5)
    options = {"runs": runs, "progress": False, "warm_start": 5, "check": False}
    dvi.compare(problem, method, 40, path=tmp_path / "race.h5", **options)
    longer = dvi.compare(problem, method, 60, path=tmp_path / "race.h5", resume=True, **options)
    whole = dvi.compare(problem, method, 60, **options)
    for name in runs:
        assert torch.equal(longer.runs[name].w, whole.runs[name].w)
        np.testing.assert_array_equal(longer.runs[name].loss, whole.runs[name].loss)
    # the same work, but for what is done again before the old end
    assert longer.runs[runs[-1]].ledger.gradients == whole.runs[runs[-1]].ledger.gradients
