"""The paper's figures: the layouts of their panels.

Each function draws one layout, for one figure or several.  The panels are those of :mod:`dvi.plotting`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from dvi.paper.drawing import draws
from dvi.paper.stored import Stored
from dvi.plotting import arrange
from dvi.plotting.curves import (
    Curve,
    coordinate_gradient,
    coordinate_nu,
    coordinate_weight,
    curves,
    learning_rate_and_limit,
    most_moving,
    output,
    top_curvature,
    with_edges,
)
from dvi.plotting.panels import Panel, component, distances, duration, eigenvalues, in_layers, loss
from dvi.plotting.style import COLOURS, Look
from dvi.problems.networks.activations import make_activation
from dvi.results.comparison import Comparison
from dvi.results.solution import Solution
from dvi.results.status import Status
from dvi.solvers.eigen.block_method import CRITICAL

Runs = Mapping[str, Stored]

_NETWORKS = {"cnn": "CNN", "resnet": "ResNet", "vit": "ViT", "transformer": "transformer", "rnn": "RNN"}
_METHODS = {"gd": "gradient descent", "rmsprop-norm": "RMSProp-Norm", "rmsprop": "RMSProp"}
_RATE_DECADES = 1.0  # of the axis; rates fall by more early on, but the late ones must be readable
_LEADING = 6  # number of eigenvalues drawn for each process


# ---- one run: Figs. 1–4 and 6 ---------------------------------------------------------------------------


@draws(2, 4, 6)
def overview(runs: Runs) -> Any:
    """A run beside its flows: loss, eigenvalues, distances, an output, and the quantities that the method adapts."""
    (run,) = runs.values()
    race, sigma = in_layers(run.race), _sigma(runs)
    panels = [*_usual(run, race, sigma), output(race, sigma)]
    if run.row.method == "rmsprop-norm":
        panels.append(learning_rate_and_limit(race))
    elif run.row.method == "rmsprop":
        panels += [coordinate_nu(race), coordinate_gradient(race, sigma)]
    marked = [with_edges(race, _brief(panel)) for panel in panels if panel]
    columns = 2 if len(marked) <= 4 else 3
    return arrange(_rows(marked, columns), sigma=sigma, title=_title(run))


@draws(1)
def weights(runs: Runs) -> Any:
    """The loss of a run, the network's output and single weights, which oscillate about the flow."""
    (run,) = runs.values()
    race, sigma = in_layers(run.race), _sigma(runs)
    panels = [loss(race, sigma), output(race, sigma), *(coordinate_weight(race, sigma, i) for i in (0, 1))]
    return arrange(_rows([_brief(panel) for panel in panels if panel], 2), sigma=sigma, title=_title(run))


@draws(3)
def curve(runs: Runs) -> Any:
    """The train loss alone: every step, its average, the central flow's, and the average that the flow predicts."""
    (run,) = runs.values()
    panel = loss(in_layers(run.race), _sigma(runs))
    return arrange(
        [[panel and with_edges(run.race, panel)]], sigma=_sigma(runs), title=_title(run), width=5, row_height=3.4
    )


# ---- flows side by side: Figs. 5, 7 and 11 --------------------------------------------------------------


@draws(5, 7)
def acceleration(runs: Runs) -> Any:
    """Central flows at several learning rates and the flow without curvature penalty: loss, step size, sharpness."""
    grid = []
    for problem, group in _groups(runs).items():
        lines = []
        central = [run for run in group if "central" in run.race.runs]
        for colour, run in zip(COLOURS, central, strict=False):
            lines.append((run.race.runs["central"], _line(f"central flow, {_learning_rate(group, run)}", colour)))
        lines += [
            (run.race.runs["ablated"], _line("ablated flow, −(2/S)∇L", "black"))
            for run in group
            if "ablated" in run.race.runs
        ]
        grid.append(_three(_of_problem(problem), lines, "step size", "learning rate η/√ν"))
    return arrange(grid, sigma=_sigma(runs), title="RMSProp-Norm: acceleration via regularization", letters=False)


@draws(11)
def stationary(runs: Runs) -> Any:
    """The stationary flow and its ablation: loss, harmonic mean of the learning rates, sharpness; a row per problem."""
    looks = {
        "stationary": _line("stationary flow", COLOURS[0]),
        "stationary-ablated": _line("the same without curvature penalty", COLOURS[1]),
    }
    grid = []
    for problem, group in _groups(runs).items():
        found = [(run.race.runs[name], look) for name, look in looks.items() for run in group if name in run.race.runs]
        grid.append(_three(_of_problem(problem), found, "mean learning rate", "harmonic mean"))
    return arrange(grid, sigma=_sigma(runs), title="RMSProp: the stationary flow and its ablation", letters=False)


def _three(name: str, lines: list[tuple[Solution, Look]], rate: str, label: str) -> list[Panel | None]:
    """Loss with an inset of its beginning, learning rate, and sharpness."""
    until = max((float(run.t[-1]) for run, _ in lines), default=1.0)
    panels = (
        curves(
            f"{name}: train loss",
            "train loss L",
            [Curve(run.t, run.loss, look) for run, look in lines],
            inset=until / 8,
        ),
        curves(rate, label, [Curve(run.t, run.series["effective_lr"], look) for run, look in lines]),
        curves("sharpness", "S(w)", [Curve(run.t, top_curvature(run), look) for run, look in lines]),
    )
    return [panel and replace(panel, until=until) for panel in panels]


# ---- ν and its stationary value: Figs. 8–10 -------------------------------------------------------------


@draws(8)
def cosine(runs: Runs) -> Any:
    """The cosine of ν(t) and its stationary value along the central flow; a panel per problem."""
    look = _line("cosine of ν(t) and the stationary ν", "black")
    return _measured(runs, "Does ν become stationary?", "cosine", {"stationary_cosine": look}, sign=1.0)


@draws(9)
def suboptimal(runs: Runs) -> Any:
    """The rate at which the loss falls with RMSProp's stationary preconditioner, and with the alternative one."""
    looks = {
        "naive_rate": _line("stationary preconditioner, eq. (12)", COLOURS[1]),
        "alternative_rate": _line("without the second term of eq. (12)", COLOURS[2]),
    }
    return _measured(runs, "How fast two preconditioners let the loss fall", "‖∇L‖²$_{P^{-1}}$ (loss/step)", looks)


@draws(10)
def prediction(runs: Runs) -> Any:
    """The rate at which the loss falls along the central flow, and two estimates of it from w alone."""
    looks = {
        "loss_rate": _line("central flow", COLOURS[0]),
        "stationary_rate": _line("stationary flow, eq. (13)", COLOURS[2]),
        "naive_rate": _line("naive estimate, without curvature penalty", COLOURS[1], ls=(0, (3, 2))),
    }
    return _measured(runs, "How fast the loss falls, and what w alone tells of it", "−dL/dt (loss/step)", looks)


def _measured(runs: Runs, title: str, label: str, looks: dict[str, Look], sign: float = -1.0) -> Any:
    panels = []
    for run in runs.values():
        central = run.race.runs["central"]
        none = np.full(len(central.t), np.nan)
        lines = [Curve(central.t, sign * central.series.get(name, none), look) for name, look in looks.items()]
        panel = curves(_of_problem(run.row.problem), label, lines, decades=_RATE_DECADES)
        if panel:
            panels.append(replace(with_edges(run.race, panel, timed=False), until=duration(run.race) or 1))
    columns = min(3, max(1, len(panels)))
    width = {1: 4.2, 2: 6.4}.get(columns, 7.2)
    return arrange(_rows(panels, columns), sigma=_sigma(runs), title=f"RMSProp: {title}", width=width, row_height=2.4)


# ---- the grids: Figs. 12–36 -----------------------------------------------------------------------------


@draws(*range(12, 37))
def family(runs: Runs) -> Any:
    """Loss, eigenvalues and distances; a column per learning rate (or β₂)."""
    first, sigma = next(iter(runs.values())), _sigma(runs)
    columns: list[list[Panel | None]] = []
    for letter, run in zip("abcdefgh", runs.values(), strict=False):
        race = in_layers(run.race)
        marked = [panel and with_edges(race, _brief(panel), timed=False) for panel in _usual(run, race, sigma)]
        panels = [panel and replace(panel, title="", xlabel="") for panel in marked]
        if panels[0]:
            panels[0] = replace(panels[0], title=f"({letter}) {_settings(run)}", remark=_ended(run))
        if panels[-1]:
            panels[-1] = replace(panels[-1], xlabel="time (optimizer steps)")
        if columns:  # only the first column labels its vertical axes
            panels = [panel and replace(panel, label="") for panel in panels]
        columns.append(panels)
    return arrange(_turned(columns), sigma=sigma, title=_title(first, settings=False), letters=False)


# ---- what the accuracy depends on: Figs. 37 and 38 ------------------------------------------------------


@draws(37)
def learning_rates(runs: Runs) -> Any:
    """Loss, an output and the accumulated distance at several learning rates, each in its colour."""
    panels = [panel and replace(panel, until=_duration(runs)) for panel in _side_by_side(runs)]
    first = next(iter(runs.values()))
    title = f"{_title(first, settings=False)}; pale: the optimizer, dark: its central flow"
    return arrange([panels], sigma=_sigma(runs), title=title, row_height=2.8)


@draws(38)
def smoothness(runs: Runs) -> Any:
    """The β-GELU, the distance for several β, and for each β loss and an output."""
    first, sigma = next(iter(runs.values())), _sigma(runs)
    x = np.linspace(-3, 3, 301)
    shapes = []
    for colour, run in zip(_colours(len(runs)), runs.values(), strict=True):
        values = make_activation(run.options["activation"])(torch.from_numpy(x)).numpy()
        shapes.append(Curve(x, values, _line(_settings(run), colour)))
    activation = curves("activation x Φ(βx)", "activation", shapes, xlabel="x")
    columns: list[list[Panel | None]] = []
    which = most_moving(first.race)  # the same output for all runs
    for run in runs.values():
        race = in_layers(run.race)
        found = [loss(race, sigma), output(race, sigma, which)]
        panels = [panel and replace(_brief(panel), title="", until=duration(race) or 1) for panel in found]
        if panels[0]:
            panels[0] = replace(panels[0], title=_settings(run), remark=_ended(run), xlabel="")
        columns.append([panel and replace(panel, label="") for panel in panels] if columns else panels)
    lower = _turned(columns)
    apart = _side_by_side(runs)[-1]
    upper = [activation, apart and replace(apart, until=_duration(runs))]
    width = max(7.2, 1.9 * len(runs))
    grid = [[*upper, *[None] * (len(runs) - 2)], *lower]
    return arrange(grid, sigma=sigma, title=_title(first, settings=False), letters=False, width=width)


def _side_by_side(runs: Runs) -> list[Panel | None]:
    """Loss, an output and the distance of optimizer and central flow, each run in its colour."""
    losses, outputs, apart = [], [], []
    which = most_moving(list(runs.values())[-1].race)  # the same output for all runs
    for colour, run in zip(_colours(len(runs)), runs.values(), strict=True):
        name, race = _settings(run), run.race
        for process in ("discrete", "central"):
            if process not in race.runs:
                continue
            one = race.runs[process]
            pale = _line(f"_{name}", colour, lw=0.6, alpha=0.4)
            look = pale if process == "discrete" else _line(name, colour)
            losses.append(Curve(one.t, one.loss, look))
            if which is not None:
                outputs.append(Curve(one.t, component(one.series["outputs"], which), look))
        if ("discrete", "central") in race.distance:
            apart.append(Curve(race.t, race.distance["discrete", "central"], _line(name, colour)))
    return [
        curves("train loss", "train loss L", losses),
        curves("network output", "output (on a test example)", outputs, log=False),
        curves("accumulated distance", "‖w$_t$ − w(t)‖", apart, zero=True, log=False),
    ]


# ---- words and numbers ----------------------------------------------------------------------------------


def _usual(run: Stored, race: Comparison, sigma: float) -> list[Panel | None]:
    """Loss, eigenvalues and distances."""
    return [loss(race, sigma), _spectrum(run, race), distances(race)]


def _brief(panel: Panel) -> Panel:
    """The panel without remark and units: these figures have many small panels, and their page explains them."""
    return replace(panel, remark="", label=panel.label.partition(" (")[0])


def _spectrum(run: Stored, race: Comparison) -> Panel | None:
    """Eigenvalues against their threshold: of H or H/√ν (and 2/η), or of P⁻¹H (and 2), depending on the method."""
    if run.row.method == "rmsprop":
        panel, critical, name = eigenvalues(race, _LEADING), CRITICAL, "2"
    else:
        of = "Hessian eigenvalue" if run.row.method == "gd" else "eigenvalue of H/√ν"
        lr = float(run.options["lr"])
        panel, critical, name = eigenvalues(race, _LEADING, 1 / lr, of), CRITICAL / lr, "2/η"
    if panel is None:
        return None

    def draw(axes: Any) -> None:
        panel.draw(axes)
        place = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "va": "center"}
        axes.annotate(name, (1, critical), xytext=(2, 0), fontsize="small", color="0.4", **place)

    return replace(panel, draw=draw)


def _sigma(runs: Runs) -> float:
    """The width of time averages: the paper's 50 steps, or a tenth of the run if that is less."""
    return min(50.0, _duration(runs) / 10)


def _duration(runs: Runs) -> float:
    return max((duration(run.race) for run in runs.values()), default=0.0) or 1.0


def _groups(runs: Runs) -> dict[str, list[Stored]]:
    """The runs by problem, in order."""
    found: dict[str, list[Stored]] = {}
    for run in runs.values():
        found.setdefault(run.row.problem, []).append(run)
    return found


def _of_problem(name: str) -> str:
    """``cnn-mse-4`` as "CNN, MSE"."""
    network, loss, *_ = name.split("-")
    return f"{_NETWORKS.get(network, network)}, {loss.upper()}"


def _settings(run: Stored) -> str:
    """The setting in which a run differs from the others of its figure."""
    options = run.options
    if "activation" in options:
        return f"β = {options['activation']:g}"
    if "36" in run.row.figures:
        return f"β$_2$ = {options.get('beta2', run.spec['method'].get('beta2')):g}"
    return f"η = {options['lr']:g}"


def _learning_rate(group: list[Stored], run: Stored) -> str:
    """The label of a learning rate: its place in the group ("smaller η"), since the values differ between problems."""
    rates = sorted({float(other.options["lr"]) for other in group})
    names = {1: ["η"], 2: ["smaller η", "larger η"], 3: ["smallest η", "middle η", "largest η"]}
    return names.get(len(rates), [f"η = {rate:g}" for rate in rates])[rates.index(float(run.options["lr"]))]


def _title(run: Stored, settings: bool = True) -> str:
    """Problem, method and size of a figure."""
    method = _METHODS.get(run.row.method, run.row.method)
    words = f"{method[0].upper()}{method[1:]} on a {_of_problem(run.row.problem)}"
    words += f" ({int(run.race.about['dim'])} weights)" if "dim" in run.race.about else ""
    return f"{words}, {_settings(run)}" if settings else words


def _ended(run: Stored) -> str:
    """How a run ended; "" if it reached its end."""
    if run.race.status is Status.SUCCESS:
        return ""
    return f"ends at {duration(run.race):g}: {run.race.status.name.lower().replace('_', ' ')}"


def _line(label: str, colour: str, **options: Any) -> Look:
    return label, {"color": colour, "lw": 1.3, **options}


def _colours(count: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]


def _rows(panels: list[Panel], columns: int) -> list[list[Panel | None]]:
    return [list(panels[i : i + columns]) for i in range(0, len(panels), columns)]


def _turned(columns: list[list[Panel | None]]) -> list[list[Panel | None]]:
    return [list(row) for row in zip(*columns, strict=True)]
