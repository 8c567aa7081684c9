"""How well central flows predict optimizers on real data: the table of the README.

``python benchmarks/agreement.py [--only NAME …]`` runs every case (about a quarter of an hour on two cores) and prints
a Markdown table.  Each row starts the optimizer, its central flow and its stable flow from one point, warm start
included, and is measured from the first breakpoint of the central flow on.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

import dvi
from dvi.methods import GradientDescent, RMSProp, RMSPropNorm
from dvi.plot import time_average
from dvi.problems import digits, sorting

ADAM_LIKE = {"eps": 1e-8, "bias_correction": True}
Case = tuple[Callable[[], dvi.Problem], dvi.Method, int]

CASES: dict[str, Case] = {
    "digits MLP, MSE, GD 0.2": (lambda: digits("mlp", "mse", n=300, width=32), GradientDescent(0.2), 1000),
    "digits MLP, MSE, RMSProp-Norm 0.1": (
        lambda: digits("mlp", "mse", n=300, width=32), RMSPropNorm(0.1, 0.99, **ADAM_LIKE), 600,
    ),
    "digits MLP, MSE, RMSProp 1e-3": (
        lambda: digits("mlp", "mse", n=300, width=32), RMSProp(1e-3, 0.99, **ADAM_LIKE), 600,
    ),
    "digits MLP, CE, GD 0.7": (lambda: digits("mlp", "ce", n=300, width=32), GradientDescent(0.7), 1000),
    "digits MLP, CE, GD 1.5": (lambda: digits("mlp", "ce", n=300, width=32), GradientDescent(1.5), 600),
    "digits MLP, CE, RMSProp 1e-3": (
        lambda: digits("mlp", "ce", n=300, width=32), RMSProp(1e-3, 0.99, **ADAM_LIKE), 400,
    ),
    "digits (4 classes) MLP, MSE, GD 0.3": (
        lambda: digits("mlp", "mse", n=300, width=32, classes=4), GradientDescent(0.3), 1000,
    ),
    "digits CNN, MSE, GD 0.5": (lambda: digits("cnn", "mse", n=100, width=6), GradientDescent(0.5), 300),
    "digits CNN, MSE, RMSProp 5e-4": (
        lambda: digits("cnn", "mse", n=100, width=6), RMSProp(5e-4, 0.99, **ADAM_LIKE), 300,
    ),
    "sorting transformer, MSE, GD 0.02": (
        lambda: sorting("transformer", "mse", n=100, width=12, depth=2), GradientDescent(0.02), 400,
    ),
    "sorting transformer, CE, RMSProp 5e-4": (
        lambda: sorting("transformer", "ce", n=100, width=12, depth=2), RMSProp(5e-4, 0.99, **ADAM_LIKE), 150,
    ),
}  # fmt: skip


def measure(name: str) -> dict[str, Any]:
    """One row: distances in weight space and errors of the loss, from the first breakpoint on."""
    torch.set_num_threads(1)
    make, method, steps = CASES[name]
    problem, started = make(), time.perf_counter()
    row: dict[str, Any] = {"case": name, "d": len(problem.w0)}
    race = dvi.compare(problem, method, steps, eigen_every=0, progress=False, throw=False)
    row |= {"steps": int(race.t[-1]) if len(race.t) else 0, "status": race.status.name}
    row["seconds"] = time.perf_counter() - started
    if not race.central.breakpoints:
        return row | {"edge": None}
    t = race.t[: min(len(run.t) for run in race.runs.values())]  # a run that failed is measured as far as it went
    sigma = min(50.0, t[-1] / 10)
    since = t >= race.central.breakpoints[0][0]
    inner = since & (t > sigma) & (t < t[-1] - sigma)  # where the averaging window fits
    observed = race.smoothed("discrete", sigma)[: len(t)][inner]

    def loss_error(values: Any) -> float:
        return float(100 * np.mean(np.abs(values[: len(t)][inner] / observed - 1)))

    return row | {
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
    """The rows as Markdown."""
    yield "| problem and method | weights | steps | edge from | k ≤ | ‖discrete − central‖ | ‖discrete − stable‖ | " + (
        "predicted loss off by | stable flow's loss off by | cost |"
    )
    yield "|" + "---|" * 10
    for row in rows:
        if row["edge"] is None:
            yield f"| {row['case']} | {row['d']} | {row['steps']} | – | | | | | | {row['status']} |"
            continue
        yield (
            f"| {row['case']} | {row['d']} | {row['steps']} | {row['edge']:.0f} | {row['k']} | {row['central']:.3g} | "
            f"{row['stable']:.3g} | {row['predicted']:.1f} % | {row['stable loss']:.1f} % | {row['cost']:.1f} |"
            + ("" if row["status"] == "SUCCESS" else f" {row['status']}")
        )


def main() -> None:
    """Run the cases, two at a time, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", default=[], help="parts of case names to run")
    parser.add_argument("--out", type=Path, help="a JSON file for the numbers")
    chosen = parser.parse_args()
    names = [name for name in CASES if not chosen.only or any(part in name for part in chosen.only)]
    rows = []
    with ProcessPoolExecutor(max_workers=2) as pool:
        for row in pool.map(measure, names):
            print(f"{row['case']}: {row['seconds']:.0f} s", file=sys.stderr)
            rows.append(row)
            if chosen.out:  # case by case: a later one may take long
                chosen.out.write_text(json.dumps(rows, indent=1))
    print("\n".join(table(rows)))


if __name__ == "__main__":
    main()
