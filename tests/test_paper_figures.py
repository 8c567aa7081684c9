"""The paper's figures, each layout from tiny stored runs that are made up: what is drawn is what is stored."""

import logging

import numpy as np
import pytest
import torch

import dvi
from dvi.problems import Ledger
from dvi.results.solution import Cost
from dvi.storage.files import StoreError

pytest.importorskip("matplotlib")
pytest.importorskip("h5py")

from dvi.cli import main
from dvi.paper.drawing import draw, drawers
from dvi.paper.making import spec_of
from dvi.paper.report import markdown
from dvi.paper.stored import missing, runs_of
from dvi.paper.table import table
from dvi.plotting.curves import most_moving
from dvi.plotting.panels import time_average
from dvi.results.summary import summarise
from dvi.sweeps.records import Record, result_path, write_record

N = 41
T = np.arange(N, dtype=float)


def solution(name, row, seed):
    """A made-up run whose every series is another one."""
    rng = np.random.default_rng(seed)

    def fall(*shape):
        start = 1 + rng.random(shape)
        return start * np.exp(-0.02 * T).reshape(-1, *[1] * len(shape)) + 0.01 * rng.random((N, *shape))

    series = {
        "grad_sq": fall(),
        "effective_lr": 1 / fall(),
        "loss_rate": -fall(),
        "trace": fall(),
        "step_length": fall(),
    }
    if "outputs" in row.record:
        series |= {"outputs": fall(1, 4), "predicted_outputs": fall(1, 4)}
    if "coordinates" in row.record:
        for part in ("grad_sq", "nu", "w"):
            series[f"coordinate_{part}"] = fall(12)
        series["predicted_coordinate_grad_sq"] = fall(12)
    if name != "discrete" and "sharpness" in row.record:
        series["sharpness"] = 20 * fall()
    if name == "central" and "stationarity" in row.record:
        series |= {part: -fall() for part in ("stationary_rate", "naive_rate", "alternative_rate")}
        series["stationary_cosine"] = 1 - 0.5 * fall()
    if name == "discrete":
        series = {part: values for part, values in series.items() if not part.startswith("predicted_")}
    if name == "stable":  # which predicts no oscillation
        series |= {part: series[part.removeprefix("predicted_")] for part in series if part.startswith("predicted_")}
    loss = fall()
    predicted = {"discrete": np.full(N, np.nan), "stable": loss}.get(name, 1.1 * fall())
    return dvi.Solution(
        name=name,
        t=T,
        loss=loss,
        predicted_loss=predicted,
        eigenvalues=np.stack([np.minimum(2, 1.5 + T / 20), np.full(N, 1.4)], axis=1),
        X=[np.zeros((0, 0))] * N,
        w=torch.zeros(3),
        nu={},
        breakpoints=[(10.0, "enter", 1), (25.0, "enter", 2)] if name == "central" else [],
        status=dvi.Status.SUCCESS,
        ledger=Cost(T, [{"gradients": i} for i in range(N)], Ledger(gradients=N)),
        series=series,
    )


def store(folder, row, seed, state="done"):
    runs = {name: solution(name, row, 10 * seed + i) for i, name in enumerate(row.runs)}
    pairs = [(a, b) for i, a in enumerate(row.runs) for b in row.runs[i + 1 :]]
    distance = {pair: 0.01 * (i + 1) * T + seed for i, pair in enumerate(pairs)}
    status = dvi.Status.SUCCESS if state == "done" else dvi.Status.DIVERGED
    dvi.Comparison(T, runs, distance, status, [], {"dim": 123}).save(result_path(folder, row.name))
    write_record(folder, Record(row.name, spec_of(row, "small") | {"device": "cpu"}, state, status.name))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The runs of one figure of each layout."""
    where = tmp_path_factory.mktemp("runs")
    rows = {row.name: row for figure in (1, 2, 4, 5, 6, 8, 11, 12, 36, 38) for row in table().of_figure(figure)}
    for seed, row in enumerate(rows.values()):
        store(where, row, seed)
    return where


@pytest.fixture
def shown(folder):
    """A function that draws a figure, and gives it with its runs."""

    def show(number):
        runs = runs_of(number, folder=folder)
        return drawers()[str(number)](runs), runs

    return show


def lines(axes, label=None):
    """The lines of a label, as pairs of arrays."""
    return [line.get_xydata().T for line in axes.lines if label is None or line.get_label() == label]


def the_line(axes, label):
    (found,) = lines(axes, label)
    return found


def titles(figure):
    return [axes.get_title(loc="left") for axes in figure.axes]


def labels(axes):
    return [label for label in axes.get_legend_handles_labels()[1]]


def test_every_figure_of_the_table_has_a_layout():
    assert set(drawers()) == set(table().figures)


def test_overview_of_gradient_descent(shown):
    figure, runs = shown(2)
    (run,) = runs.values()
    race, lr = run.race, run.options["lr"]
    loss, spectrum, distance, output = figure.axes
    assert titles(figure) == [
        "(a) train loss",
        "(b) Hessian eigenvalues",
        "(c) distance in weight space",
        "(d) network output",
    ]
    assert all(axes.get_xlabel() == "time (optimizer steps)" and axes.get_ylabel() for axes in figure.axes)
    np.testing.assert_array_equal(the_line(loss, "central flow"), [T, race.central.loss])
    np.testing.assert_array_equal(the_line(loss, "predicted time average"), [T, race.central.predicted_loss])
    np.testing.assert_array_equal(the_line(loss, "optimizer, every step"), [T, race.discrete.loss])
    averaged = the_line(loss, "optimizer, averaged (σ)")[1]
    inside = np.isfinite(averaged)
    np.testing.assert_array_equal(averaged[inside], time_average(race.discrete, race.discrete.loss, 4.0)[inside])
    np.testing.assert_allclose(the_line(spectrum, "central flow")[1], race.central.eigenvalues[:, 0] / lr)
    assert 2 / lr == pytest.approx(the_line(spectrum, "_threshold")[1])
    assert "2/η" in [text.get_text() for text in spectrum.texts]
    np.testing.assert_array_equal(the_line(distance, "central flow")[1], race.distance["discrete", "central"])
    np.testing.assert_array_equal(the_line(distance, "stable flow")[1], race.distance["discrete", "stable"])
    values = race.discrete.series["outputs"]
    which = np.unravel_index(np.argmax(np.ptp(values, axis=0)), values.shape[1:])
    np.testing.assert_array_equal(
        the_line(output, "central flow")[1], race.central.series["outputs"][(slice(None), *which)]
    )
    marks = {
        label: x for axes in figure.axes for label in labels(axes) for x, _ in lines(axes, label) if "step" in label
    }
    assert set(marks) >= {"edge of stability, from step 10", "several directions, from step 25"}
    assert marks["edge of stability, from step 10"] == pytest.approx([10, 10])


def test_overview_shows_what_the_method_adapts(shown):
    figure, runs = shown(4)
    (run,) = runs.values()
    central = run.race.central
    rate = figure.axes[4]
    np.testing.assert_array_equal(the_line(rate, "central flow")[1], central.series["effective_lr"])
    limit = 2 * central.series["effective_lr"] / central.eigenvalues[:, 0]
    np.testing.assert_allclose(the_line(rate, "largest stable learning rate 2/S")[1], limit)
    figure, runs = shown(6)
    (run,) = runs.values()
    nu, gradient = figure.axes[4:]
    series = run.race.central.series
    np.testing.assert_array_equal(the_line(nu, "central flow")[1], series["coordinate_nu"][:, 0])
    np.testing.assert_array_equal(the_line(gradient, "central flow")[1], series["coordinate_grad_sq"][:, 0])
    predicted = the_line(gradient, "predicted time average")[1]
    np.testing.assert_array_equal(predicted, series["predicted_coordinate_grad_sq"][:, 0])


def test_single_weights_and_the_loss_alone(shown):
    figure, runs = shown(1)
    (run,) = runs.values()
    for i, axes in enumerate(figure.axes[2:]):
        np.testing.assert_array_equal(
            the_line(axes, "optimizer, every step")[1], run.race.discrete.series["coordinate_w"][:, i]
        )
    figure, runs = shown(3)
    assert len(figure.axes) == 1
    assert "predicted time average" in labels(figure.axes[0])


def test_acceleration_with_its_ablation_and_inset(shown):
    figure, runs = shown(5)
    loss, rate, sharpness = figure.axes
    found = {
        "central flow, smaller η": runs["fig7-cnn-mse-a"].race.central,
        "central flow, larger η": runs["fig7-cnn-mse-c"].race.central,
        "ablated flow, −(2/S)∇L": runs["fig7-cnn-mse-ablated"].race.ablated,
    }
    assert set(labels(loss)) == set(found)
    (inset,) = loss.child_axes
    assert inset.get_xlim()[1] < N / 2
    for label, run in found.items():
        np.testing.assert_array_equal(the_line(loss, label)[1], run.loss)
        np.testing.assert_array_equal(the_line(rate, label)[1], run.series["effective_lr"])
        np.testing.assert_array_equal(the_line(sharpness, label)[1], run.series["sharpness"])
        t, values = the_line(inset, "_" + label)
        np.testing.assert_array_equal(values, run.loss[: len(t)])
    assert len({line.get_color() for line in loss.lines}) == 3


@pytest.mark.parametrize(
    ("number", "signed"),
    [
        (8, {"cosine of ν(t) and the stationary ν": (1, "stationary_cosine")}),
        (
            9,
            {
                "stationary preconditioner, eq. (12)": (-1, "naive_rate"),
                "without the second term of eq. (12)": (-1, "alternative_rate"),
            },
        ),
        (
            10,
            {
                "central flow": (-1, "loss_rate"),
                "stationary flow, eq. (13)": (-1, "stationary_rate"),
                "naive estimate, without curvature penalty": (-1, "naive_rate"),
            },
        ),
    ],
)
def test_what_was_measured(shown, number, signed):
    figure, runs = shown(number)
    assert len(figure.axes) == len(runs) == 6
    for axes, run in zip(figure.axes, runs.values(), strict=True):
        for label, (sign, name) in signed.items():
            np.testing.assert_array_equal(the_line(axes, label)[1], sign * run.race.central.series[name])
    assert {title.partition(") ")[2] for title in titles(figure)} == {
        f"{network}, {loss}" for network in ("CNN", "ResNet", "ViT") for loss in ("MSE", "CE")
    }


def test_the_stationary_flow_and_its_ablation(shown):
    figure, runs = shown(11)
    assert len(figure.axes) == 18  # three panels for each of six problems
    one, other = runs["fig11-cnn-mse"].race, runs["fig11-cnn-mse-ablated"].race
    loss, rate, sharpness = figure.axes[:3]
    np.testing.assert_array_equal(the_line(loss, "stationary flow")[1], one.runs["stationary"].loss)
    ablated = other.runs["stationary-ablated"]
    label = "the same without curvature penalty"
    np.testing.assert_array_equal(the_line(loss, label)[1], ablated.loss)
    np.testing.assert_array_equal(the_line(rate, label)[1], ablated.series["effective_lr"])
    np.testing.assert_array_equal(the_line(sharpness, label)[1], ablated.series["sharpness"])


@pytest.mark.parametrize("number", [12, 36])
def test_a_grid_has_a_column_for_each_run(shown, number):
    figure, runs = shown(number)
    assert len(figure.axes) == 9
    for letter, (i, run) in zip("abc", enumerate(runs.values()), strict=True):
        loss, _, distance = (figure.axes[3 * row + i] for row in range(3))
        what = f"η = {run.options['lr']:g}" if number == 12 else f"β$_2$ = {run.spec['method']['beta2']:g}"
        assert loss.get_title(loc="left") == f"({letter}) {what}"
        np.testing.assert_array_equal(the_line(loss, "central flow")[1], run.race.central.loss)
        np.testing.assert_array_equal(the_line(distance, "central flow")[1], run.race.distance["discrete", "central"])


def test_learning_rates_in_colours(shown):
    figure, runs = shown(37)
    loss, output, distance = figure.axes
    assert labels(loss) == [f"η = {run.options['lr']:g}" for run in runs.values()]
    for run in runs.values():
        label = f"η = {run.options['lr']:g}"
        np.testing.assert_array_equal(the_line(loss, label)[1], run.race.central.loss)
        np.testing.assert_array_equal(the_line(loss, "_" + label)[1], run.race.discrete.loss)
        np.testing.assert_array_equal(the_line(distance, label)[1], run.race.distance["discrete", "central"])
    assert len(lines(output)) == 2 * len(runs)


def test_smoothness(shown):
    figure, runs = shown(38)
    activation, distance, *rest = figure.axes
    assert len(rest) == 2 * len(runs)
    x = torch.linspace(-3, 3, 301, dtype=torch.float64)
    for run in runs.values():
        beta = run.options["activation"]
        found = the_line(activation, f"β = {beta:g}")
        # Φ by erfc in the library, by torch's own distribution here: rounding
        np.testing.assert_allclose(found[1], x * torch.special.ndtr(beta * x), atol=1e-12)
        np.testing.assert_array_equal(the_line(distance, f"β = {beta:g}")[1], run.race.distance["discrete", "central"])
    same = most_moving(next(iter(runs.values())).race)  # another output may move more at another β
    for axes, run in zip(rest[len(runs) :], runs.values(), strict=True):
        shown_values = the_line(axes, "optimizer, every step")[1]
        np.testing.assert_array_equal(shown_values, run.race.discrete.series["outputs"][:, *same])


def test_missing_runs_are_told_with_the_command_that_makes_them(tmp_path, caplog):
    with pytest.raises(StoreError, match="dvi paper run fig12 --size small"):
        draw(12, tmp_path / "x.png", folder=tmp_path)
    store(tmp_path, table().of_figure(12)[1], 0)
    with caplog.at_level(logging.WARNING, "dvi"):
        draw(12, tmp_path / "x.png", folder=tmp_path)
    (told,) = caplog.messages
    assert "fig12a, fig12c" in told
    assert f"dvi paper run fig12a fig12c --size small --folder {tmp_path}" in told
    assert (tmp_path / "x.png").stat().st_size > 10_000


def test_a_run_with_other_numbers_than_the_table_is_not_drawn_for_it(tmp_path):
    for seed, row in enumerate(table().of_figure(12)):
        store(tmp_path, row, seed)
    row = table().of_figure(12)[1]
    spec = spec_of(row, "small")
    spec["method"]["lr"] *= 2
    write_record(tmp_path, Record(row.name, spec, "done", "SUCCESS"))
    assert list(runs_of(12, folder=tmp_path)) == ["fig12a", "fig12c"]
    assert missing(12, folder=tmp_path) == ["fig12b"]


def test_a_run_that_failed_is_drawn_as_far_as_it_came(tmp_path):
    for seed, row in enumerate(table().of_figure(12)):
        store(tmp_path, row, seed, state="failed" if row.panel == "c" else "done")
    figure = drawers()["12"](runs_of(12, folder=tmp_path))
    remarks = [[text.get_text() for text in axes.texts] for axes in figure.axes[:3]]
    assert "ends at 40: diverged" in remarks[2]
    assert not any("ends" in text for texts in remarks[:2] for text in texts)


def race_of(row, apart):
    """A made-up comparison: 4.6 is the largest eigenvalue of the optimizer, at t = 22; the flow's edge is at t = 10."""
    runs = {name: solution(name, row, i) for i, name in enumerate(row.runs)}
    eigenvalues = np.full((N, 2), np.nan)
    eigenvalues[::2] = 1.9
    eigenvalues[22, 0] = 4.6
    eigenvalues[4, 0] = 7.0  # before the edge: counts for nothing
    runs["discrete"].eigenvalues = eigenvalues
    runs["central"].about["unit_steps"] = [[12.0, 19.0], [30.0, 38.0]]
    distance = {("discrete", "central"): np.full(N, apart), ("discrete", "stable"): np.full(N, 1.0)}
    return dvi.Comparison(T, runs, distance, dvi.Status.SUCCESS, [], {"dim": 123})


@pytest.mark.parametrize(
    ("name", "apart", "cost", "remarks"),
    [
        ("fig12a", 0.3, 59.0, []),
        (
            "fig12a",
            0.5,
            61.0,
            ["0.50 of the stable flow's distance: 12 steps past the edge", "at 2.3 times", "15 of 40"],
        ),
        ("fig12c", 0.5, 59.0, []),  # the largest learning rate
        ("fig16a", 0.5, 59.0, []),  # cross-entropy
    ],
)
def test_dear_and_distant_runs_are_remarked(name, apart, cost, remarks):
    row = table().experiments[name]
    seen = summarise(race_of(row, apart))
    assert seen["peak"] == [12.0, pytest.approx(2.3)]
    assert seen["unit_steps"] == 15.0
    seen["gradient_equivalents"]["central"] = cost
    (line,) = list(markdown([row], "small", [Record(name, {}, "done", "SUCCESS", summary=seen)]))[2:]
    remark = line.split("|")[-2].strip()
    assert bool(remark) == bool(remarks)
    for words in remarks:
        assert words in remark


def test_a_late_edge_is_remarked():
    row = table().experiments["fig12a"]
    seen = summarise(race_of(row, 0.5))
    remarks = []
    for seen["edge"] in (13.0, 14.0):  # of 40 steps
        (line,) = list(markdown([row], "small", [Record("fig12a", {}, "done", "SUCCESS", summary=seen)]))[2:]
        remarks.append("the edge comes late, at step 14 of 40" in line)
    assert remarks == [False, True]


def test_from_the_shell(folder, tmp_path, capsys):
    for name in ("fig8.pdf", "fig8.png"):
        assert main(["paper", "figure", "8", "--out", str(tmp_path / name), "--folder", str(folder)]) == 0
        assert capsys.readouterr().out.strip() == str(tmp_path / name)
    assert (tmp_path / "fig8.pdf").read_bytes().startswith(b"%PDF")
