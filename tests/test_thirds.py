"""Third derivatives along the axes of the oscillation alone, and what they leave to extrapolation."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import examples, orthogonal
from hypothesis import given
from hypothesis import strategies as st

import dvi
from dvi.methods import GradientDescent
from dvi.problems import digits
from dvi.problems.exact.edge import MatrixSweep
from dvi.solvers.macro import refresh
from dvi.solvers.macro.model import Slope, StepContext, Taken, third_derivatives
from dvi.solvers.protocol import Frame
from dvi.solvers.svec import skron, svec

seeds = st.integers(0, 10_000)
F64 = torch.float64


def axes_of(k, seen, context, R, X):
    return refresh._axes(k, seen, context, R, R @ X @ R.T)


def nearest(T, axes, squares):
    """The T nearest to a given one, with the true T[q, q] of a flow that knows no others."""

    class Known:
        def third_derivatives(self, y, U, squares):
            return known

    known = squares
    frame = Frame(torch.zeros(1), torch.eye(len(axes), dtype=F64), None, None, None)
    return third_derivatives(Known(), None, frame, T, axes)


def along(Q, T):
    """T[q, q] for the columns q of Q, from all of T [n, d]."""
    return torch.tensor(np.stack([svec(np.outer(q, q)) @ T for q in Q.T]))


@pytest.mark.parametrize("derivatives", ["autodiff", "mixed", "finite-difference"])
def test_squares_are_the_diagonal_of_all_pairs(derivatives):
    problem = digits(n=30, width=4, derivatives=derivatives)
    U = torch.zeros(problem.dim, 3, dtype=F64)  # columns of length 1 to the last bit: nothing rounds in scaling them
    for i, column in enumerate(U.T):
        column[torch.randperm(problem.dim, generator=torch.Generator().manual_seed(i))[:4]] = 0.5
    before = problem.ledger.counts["third_derivatives"]
    squares = problem.hessian_gradient(problem.w0, U, squares=True)
    assert problem.ledger.counts["third_derivatives"] - before == 3
    rows = problem.hessian_gradient(problem.w0, U)[[0, 3, 5]]
    # the same operations in both
    torch.testing.assert_close(squares, rows, rtol=1e-10, atol=1e-10 * float(rows.abs().max()))


@given(seeds, st.integers(2, 5))
@examples(30)
def test_the_nearest_T_pushes_as_the_true_one_and_is_left_alone_aside(seed, k):
    rng = np.random.default_rng(seed)
    n, d = k * (k + 1) // 2, 7
    guess, true = rng.normal(size=(2, n, d))
    Q = orthogonal(rng, k)
    X = Q @ np.diag(rng.uniform(size=k)) @ Q.T
    T = nearest(torch.tensor(guess), Q, along(Q, true)).numpy()
    np.testing.assert_allclose(svec(X) @ T, svec(X) @ true, atol=1e-13)  # T[X], what moves w, is exact
    turned = skron(Q.T) @ (T - guess)  # in the basis of the axes
    off_diagonal = svec(np.ones((k, k)) - np.eye(k)) > 0
    np.testing.assert_allclose(turned[off_diagonal], 0.0, atol=1e-13)


@given(seeds, st.integers(2, 4))
@examples(30)
def test_a_slope_is_counted_from_when_all_were_taken(seed, k):
    """T linear in time, its slope not known at first: after a look along the axes only, a whole one finds it."""
    rng = np.random.default_rng(seed)
    n, d = k * (k + 1) // 2, 5
    T0, dT = rng.normal(size=(2, n, d))
    Q, R = orthogonal(rng, k), orthogonal(rng, k)
    whole, partly, now = 0.0, *np.cumsum(rng.uniform(0.5, 2, 2))
    known = nearest(torch.tensor(T0), Q, along(Q, T0 + partly * dT)).numpy()  # foreseen without a slope
    naive = (skron(R) @ (T0 + now * dT - known)) / (now - partly)

    def slope(T):
        return Slope(torch.tensor(T), torch.zeros(d, k), 1.0, np.eye(k))

    seen = type("Seen", (), {"t": partly})()
    here = StepContext(0.0, torch.zeros(d), seen, None, slope(np.zeros((n, d))), taken=Taken(Q, 1, whole))
    found = refresh._tempered(slope(naive), here, R, now)
    np.testing.assert_allclose(found.T, skron(R) @ dT, atol=1e-12)
    assert np.abs(naive - skron(R) @ dT).max() > 1e-3 * np.abs(dT).max()  # which without it would be wrong
    everything = replace(here, taken=Taken(None, 0, partly))
    assert refresh._tempered(slope(naive), everything, R, now).T.equal(torch.tensor(naive))


def test_a_run_takes_fewer_third_derivatives_and_stays_as_close(monkeypatch):
    toy = MatrixSweep([1.0, 1.3, 1.6, 2.0], [0.3, 0.4, 0.6, 0.8], lr=0.5, seed=4)

    def errors():
        flow = dvi.central_flow(toy.problem, GradientDescent(toy.lr), check=False)
        before = toy.problem.ledger.counts["third_derivatives"]
        solution = dvi.solve(flow, 30, integrator=dvi.MacroStep(1e-4), save=("w",), progress=False)
        assert max(len(X) for X in solution.X) >= 3
        exact = np.stack([toy.weights(t) for t in solution.t])
        error = np.linalg.norm(np.asarray(solution.series["w"]) - exact, axis=1).max()
        return error, toy.problem.ledger.counts["third_derivatives"] - before

    error, taken = errors()
    monkeypatch.setattr(refresh, "_axes", lambda *_: None)
    whole_error, all_taken = errors()
    assert taken < all_taken
    assert error < 2 * whole_error + 1e-6


def test_the_axes_are_not_enough_where_a_direction_is_new():
    seen = type("Seen", (), {"eigenvalues": np.array([2.0, 1.96]), "t": 0.0})()
    slope = Slope(torch.zeros(3, 5), torch.zeros(5, 2), 1.0, np.eye(2))
    here = StepContext(0.0, torch.zeros(5), seen, None, slope, taken=Taken(None, 0, 0.0))
    X = np.diag([1.0, 0.0])
    assert axes_of(2, seen, here, np.eye(2), X).shape == (2, 2)
    assert axes_of(2, seen, replace(here, slope=None), np.eye(2), X) is None
    assert axes_of(2, seen, here, np.eye(2), np.zeros((2, 2))) is None  # nothing oscillates
    young = replace(here, slope=replace(slope, known=np.diag([1.0, 0.0])))
    assert axes_of(2, seen, young, np.eye(2), X) is None  # the second one's T has no slope yet
    arrived = type("Seen", (), {"eigenvalues": np.array([2.0, 2.0]), "t": 0.0})()
    assert axes_of(2, arrived, here, np.eye(2), X) is None
