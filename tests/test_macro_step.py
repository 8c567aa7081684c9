"""What the macro step promises: looks when they are needed, stiff forces, error estimates that are told."""

import re
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pytest
import torch
from conftest import examples, orthogonal
from hypothesis import given
from hypothesis import strategies as st

import dvi
from dvi.methods import GradientDescent, RMSPropNorm
from dvi.problems.exact.edge import MatrixSweep
from dvi.runs.sampling import breakpoints
from dvi.solvers import ccp
from dvi.solvers.budget import Spending
from dvi.solvers.eigen.block_method import Eigenblock
from dvi.solvers.eigen.tracker import EigenTracker, SpectrumEstimate
from dvi.solvers.errors import BudgetError
from dvi.solvers.macro import MacroMemory
from dvi.solvers.macro.model import amplitude
from dvi.solvers.macro.unit import UnitMemory, unit_step
from dvi.solvers.protocol import Frame, State

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


def test_the_next_look_is_made_before_an_eigenvalue_four_times_as_fast_would_arrive():
    """One that rises by 0.05 a unit, looked at twice: it is believed until at 0.2 a unit it would be in the band."""

    class Rising:
        def effective_hessian(self, y):
            values = torch.tensor([1.2 + 0.05 * y.t, 0.3], dtype=torch.float64)
            return lambda V: values[:, None] * V

        def basis(self, y, V):
            return V

    tracker, w = EigenTracker(patience=1e3, survey_every=1e3), torch.zeros(2, dtype=torch.float64)
    seen = tracker.update(Rising(), State(w, {}, 0.0), None, 1.0)
    seen = tracker.update(Rising(), State(w, {}, 2.0), seen, 10.0)
    assert 1.3 + 4 * 0.05 * (seen.until - 2.0) == pytest.approx(2.0 - tracker.band)


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
    solution = run(flow, make(watch=EigenTracker(survey_every=60)), 65)
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
    seen = SpectrumEstimate(block, np.zeros(2), 0.0, 0.0)

    class Moved:
        def effective_hessian(self, y):
            return lambda V: A @ V

        def basis(self, y, V):
            return V

    found = EigenTracker().update(Moved(), State(Q[0], {}, 1.0), seen, 1.0)
    assert found.eigenvalues[0] == pytest.approx(1.0, abs=0.05)


# ---- where the force of oscillations is stiff -----------------------------------------------------------------


def stiff_problem(q, slope, start):
    """L = −y + ½(y + Σqz²)x² − Σbz: at the edge σ² = 2, z goes to b/2q, at the rate ηqσ² were y free to follow."""
    q, slope, start = (torch.tensor(x, dtype=torch.float64) for x in (q, slope, start))

    def loss(w):
        x, y, z = w[0], w[1], w[2:]
        return -y + 0.5 * (y + (q * z**2).sum()) * x**2 - (slope * z).sum()

    rest = slope / (2 * q)
    w0 = torch.cat([torch.tensor([0.0, 3.0], dtype=torch.float64), rest * start])
    return dvi.central_flow(dvi.Problem(loss, w0), GradientDescent(LR), check=False), rest


@pytest.mark.parametrize(
    ("q", "slope", "start"),
    [([40.0], [2.0], [0.5]), ([5.9, 49.7], [2.8, 2.2], [1.2, 1.0])],
)
def test_a_stiff_force_is_passed_at_a_bounded_cost(q, slope, start):
    """The force pulls back at 40 per unit time and more; 0.3 of the amplitude √2 is the tolerance."""
    flow, rest = stiff_problem(q, slope, start)
    solution = run(flow, dvi.MacroStep(budget=150), 30)
    exact = run(flow, dvi.MacroStep(1e-3), 12)  # at rest by then, in hundreds of steps
    np.testing.assert_allclose(exact.w[2:], rest, atol=1e-3)
    np.testing.assert_allclose(solution.w[2:], rest, atol=0.3 * 2**0.5)
    assert solution.ledger.per_unit_time() < 0.3 * exact.ledger.per_unit_time()
    (note,) = [note for note in solution.notes if "steps of one unit" in note]
    (first, _), *_ = stretches = solution.about["unit_steps"]
    assert 0 < first < 30
    largest, middle = (float(x) for x in re.findall(r"at most (\d[\d.]*\d)", note))
    inside = [i for i, t in enumerate(solution.t) if any(start + 1 < t < end - 1 for start, end in stretches)]
    assert largest >= solution.eigenvalues[inside].max() - 0.01  # those are interpolated between steps
    assert 2 - 0.2 < middle <= largest
    spans = [patch for patch in solution.plot().axes[0].patches if patch.get_x() == pytest.approx(first)]
    assert spans  # shaded in the picture
    assert not any("steps of one unit" in note for note in exact.notes)


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


@pytest.mark.parametrize("r", [10.0, 30.0])
def test_an_eigenvector_that_turns_fast_is_followed_at_a_bounded_cost(r):
    """It pulls back at 11 and at 100 per unit time."""
    problem = Turning(r, 0.2, 1.0, 2.0)
    solution = run(problem.flow, dvi.MacroStep(), 30)
    assert solution.ledger.per_unit_time() < 100
    # within what the tolerance, 0.3 of the amplitude, says
    assert float(solution.w[3]) == pytest.approx(problem.z, abs=0.3 * (problem.lr * problem.X) ** 0.5)


def test_a_unit_step_averages_third_derivatives():
    """T̄ = ½ (T + R T̄): on the slide, from a frame of the opposite sign, and twice the T, the mean is 3/2 T."""
    problem = dvi.problems.Circle(entry=0.3)
    flow = dvi.central_flow(problem.problem, GradientDescent(problem.lr), check=False)
    y = State(problem.weights(1.0), {}, 1.0)
    tracker = EigenTracker()
    now = tracker.update(flow, y, None, 1.0)
    frame = now.frame(flow, y, 1)
    turned = replace(frame, U=-frame.U, T=2 * frame.T)
    memory = UnitMemory(now, turned, np.zeros((1, 1)), 0.0, 10.0)
    end, after, seen = unit_step(flow, tracker, memory, y, 5.0)
    assert end.t == 2.0
    torch.testing.assert_close(after.frame.T, 1.5 * frame.T)
    lin = flow.linearised(y, seen.g, after.frame)
    # complementarity at the end of the step, to first order
    S = lin.gap + lin.beta @ seen.X - lin.alpha
    assert seen.X[0, 0] > 0
    np.testing.assert_allclose(S, 0.0, atol=1e-10)
    torch.testing.assert_close(end.w, y.w + lin.drift(seen.X).w)


def test_a_unit_step_with_a_direction_below_the_edge_has_a_solution():
    """RMSProp-Norm on a quadratic loss: with H times eigenvectors of unlike eigenvalues β is not monotone."""
    lr, sharp = 0.5, torch.tensor([8.0, 7.9, 1.0, 0.5, 0.1], dtype=torch.float64)
    problem = dvi.Problem(lambda w: 0.5 * (sharp * w**2).sum(), 1e-2 * torch.ones(5, dtype=torch.float64))
    flow = dvi.central_flow(problem, RMSPropNorm(lr, 0.9), check=False)
    y = State(problem.w0, {"v": torch.tensor((lr * 8.0 / 2) ** 2, dtype=torch.float64)}, 0.0)
    tracker = EigenTracker()
    now = tracker.update(flow, y, None, 1.0)
    frame = now.frame(flow, y, 2)
    lin = flow.linearised(y, flow.value_and_grad(y)[1], frame)
    with pytest.raises(dvi.CCPError, match="not monotone"):
        ccp.solve(lin.alpha - lin.gap, lin.beta)
    end, _, seen = unit_step(flow, tracker, UnitMemory(now, frame, np.zeros((2, 2)), 10.0, 10.0), y, 1.0)
    assert len(seen.X) == 2
    # ν is held where the largest eigenvalue is 2, to the second order of a step of it: 0.1 of its rate of 0.1
    assert float(end.nu["v"]) == pytest.approx((lr * 8.0 / 2) ** 2, rel=1e-2)


# ---- tolerance and budget -------------------------------------------------------------------------------------


def test_the_tolerance_follows_the_oscillation_and_an_explicit_one_stays():
    default, fixed = dvi.MacroStep(), dvi.MacroStep(1e-4)
    for size, tol in ((0.0, 1e-3), (0.1, 0.03), (100.0, 1.0)):
        memory = MacroMemory(0.25, amplitude=size)
        assert default.tolerance(memory) == pytest.approx(tol)
        assert fixed.tolerance(memory) == 1e-4
        # eigenvectors follow its root, but are never rougher than the band below 2
        assert default.tracker(tol).subspace.tol == pytest.approx(min(0.05, 3e-3 * (tol / 1e-3) ** 0.5))
    assert MacroMemory(1.0, amplitude=0.2).amplitude_with(0.0) == pytest.approx(0.1)  # halved where nothing oscillates
    assert MacroMemory(1.0).amplitude_with(0.3) == 0.3


def test_the_amplitude_is_the_root_of_the_trace():
    rng = np.random.default_rng(0)
    U, X = torch.tensor(rng.normal(size=(7, 2))), np.diag([2.0, 0.5])
    frame = Frame(U[:, 0], U, U, X, torch.zeros(3, 7))
    Sigma = U.numpy() @ X @ U.numpy().T
    assert amplitude(X, frame) == pytest.approx(np.trace(Sigma) ** 0.5)


def test_what_exceeds_the_budget_goes_to_unit_steps_and_then_ends_in_words():
    problem = MatrixSweep([1.0, 1.3], [0.3, 0.4], lr=0.5, seed=4)
    flow = dvi.central_flow(problem.problem, GradientDescent(problem.lr), check=False)
    # with tol given only the budget leads to unit steps
    free = run(flow, dvi.MacroStep(1e-3, budget=np.inf), 60)
    assert not any("steps of one unit" in note for note in free.notes)
    few = run(flow, dvi.MacroStep(1e-3, budget=1.0), 60, throw=False)  # 20 gradients: not enough for the first look
    assert few.status is dvi.Status.OVER_BUDGET
    assert any("budget=1 are allowed" in note for note in few.notes)
    assert few.t[-1] <= 41  # it ends with the first step beyond t = 40, which is not kept
    # with tol given there is no bound, unless it is asked for
    assert (dvi.MacroStep().limit, dvi.MacroStep(1e-5).limit, dvi.MacroStep(1e-5, budget=7).limit) == (100, np.inf, 7)
    with pytest.raises(ValueError, match="a budget is positive"):
        dvi.MacroStep(budget=0.0)


def test_a_run_ends_when_it_has_exceeded_its_budget_for_forty_units():
    """Unit steps here begin since the force is stiff, cost 15 to 30 a unit, and longer steps many times that."""
    flow, _ = stiff_problem([40.0], [2.0], [0.5])
    solution = run(flow, dvi.MacroStep(budget=12.0), 80, throw=False)
    assert solution.status is dvi.Status.OVER_BUDGET
    assert 40 <= solution.t[-1] <= 61
    assert any("budget=12 are allowed" in note for note in solution.notes)


def on_the_slide():
    """A flow with one direction at the edge, a state there, and the memory of unit steps that go on until t = 40."""
    problem = dvi.problems.Circle(entry=0.3)
    flow = dvi.central_flow(problem.problem, GradientDescent(problem.lr), check=False)
    y = State(problem.weights(1.0), {}, 1.0)
    now = EigenTracker().update(flow, y, None, 1.0)
    unit = UnitMemory(now, now.frame(flow, y, 1), np.zeros((1, 1)), begin=0.0, until=40.0)
    return flow, y, MacroMemory(1.0, amplitude=1.0, unit=unit)


def test_unit_steps_that_exceed_the_budget_give_way_to_longer_ones():
    flow, y, memory = on_the_slide()
    dear = replace(memory, spent=Spending().after(1.0, 2001.0))
    macro = dvi.MacroStep()
    first = macro.step(flow, dear, y, 30.0)
    assert first.unit
    assert first.memory.unit.until == first.y.t == 2.0
    second = macro.step(flow, first.memory, first.y, 30.0)
    assert second.unit
    assert second.memory.unit is None
    third = macro.step(flow, second.memory, second.y, 30.0)
    assert not third.unit
    # two updates behind steps that resolve too little would lead to unit steps, but not where these have given way
    accepted = macro.step(flow, replace(third.memory, needless=2, h=0.01), third.y, 30.0)
    assert not accepted.unit
    assert accepted.memory.unit is None
    # within the budget nothing of this happens
    assert macro.step(flow, memory, y, 30.0).memory.unit.until == 40.0


def test_longer_steps_that_exceed_the_budget_give_way_to_unit_steps():
    flow, y, memory = on_the_slide()
    macro = dvi.MacroStep()
    dear = Spending().after(0.9, 2001.0)
    assert macro.step(flow, replace(memory, unit=None, spent=dear), y, 1.0).memory.unit is not None
    # what unit steps have spent until they ended at t = 0.95 does not count against longer ones
    assert macro.step(flow, replace(memory, unit=None, spent=dear, left=(0.95, 15.0)), y, 1.0).memory.unit is None


def test_what_exceeds_the_budget_for_two_windows_ends_the_run():
    flow, y, memory = on_the_slide()
    macro = dvi.MacroStep()
    dear = Spending().after(1.0, 2001.0)
    for unit in (memory.unit, None):
        with pytest.raises(BudgetError, match="budget=100 are allowed"):
            macro.step(flow, replace(memory, unit=unit, over=-38.9, spent=dear), y, 1.0)
        assert macro.step(flow, replace(memory, unit=unit, over=-37.0, spent=dear), y, 1.0).memory.over == -37.0
        assert macro.step(flow, replace(memory, unit=unit, over=-37.0), y, 1.0).memory.over is None


def test_a_unit_step_is_halved_where_the_sharpness_is_too_high_and_still_rises():
    flow, y, memory = on_the_slide()
    above = State(y.w * 1.15**0.5, {}, 1.0)
    high = replace(memory.unit.spectrum, block=replace(memory.unit.spectrum.block, eigenvalues=np.array([2.4, 0.0])))
    for last, expected in ((memory.unit.spectrum, 0.5), (high, 1.0)):
        end, _, seen = unit_step(flow, EigenTracker(), replace(memory.unit, spectrum=last), above, 5.0)
        assert seen.eigenvalues[0] == pytest.approx(2.3)
        assert end.t - 1.0 == expected


def test_no_unit_step_is_shorter_than_it_may_be():
    """The sharpness is above 2 by 0.1: too much to lengthen steps, too little to halve them."""
    flow, y, memory = on_the_slide()
    above = State(y.w * 1.05**0.5, {}, 1.0)  # the eigenvalue is |y|², and x = 0
    small = replace(memory.unit, dt=1 / 8)
    for shortest, expected in ((0.0, 1 / 8), (0.5, 0.5)):
        end, after, seen = unit_step(flow, EigenTracker(), small, above, 5.0, shortest)
        assert seen.eigenvalues[0] == pytest.approx(2.1)
        assert (end.t - 1.0, after.dt) == (expected, expected)


@pytest.mark.parametrize("sharpness", [2.1, 4.0])
def test_a_displacement_along_a_critical_direction_decays_in_a_unit_step(sharpness):
    """As in the flow, by exp(−S), up to what the oscillation pushes; Euler's method multiplies it by 1 − S."""
    flow, y, memory = on_the_slide()
    w = y.w * (sharpness / 2) ** 0.5
    w[0] = 1e-3
    end, _, seen = unit_step(flow, EigenTracker(), memory.unit, State(w, {}, 1.0), 1.0, shortest=1.0)
    assert seen.eigenvalues[0] == pytest.approx(sharpness, rel=1e-3)
    assert end.t == 2.0
    assert end.w[0].item() == pytest.approx(1e-3 * np.exp(-sharpness), abs=2.5e-4)


def test_unit_steps_are_not_halved_once_half_the_budget_is_spent():
    flow, y, memory = on_the_slide()
    above = State(y.w * 1.15**0.5, {}, 5.0)  # the sharpness is 2.3 and rises
    for spent, length in ((900.0, 0.5), (1100.0, 1.0)):
        now = replace(memory, spent=Spending().after(3.0, 0.5 * spent).after(5.0, 0.5 * spent))
        assert dvi.MacroStep(budget=100).step(flow, now, above, 9.0).y.t == pytest.approx(5.0 + length)


def test_longer_steps_that_replaced_unit_steps_have_five_units_to_show_what_they_cost():
    flow, y, memory = on_the_slide()
    macro = dvi.MacroStep(budget=100)
    start = replace(memory, unit=None, h=0.5, over=0.5)
    earlier = Spending().after(-1.0, 5000.0)  # the unit steps that gave way at t = 0.5
    for spent, unit in ((400.0, False), (700.0, True)):
        now = replace(start, left=(0.5, 15.0), spent=earlier.after(1.0, spent))
        after = macro.step(flow, now, y, 9.0)
        assert not after.unit
        assert (after.memory.unit is not None) is unit
    first = replace(start, spent=Spending().after(1.0, 1900.0))  # no unit steps before: the whole window is there
    assert macro.step(flow, first, y, 9.0).memory.unit is None


def test_the_cost_is_that_of_the_last_twenty_units():
    spent = Spending()
    for t in range(1, 41):
        spent = spent.after(float(t), 3.0 if t <= 20 else 5.0)
    assert spent.per_unit_time(40.0) == pytest.approx(5.0)
    assert spent.per_unit_time(50.0) == pytest.approx(2.5)
    assert len(spent.steps) <= 21
    assert spent.since(38.0) == pytest.approx(10.0)


# ---- error estimates that cannot be met ---------------------------------------------------------------------


def test_steps_that_could_not_be_short_enough_are_told():
    problem = dvi.problems.digits(network="mlp", loss="mse", n=60, width=8)
    flow = dvi.central_flow(problem, GradientDescent(0.1), check=False)
    solution = run(flow, dvi.MacroStep(1e-7, h_min=0.25), 3, warm_start=3)
    (note,) = [note for note in solution.notes if "as short as allowed" in note]
    above, steps = (int(n) for n in re.search(r"(\d+) of (\d+) steps", note).groups())
    assert 12 <= above <= steps <= 16  # three units in steps of a quarter, the last ones halved to end there
    assert "lower h_min, or loosen tol" in note
    assert not any("as short as allowed" in note for note in run(flow, dvi.MacroStep(1e-3), 3, warm_start=3).notes)


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


def late_riser(w):
    """x is held at the edge from t = 10 on, and nothing else happens until the curvature of y rises about t = 150."""
    x, y, z, u = w
    curvature = 0.5 + 4 * torch.sigmoid((u - 1.5) / 0.06)
    return ((2 + 0.2 * z) * x * x + curvature * y * y) / 2 - 0.05 * z - 0.01 * u


@pytest.mark.parametrize("tol", [None, 1e-2])
def test_a_direction_that_rises_after_a_long_calm_is_held_in_time(tol):
    problem = dvi.Problem(late_riser, torch.tensor([0.0, 0.0, -0.5, 0.0], dtype=torch.float64))
    flow = dvi.central_flow(problem, dvi.methods.GradientDescent(1.0))
    run = dvi.solve(flow, 170, integrator=dvi.MacroStep(tol), eigen_every=0, progress=False)
    arrival = (1.5 + 0.06 * np.log(1.5 / 2.5)) / 0.01  # where 0.5 + 4 sigmoid((0.01 t − 1.5)/0.06) = 2: at t = 146.9
    assert np.nanmax(run.eigenvalues) < 2.01
    assert [k for _, _, k in run.breakpoints] == [1, 2]
    assert run.breakpoints[1][0] == pytest.approx(arrival, abs=3)
    assert not run.notes


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
