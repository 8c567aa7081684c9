"""Compares the cost and accuracy of the flow of second order with the paper's: the costs in docs/momentum.md.

``python benchmarks/second_order.py`` takes a minute.  ``--errors`` also solves both flows of one row finely, and prints
the largest distances in w from these solutions.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch

import dvi
from dvi.compiler.exact_rates import Accuracy
from dvi.methods import GradientDescent, RMSProp, RMSPropNorm
from dvi.problems import digits
from dvi.solvers.protocol import Integrator

ADAM_LIKE: dict[str, Any] = {"eps": 1e-8, "bias_correction": True}
#: Loss, method and steps.
RUNS: dict[str, tuple[str, dvi.Method, int]] = {
    "GD 0.2": ("mse", GradientDescent(0.2), 250),
    "GD 0.3": ("mse", GradientDescent(0.3), 80),
    "RMSProp 1e-3": ("mse", RMSProp(1e-3, 0.99, **ADAM_LIKE), 100),
    "RMSProp-Norm 0.1": ("mse", RMSPropNorm(0.1, 0.99, **ADAM_LIKE), 100),
    "cross-entropy, GD 0.7": ("ce", GradientDescent(0.7), 250),
}
MEASURED: tuple[tuple[Accuracy, Integrator], ...] = (
    ("paper", dvi.MacroStep(1e-3)),
    ("paper", dvi.MacroStep(3e-4)),
    ("second-order", dvi.SemiImplicit()),
)
#: By accuracy, a fine and a less fine solution; their distance estimates the error of the fine one.
FINE: dict[Accuracy, tuple[Integrator, Integrator]] = {
    "paper": (dvi.MacroStep(1e-5), dvi.MacroStep(1e-4)),
    "second-order": (dvi.SemiImplicit(dt=1 / 16, tol=1e-5), dvi.SemiImplicit(dt=1 / 8, tol=1e-5)),
}


def solve(name: str, accuracy: Accuracy, integrator: Integrator) -> dvi.Solution:
    """One run from the automatic warm start, with exact derivatives."""
    loss, method, steps = RUNS[name]
    flow = dvi.central_flow(digits("mlp", loss, n=300, width=32), method, accuracy=accuracy, check=False)
    return dvi.solve(flow, steps, integrator=integrator, warm_start="auto", save=("w",), progress=False)


def error(solution: dvi.Solution, fine: dvi.Solution) -> float:
    """The largest distance in w."""
    return float(np.linalg.norm(solution.series["w"] - fine.series["w"], axis=1).max())


def main() -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--errors", default="", metavar="RUN", help="the run to solve finely, such as 'RMSProp 1e-3'")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    print("| run | steps | " + " | ".join(str(integrator).split(", h")[0] for _, integrator in MEASURED) + " |")
    print("|" + "---|" * (2 + len(MEASURED)))
    for name, (_, _, steps) in RUNS.items():
        costs = [solve(name, *run).ledger.per_unit_time() for run in MEASURED]
        print(f"| {name} | {steps} | " + " | ".join(f"{cost:.1f}" for cost in costs) + " |", flush=True)
    if asked.errors:
        fine = {a: solve(asked.errors, a, finest) for a, (finest, _) in FINE.items()}
        for accuracy, integrator in (*MEASURED, *((a, second) for a, (_, second) in FINE.items())):
            off = error(solve(asked.errors, accuracy, integrator), fine[accuracy])
            print(f"{asked.errors}, {accuracy}, {integrator}: {off:.1e} from the fine solution", flush=True)


if __name__ == "__main__":
    main()
