"""What is drawn, of complete, partial and unfinished results."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import dvi
from dvi.problems import Ledger
from dvi.results.solution import Cost

pytest.importorskip("matplotlib")

from dvi.plotting import plot_comparison, plot_solution, time_average

N = 121


def run(name, n=N, adaptive=True, k=2):
    """A made-up run of n steps that enters the edge of stability at step 20."""
    t = np.arange(n, dtype=float)
    edge = t >= 20
    swing = edge * 0.02 * (1 + np.sin(t / 3))
    loss = np.exp(-t / 60) + (swing if name == "discrete" else 0)
    table = np.full((n, 3), np.nan)
    if name == "discrete":
        table[::5, 0] = 2 + 0.1 * np.sin(t[::5])
    elif name == "stable":
        table[::5, 0] = 1.5 + t[::5] / 20
    else:
        table[:, 0] = np.minimum(2, 1.5 + t / 40)
        table[30:, 1] = 1.8
    series = {"grad_sq": loss**2, "effective_lr": 0.1 + 0.001 * t if adaptive else np.full(n, 0.1)}
    series |= {"trace": 0.0 * t if name == "stable" else 1e-5 * (1 + swing)}
    if name == "discrete":
        series |= {"step_length": 0.1 + swing}
    else:
        series |= {"predicted_grad_sq": loss**2 + (swing if name == "central" else 0), "loss_rate": -loss / 60}
    return dvi.Solution(
        name=name,
        t=t,
        loss=loss,
        predicted_loss=np.full(n, np.nan)
        if name == "discrete"
        else loss + (0.02 * edge if name in ("central", "map") else 0),
        eigenvalues=table,
        X=[np.eye(k)] * n,
        w=torch.zeros(4),
        nu={},
        breakpoints=[(20.0, "enter", 1), (35.0, "enter", 2), (70.0, "leave", 1)]
        if name == "central" and n > 70
        else [],
        status=dvi.Status.SUCCESS,
        ledger=Cost(t, [{"gradients": i} for i in range(n)], Ledger(gradients=n)),
        series=series,
        notes=[],
        about={"method": "RMSProp(lr=0.002, beta2=0.99, eps=0.0, bias_correction=True)"},
    )


def race(names=("discrete", "central", "stable"), n=N, status=dvi.Status.SUCCESS, **options):
    runs = {name: run(name, n, **options) for name in names}
    t = np.arange(n, dtype=float)
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    about = {
        "method": "RMSProp(lr=0.002, beta2=0.99, eps=0.0, bias_correction=True)",
        "problem": "ModuleProblem('digits-mlp-mse', dim=3466, dtype=torch.float64, device='cpu')",
        "steps": float(N - 1),
    }
    return dvi.Comparison(t, runs, {pair: 0.01 * t for pair in pairs}, status, [], about)


def titles(figure):
    return [axes.get_title(loc="left") for axes in figure.axes]


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()] if figure.legends else []


def drawn(figure, panel, label):
    """The line of a label in the panel of that number."""
    (line,) = [line for line in figure.axes[panel].lines if line.get_label() == label]
    return line


@pytest.mark.parametrize(
    ("adaptive", "last"), [(True, "(d) effective learning rate"), (False, "(d) size of the oscillations")]
)
def test_four_panels_with_labels_and_units(adaptive, last):
    figure = plot_comparison(race(adaptive=adaptive))
    assert titles(figure) == ["(a) train loss", "(b) effective eigenvalues", "(c) distance in weight space", last]
    assert all(axes.get_xlabel() == "time (optimizer steps)" for axes in figure.axes)
    assert all("(" in axes.get_ylabel() for axes in figure.axes)  # units
    assert set(legend(figure)) == {
        "optimizer, every step",
        "optimizer, averaged (σ = 12 steps)",
        "predicted time average",
        "central flow",
        "stable flow",
        "optimizer, every 5 steps",
        "edge of stability, from step 20",
    }
    assert figure.get_suptitle() == (
        "RMSProp (η = 0.002, β$_2$ = 0.99, bias-corrected) on digits-mlp-mse (3466 weights)"
    )


@pytest.mark.parametrize(
    ("about", "line"),
    [
        ({}, None),
        ({"warm_start": 0.0}, None),
        ({"warm_start": 1.0}, "time 0 is after 1 step of warm start"),
        ({"warm_start": 12.0}, "time 0 is after 12 steps of warm start"),
    ],
)
def test_title_tells_the_warm_start(about, line):
    result = race()
    result.about |= about
    assert plot_comparison(result).get_suptitle().split("\n")[1:] == ([line] if line else [])
    result.about = about
    assert plot_comparison(result).get_suptitle() == (line or "")


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (
            "RMSPropNorm(lr=0.1, beta2=0.9, eps=1e-08, bias_correction=False)",
            "RMSProp-Norm (η = 0.1, β$_2$ = 0.9, ε = 1e-08)",
        ),
        ("RMSProp(lr=<function f>, beta2=0.9, eps=0)", "RMSProp (η scheduled, β$_2$ = 0.9)"),
        ("HeavyBall(lr=0.5, beta1=0.9, m=2)", "Heavy ball (η = 0.5, β$_1$ = 0.9, m=2)"),
        ("Shampoo(lr=0.1, shapes=((8, 4), (8,)), beta2=1.0, one_sided=False)", "Shampoo (η = 0.1, β$_2$ = 1.0)"),
        ("AdaGrad(lr=0.1, eps=0.0)", "AdaGrad (η = 0.1)"),
        ("MyOwn(lr=0.1)", "My Own (η = 0.1)"),
        ("Mine", "Mine"),
    ],
)
def test_methods_in_words(method, words):
    result = race()
    result.about = {"method": method}
    assert plot_comparison(result).get_suptitle() == words


def test_lines_hold_the_data():
    result = race()
    figure = plot_comparison(result, sigma=3)
    np.testing.assert_array_equal(drawn(figure, 0, "central flow").get_ydata(), result.central.loss)
    predicted = drawn(figure, 0, "predicted time average")
    np.testing.assert_array_equal(predicted.get_ydata(), result.central.predicted_loss)
    averaged = drawn(figure, 0, "optimizer, averaged (σ)").get_ydata()
    inner = np.isfinite(averaged)
    np.testing.assert_allclose(averaged[inner], result.smoothed(sigma=3)[inner])
    assert inner.sum() == N - 2 * 3
    np.testing.assert_array_equal(drawn(figure, 2, "stable flow").get_ydata(), result.distance["discrete", "stable"])
    assert not [line for line in figure.axes[2].lines if np.array_equal(line.get_ydata(), result.central.loss)]
    looks = drawn(figure, 1, "optimizer, every 5 steps")
    np.testing.assert_array_equal(looks.get_xdata(), np.arange(0, N, 5))
    assert "up to 7.5" in " ".join(text.get_text() for text in figure.axes[1].texts)


@pytest.mark.parametrize(
    "names", [("discrete", "central", "stable"), ("discrete", "map", "stable"), ("map", "ablated")]
)
def test_every_process_has_its_own_dash_or_width_and_brightness(names):
    """Readers who see no colours tell the lines apart, and the flow from what it predicts."""
    import matplotlib.colors

    figure = plot_comparison(race(names))
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    looks, brightness = set(), {}
    for label, line in lines.items():
        brightness[label] = float(np.dot(matplotlib.colors.to_rgb(line.get_color()), [0.299, 0.587, 0.114]))
        looks.add((line.get_linestyle(), line.get_linewidth(), round(brightness[label], 1)))
    assert len(looks) == len(lines) >= len(names)
    predicting = next(label for label in ("central flow", "central map") if label in lines)
    assert abs(brightness[predicting] - brightness["predicted time average"]) > 0.2


def test_legend_overlaps_no_panel():
    figure = plot_comparison(race())
    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer()
    box = figure.legends[0].get_window_extent(renderer)
    assert not any(box.overlaps(axes.get_tightbbox(renderer)) for axes in figure.axes)
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.x1


@pytest.mark.parametrize(
    "names",
    [("discrete",), ("central",), ("stable",), ("discrete", "central"), ("central", "stable"), ("discrete", "stable")],
)
@pytest.mark.parametrize("n", [0, 1, 2, N])
def test_subsets_and_lengths(names, n):
    figure = plot_comparison(race(names, n=n, status=dvi.Status.RUNNING))
    figure.draw_without_rendering()
    assert "unfinished: step" in figure.get_suptitle()
    assert ("Nothing recorded yet." in " ".join(t.get_text() for a in figure.axes for t in a.texts)) == (n == 0)


def test_unequal_lengths_and_gaps():
    result = race(status=dvi.Status.DIVERGED)
    result.runs["stable"] = run("stable", n=60)
    result.runs["discrete"].loss[40:45] = np.nan
    result.distance["discrete", "stable"] = result.distance["discrete", "stable"][:60]
    result.runs["central"].eigenvalues[:] = np.nan
    figure = plot_comparison(result)
    figure.draw_without_rendering()
    assert figure.axes[0].get_xlim() == (0, N - 1)
    assert "(diverged)" in figure.get_suptitle()


def test_all_nan_draws_nothing_and_does_not_fail():
    result = race()
    for name, solution in result.runs.items():
        nothing = np.full(N, np.nan)
        series = {key: np.full(N, np.nan) for key in solution.series}
        result.runs[name] = replace(
            solution, loss=nothing, predicted_loss=nothing, eigenvalues=np.full((N, 0), np.nan), series=series
        )
    result.distance = {pair: np.full(N, np.nan) for pair in result.distance}
    assert plot_comparison(result).axes[0].texts[0].get_text() == "Nothing recorded yet."


def test_scale_of_the_loss():
    result = race()
    assert plot_comparison(result).axes[0].get_yscale() == "linear"
    for solution in result.runs.values():
        solution.loss[:] = solution.loss**3
    assert plot_comparison(result).axes[0].get_yscale() == "log"


def test_common_power_of_ten_is_in_the_label():
    axes = plot_comparison(race(adaptive=False)).axes[3]
    assert axes.get_ylabel() == "tr Σ (10$^{-5}$ units of w²)"
    assert axes.yaxis.get_major_formatter()(1e-5, 0) == "1"


def test_average_leaves_gaps_out():
    solution = run("discrete")
    values = np.ones(N)
    values[50:60] = np.nan
    np.testing.assert_allclose(time_average(solution, values, 5.0), 1.0)
    assert np.isnan(time_average(solution, np.full(N, np.nan), 5.0)).all()


def test_single_solution_shows_the_gradient():
    figure = plot_solution(run("central"))
    assert titles(figure) == [
        "(a) train loss",
        "(b) effective eigenvalues",
        "(c) squared gradient norm",
        "(d) effective learning rate",
    ]


@pytest.mark.parametrize("name", ["central", "map", "stable", "ablated", "stationary", "mine"])
def test_a_flow_is_called_by_its_own_name(name):
    """Nothing in the picture of one flow speaks of another."""
    told = " ".join(legend(plot_solution(replace(run("central"), name=name))))
    assert name in told
    assert not [
        other for other in ("central flow", "stable flow", "ablated flow") if name not in other and other in told
    ]


def test_a_remark_covers_no_line():
    """How far the stable flow goes is said outside the axes, wherever it leaves them."""
    for rise in (5, 20, 60):
        result = race()
        result.stable.eigenvalues[::5, 0] = 1.5 + np.arange(0, N, 5) / rise
        axes = plot_comparison(result).axes[1]
        axes.figure.draw_without_rendering()
        said = [text for text in axes.texts if text.get_text()]
        assert "up to" in said[0].get_text()
        assert not any(text.get_window_extent().overlaps(axes.get_window_extent()) for text in said)


@pytest.mark.parametrize(("ending", "head"), [("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml")])
def test_files(tmp_path, ending, head):
    path = tmp_path / "new folder" / f"race.{ending}"
    race().plot(path)
    assert path.read_bytes().startswith(head)
    if ending == "png":
        from matplotlib.image import imread

        assert imread(path).shape[1] == round(7.2 * 200)


def test_shows_itself_in_a_notebook():
    assert plot_comparison(race())._repr_html_().startswith('<img src="data:image/png;base64,')


def test_a_run_that_diverged():
    result = race(("discrete",), status=dvi.Status.DIVERGED)
    result.discrete.loss[-60:] = 10.0 ** np.arange(3, 303, 5)
    figure = plot_comparison(result)
    figure.draw_without_rendering()
    assert figure.axes[0].get_yscale() == "log"
    assert figure.axes[0].get_ylim()[1] < 1e110


def test_wrong_options(tmp_path):
    with pytest.raises(ValueError, match="sigma=0 must be positive, in unit times"):
        plot_comparison(race(), sigma=0)
    with pytest.raises(ValueError, match="width=-1 must be positive"):
        plot_comparison(race(), width=-1)
    with pytest.raises(ValueError, match="xyz"):
        plot_comparison(race(), tmp_path / "race.xyz")


def test_leaves_the_users_matplotlib_alone():
    """Neither pyplot nor a changed setting is left behind."""
    code = """
import sys, matplotlib
def settings():
    return {name: matplotlib.rcParams[name] for name in matplotlib.rcParams if name != "backend"}
before = settings()
sys.path.insert(0, "tests")
import test_plot
test_plot.plot_comparison(test_plot.race())._repr_html_()
assert "matplotlib.pyplot" not in sys.modules
assert settings() == before
"""
    root = Path(__file__).parents[1]
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=60, cwd=root)


def test_missing_matplotlib_says_what_to_install():
    code = "import sys; sys.modules['matplotlib'] = None; import dvi.plotting"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "pip install 'dvi-flows[plot]'" in done.stderr


def test_a_real_run(tmp_path):
    problem = dvi.problems.digits(network="mlp", loss="mse", n=20, classes=3, width=4)
    method = dvi.methods.GradientDescent(lr=0.05)
    result = dvi.compare(problem, method, steps=6, check=False, progress=False)
    figure = result.plot(tmp_path / "race.png")
    assert titles(figure)[:3] == ["(a) train loss", "(b) effective eigenvalues", "(c) distance in weight space"]
    assert "Gradient descent (η = 0.05)" in figure.get_suptitle()
    result.central.plot(tmp_path / "central.png")
