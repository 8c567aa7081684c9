"""Arrivals and exits on a face of the constraint: what is held, where events are, what a landing costs."""

import numpy as np
import pytest
import torch
from test_convergence import errors, moves, rising_and_falling

import dvi
from dvi.methods import GradientDescent
from dvi.problems import Circle, MatrixSweep
from dvi.solvers.eigen.block_method import CriticalSubspace
from dvi.solvers.eigen.tracker import EigenTracker
from dvi.solvers.protocol import State
from dvi.solvers.reference.active_set import ARRIVED, Face
from dvi.solvers.reference.breakpoints import find_arrival
from dvi.solvers.repair import Repair

SHARP = EigenTracker(CriticalSubspace(tol=1e-10))


def near_the_edge(gaps):
    """A flow and its state with directions that far below an effective eigenvalue of 2, and their vectors [d, k]."""
    lr = 0.5
    toy = MatrixSweep([1.0] * len(gaps), [gap / lr for gap in gaps], lr, seed=3)
    flow = dvi.central_flow(toy.problem, GradientDescent(lr), check=False)
    d, k = toy.problem.dim, len(gaps)
    V = torch.zeros(d, k, dtype=torch.float64)
    V[:k] = toy.Q
    return flow, flow.initial, V


@pytest.mark.parametrize("drift", [1e-9, 1e-6, 3e-5, 1e-3])
@pytest.mark.parametrize("k", [1, 2])
def test_a_held_direction_that_has_drifted_is_kept_at_an_arrival(drift, k):
    """The one that arrives is nearer to 2 than those that are held; all are held from here on, the distant one not."""
    flow, y, V = near_the_edge([*(drift * (i + 1) for i in range(k)), 1e-12, 0.2])
    face = Face(flow, SHARP, V[:, :k])
    held = face.arrived(y)
    assert held.shape[1] == k + 1
    # Eigenvectors to a residual of 1e-10; the smallest distance to one that is not held is 0.2.
    assert float((V[:, : k + 1].T @ held).svd().S.min()) == pytest.approx(1, abs=1e-9)


def test_nothing_is_held_that_has_not_arrived():
    flow, y, V = near_the_edge([1e-9, 1e-5, 0.2])
    assert Face(flow, SHARP, V[:, :0]).arrived(y).shape[1] == 1
    assert Face(flow, SHARP, V[:, :0], near=1e-4).arrived(y).shape[1] == 2
    assert ARRIVED < 1e-5


def test_what_is_recognised_does_not_depend_on_where_was_looked_before():
    """Trial steps behind an arrival must not exchange the held direction for the other one."""
    toy = MatrixSweep([1.0, 1.2], [0.01, 0.5], lr=0.5, seed=2)
    flow = dvi.central_flow(toy.problem, GradientDescent(0.5), check=False)
    V = torch.zeros(toy.problem.dim, 1, dtype=torch.float64)
    V[:2, 0] = toy.Q[:, 0]
    face = Face(flow, SHARP, V)
    first = face.look(flow.initial)
    behind = State(flow.initial.w + 30 * first.rate.w, {}, 30.0)  # the other one is far above 2 by then
    assert face.look(behind).next_eigenvalue > 2
    again = face.look(flow.initial)
    assert again.next_eigenvalue == pytest.approx(first.next_eigenvalue, abs=1e-12)
    assert torch.allclose(again.rate.w, first.rate.w, rtol=0, atol=1e-9)


def test_a_landing_is_of_second_order_locally():
    """From half a landing before the entry of the circle to half a landing after it."""
    toy = Circle(lr=0.5, a=1.0, angle=1.2, entry=1.37)
    flow = dvi.central_flow(toy.problem, GradientDescent(toy.lr), check=False)
    off = []
    for h in (0.1, 0.05, 0.025):
        y = State(toy.weights(toy.entry - h / 2), flow.initial.nu, toy.entry - h / 2)
        face = Face(flow, SHARP, y.w.new_zeros(3, 0), repair=Repair(flow, y))
        g = flow.value_and_grad(y)[1]
        end, held = face.land(y, g, h)
        assert held.shape[1] == 1
        assert end.t == pytest.approx(toy.entry + h / 2)
        off.append(float((end.w - toy.weights(end.t)).norm()))
    assert np.diff(np.log2(off)) == pytest.approx([-2, -2], abs=0.15)  # the next term is h times as large
    # one that ends before the entry holds nothing, and is exact: the speed is constant there
    y = flow.initial
    face = Face(flow, SHARP, y.w.new_zeros(3, 0), repair=Repair(flow, y))
    end, held = face.land(y, flow.value_and_grad(y)[1], 0.1)
    assert held.shape[1] == 0
    assert torch.allclose(end.w, toy.weights(0.1), rtol=0, atol=1e-14)


def test_an_arrival_is_found_on_eigenvalues_alone():
    toy = Circle(lr=0.5, a=1.0, angle=1.2, entry=1.37)
    flow = dvi.central_flow(toy.problem, GradientDescent(toy.lr), check=False)
    y = flow.initial
    face = Face(flow, SHARP, y.w.new_zeros(3, 0), repair=Repair(flow, y))
    begin = face.look(y)
    after = face.look(end := y.moved(begin.rate, 2.0))
    assert face.passed(after)
    spent = flow.problem.ledger.copy()
    found = find_arrival(face, lambda t: y.moved(begin.rate, t), begin, after, y.t, end.t)
    assert found == pytest.approx(toy.entry, abs=1e-7)  # a tenth of ARRIVED at a rate of about 1
    assert (flow.problem.ledger - spent).gradients == (flow.problem.ledger - spent).third_derivatives == 0


@pytest.mark.parametrize("order", [2, 4])
def test_orders_through_three_entries_and_three_exits(order):
    """Entries at t = 0.31, 0.43, 0.51, two of them in one step, exits at 3.9, 5.0, 6.1: landings keep the order."""
    toy = rising_and_falling(3)
    flow = dvi.central_flow(toy.problem, GradientDescent(toy.learning_rate), check=False)
    steps = {2: (1 / 4, 1 / 8), 4: (1 / 2, 1 / 4)}[order]
    found = []
    for h in steps:
        solution = dvi.solve(flow, 7, integrator=dvi.RungeKutta(order, h=h), save=("w",), progress=False)
        found.append(errors(toy, solution).max())
        entries, exits = moves(solution)
        assert len(entries) == len(exits) == 3
        # exits are roots on dense output: of the order of the steps, and precise to 1e-6
        assert exits == pytest.approx(toy.exit_times, abs=1e-3 * h**order + 1e-6)
        landing = 0.01 * h ** (order / 2)  # an entry is seen where the landing over it ends
        for seen, exact in zip(entries, toy.entry_times, strict=True):
            assert -1e-2 * h**order <= seen - exact <= landing
    # entries fall anywhere in a step, which modulates the constant from one step to the next
    assert np.log2(found[0] / found[1]) == pytest.approx(order, abs=0.3)


@pytest.mark.parametrize("integrator", [dvi.RungeKutta(4, tol=1e-5), dvi.TorchDiffEq(rtol=1e-5, atol=1e-7)])
def test_exits_are_passed_without_chattering(integrator):
    """The same with adaptive steps: they used to look hundreds of times around an exit, and not to come to the end."""
    toy = rising_and_falling(3)
    flow = dvi.central_flow(toy.problem, GradientDescent(toy.learning_rate), check=False)
    solution = dvi.solve(flow, 8, integrator=integrator, save=("w",), progress=False)
    assert errors(toy, solution).max() < 1e-4  # ten steps' worth of tol
    assert len(moves(solution)[0]) == len(moves(solution)[1]) == 3
    # six breakpoints of at most eight steps, and eight units, of at most a dozen looks each
    assert solution.ledger.gradients < 12 * (6 * 8 + 8)
