"""Schedules as people have them: jumps, tables with one value a step, functions for 0 ≤ t ≤ steps only, mistakes.

On a quadratic loss with H = diag(h) gradient flow is w = exp(−h ∫lr dt), and gradient descent ∏(1 − h lr_t).
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dvi
from dvi.methods import GradientDescent, HeavyBall, RMSProp, Timetable

H = torch.tensor([1.0, 0.3], dtype=torch.float64)
N = 30

TABLES = {
    "decay": [0.4 - 0.01 * t for t in range(N)],
    "warm-up": [0.04 * min(10, t + 1) for t in range(N)],
    "cosine": [0.2 * (1 + math.cos(math.pi * t / N)) + 0.01 for t in range(N)],
    "restarts": [0.2 * (1 + math.cos(math.pi * (t % 10) / 10)) + 0.01 for t in range(N)],
    "StepLR": [0.4 * 0.5 ** (t // 10) for t in range(N)],
    "one value": [0.2] * N,
    "random": np.random.default_rng(0).uniform(0.1, 0.4, N).tolist(),
}


def quadratic() -> dvi.Problem:
    return dvi.Problem(lambda w: 0.5 * (H * w * w).sum(), torch.ones(2, dtype=torch.float64))


def valley() -> dvi.Problem:
    """A loss with a sharp valley: with lr = 0.7 the flow comes to the edge at t = 9."""
    w0 = torch.tensor([1.1, 0.6], dtype=torch.float64)
    return dvi.Problem(lambda w: 0.5 * (w[0] * w[1] - 1) ** 2 + 0.02 * (w[0] - 3) ** 2, w0)


def run(lr, steps=20, integrator=None, make=dvi.central_flow, problem=None, **options):
    flow = make(problem or quadratic(), GradientDescent(lr))
    return dvi.solve(flow, steps, integrator=integrator, progress=False, **options)


def surveyed(method, end) -> Timetable:
    timetable = Timetable(method)
    timetable.survey(0.0, end)
    return timetable


def read(timetable, t, **how) -> float:
    """The learning rate that a flow sees at t in a run."""
    with timetable.stretch(t):
        return float(timetable.at(t, **how).lr)


# ---- how a schedule is read -----------------------------------------------------------------------------------------

JUMPS = {
    "two pieces": (lambda t: 0.5 if t < 10 else 1.5, [10]),
    "the old value at 10 still": (lambda t: 0.5 if t <= 10 else 1.5, [11]),
    "between two steps": (lambda t: 0.5 if t < 9.3 else 1.5, [10]),
    "three in one unit": (lambda t: 0.1 + 0.1 * (t > 9.2) + 0.1 * (t > 9.5) + 0.1 * (t > 9.9), [10]),
    "MultiStepLR": (lambda t: 0.1 * 0.5 ** ((t >= 7) + (t >= 12)), [7, 12]),
    "restarts": (lambda t: 0.2 * (1 + math.cos(math.pi * (t % 6) / 6)) + 0.01, [6, 12, 18]),
    "sawtooth": (lambda t: 0.3 - 0.02 * (t % 5), [5, 10, 15]),
    "smooth": (lambda t: 0.1 + 0.05 * math.sin(t), []),
    "steep, but smooth": (lambda t: 0.1 + 0.1 / (1 + math.exp(-(t - 9.5) / 0.02)), []),
    "a root": (lambda t: 0.1 + math.sqrt(t), []),
    "a kink": (lambda t: 0.1 * min(1.0, (t + 1) / 10), []),
    "a table that falls steadily": (lambda t: 0.4 - 0.01 * int(t), []),
    "a table that halves at every step": (lambda t: 0.5 ** int(t), []),
    "a table with a drop": (lambda t: 0.4 - 0.01 * int(t) - 0.1 * (int(t) >= 8), [8]),
    "a table by rounding": (lambda t: TABLES["StepLR"][round(t)], [10]),
    "a list": (TABLES["restarts"], [10]),
}


@pytest.mark.parametrize("name", JUMPS)
def test_where_a_flow_jumps(name):
    """At the first whole number at which the optimizer sees the new value; tables that change steadily do not jump."""
    lr, expected = JUMPS[name]
    schedule = GradientDescent(lr).schedule("lr", 20.0)
    assert [t for t in range(1, 20) if schedule.jumps(t)] == expected
    for t in expected:
        with pytest.raises(AssertionError):  # a real jump: the sides differ
            assert schedule.value(t, left=True) == pytest.approx(schedule.value(t), rel=0.03)


@pytest.mark.parametrize("second_order", [False, True])
@pytest.mark.parametrize("as_function", [False, True])
@pytest.mark.parametrize("name", TABLES)
def test_a_flow_keeps_the_sum_of_a_table(name, as_function, second_order):
    """∫lr dt from 0 to n is Σ lr_t.  The flow's lr is linear on half units, where the midpoint rule is exact."""
    table = TABLES[name]
    timetable = surveyed(GradientDescent((lambda t: table[int(t)]) if as_function else table), N)
    middles = (np.arange(2 * N) + 0.5) / 2
    integral = 0.0
    for t in middles:
        with timetable.stretch(t):
            integral += 0.5 * timetable.at(timetable.clock(t) if second_order else t, centred=not second_order).lr
    assert integral == pytest.approx(sum(table), rel=1e-13)
    values = [read(timetable, t / 7, centred=True) for t in range(7 * N)]
    assert min(table) <= min(values)
    assert max(values) <= max(table)


@given(st.lists(st.floats(0.01, 1.0), min_size=1, max_size=12))
def test_any_table_keeps_its_sum(table):
    timetable = surveyed(GradientDescent(table), len(table))
    integral = sum(0.5 * read(timetable, (i + 0.5) / 2, centred=True) for i in range(2 * len(table)))
    assert integral == pytest.approx(sum(table), rel=1e-12)


def test_slopes_stay_on_one_side():
    sides = GradientDescent(lambda t: 0.1 + 0.01 * t if t < 10 else 1.0 - 0.02 * t).schedule("lr", 20.0)
    assert sides.slope(10.0, left=True) == pytest.approx(0.01, rel=1e-9)
    assert sides.slope(10.0) == pytest.approx(-0.02, rel=1e-9)
    assert sides.slope(9.9999) == pytest.approx(0.01, rel=1e-9)
    assert sides.slope(20.0) == pytest.approx(-0.02, rel=1e-9)
    kink = GradientDescent(lambda t: 0.1 + 0.01 * min(t, 6.5)).schedule("lr", 20.0)
    assert kink.slope(6.5, left=True) == pytest.approx(0.01, rel=1e-6)
    assert kink.slope(6.5) == pytest.approx(0.0, abs=1e-8)
    root = GradientDescent(lambda t: 0.05 + 0.01 * math.sqrt(20 - t)).schedule("lr", 20.0)
    assert root.slope(10.0) == pytest.approx(-0.005 / 10**0.5, rel=1e-7)


def test_the_slope_of_a_table_is_that_of_the_broken_line():
    timetable = surveyed(GradientDescent(TABLES["decay"]), N)
    dt = torch.zeros((), dtype=torch.float64)
    for t, expected in ((0.2, 0.0), (7.2, -0.01), (20.0, -0.01)):
        method = timetable.moving(t, centred=True)
        value, slope = torch.func.jvp(lambda dt, method=method: method(dt).lr, (dt,), (torch.ones_like(dt),))
        assert float(slope) == pytest.approx(expected, rel=1e-9)
        assert float(value) == pytest.approx(0.4 - 0.01 * max(0.0, t - 0.5), rel=1e-12)


def test_kinks_are_landed_on():
    timetable = surveyed(GradientDescent(lambda t: 0.1 * min(1, (t + 1) / 10) * (1 + math.cos(math.pi * t / 40))), 20.0)
    with timetable.stretch(3.0) as (corner, jump):
        assert (corner, jump) == (9.0, False)
    with surveyed(GradientDescent(lambda t: 0.2 + 0.1 * math.sin(t)), 20.0).stretch(0.0) as (corner, _):
        assert corner == math.inf


# ---- the optimizer --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TABLES)
def test_the_optimizer_uses_the_values_at_whole_steps(name):
    """Against torch.optim.SGD with LambdaLR, for n steps of a table with n values."""
    table, w = TABLES[name], torch.ones(2, dtype=torch.float64, requires_grad=True)
    theirs = torch.optim.SGD([w], 1.0, momentum=0.5)
    scheduler = torch.optim.lr_scheduler.LambdaLR(theirs, lambda t: table[min(t, N - 1)])
    for _ in range(N):
        theirs.zero_grad()
        (0.5 * (H * w * w).sum()).backward()
        theirs.step()
        scheduler.step()
    for lr in (table, tuple(table), np.array(table), torch.tensor(table), lambda t: table[int(t)]):
        ours = dvi.solve(dvi.discrete(quadratic(), HeavyBall(lr, 0.5)), N, progress=False, eigen_every=0)
        exact = 1e-6 if isinstance(lr, torch.Tensor) and lr.dtype == torch.float32 else 1e-12
        assert torch.linalg.vector_norm(ours.w - w.detach()) <= exact


@pytest.mark.parametrize("name", ["decay", "restarts", "random"])
def test_the_central_map_is_the_optimizer_where_nothing_oscillates(name):
    table = TABLES[name]
    for method in (GradientDescent(table), HeavyBall(table, 0.5)):
        ours = dvi.solve(dvi.central_map(quadratic(), method), N, progress=False)
        theirs = dvi.compare(quadratic(), method, N, runs=("discrete",), warm_start=0, progress=False, eigen_every=0)
        again = dvi.compare(quadratic(), method, N, runs=("discrete", "map"), warm_start=0, progress=False)
        assert ours.status is theirs.status is dvi.Status.SUCCESS
        assert again.distance["discrete", "map"].max() <= 1e-13


# ---- every integrator -----------------------------------------------------------------------------------------------

# integrator: (the integrator, the error it is allowed in w at the end: its order, or its tolerance a few steps long)
INTEGRATORS = {
    "macro": (None, 2e-3),
    "macro, sharp": (dvi.MacroStep(tol=1e-6), 2e-5),
    "euler": (dvi.Euler(0.05), 5e-3),
    "euler, steps that do not divide": (dvi.Euler(0.03), 5e-3),
    "rk2": (dvi.RungeKutta(2, tol=1e-5), 2e-4),
    "rk4": (dvi.RungeKutta(4), 5e-6),
    "rk4, fixed": (dvi.RungeKutta(4, h=0.5), 2e-4),
    "torchdiffeq": (dvi.TorchDiffEq(), 5e-6),
}


@pytest.mark.parametrize("make", [dvi.central_flow, dvi.stable_flow])
@pytest.mark.parametrize("name", INTEGRATORS)
def test_every_integrator_lands_on_a_jump(name, make):
    """Up at 4, down at 7 (as the optimizer sees it): before each, the values are those on its left.

    A step across a jump would be off by the jump times a part of a step, about 0.05.
    """
    integrator, allowed = INTEGRATORS[name]
    solution = run(lambda t: 0.3 if t < 4 else 1.2 if t < 6.4 else 0.2, 10, integrator, make, save=("w",))
    integral = np.interp(solution.t, [0, 4, 7, 10], [0, 1.2, 4.8, 5.4])
    exact = np.exp(-H.numpy() * integral[:, None])
    assert solution.status is dvi.Status.SUCCESS
    assert not solution.breakpoints
    assert not solution.notes
    assert list(solution.t) == list(range(11))
    assert np.abs(solution.w.numpy() - exact[-1]).max() <= allowed
    # Between nodes w is interpolated to the integrator's order.
    assert np.abs(solution.series["w"] - exact).max() <= 3 * allowed
    assert solution.series["effective_lr"] == pytest.approx([0.3] * 4 + [1.2] * 3 + [0.2] * 4, rel=1e-9)


@pytest.mark.parametrize("name", ["macro", "rk4", "torchdiffeq"])
@pytest.mark.parametrize("table", ["decay", "restarts"])
def test_every_integrator_keeps_the_sum_of_a_table(name, table):
    integrator, allowed = INTEGRATORS[name]
    values = TABLES[table]
    solution = run(lambda t: values[int(t)], N, integrator)
    assert solution.status is dvi.Status.SUCCESS
    assert not solution.breakpoints
    assert not solution.notes
    # tol a step is not the error of the run: an error made where w is large decays with w, ten steps of it are left
    assert float((solution.w - torch.exp(-H * sum(values))).abs().max()) <= max(10 * allowed, 1e-5)


@pytest.mark.parametrize("accuracy", ["paper", "second-order"])
def test_second_order_jumps_where_the_optimizer_does(accuracy):
    """lr from 0.02 to 0.2 at 10: half a unit too late would be 0.09 h of the exponent."""
    lr = [0.02] * 10 + [0.2] * 10
    flow = dvi.central_flow(quadratic(), GradientDescent(lr), accuracy=accuracy)
    integrator = dvi.SemiImplicit(dt=0.25) if accuracy == "second-order" else dvi.RungeKutta(4)
    solution = dvi.solve(flow, 20, integrator=integrator, progress=False)
    if accuracy == "paper":
        assert float((solution.w - torch.exp(-H * sum(lr))).abs().max()) < 5e-6
        return
    optimizer = math.prod((1 - H * x for x in lr), start=torch.ones(2, dtype=torch.float64))
    # second order: (h lr)²/12 of the exponent h·Σlr = 2.2 for h = 1
    assert float((solution.w / optimizer - 1).abs().max()) < 0.2**2 / 12 * 2.2 * 2


def test_the_stationary_flow_lands_on_a_jump():
    """RMSProp's ν settles at g², so that w falls at the speed lr, whatever the loss: w = 1 − ∫lr."""
    flow = dvi.stationary_flow(quadratic(), RMSProp(lambda t: 0.01 if t < 10.5 else 0.03, 0.9))
    solution = dvi.solve(flow, 20, integrator=dvi.Quasistatic(0.7), progress=False)
    assert solution.status is dvi.Status.SUCCESS
    assert not solution.breakpoints
    assert solution.w.numpy() == pytest.approx(np.full(2, 1 - 0.11 - 0.27), abs=1e-9)


def test_a_schedule_that_is_not_lr():
    """β₂ jumps: RMSProp's ν relaxes with (1 − β₂)/β₂ of its own stretch, here towards a constant g."""
    constant = dvi.Problem(lambda w: w.sum(), torch.zeros(2, dtype=torch.float64))
    method = RMSProp(0.01, lambda t: 0.9 if t < 10 else 0.5)
    solution = dvi.solve(dvi.stable_flow(constant, method), 12, integrator=dvi.RungeKutta(4, h=0.1), progress=False)
    rate = 10 * (0.1 / 0.9) + 2 * (0.5 / 0.5)
    nu = 1 - 0.9 * math.exp(-rate)  # ν after the first update is 0.1
    leaf = torch.utils._pytree.tree_leaves(solution.nu)[0]
    assert leaf.numpy() == pytest.approx(np.full(leaf.shape, nu), abs=1e-6)  # 20 steps of h⁵/120


# ---- at the edge ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("integrator", [None, dvi.Euler(0.25)])
def test_behind_a_fall_nothing_oscillates(integrator):
    solution = run(lambda t: 0.7 if t < 15 else 0.35, 20, integrator, problem=valley())
    assert solution.status is dvi.Status.SUCCESS
    assert not solution.notes
    assert [(kind, k) for _, kind, k in solution.breakpoints] == [("enter", 1), ("leave", 0)]
    assert solution.breakpoints[1][0] == pytest.approx(15)
    trace = solution.series["trace"]
    assert trace[14] > 0
    assert trace[15:].max() == 0
    assert solution.eigenvalues[15, 0] == pytest.approx(1.0, abs=0.02)  # half of 2


@pytest.mark.parametrize("integrator", [None, dvi.Euler(0.25)])
def test_behind_a_rise_at_the_edge_there_is_no_flow(integrator):
    def lr(t):
        return 0.7 if t < 15 else 0.9

    problem = valley()
    with pytest.raises(
        dvi.RunError, match=r"jump of a schedule at t = 15 \(lr from 0\.7 to 0\.9\).* is 2\.5"
    ) as failure:
        run(lr, 25, integrator, problem=problem)
    assert failure.value.status is dvi.Status.INFEASIBLE_START
    solution = failure.value.result
    assert solution.t[-1] == 15
    assert [kind for _, kind, _ in solution.breakpoints] == ["enter"]
    # the two remedies
    start = dvi.State(solution.w, solution.nu, 15)
    again = run(lr, 10, integrator, problem=problem, start=start, warm_start="auto")
    assert again.status is dvi.Status.SUCCESS
    if integrator is None:
        gradual = run(lambda t: 0.7 + 0.2 * min(max(t - 15, 0), 40) / 40, 30, problem=problem)
        assert gradual.status is dvi.Status.SUCCESS


# ---- what a schedule is asked for -----------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["central", "stable", "second-order", "map", "discrete", "rk4", "torchdiffeq", "euler"])
def test_a_schedule_is_asked_for_the_times_of_the_run_only(how):
    asked = []

    def lr(t):
        asked.append(float(t))
        return 0.05 + 0.01 * math.sqrt(t) * math.sqrt(6 - t)  # fails outside 0 ≤ t ≤ 6

    method, integrator = GradientDescent(lr), None
    if how == "discrete":
        flow = dvi.discrete(quadratic(), method)
    elif how == "map":
        flow = dvi.central_map(quadratic(), method)
    elif how == "stable":
        flow = dvi.stable_flow(quadratic(), method)
    else:
        flow = dvi.central_flow(quadratic(), method, accuracy="second-order" if how == "second-order" else "paper")
        integrator = INTEGRATORS[how][0] if how in INTEGRATORS else None
    assert dvi.solve(flow, 6, integrator=integrator, progress=False).status is dvi.Status.SUCCESS
    assert min(asked) == 0
    assert max(asked) == 6


def test_a_function_without_a_value_at_the_end():
    """1/(10 − t) on 0 ≤ t < 4, a table in between, both with their last values at the end."""

    def lr(t):
        if not 0 <= t < 4:
            raise LookupError("no such step")
        return 1 / (10 - t)

    solution = run(lr, 4, dvi.RungeKutta(4))
    assert float((solution.w - torch.exp(-H * math.log(10 / 6))).abs().max()) < 5e-6
    assert solution.series["effective_lr"][-1] == pytest.approx(1 / 6, rel=1e-9)


def test_a_warm_start_moves_the_clock():
    """Five steps of gradient descent by lr_0 … lr_4, then the flow from t = 5 on."""
    table = [0.3] * 8 + [0.1] * 7
    flow = dvi.central_flow(quadratic(), GradientDescent(table))
    solution = dvi.solve(flow, 10, warm_start=5, integrator=dvi.RungeKutta(4), progress=False)
    exact = (1 - 0.3 * H) ** 5 * torch.exp(-H * (3 * 0.3 + 7 * 0.1))
    assert float((solution.w - exact).abs().max()) < 5e-6
    assert solution.series["effective_lr"] == pytest.approx([0.3] * 3 + [0.1] * 8, rel=1e-9)
    with pytest.raises(dvi.SpecError, match=r"lr=….*at t = 15 .*IndexError.*15 values.*from t = 5 to 16"):
        dvi.solve(flow, 11, warm_start=5, progress=False)


def test_a_longer_run_with_a_table_goes_on_to_the_same_result(tmp_path):
    """The end of the first run asks for no value of the table beyond; what depended on that is computed again."""
    table, options = TABLES["restarts"], {"runs": ("discrete", "central"), "progress": False, "check": False}
    method = GradientDescent(table)
    dvi.compare(quadratic(), method, 10, path=tmp_path / "race.h5", **options)
    longer = dvi.compare(quadratic(), method, 20, path=tmp_path / "race.h5", resume=True, **options)
    whole = dvi.compare(quadratic(), method, 20, **options)
    for name in options["runs"]:
        assert torch.equal(longer.runs[name].w, whole.runs[name].w)
        assert np.array_equal(longer.runs[name].loss, whole.runs[name].loss)


# ---- what is refused ------------------------------------------------------------------------------------------------


def refused_at(limit, error):
    def lr(t):
        if t > limit:
            raise error
        return 0.1

    return lr


DRAWN = np.random.default_rng(1)
WRONG = {
    "raises": (refused_at(7.5, RuntimeError("boom")), r"lr=….*at t = 8 it raised RuntimeError: boom.*t = 0 to 20"),
    "raises what is no Exception of ours": (refused_at(3, OSError("no file")), r"lr=….*at t = 4 it raised OSError"),
    "a dict": (lambda t: {0: 0.1}[t], r"lr=….*at t = 1 it raised KeyError"),
    "a list by a number": (lambda t: TABLES["decay"][t], r"lr=….*at t = 0 .*TypeError.*lr=\[…\]"),
    "too short a table": ([0.1] * 15, r"lr=….*at t = 15 .*15 values"),
    "NaN": (lambda t: 0.1 if t < 5 else math.nan, r"lr=….*at t = 5 it gave nan"),
    "None": (lambda t: None if t > 2 else 0.1, r"lr=….*at t = 3 .*None"),
    "text": (lambda t: "0.1", r"lr=….*at t = 0 .*is text"),
    "negative": (lambda t: 0.1 - 0.01 * t, r"at t = 10: lr must be positive"),
    "random": (lambda t: DRAWN.uniform(0.1, 0.2), r"lr=….*two values at t = 0.*random"),
    "random later": (lambda t: 0.1 if t < 5 else DRAWN.uniform(0.1, 0.2), r"lr=….*two values at t = 5"),
    "an empty table": ([], r"lr=….*empty"),
    "a table of words": (["fast"], r"lr=….*made of numbers"),
    "a matrix": (np.ones((2, 2)), "lr must be a number or a schedule"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_schedule_is_refused_before_the_run(name):
    lr, words = WRONG[name]
    with pytest.raises(dvi.SpecError, match=words):
        run(lr)


def test_a_run_whose_schedule_fails_midway_keeps_what_was_computed():
    def lr(t):
        if 7.19 < t < 7.21:  # seen by Euler's steps of 0.1, not when the run starts
            raise ArithmeticError("not here")
        return 0.1 + 0.001 * t

    with pytest.raises(dvi.RunError, match=r"lr=….*at t = 7\.2 it raised ArithmeticError: not here") as failure:
        run(lr, 20, dvi.Euler(0.1))
    assert failure.value.status is dvi.Status.SCHEDULE
    assert list(failure.value.result.t) == list(range(8))


def test_scalars_of_other_libraries_are_numbers():
    for value in (np.float32(0.25), np.array(0.25), torch.tensor(0.25), np.int64(1)):
        assert run(lambda t, value=value: value, 2).status is dvi.Status.SUCCESS


def test_a_sequence_that_is_no_hyperparameter_is_left_alone():
    class Two(dvi.Method):
        betas: tuple[float, float] = (0.5, 0.9)
        lr: float = 0.1

        def P(self, nu):
            return dvi.Scalar(1 / torch.tensor(self.lr * self.betas[0], dtype=torch.float64))

    assert Two().betas == (0.5, 0.9)
    assert Two().scheduled == ()
    assert Two(lr=[0.1, 0.2]).scheduled == ("lr",)
