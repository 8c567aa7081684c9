"""How well central flows predict optimizers on real data: the tables of the README and of docs/zoo.md.

``python benchmarks/agreement.py [--methods] [--only NAME …]`` runs every case (about a quarter of an hour on two cores)
and prints a Markdown table: problems of several kinds, or with ``--methods`` every method on one problem.  In each row
the optimizer, its central flow and its stable flow start from one point after a warm start.  Measurements begin at the
first breakpoint of the central flow.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import dvi
from dvi.methods import (
    Adafactor,
    AdaGrad,
    AdaGradNorm,
    Adam,
    AdamW,
    CentredRMSProp,
    GradientDescent,
    HeavyBall,
    NAdam,
    Nesterov,
    NormalizedGD,
    QuasiHyperbolic,
    RMSProp,
    RMSPropNorm,
)
from dvi.plotting import time_average
from dvi.problems import digits, sorting

ADAM_LIKE = {"eps": 1e-8, "bias_correction": True}
#: A problem that takes options such as derivatives=, a method, and the number of steps.
Case = tuple[Callable[..., dvi.Problem], dvi.Method, int]

CASES: dict[str, Case] = {
    "digits MLP, MSE, GD 0.2": (lambda **o: digits("mlp", "mse", n=300, width=32, **o), GradientDescent(0.2), 1000),
    "digits MLP, MSE, RMSProp-Norm 0.1": (
        lambda **o: digits("mlp", "mse", n=300, width=32, **o), RMSPropNorm(0.1, 0.99, **ADAM_LIKE), 600,
    ),
    "digits MLP, MSE, RMSProp 1e-3": (
        lambda **o: digits("mlp", "mse", n=300, width=32, **o), RMSProp(1e-3, 0.99, **ADAM_LIKE), 600,
    ),
    "digits MLP, CE, GD 0.7": (lambda **o: digits("mlp", "ce", n=300, width=32, **o), GradientDescent(0.7), 1000),
    "digits MLP, CE, GD 1.5": (lambda **o: digits("mlp", "ce", n=300, width=32, **o), GradientDescent(1.5), 600),
    "digits MLP, CE, RMSProp 1e-3": (
        lambda **o: digits("mlp", "ce", n=300, width=32, **o), RMSProp(1e-3, 0.99, **ADAM_LIKE), 400,
    ),
    "digits (4 classes) MLP, MSE, GD 0.3": (
        lambda **o: digits("mlp", "mse", n=300, width=32, classes=4, **o), GradientDescent(0.3), 1000,
    ),
    "digits CNN, MSE, GD 0.5": (lambda **o: digits("cnn", "mse", n=100, width=6, **o), GradientDescent(0.5), 300),
    "digits CNN, MSE, RMSProp 5e-4": (
        lambda **o: digits("cnn", "mse", n=100, width=6, **o), RMSProp(5e-4, 0.99, **ADAM_LIKE), 300,
    ),
    "sorting transformer, MSE, GD 0.02": (
        lambda **o: sorting("transformer", "mse", n=100, width=12, depth=2, **o), GradientDescent(0.02), 400,
    ),
    "sorting transformer, CE, RMSProp 5e-4": (
        lambda **o: sorting("transformer", "ce", n=100, width=12, depth=2, **o), RMSProp(5e-4, 0.99, **ADAM_LIKE), 150,
    ),
}  # fmt: skip


def digits_mlp(seed: int = 0, **options: Any) -> dvi.Problem:
    """The problem for all methods."""
    return digits("mlp", "mse", n=300, width=32, seed=seed, **options)


class GradientDescentW(GradientDescent):
    """SGD with weight decay; ``torch.optim.SGD`` adds λw to the gradient, which is the same without momentum."""

    weight_decay: float = 0.0

    def decay(self) -> float:
        """ηλ."""
        return float(self.lr * self.weight_decay)


#: One method for each row; with these learning rates, several eigenvalues reach the edge early.
METHODS: dict[str, Case] = {
    "GD 0.2": (digits_mlp, GradientDescent(0.2), 600),
    "RMSProp-Norm 0.1": (digits_mlp, RMSPropNorm(0.1, 0.99, **ADAM_LIKE), 400),
    "RMSProp 1e-3": (digits_mlp, RMSProp(1e-3, 0.99, **ADAM_LIKE), 400),
    "AdaGrad 0.01": (digits_mlp, AdaGrad(0.01), 300),
    "AdaGrad-Norm 1": (digits_mlp, AdaGradNorm(1.0), 400),
    "centred RMSProp 1e-3": (digits_mlp, CentredRMSProp(1e-3, 0.99, eps=1e-8), 200),
    "Adafactor 1e-3": (digits_mlp, Adafactor(1e-3, digits_mlp().shapes), 200),
    "normalised GD 0.05": (digits_mlp, NormalizedGD(0.05), 200),
    "heavy ball 0.25, β = 0.5": (digits_mlp, HeavyBall(0.25, 0.5), 400),
    "heavy ball 0.3, β = 0.9": (digits_mlp, HeavyBall(0.3, 0.9), 300),
    "Nesterov 0.1, β = 0.9": (digits_mlp, Nesterov(0.1, 0.9), 300),
    "quasi-hyperbolic 0.3, β = 0.9, n = 0.5": (digits_mlp, QuasiHyperbolic(0.3, 0.9, 0.5), 300),
    "Adam 3e-3, β₁ = 0.5": (digits_mlp, Adam(3e-3, 0.5, 0.99), 300),
    "Adam 1e-2, β₁ = 0.9": (digits_mlp, Adam(1e-2, 0.9, 0.99), 300),
    "GD 0.2, weight decay 1e-3": (digits_mlp, GradientDescentW(0.2, 1e-3), 600),
    "AdamW 3e-3, β₁ = 0.5, weight decay 0.1": (digits_mlp, AdamW(3e-3, 0.5, 0.99, weight_decay=0.1), 300),
    "AdamW 3e-3, β₁ = 0.5, weight decay 0.1, none on biases": (
        digits_mlp, AdamW(3e-3, 0.5, 0.99, weight_decay=0.1, shapes=digits_mlp().shapes), 300,
    ),
    "AdamW 1e-2, β₁ = 0.9, weight decay 0.1": (digits_mlp, AdamW(1e-2, 0.9, 0.99, weight_decay=0.1), 300),
    "NAdam 4e-3, β₁ = 0.9": (digits_mlp, NAdam(4e-3, 0.9, 0.99), 300),
}  # fmt: skip

_MOMENTUM = {
    "heavy ball 0.25, β = 0.5": HeavyBall(0.25, 0.5),
    "heavy ball 0.3, β = 0.9": HeavyBall(0.3, 0.9),
    "Adam 3e-3, β₁ = 0.5": Adam(3e-3, 0.5, 0.99),
}
SEEDS: dict[str, Case] = {
    f"{name}, seed {seed}": (partial(digits_mlp, seed), method, 300)
    for name, method in _MOMENTUM.items()
    for seed in (1, 2)
}

ALL = CASES | METHODS | SEEDS


def measure(name: str, derivatives: str = "autodiff") -> dict[str, Any]:
    """One row: distances in weight space and errors of the loss, from the first breakpoint on."""
    torch.set_num_threads(1)
    make, method, steps = ALL[name]
    problem, started = make(derivatives=derivatives), time.perf_counter()
    row: dict[str, Any] = {"case": name, "d": len(problem.w0)}
    every = 0 if name in CASES else 2
    race = dvi.compare(problem, method, steps, eigen_every=every, progress=False, throw=False)
    row |= {"steps": int(race.t[-1]) if len(race.t) else 0, "status": race.status.name}
    row["seconds"] = time.perf_counter() - started
    if not race.central.breakpoints:
        return row | {"edge": None}
    t = race.t[: min(len(run.t) for run in race.runs.values())]  # a run that failed is measured up to its end
    sigma = min(50.0, t[-1] / 10)
    since = t >= race.central.breakpoints[0][0]
    inner = since & (t > sigma) & (t < t[-1] - sigma)  # where the averaging window fits
    observed = race.smoothed("discrete", sigma)[: len(t)][inner]

    def loss_error(values: Any) -> float:
        return float(100 * np.mean(np.abs(values[: len(t)][inner] / observed - 1)))

    seen = race.discrete.eigenvalues[:, 0] if every else np.full(len(race.discrete.t), np.nan)
    seen = seen[(race.discrete.t >= race.central.breakpoints[0][0]) & ~np.isnan(seen)] / 2
    quartiles = np.percentile(seen, [25, 50, 75]) if len(seen) else np.full(3, np.nan)
    return row | {
        "sharpness": [float(q) for q in quartiles],
        "warm": race.about["warm_start"],
        "edge": race.central.breakpoints[0][0],
        "k": max(k for _, _, k in race.central.breakpoints),
        "central": float(race.distance["discrete", "central"][: len(t)][since].mean()),
        "stable": float(race.distance["discrete", "stable"][: len(t)][since].mean()),
        "predicted": loss_error(time_average(race.central, race.central.predicted_loss, sigma)),
        "stable loss": loss_error(time_average(race.stable, race.stable.loss, sigma)),
        "cost": race.central.ledger.per_unit_time(),
    }


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """The rows as Markdown; the last column has the quartiles of the optimizer's sharpness over its threshold c."""
    yield "| problem and method | weights | steps | edge from | k ≤ | ‖discrete − central‖ | ‖discrete − stable‖ | " + (
        "predicted loss off by | stable flow's loss off by | cost | sharpness/c |"
    )
    yield "|" + "---|" * 11
    for row in rows:
        if row["edge"] is None:
            yield f"| {row['case']} | {row['d']} | {row['steps']} | – | | | | | | {row['status']} |"
            continue
        yield (
            f"| {row['case']} | {row['d']} | {row['steps']} | {row['edge']:.0f} | {row['k']} | {row['central']:.3g} | "
            f"{row['stable']:.3g} | {row['predicted']:.1f} % | {row['stable loss']:.1f} % | {row['cost']:.1f} | "
            + ("–" if np.isnan(row["sharpness"][0]) else " / ".join(f"{q:.2f}" for q in row["sharpness"]))
            + " |"
            + ("" if row["status"] == "SUCCESS" else f" {row['status']}")
        )


def main() -> None:
    """Run the cases, two at a time, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", default=[], help="parts of case names to run")
    parser.add_argument("--methods", action="store_true", help="every method on one problem, in place of the problems")
    parser.add_argument("--seeds", action="store_true", help="methods with momentum from other starts")
    parser.add_argument("--out", type=Path, help="a JSON file for the numbers")
    parser.add_argument("--derivatives", default="autodiff", help="autodiff, mixed or finite-difference")
    chosen = parser.parse_args()
    cases = METHODS if chosen.methods else SEEDS if chosen.seeds else CASES
    names = [name for name in cases if not chosen.only or any(part in name for part in chosen.only)]
    rows = []
    with ProcessPoolExecutor(max_workers=2) as pool:
        for row in pool.map(partial(measure, derivatives=chosen.derivatives), names):
            print(f"{row['case']}: {row['seconds']:.0f} s", file=sys.stderr)
            rows.append(row)
            if chosen.out:  # after each case, because a later one may take long
                chosen.out.write_text(json.dumps(rows, indent=1))
    print("\n".join(table(rows)))


if __name__ == "__main__":
    main()
