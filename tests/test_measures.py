"""What is measured along a flow, against dense matrices and the semidefinite program; and starts with a settled ν."""

import numpy as np
import pytest
import torch
from conftest import CubicLoss

import dvi
from dvi.methods import GradientDescent, RMSProp, RMSPropNorm
from dvi.runs.measures import sharpness, stationarity
from dvi.stationarity.diagonal_sdp import stable_diagonal


def indefinite(seed, d=8):
    """A cubic loss at 0 with a gradient and an indefinite Hessian, both known.

    Its diagonal is positive: pᵢ ≥ Hᵢᵢ/2 > 0 then.  Elsewhere the best P without the gradient may be singular.
    """
    rng = np.random.default_rng(seed)
    A, scale = rng.normal(size=(d, d)), np.exp(0.5 * rng.normal(size=d))
    g, H = scale * rng.normal(size=d), np.outer(scale, scale) * (A + A.T)
    np.fill_diagonal(H, np.abs(np.diag(H)))
    assert np.linalg.eigvalsh(H)[0] < 0
    return g, H, CubicLoss.with_derivatives(rng, np.zeros(d), g, H).problem(np.zeros(d))


@pytest.fixture(scope="module")
def small():
    return dvi.problems.digits(network="mlp", loss="mse", n=20, classes=2, width=3, depth=1)


@pytest.mark.parametrize("seed", range(3))
def test_the_alternative_preconditioner_solves_the_program_without_its_second_term(seed):
    _, H, problem = indefinite(seed)
    lr = 0.3
    flow = dvi.central_flow(problem, RMSProp(lr, 0.9), check=False)
    p = dvi.stationary(flow, without="gradient").nu["v"].sqrt().numpy() / lr
    reference = stable_diagonal(H, np.zeros(len(H)))
    # p is off by about √gap: of the interior point some 1e-13 to 1e-10, of the fixed point 1e-9
    np.testing.assert_allclose(p, reference.p, rtol=1e-4, atol=1e-4 * reference.p.max())
    assert p.sum() == pytest.approx(reference.bounds.primal, rel=1e-7)
    assert np.linalg.eigvalsh(2 * np.diag(p) - H)[0] >= -1e-6 * p.max()
    assert p.sum() < dvi.stationary(flow).nu["v"].sqrt().sum() / lr  # the second term asks for more


def test_only_the_gradient_can_be_left_out():
    _, _, problem = indefinite(0)
    with pytest.raises(ValueError, match="gradient"):
        dvi.stationary(dvi.central_flow(problem, RMSProp(0.3, 0.9), check=False), without="curvature penalty")


@pytest.mark.parametrize("correction", [False, True])
def test_stationarity_against_the_semidefinite_program(correction):
    g, H, problem = indefinite(1)
    lr = 0.2
    flow = dvi.central_flow(problem, RMSProp(lr, 0.9, bias_correction=correction), check=False)
    seen = stationarity(flow)(flow.initial)
    p = stable_diagonal(H, np.abs(g) / lr).p
    nu = flow.initial.nu["v"].numpy()
    cosine = nu @ p**2 / np.linalg.norm(nu) / np.linalg.norm(p**2)
    # measured to a relative residual of 1e-5, and p is off by its root at worst
    assert seen["stationary_cosine"] == pytest.approx(cosine, rel=3e-3)
    assert seen["naive_rate"] == pytest.approx(-(g**2 / p).sum(), rel=3e-3)
    alternative = stable_diagonal(H, np.zeros(len(g))).p
    assert seen["alternative_rate"] == pytest.approx(-(g**2 / alternative).sum(), rel=3e-3)
    assert seen["alternative_rate"] < seen["naive_rate"] < 0  # Fig. 9
    # with the penalty of eq. (13), whose Σ test_stationary_flow checks
    settled = dvi.stationary_flow(problem, RMSProp(lr, 0.9), check=False)
    look = settled.look(dvi.stationary(settled))
    assert seen["stationary_rate"] == pytest.approx(float(look.g @ look.rate), rel=3e-3)
    assert seen["stationary_rate"] != pytest.approx(seen["naive_rate"], rel=1e-6)


def test_a_preconditioner_that_is_not_found_leaves_the_other_numbers():
    """Where the curvature is negative the best pᵢ without the gradient is zero; with it, there is one."""
    g, H = np.array([1.0, 1.0]), np.diag([3.0, -1.0])
    problem = CubicLoss(g, H, np.zeros((2, 2, 2))).problem(np.zeros(2))
    flow = dvi.central_flow(problem, RMSProp(0.3, 0.9), check=False)
    seen = stationarity(flow)(flow.initial)
    assert np.isfinite([seen[name] for name in ("stationary_cosine", "stationary_rate", "naive_rate")]).all()
    p = stable_diagonal(H, g / 0.3).p
    assert seen["naive_rate"] == pytest.approx(-(g**2 / p).sum(), rel=3e-3)
    assert "alternative_rate" not in seen


def test_sharpness_against_the_dense_hessian(small):
    flow = dvi.central_flow(small, RMSProp(0.01, 0.9), check=False)
    w = small.w0 + 0.1
    H = small.hvp(w, torch.eye(len(w), dtype=w.dtype))
    found = sharpness(flow)(dvi.State(w, flow.initial.nu, 0.0))["sharpness"]
    # a Ritz value is off by its residual squared, (1e-3)² here, relative to the scale of P
    assert found == pytest.approx(float(torch.linalg.eigvalsh(0.5 * (H + H.T))[-1]), rel=1e-4)


def test_measures_along_a_run_cost_it_nothing_and_survive_a_resumption(small, tmp_path):
    method = RMSProp(0.01, 0.9)
    measures = {"measures": ("sharpness", "stationarity"), "measure_every": 3}
    options = {"runs": ("discrete", "central"), "progress": False, "check": False}
    plain = dvi.compare(small, method, 8, **options)
    race = dvi.compare(small, method, 8, **measures, **options)
    for name in race.runs:
        assert race.runs[name].ledger.ledger.counts == plain.runs[name].ledger.ledger.counts
        np.testing.assert_array_equal(race.runs[name].loss, plain.runs[name].loss)
    series = race.central.series
    for name in ("sharpness", "stationary_cosine", "stationary_rate", "naive_rate", "alternative_rate"):
        assert series[name].shape == race.t.shape
        assert np.isfinite(series[name]).all()
        assert name not in race.discrete.series
    path = tmp_path / "race.h5"
    dvi.compare(small, method, 4, path=path, **measures, **options)
    longer = dvi.compare(small, method, 8, path=path, resume=True, **measures, **options)
    for name, values in series.items():
        np.testing.assert_array_equal(longer.central.series[name], values)
    with pytest.raises(dvi.StoreError, match="measure"):
        dvi.compare(small, method, 20, path=path, resume=True, measures=("sharpness",), measure_every=2, **options)


def test_wrong_measures_are_refused_by_name(small):
    for wrong in (("sharpnes",), "sharpness"):
        with pytest.raises(ValueError, match="'sharpness', 'stationarity'"):
            dvi.compare(small, RMSProp(0.01, 0.9), 5, measures=wrong, progress=False)
    with pytest.raises(ValueError, match="measure_every"):
        dvi.compare(small, RMSProp(0.01, 0.9), 5, measures=("sharpness",), measure_every=0, progress=False)
    with pytest.raises(dvi.SpecError, match="no ν"):
        dvi.compare(small, GradientDescent(0.01), 5, measures=("stationarity",), progress=False, check=False)


def test_a_stationary_start_is_at_the_first_weights_and_at_the_edge(small):
    """For RMSProp-Norm with a large learning rate √ν̄ = ηS/2 in closed form."""
    _, g = small.value_and_grad(small.w0)
    H = small.hvp(small.w0, torch.eye(len(g), dtype=g.dtype))
    S = float(torch.linalg.eigvalsh(0.5 * (H + H.T))[-1])
    method = RMSPropNorm(4 * float(g.norm()) / S, 0.9)
    race = dvi.compare(
        small, method, 2, runs=("central", "ablated"), warm_start="stationary", progress=False, check=False
    )
    for run in race.runs.values():
        assert run.loss[0] == pytest.approx(float(small.value(small.w0)), rel=1e-12)
        assert run.series["effective_lr"][0] == pytest.approx(2 / S, rel=1e-5)
        assert run.eigenvalues[0, 0] == pytest.approx(2, abs=1e-5)
    assert "stationary" in race.notes[0]
    corrected = RMSPropNorm(0.1, 0.9, bias_correction=True)
    with pytest.raises(dvi.SpecError, match="never forgets"):
        dvi.compare(small, corrected, 2, runs=("central",), warm_start="stationary", progress=False, check=False)


def test_compare_runs_the_stationary_flow_and_its_ablation(small):
    method = RMSProp(0.02, 0.9)
    race = dvi.compare(
        small,
        method,
        1,
        runs=("stationary", "stationary-ablated"),
        warm_start="stationary",
        progress=False,
        check=False,
    )
    for name, without in (("stationary", None), ("stationary-ablated", "curvature penalty")):
        alone = dvi.solve(dvi.stationary_flow(small, method, without=without, check=False), 1, progress=False)
        # one stationary point each, to a relative residual of 1e-9, from different guesses
        np.testing.assert_allclose(race.runs[name].loss, alone.loss, rtol=1e-7)
    assert race.distance["stationary", "stationary-ablated"][-1] > 0


def test_weights_and_nu_at_coordinates(small):
    """Beside a loop written by hand."""
    lr, beta2, coordinates = 0.005, 0.9, (1, 7)
    run = dvi.solve(dvi.discrete(small, RMSProp(lr, beta2)), 4, coordinates=coordinates, eigen_every=0, progress=False)
    w, v = small.w0.clone(), torch.zeros_like(small.w0)
    for step in range(4):
        _, g = small.value_and_grad(w)
        v = beta2 * v + (1 - beta2) * g**2
        np.testing.assert_allclose(run.series["coordinate_w"][step], w[list(coordinates)], rtol=1e-12)
        np.testing.assert_allclose(run.series["coordinate_nu"][step], v[list(coordinates)], rtol=1e-12)
        w = w - torch.where(v > 0, lr * g / v.sqrt(), 0.0)
    flow = dvi.solve(dvi.stable_flow(small, RMSProp(lr, beta2)), 4, coordinates=coordinates, progress=False)
    np.testing.assert_allclose(flow.series["coordinate_w"][0], small.w0[list(coordinates)], rtol=1e-12)
    norm = dvi.solve(dvi.discrete(small, RMSPropNorm(lr, beta2)), 2, coordinates=coordinates, progress=False)
    assert "coordinate_nu" not in norm.series
