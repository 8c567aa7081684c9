"""Euler against central flows that are known exactly: through entries and exits, on a straight and on a curved edge."""

import numpy as np
import pytest

import dvi
from dvi.methods import GradientDescent
from dvi.problems import Circle, MatrixSweep
from dvi.solvers import CriticalSubspace, Watch

DTS = (1 / 4, 1 / 8, 1 / 16)


def solve(toy, dt, steps, **options):
    schedule = toy.learning_rate if getattr(toy, "decay", 0) else toy.lr
    flow = dvi.central_flow(toy.problem, GradientDescent(schedule), check=False)
    integrator = dvi.Euler(dt, **options)
    return dvi.solve(flow, steps, integrator=integrator, save=("w",), progress=False)


def errors(toy, solution):
    exact = np.stack([toy.weights(float(t)).numpy() for t in solution.t])
    return np.linalg.norm(solution.series["w"] - exact, axis=1)


def slopes(values, dts):
    return np.diff(np.log(values)) / np.diff(np.log(dts))


def moves(solution):
    """The moments at which something enters or leaves, one for each direction: (entries, exits)."""
    entries, exits, k = [], [], 0
    for t, _, now in solution.breakpoints:
        (entries if now > k else exits).extend([t] * abs(now - k))
        k = now
    return entries, exits


def rising(k):
    return MatrixSweep([1 + 0.35 * i for i in range(k)], [0.37 * (1 + 1.3 * i) for i in range(k)], lr=0.7, seed=k)


def rising_and_falling(k):
    """Entries at t = 0.31 … 0.60, exits at t = 3.9, 5.0, 6.1, 7.2, 8.3."""
    return MatrixSweep([1.3 + 0.2 * i for i in range(k)], [0.2 + 0.15 * i for i in range(k)], 1.0, decay=0.3, seed=k)


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5])
def test_sweep_is_exact_at_grid_points_for_a_constant_learning_rate(k):
    """The gap is linear in w and P constant: linearised complementarity is exact, entries included."""
    toy, dt = rising(k), 1 / 8
    default = solve(toy, dt, 3)
    # What is left is the eigenvectors' angles, at most residual/gap with gaps of about 0.1 at the k entries; they act
    # to second order where the block is a Ritz block.
    assert errors(toy, default).max() <= k * (1e-3 / 0.1) ** 2
    sharp = solve(toy, dt, 3, watch=Watch(CriticalSubspace(tol=1e-9)))
    assert errors(toy, sharp).max() <= k * 1e-9 / 0.1
    entries, exits = moves(sharp)
    assert len(entries) == k
    assert not exits
    for seen, exact in zip(entries, toy.entry_times, strict=True):
        assert exact - dt <= seen <= exact  # the step that brings it to 2 begins at most dt before
    # σᵢ² = 2cᵢ, and Σ = ½ηX-wise in the rotated basis: eigenvalues of Σ = UXUᵀ with UᵀU = ηI
    assert toy.lr * np.linalg.eigvalsh(sharp.X[-1]) == pytest.approx(2 * np.array(toy.rates), rel=1e-9)
    # E[L] ≈ L + tr X, as ⟨H, Σ⟩ = 2 tr X
    np.testing.assert_allclose(sharp.predicted_loss[-1] - sharp.loss[-1], np.trace(sharp.X[-1]), rtol=1e-9)
    assert sharp.eigenvalues[-1, :k] == pytest.approx(np.full(k, 2.0), abs=1e-9)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_sweep_with_a_decaying_schedule_is_first_order_and_leaves_on_time(k):
    toy = rising_and_falling(k)
    found = []
    for dt in DTS:
        solution = solve(toy, dt, 8)
        error = errors(toy, solution)
        found.append(error[-1])
        entries, exits = moves(solution)
        assert len(entries) == k
        for seen, exact in zip(entries, toy.entry_times, strict=True):
            # the step that brings it to 2 begins at most dt before; the Riemann sum of η shifts it by less than dt/2
            assert -0.5 * dt <= exact - seen <= 1.5 * dt
        due = [t for t in toy.exit_times if t < 8]
        assert len(exits) == len(due)
        for seen, exact in zip(exits, due, strict=True):
            assert abs(seen - exact) <= dt * (1 + 1e-9)
        # on the edge Y follows 2/η(t) at the ends of steps whatever was before: exact, up to eigenvectors
        held = (solution.t > toy.entry_times[-1] + dt) & (solution.t < toy.exit_times[0] - dt)
        assert held.sum() >= 2
        assert error[held].max() <= 1e-4 * k
    # afterwards what remains is the Riemann sum of η(t): first order, clean
    assert slopes(found, DTS) == pytest.approx(np.ones(len(DTS) - 1), abs=0.1)


@pytest.mark.parametrize("entry", [0.0, 1.37])
def test_circle_is_first_order_in_weights_and_in_variance(entry):
    toy = Circle(lr=0.5, a=1.0, angle=1.2, entry=entry)
    dts = (1 / 4, 1 / 8, 1 / 16, 1 / 32)
    weights, variances, off = [], [], []
    for dt in dts:
        solution = solve(toy, dt, 6)
        weights.append(errors(toy, solution).max())
        exact = [toy.variance(float(t)) for t in solution.t[2:]]
        variances.append(np.abs(solution.series["trace"][2:] - exact).max())
        off.append(abs(np.linalg.norm(solution.w[1:].numpy()) - toy.radius))
        entries, _ = moves(solution)
        assert len(entries) == 1
        assert entry - dt <= entries[0] <= entry + dt**2  # the edge bends away from its tangent by ~ dt²
    assert slopes(weights, dts) == pytest.approx(np.ones(3), abs=0.1)
    # The entry falls anywhere inside a step, which modulates the constant of first order from one dt to the next
    assert slopes(variances, dts) == pytest.approx(np.ones(3), abs=0.2)
    # each step leaves the edge by the arc's sagitta, dt²v²/2R, and the next pulls it back: it does not build up
    assert slopes(off, dts) == pytest.approx(np.full(3, 2.0), abs=0.3)


def test_the_stable_flow_of_a_sweep_goes_on_beyond_the_edge():
    toy = rising(2)
    flow = dvi.stable_flow(toy.problem, GradientDescent(toy.lr))
    solution = dvi.solve(flow, 4, integrator=dvi.Euler(1 / 4), progress=False)
    w = toy.lr * 4 * -flow.problem.value_and_grad(flow.problem.w0)[1]  # a constant gradient
    np.testing.assert_allclose(solution.w.numpy(), w.numpy(), atol=1e-13)
    assert not solution.breakpoints
