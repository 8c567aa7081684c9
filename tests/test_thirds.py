"""Third derivatives along the axes of the oscillation alone, and what they leave to extrapolation."""

from dataclasses import replace
from types import SimpleNamespace

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
from dvi.solvers.eigen.block_method import Eigenblock
from dvi.solvers.eigen.tracker import SpectrumEstimate
from dvi.solvers.macro.model import Slope, StepContext, Taken, third_derivatives
from dvi.solvers.macro.refresh import refreshed, with_thirds
from dvi.solvers.protocol import Frame, State
from dvi.solvers.svec import skron, svec

seeds = st.integers(0, 10_000)
F64 = torch.float64


class Still:
    """A flow whose P is I, in which nothing goes anywhere and nothing oscillates; T is what is given."""

    def __init__(self, T=None):
        self.T = T

    def third_derivatives(self, y, U, squares=False):
        return self.T[: U.shape[1]] if squares else self.T

    def precondition(self, y, V):
        return V

    def linearised(self, y, g, frame):
        k = frame.k
        return SimpleNamespace(alpha=np.zeros((k, k)), beta=np.eye(k * (k + 1) // 2), gap=np.eye(k))


def spectrum(t, V, eigenvalues):
    """A look at the eigenvectors V [d, k] at t."""
    values = np.asarray(eigenvalues, dtype=float)
    return SpectrumEstimate(Eigenblock(V, V, values, np.zeros(len(values))), np.zeros(len(values)), t, t)


def axes_taken(k, now, context, R, X):
    """Along which axes an update takes third derivatives; None: all of them."""
    frame = Frame(torch.zeros(5), torch.eye(5, k, dtype=F64), None, None, None)
    flow, end = Still(torch.zeros(k * (k + 1) // 2, 5, dtype=F64)), State(torch.zeros(5), {}, 1.0)
    _, taken = with_thirds(flow, end, frame, now, context, R, X)
    return taken.axes


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

    V = torch.eye(d, k, dtype=F64)

    def frame(T, V):
        return Frame(torch.zeros(d, dtype=F64), V, V, np.eye(k), torch.tensor(T))

    def found(taken):
        """The slope that an update at ``now`` finds, in a frame turned by R."""
        slope = Slope(torch.zeros(n, d, dtype=F64), torch.zeros(d, k, dtype=F64), 1.0, np.eye(k))
        before = spectrum(partly, V, np.full(k, 1.9))
        context = StepContext(0.0, torch.zeros(d), before, frame(known, V), slope, taken=taken)
        turned = V @ torch.tensor(R.T)
        new, look = frame(skron(R) @ (T0 + now * dT), turned), spectrum(now, turned, np.full(k, 1.9))
        end = State(torch.zeros(d, dtype=F64), {}, now)
        step = SimpleNamespace(y=end, loss=0.0, g=torch.zeros(d, dtype=F64))
        corrected = SimpleNamespace(y=end, ratio=lambda tol: 1.0, measured=True)
        return refreshed(Still(), context, step, look, new, R, Taken(), corrected, 1e-3).slope.T.numpy()

    np.testing.assert_allclose(found(Taken(Q, 1, whole)), skron(R) @ dT, atol=1e-12)
    # what the last interval alone says, which would be wrong, and is right where all were taken at its beginning
    naive = (skron(R) @ (T0 + now * dT - known)) / (now - partly)
    assert np.abs(naive - skron(R) @ dT).max() > 1e-3 * np.abs(dT).max()
    np.testing.assert_allclose(found(Taken(None, 0, partly)), naive, atol=1e-12)


class Counting(dvi.CentralFlow):
    """Writes down how many third derivatives each update takes, and how many there are."""

    def third_derivatives(self, y, U, squares=False):
        k = U.shape[1]
        self.taken.append((k if squares else k * (k + 1) // 2, k * (k + 1) // 2))
        return super().third_derivatives(y, U, squares)


def test_a_run_takes_fewer_third_derivatives_and_stays_as_close():
    toy = MatrixSweep([1.0, 1.3, 1.6, 2.0], [0.3, 0.4, 0.6, 0.8], lr=0.5, seed=4)
    flow = dvi.central_flow(toy.problem, GradientDescent(toy.lr), check=False)
    flow.__class__, flow.taken = Counting, []
    solution = dvi.solve(flow, 30, integrator=dvi.MacroStep(1e-4), save=("w",), progress=False)
    assert max(len(X) for X in solution.X) >= 3
    taken, all_there = np.sum(flow.taken, axis=0)
    assert taken < 0.7 * all_there
    exact = np.stack([toy.weights(t) for t in solution.t])
    # T is constant in w here and turns with the eigenvectors: what is foreseen is right but for rounding
    np.testing.assert_allclose(solution.series["w"], exact, rtol=0, atol=1e-12)


def test_the_axes_are_not_enough_where_a_direction_is_new():
    V = torch.eye(5, 2, dtype=F64)
    frame = Frame(torch.zeros(5), V, V, np.eye(2), torch.zeros(3, 5, dtype=F64))
    slope = Slope(torch.zeros(3, 5, dtype=F64), torch.zeros(5, 2), 1.0, np.eye(2))
    look = spectrum(1.0, V, [2.0, 1.96])
    here = StepContext(0.0, torch.zeros(5), spectrum(0.0, V, [2.0, 1.96]), frame, slope, taken=Taken(None, 0, 0.0))
    X = np.diag([1.0, 0.0])
    assert axes_taken(2, look, here, np.eye(2), X).shape == (2, 2)
    assert axes_taken(2, look, replace(here, slope=None), np.eye(2), X) is None
    assert axes_taken(2, look, here, np.eye(2), np.zeros((2, 2))) is None  # nothing oscillates
    young = replace(here, slope=replace(slope, known=np.diag([1.0, 0.0])))
    assert axes_taken(2, look, young, np.eye(2), X) is None  # the second one's T has no slope yet
    assert axes_taken(2, spectrum(1.0, V, [2.0, 2.0]), here, np.eye(2), X) is None  # it has just arrived
    assert axes_taken(2, look, replace(here, taken=Taken(None, 3, 0.0)), np.eye(2), X) is not None
    assert axes_taken(2, look, replace(here, taken=Taken(None, 4, 0.0)), np.eye(2), X) is None  # once in 2k updates
