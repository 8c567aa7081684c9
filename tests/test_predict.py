"""Predictions of time averages against averages taken: the mean over w ± δ of each quantity, δ the columns of UX^½."""

import numpy as np
import pytest
import torch

import dvi
from dvi.problems.catalogue.data import load_digits
from dvi.results.averages import gaussian_average
from dvi.runs.observables import Observer
from dvi.solvers.protocol import Node, host


@pytest.fixture(scope="module")
def edge():
    """A network at the edge of stability, k = 2, with a covariance that is not diagonal."""
    problem = dvi.problems.digits(network="mlp", loss="mse", n=60, width=10)
    flow = dvi.central_flow(problem, dvi.methods.GradientDescent(0.3), check=False)
    solution = dvi.solve(flow, 60, warm_start="auto", progress=False)
    y = dvi.State(solution.w, solution.nu, solution.t[-1])
    loss, g = problem.value_and_grad(y.w)
    lin = flow.linearise(y.w, y.nu, torch.linalg.qr(torch.cat([flow.linearise(y.w, y.nu).U, g[:, None]], dim=1))[0])
    U, X = lin.U, np.diag(np.arange(1.0, lin.U.shape[1] + 1)) + 0.3
    node = Node(
        t=y.t, loss=float(loss), grad_sq=float(g @ g), eigenvalues=lin.eigenvalues.numpy(), U=U,
        HU=problem.hvp(y.w, U), X=X, X_time=y.t, g=g, rate=lin.drift(),
    )  # fmt: skip
    return flow, y, node


def averaged(quantity, y, node, step=1e-3):
    """Σ_i ½[q(w + δᵢ) + q(w − δᵢ) − 2q(w)] with δᵢ = step·U X^½ eᵢ, over step²: exact for Σ up to step² ∇⁴q."""
    values, Q = np.linalg.eigh(node.X)
    D = node.U @ torch.from_numpy(Q * np.sqrt(values))
    total = sum(0.5 * (quantity(y.w + step * d) + quantity(y.w - step * d) - 2 * quantity(y.w)) for d in D.T)
    return total / step**2


def test_what_oscillations_add(edge):
    flow, y, node = edge
    problem, coordinates, inputs = flow.problem, (3, 500), load_digits(60)[0][:2]
    observer = Observer(coordinates, inputs)
    seen = observer.observe_flow(flow, y, node) | observer.observe_outputs(flow, y, node)

    # step² times fourth derivatives of order one, and rounding of 1e-16/step²: 1e-5 relative
    def loss(w):
        return problem.value_and_grad(w)[0]

    assert seen["osc_loss"] == pytest.approx(float(averaged(loss, y, node)), rel=1e-4)
    # E‖∇L‖² and E(∂ᵢL)² leave out 2∇L·½∇³L[Σ] (eqs. 18, 22): the average of ‖∇L(w+δ) − ∇L(w)‖² is what is meant
    g = node.g

    def change_sq(w):
        return (problem.value_and_grad(w)[1] - g).square()

    each = averaged(change_sq, y, node)
    assert seen["osc_grad_sq"] == pytest.approx(float(each.sum()), rel=1e-4)
    assert seen["osc_coordinate_grad_sq"] == pytest.approx(each[list(coordinates)].numpy(), rel=1e-4)
    outputs = averaged(lambda w: problem.outputs(w, inputs), y, node)
    largest = float(outputs.abs().max())
    np.testing.assert_allclose(seen["osc_outputs"], host(outputs)[0], rtol=0, atol=1e-4 * largest)
    assert seen["trace"] == pytest.approx(float(torch.trace(node.U @ torch.from_numpy(node.X) @ node.U.T)), rel=1e-12)
    assert seen["loss_rate"] == pytest.approx(float(-0.3 * g @ g), rel=1e-12)  # without X: dL/dt = −η‖∇L‖²


def test_the_race_shows_prediction_and_average_side_by_side():
    """On a short race at the edge the predicted outputs are closer to the averaged ones than the stable flow's."""
    problem = dvi.problems.digits(network="mlp", loss="mse", n=100, width=16)
    inputs = load_digits(100)[0][:2]
    race = dvi.compare(
        problem,
        dvi.methods.GradientDescent(0.3),
        120,
        test_inputs=inputs,
        coordinates=(5,),
        progress=False,
        check=False,
    )
    seen = race.smoothed("discrete", 10, of="outputs")[100]
    predicted, stable = race.central.series["predicted_outputs"][100], race.stable.series["outputs"][100]
    assert np.abs(seen - predicted).max() < 0.3 * np.abs(seen - stable).max()
    assert race.central.series["predicted_coordinate_grad_sq"].shape == (121, 1)


def test_local_averages_are_those_of_c_2():
    """Against the sum itself; weights beyond six standard deviations, e^−18, are left out."""
    t, sigma = np.arange(0, 30, 0.5), 2.0
    values = np.random.default_rng(0).normal(size=(len(t), 2))
    c = np.exp(-((t[:, None] - t) ** 2) / (2 * sigma**2))
    np.testing.assert_allclose(gaussian_average(t, values, sigma), c @ values / c.sum(axis=1)[:, None], atol=1e-7)
