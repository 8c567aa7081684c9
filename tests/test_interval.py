"""Between two looks at the eigenvectors: what is foreseen, what is owed, and that waiting saves and does not spoil."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import Distrustful, examples, orthogonal
from hypothesis import given
from hypothesis import strategies as st

import dvi
from dvi.methods import GradientDescent, RMSPropNorm
from dvi.problems import digits
from dvi.problems.exact.edge import MatrixSweep
from dvi.solvers.constants import CONSTANTS
from dvi.solvers.eigen.block_method import Eigenblock
from dvi.solvers.eigen.tracker import EigenTracker, SpectrumEstimate
from dvi.solvers.macro.defect import Corrected
from dvi.solvers.macro.model import Moments, Slope, StepContext, partial_isometry
from dvi.solvers.macro.stage import CONTROLLER
from dvi.solvers.protocol import Frame
from dvi.solvers.svec import skron, svec


def context(frame, spectrum, slope):
    """A model as of its update; loss and gradient do not matter."""
    return StepContext(0.0, frame.w, spectrum, frame, slope=slope)


seeds = st.integers(0, 2**32 - 1)


def symmetric(rng, k):
    A = rng.normal(size=(k, k))
    return A + A.T


def look(T, V, t):
    """A frame whose T is given and a sighting of the vectors V, at the time t; the weights do not matter."""
    k = next(k for k in range(9) if k * (k + 1) // 2 == len(T))
    V = torch.as_tensor(V)
    block = Eigenblock(V, V, np.full(V.shape[1], 2.0), np.zeros(V.shape[1]))
    frame = Frame(V[:, 0], V[:, :k], V[:, :k], np.eye(k), torch.as_tensor(T))
    return frame, SpectrumEstimate(block, np.zeros(V.shape[1]), t, t)


# ---- what is owed ---------------------------------------------------------------------------------------------


@given(seeds, st.integers(1, 3), st.integers(1, 4))
@examples(30)
def test_what_is_owed_makes_up_for_a_bend_of_T_exactly(seed, k, pieces):
    """T quadratic in time, X constant on each of some steps: used slopes + the bend at the end = ∫ T[X] dt."""
    rng = np.random.default_rng(seed)
    d, n = 5, k * (k + 1) // 2
    c0, c1, c2 = rng.normal(size=(3, n, d))

    def T(s):
        return c0 + s * c1 + s * s * c2

    V = orthogonal(rng, d)[:, : k + 1]
    a = rng.uniform(0.5, 2)
    old, new = look(T(-a), V, -a), look(T(0.0), V, 0.0)
    slope = Slope.between(*old, *new)
    edges = np.r_[0.0, np.cumsum(rng.uniform(0.1, 0.5, pieces))]
    owed, used, exact = Moments.none(k), np.zeros(d), np.zeros(d)
    for s, end in pairwise(edges):
        X, h = symmetric(rng, k), end - s
        owed = owed.after(X, s, h)
        used += h * svec(X) @ context(*new, slope).ahead(s + h / 2).T.numpy()
        nodes, weights = np.polynomial.legendre.leggauss(3)
        for node, weight in zip(nodes, weights, strict=True):
            exact += 0.5 * h * weight * svec(X) @ T(s + 0.5 * h * (1 + node))
    H = edges[-1]
    late = T(H) - context(*new, slope).ahead(H).T.numpy()
    np.testing.assert_allclose(used + svec(owed.bent(H, slope)) @ late, exact, rtol=1e-11, atol=1e-11)


@given(seeds, st.integers(1, 3))
@examples(15)
def test_without_a_slope_T_is_linear(seed, k):
    rng = np.random.default_rng(seed)
    c0, c1 = rng.normal(size=(2, k * (k + 1) // 2, 4))
    X, H = symmetric(rng, k), rng.uniform(0.5, 3)
    owed = Moments.none(k).after(X, 0.0, H)
    exact = svec(X) @ (H * c0 + 0.5 * H**2 * c1)
    np.testing.assert_allclose(H * svec(X) @ c0 + svec(owed.bent(H, None)) @ (H * c1), exact, rtol=1e-12, atol=1e-12)


# ---- what is foreseen -----------------------------------------------------------------------------------------


@given(seeds)
@examples(20)
def test_slopes_do_not_depend_on_how_eigenvectors_are_turned(seed):
    """The old frame in any basis of its span: T moves along with it, and its slope is the same."""
    rng = np.random.default_rng(seed)
    k, d = 3, 8
    V = orthogonal(rng, d)[:, : k + 1]
    T, dT = rng.normal(size=(2, k * (k + 1) // 2, d))
    Q = orthogonal(rng, k)
    turned = np.column_stack([V[:, :k] @ Q, V[:, k]])
    old, new = look(skron(Q.T) @ (T - 0.5 * dT), turned, 1.0), look(T, V, 1.5)
    slope = Slope.between(*old, *new)
    np.testing.assert_allclose(slope.T, dT, atol=1e-12)
    np.testing.assert_allclose(slope.V, 0.0, atol=1e-12)
    np.testing.assert_allclose(context(*new, slope).ahead(0.25).T, T + 0.25 * dT, atol=1e-12)
    assert slope.span == 0.5
    assert Slope.between(*new, *new) is None  # no time in between


def test_a_new_direction_has_no_slope_and_an_old_one_keeps_its_own():
    rng = np.random.default_rng(0)
    V = orthogonal(rng, 6)
    T1, dT = rng.normal(size=(2, 1, 6)) * [[[1.0]], [[0.05]]]
    T = np.vstack([T1 + dT, rng.normal(size=(2, 6))])  # pairs (1,1), (1,2), (2,2)
    slope = Slope.between(*look(T1, V[:, :1], 0.0), *look(T, V[:, :2], 1.0))
    np.testing.assert_allclose(slope.T[:1], dT, atol=1e-12)
    np.testing.assert_allclose(slope.T[1:], 0.0, atol=1e-12)
    back = Slope.between(*look(T, V[:, :2], 0.0), *look(T1, V[:, :1], 1.0))  # and the other way round
    np.testing.assert_allclose(back.T, T1 - T[:1], atol=1e-12)
    # where there is no slope T is off linearly, and that much is owed; there is no waiting while much oscillates there
    X = np.diag([2.0, 1.0])
    owed = Moments.none(2).after(X, 0.0, 3.0)
    known, new = np.diag([1.0, 0.0]), np.diag([0.0, 1.0])
    np.testing.assert_allclose(slope.known, known, atol=1e-12)
    expected = known * (owed.second + slope.span * owed.first) / (3 * (3 + slope.span)) + new * owed.first / 3
    np.testing.assert_allclose(owed.bent(3.0, slope), expected, atol=1e-12)
    assert not slope.covers(X)
    assert slope.covers(np.diag([2.0, 0.2]))


def test_slopes_are_not_believed_for_ever():
    V = orthogonal(np.random.default_rng(1), 5)[:, :2]
    small = torch.tensor([[np.cos(0.1), -np.sin(0.1)], [np.sin(0.1), np.cos(0.1)]])
    old, new = look(np.zeros((1, 5)), V @ small.numpy(), 0.0), look(np.ones((1, 5)), V, 1.0)
    slope = Slope.between(*old, *new)
    assert torch.equal(context(*new, slope).ahead(100.0).T, context(*new, slope).ahead(3.0).T)
    assert torch.equal(context(*new, slope).vectors_ahead(101.0), context(*new, slope).vectors_ahead(4.0))
    assert context(*new, None).ahead(1.0) is new[0]
    assert context(*new, None).vectors_ahead(2.0) is None


@given(seeds, st.integers(1, 4), st.integers(1, 4))
@examples(20)
def test_a_partial_isometry_turns_what_is_shared_and_drops_the_rest(seed, m, k):
    rng = np.random.default_rng(seed)
    Q = orthogonal(rng, 6)
    R = partial_isometry(Q[:m, :k] * 0.4)  # nothing is shared by half
    assert np.array_equal(R, np.zeros((m, k)))
    whole = partial_isometry(Q[:k] @ Q.T[:, :k] + 0.01 * rng.normal(size=(k, k)))
    np.testing.assert_allclose(whole @ whole.T, np.eye(k), atol=1e-12)


def test_an_interval_is_as_long_as_the_defect_of_the_last_one_allows():
    """Defects of order h³ against a tolerance of tol √h, and what is below a gap's tolerance counts for nothing."""
    y, X, tol = None, np.eye(1), 1e-3
    at = Corrected(y, X, bend=tol)
    assert at.ratio(tol) == pytest.approx(1)
    assert CONTROLLER.factor(32 * at.ratio(tol)) == pytest.approx(max(CONSTANTS.safety / 4, CONSTANTS.change[0]))
    assert CONTROLLER.factor(at.ratio(tol) / 4, 10) / CONTROLLER.factor(at.ratio(tol), 10) == pytest.approx(4**0.4)
    assert Corrected(y, X, slip=3 * tol, bend=tol).ratio(tol) == pytest.approx(3)
    assert Corrected(y, X, sag=2 * CONSTANTS.sag).ratio(tol) == pytest.approx(2)
    assert CONTROLLER.factor(0.0) == CONSTANTS.change[1]
    assert CONTROLLER.factor(0.0, CONSTANTS.believed) == CONSTANTS.believed


# ---- that waiting saves and does not spoil ---------------------------------------------------------------------


def run(flow, steps, tol=1e-3, **options):
    return dvi.solve(flow, steps, integrator=dvi.MacroStep(tol), save=("w",), progress=False, **options)


@pytest.mark.parametrize(
    ("n", "width", "method", "steps"),
    [
        (100, 16, GradientDescent(0.2), 160),
        (100, 12, RMSPropNorm(0.1, 0.99, eps=1e-8, bias_correction=True), 200),
    ],
)
def test_fewer_looks_at_the_same_error(n, width, method, steps):
    problem = digits(network="mlp", loss="mse", n=n, width=width)
    flow = dvi.central_flow(problem, method, check=False)
    waited = run(flow, steps, warm_start="auto")
    always = dvi.MacroStep(1e-3, watch=Distrustful.like(dvi.MacroStep(1e-3).tracker(1e-3)))
    looked = dvi.solve(flow, steps, integrator=always, save=("w",), progress=False, warm_start="auto")
    fine = run(flow, steps, tol=1e-4, warm_start="auto")
    assert max(k for _, _, k in fine.breakpoints) == 2

    def error(solution):
        return np.linalg.norm(solution.series["w"] - fine.series["w"], axis=1).max()

    def spent(solution, kind):
        return solution.ledger.counts[-1][kind]

    assert spent(waited, "third_derivatives") < 0.8 * spent(looked, "third_derivatives")
    assert spent(waited, "hvps") < 0.9 * spent(looked, "hvps")
    # half of tol √h may be owed at the end of an interval, beside tol √h of the step itself
    assert error(waited) < 1.5 * error(looked) + 1e-3


def test_an_entry_is_seen_while_waiting():
    """k directions arrive one after another, at known times, while others oscillate and nobody looks."""
    problem = MatrixSweep([1.0, 0.6, 0.3], [8.0, 8.5, 9.0], lr=0.2, seed=4)
    flow = dvi.central_flow(problem.problem, GradientDescent(problem.lr), check=False)
    steps = int(max(problem.entry_times) + 20)
    solution = run(flow, steps)
    entered = [t for t, what, _ in solution.breakpoints if what == "enter"]
    assert len(entered) == 3
    np.testing.assert_allclose(entered, sorted(problem.entry_times), atol=1.0)
    exact = np.stack([problem.weights(float(t)).numpy() for t in solution.t])
    # linear between breakpoints: what is left are the three landings, each at most what one step may be off, tol √h_max
    assert np.abs(solution.series["w"] - exact).max() < 3 * 1e-3 * 20**0.5
    assert np.nanmax(solution.eigenvalues) < 2 + CONSTANTS.sag
    steps_taken = len(solution.ledger.t)
    assert solution.ledger.counts[-1]["third_derivatives"] < 6 * steps_taken  # 6 pairs at k = 3, had each step looked


def test_an_eigenvalue_that_is_not_held_ends_the_wait():
    V = torch.eye(4, dtype=torch.float64)[:, :2]
    block = Eigenblock(V, V, np.array([2.0, 1.8]), np.zeros(2))

    class Still:
        def precondition(self, y, U):
            return U

    seen = SpectrumEstimate(block, np.array([0.0, 0.01]), 0.0, 0.0, U=V)
    watch = EigenTracker()
    assert watch.trusted(Still(), None, seen, 1, 5.0)  # 1.8 + 1.5·0.01·5 = 1.875
    assert not watch.trusted(Still(), None, seen, 1, 11.0)  # 1.965, in the band of 0.05
    assert not watch.trusted(Still(), None, seen, 2, 1.0)  # none beyond the held ones is followed
    falling = type("Falling", (), {"precondition": lambda self, y, U: 0.9 * U})()
    assert not watch.trusted(falling, None, seen, 1, 5.0)  # 1.8/0.9 = 2, by P alone
    # P that grew has let λ sink to 1.8/1.25 in the old basis, but its rate, seen as P grew, takes it to 1.965: RMSProp
    # on digits missed an arrival so, since −0.36 < ½(1.95 − 1.965)
    growing = type("Growing", (), {"precondition": lambda self, y, U: 1.25 * U})()
    assert watch.trusted(growing, None, seen, 1, 5.0)
    assert not watch.trusted(growing, None, seen, 1, 11.0)
