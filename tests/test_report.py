"""The report of a run: its numbers on problems where each has a closed form, its words, and how it is shown."""

import dataclasses
import math
import sys

import numpy as np
import pytest
import torch

import dvi
from dvi.methods import GradientDescent, RMSPropNorm
from dvi.problems.exact.edge import MatrixSweep
from dvi.reports import Report, report_of

LR = 0.5  # the edge of gradient descent is at a curvature of 4


@pytest.fixture(scope="module")
def sweep():
    """Two eigenvalues that arrive at the edge one after the other and stay; all of it known."""
    toy = MatrixSweep(rates=[0.5, 0.3], gaps=[0.4, 0.5], lr=LR)
    return toy, dvi.compare(toy.problem, GradientDescent(LR), 60, check=False, progress=False)


def test_the_numbers_of_an_exact_flow(sweep):
    toy, race = sweep
    report = race.report()
    # eigenvalues and entry times to the eigensolver's tolerance and the default tolerance of the integrator, 1e-3
    assert report.at_edge
    assert report.since == pytest.approx(min(toy.entry_times), rel=1e-2)
    assert (report.directions, report.most_directions) == (2, 2)
    still = (race.t < min(toy.entry_times)).mean()
    assert report.edge_share == pytest.approx(1 - still)
    assert report.sharpness == pytest.approx(2, rel=1e-3)
    assert report.effective_lr == LR
    assert report.largest_stable_lr == pytest.approx(LR, rel=1e-3)
    # ½⟨H, Σ⟩ with H = 2/η on the directions that oscillate, and variances 2c
    assert report.oscillation_loss == pytest.approx(0.5 * 2 / LR * (1.0 + 0.6), rel=1e-3)
    assert report.loss == pytest.approx(-(0.5 * 0.4 + 0.3 * 0.5), rel=1e-3)  # −⟨C, Y⟩ with Y = Q diag(z) Qᵀ
    assert report.curvature == pytest.approx(2 / LR, rel=1e-3)


def test_what_would_be_without_the_oscillation(sweep):
    report = sweep[1].report()
    # linear in time, so that the average over the last 10 units is the value in their middle
    middle = 55.0
    steepest = 2 / LR - 0.4 + LR * 0.5 * middle
    assert report.curvature_stable == pytest.approx(steepest, rel=1e-3)
    assert report.curvature_ablated == report.curvature_stable  # without a state ν
    assert report.curvature_explained == pytest.approx(1 - 2 / LR / steepest, rel=1e-3)
    assert report.stable_loss == pytest.approx(-LR * middle * (0.5**2 + 0.3**2), rel=1e-6)


def test_an_optimizer_that_does_not_oscillate_is_not_described_by_the_flow(sweep):
    """From x = 0 exactly, gradient descent does not leave the unstable path of the stable flow."""
    _, race = sweep
    report = race.report()
    assert report.distance_stable == pytest.approx(0, abs=1e-9)
    away = torch.linalg.vector_norm(race.discrete.w - race.central.w)
    assert report.distance == pytest.approx(float(away), rel=0.2)  # at the end and over the last 10 of 60 steps
    assert report.optimizer_loss == pytest.approx(report.stable_loss, rel=1e-6)


def test_the_next_term_of_a_cubic_is_zero(sweep):
    # the loss is cubic: its gradient is quadratic, and the first two terms are all
    terms = sweep[1].report().next_terms
    assert len(terms) >= 2
    assert max(size for _, size in terms) < 1e-12  # rounding of gradients of size 1 at a force of size 1


@pytest.mark.parametrize("b", [0.3, 2.0])
def test_the_next_term_by_hand(b):
    """L = Σᵢ (½zᵢ² + (b/24) zᵢ⁴) yᵢ − cᵢyᵢ, z = Qᵀx: at x = 0 the force is ½σᵢ² on yᵢ, and the next term (b/24) σᵢ⁴.

    On the edge σᵢ² = 2cᵢ, so the ratio is (b/6) ‖c²‖/‖c‖.
    """
    c = torch.tensor([0.5, 0.2], dtype=torch.float64)
    Q = torch.tensor([[0.8, -0.6], [0.6, 0.8]], dtype=torch.float64)

    def loss(w):
        z, y = Q.T @ w[:2], w[2:]
        return ((0.5 * z**2 + b / 24 * z**4 - c) * y).sum()

    problem = dvi.Problem(loss, torch.tensor([0, 0, 3.9, 3.95], dtype=torch.float64))
    flow = dvi.solve(dvi.central_flow(problem, GradientDescent(LR)), 40, progress=False)
    report = flow.report()
    expected = b / 6 * float((c**2).norm() / c.norm())
    # the last measurement, when both are on the edge: Σ is held to the integrator's tolerance
    assert report.next_terms[-1][1] == pytest.approx(expected, rel=1e-3)
    assert report.next_terms[-1][0] > 20
    times = [t for t, _ in report.next_terms]
    assert report.next_term == np.median([size for _, size in report.next_terms])
    assert all(0 <= t <= 40 for t in times)


def test_where_the_loss_ends_within_reach_of_the_oscillation():
    """√(1 − A x²) is not finite at x² = σ² = 2c > 1/A."""

    def loss(w):
        x, y = w
        return 0.5 * x**2 * y - 0.5 * y + 0.01 * torch.sqrt(1 - 4 * x**2)

    problem = dvi.Problem(loss, torch.tensor([0, 3.9], dtype=torch.float64))
    report = dvi.solve(dvi.central_flow(problem, GradientDescent(LR)), 30, progress=False).report()
    assert report.next_term == math.inf
    assert report.verdict == "poor"
    assert "not finite" in str(report)


def test_an_oscillation_that_rounding_hides_is_not_measured():
    """σ² = 2c = 2e-14 beside a gradient of size 1: a difference of gradients shows nothing."""

    def loss(w):
        x, y, z = w
        return 0.5 * x**2 * y - 1e-14 * y + z

    problem = dvi.Problem(loss, torch.tensor([0, 4.0 - 1e-15, 0], dtype=torch.float64))
    report = dvi.solve(dvi.central_flow(problem, GradientDescent(LR), check=False), 60, progress=False).report()
    assert report.next_terms == ()


def test_what_the_measurement_costs():
    """Two gradients and a third derivative for each direction, in the problem's ledger and not in the run's."""
    toy = MatrixSweep(rates=[0.5, 0.3], gaps=[0.4, 0.5], lr=LR)
    flow = dvi.central_flow(toy.problem, GradientDescent(LR), check=False)
    before = toy.problem.ledger.copy()
    solution = dvi.solve(flow, 40, progress=False)
    beside = toy.problem.ledger - before - solution.ledger.ledger
    measured = len(solution.report().next_terms)
    assert measured >= 2
    assert beside.gradients == 2 * 2 * measured
    assert beside.third_derivatives == 2 * measured


def test_the_ablated_flow_shows_what_the_push_on_the_weights_does():
    """RMSProp-Norm without the push: dS/dt = 2c/S on the edge, so S² grows by 4c a unit time."""
    toy = MatrixSweep(rates=[0.5], gaps=[0.4], lr=LR)
    method = RMSPropNorm(lr=0.25, beta2=0.9, bias_correction=True)  # P = ‖g‖/lr = 2 at the start, and the edge at 4
    race = dvi.compare(toy.problem, method, 40, runs=("central", "ablated"), check=False, progress=False, warm_start=0)
    report = race.report()
    (entry, _, _), *_ = race.ablated.breakpoints
    start = int(entry) + 20  # the past of ν, and of the step in which the direction arrives, is forgotten
    S = float(race.ablated.eigenvalues[start, 0] / race.ablated.series["effective_lr"][start])
    expected = np.mean(np.sqrt(S**2 + 4 * 0.5 * (race.t[-11:] - race.t[start])))
    assert report.curvature_ablated == pytest.approx(expected, rel=5e-3)  # of the default tolerance over 20 units
    assert report.curvature < report.curvature_ablated
    assert "ablated" in str(report)
    assert "distance" not in str(report)
    assert any('"discrete"' in told for told in report.missing)


def test_a_flow_that_leaves_the_edge():
    toy = MatrixSweep(rates=[0.5], gaps=[0.2], lr=LR, decay=0.05)
    problem, method = toy.problem, GradientDescent(toy.learning_rate)
    steps = math.ceil(toy.exit_times[0]) + 20
    report = dvi.solve(dvi.central_flow(problem, method), steps, progress=False).report()
    assert report.at_edge is False
    assert report.since is None
    assert (report.directions, report.most_directions) == (0, 1)
    share = (toy.exit_times[0] - toy.entry_times[0]) / steps
    assert report.edge_share == pytest.approx(share, abs=8 / steps)  # an exit is seen some units late
    assert "Not at the end" in str(report)


# ---- what is not there ----------------------------------------------------------------------------------


def test_a_run_below_the_edge():
    race = dvi.compare(MatrixSweep([0.5], [0.4], LR).problem, GradientDescent(0.01), 20, check=False, progress=False)
    report = race.report()
    assert report.at_edge is False
    assert report.most_directions == 0
    assert report.verdict == "unknown"
    assert report.missing == ()
    assert "nothing oscillates" in str(report)
    assert "trusted? Yes" not in str(report)


def test_the_optimizer_alone(sweep):
    _, race = sweep
    report = race.discrete.report()
    assert report.at_edge  # beyond it, in fact
    assert report.directions is None
    assert report.distance is None
    assert '"central"' in str(report)


def test_the_central_map_is_called_by_its_name():
    problem = MatrixSweep([0.5], [0.4], LR).problem
    race = dvi.compare(problem, GradientDescent(LR), 20, runs=("discrete", "map"), check=False, progress=False)
    report = race.report()
    assert report.flow == "map"
    assert report.directions == 1
    assert "the central map is" in str(report)
    assert "central flow" not in str(report)


def test_the_stable_flow_alone_says_nothing_of_the_edge(sweep):
    report = sweep[1].stable.report()
    assert report.at_edge is None
    assert '"central"' in str(report)


def test_nothing_recorded(sweep):
    _, race = sweep
    empty = dataclasses.replace(race.central, t=np.empty(0), loss=np.empty(0))
    assert "nothing was recorded" in str(report_of({"central": empty}))
    assert "nothing was recorded" in str(report_of({}))


# ---- the verdict ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("distance", "stable", "term", "verdict"),
    [
        (0.1, 1.0, 0.001, "good"),
        (0.5, 1.0, 0.001, "fair"),
        (0.1, 1.0, 0.05, "fair"),
        (0.9, 1.0, 0.001, "poor"),
        (0.1, 1.0, 0.5, "poor"),
        (0.1, 1.0, None, "good"),
        (None, None, 0.001, "unknown"),  # a small next term is needed, but it is not enough
        (None, None, 0.2, "poor"),
        (None, None, None, "unknown"),
        (0.1, 0.0, None, "unknown"),
    ],
)
def test_the_verdict_is_the_worse_of_the_two(distance, stable, term, verdict):
    terms = () if term is None else ((1.0, term),)
    report = Report("", 0, 1, 1, most_directions=1, distance=distance, distance_stable=stable, next_terms=terms)
    assert report.verdict == verdict


# ---- how it is kept and shown ---------------------------------------------------------------------------


def test_a_file_gives_the_same_report(sweep, tmp_path):
    pytest.importorskip("h5py")
    _, race = sweep
    race.save(tmp_path / "race.h5")
    assert dvi.load(tmp_path / "race.h5").report() == race.report()


def test_a_longer_run_measures_at_the_same_times(tmp_path):
    pytest.importorskip("h5py")
    toy = MatrixSweep(rates=[0.5, 0.3], gaps=[0.4, 0.5], lr=LR)
    keep = {"check": False, "progress": False, "path": tmp_path / "race.h5"}
    dvi.compare(toy.problem, GradientDescent(LR), 20, **keep)
    longer = dvi.compare(toy.problem, GradientDescent(LR), 60, resume=True, **keep)
    at_once = dvi.compare(toy.problem, GradientDescent(LR), 60, check=False, progress=False)
    terms = [race.central.series["next_term"] for race in (longer, at_once)]
    assert np.isfinite(terms[0]).any()
    np.testing.assert_array_equal(*terms)


def test_lines_are_short_and_html_is_escaped(sweep):
    _, race = sweep
    report = race.report()
    assert max(map(len, str(report).splitlines())) <= 100
    strange = dataclasses.replace(report, title="a<b> & c")
    assert "a&lt;b&gt; &amp; c" in strange._repr_html_()
    assert all(line.split("?")[0] in strange._repr_html_() for line in str(report).splitlines() if "?" in line)


def test_a_notebook_shows_picture_and_report(sweep):
    pytest.importorskip("matplotlib")
    _, race = sweep
    for result in (race, race.central):
        shown = result._repr_html_()
        assert shown.startswith("<img")
        assert "At the edge of stability?" in shown


def test_a_notebook_without_matplotlib_shows_the_report(sweep, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("dvi.plotting")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.style", None)
    shown = sweep[1]._repr_html_()
    assert "<img" not in shown
    assert "pip install" in shown
    assert "At the edge of stability?" in shown


def test_the_shell_says_it(sweep, tmp_path, capsys):
    pytest.importorskip("h5py")
    pytest.importorskip("tyro")
    from dvi.cli import main

    _, race = sweep
    race.save(tmp_path / "race.h5")
    race.central.save(tmp_path / "central.h5")
    assert main(["report", str(tmp_path / "race.h5"), str(tmp_path / "central.h5")]) == 0
    assert capsys.readouterr().out == f"{race.report()}\n\n{race.central.report()}\n"
    assert main(["report"]) == 2
