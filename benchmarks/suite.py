"""Measures the cost of central flows on many kinds of networks, in gradient equivalents (GE) per optimizer step.

    python benchmarks/suite.py [--only PART …] [--seeds 1 3] [--derivatives mixed] [--budget GE] [--out FILE]
    python benchmarks/suite.py --table        the tables of docs/benchmarks.md, from the file

Each case runs the optimizer, its central flow and its stable flow side by side for 80 unit times.  With the chosen
learning rates, the edge of stability is reached early.  Each finished row is written to a JSON file, and rows in the
file are not run again.

There are two kinds of cases.  On some, constants of the integrator have been *chosen*, so their costs are less
meaningful.  If a constant was chosen on one member of a family, all seeds of the family count as chosen.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import machine
import numpy as np
import torch
import torch.nn.functional as F
from suite_networks import Decoder, GraphAttention, Recurrent, ViT, resnet
from torch import Tensor, nn

import dvi
from dvi.methods import GradientDescent, Method, RMSProp, RMSPropNorm
from dvi.problems import digits, sorting
from dvi.problems.catalogue.data import load_digits, make_sorting
from dvi.problems.catalogue.tasks import cross_entropy, squared_error
from dvi.problems.networks.mlp import MLP
from dvi.problems.problem import Backend

FILE = Path(__file__).with_name("suite.json")
STEPS = 80
BAR = 50.0  # the largest acceptable cost of a case, GE per unit
ADAM_LIKE = {"eps": 1e-8, "bias_correction": True}


class Network:
    """A network made from a seed, and its problem from the initial weights or from others."""

    def __init__(self, make: Callable[[], nn.Module], examples: Callable[[int], tuple[Tensor, Tensor]], loss: str):
        self.make, self.examples, self.loss = make, examples, loss

    def __call__(self, seed: int, backend: Backend, w: Tensor | None = None) -> dvi.Problem:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self.make().double()
        inputs, labels = self.examples(seed)
        criterion, targets = cross_entropy, labels
        if self.loss == "mse":
            criterion, targets = squared_error, F.one_hot(labels).double()

        def problem() -> dvi.Problem:
            return dvi.Problem.from_module(model, criterion, inputs, targets, derivatives=backend)

        if w is not None:
            problem().load_into(model, w)
        return problem()


def classify(make: Callable[[], nn.Module], n: int, loss: str) -> Network:
    """A network of images on n digits."""
    return Network(make, lambda seed: load_digits(n, 10, seed), loss)


def sort(make: Callable[[], nn.Module], loss: str) -> Network:
    """A network of sequences that sorts 60 of five letters."""
    return Network(make, lambda seed: make_sorting(60, 5, 4, seed), loss)


def ring(seed: int) -> tuple[Tensor, Tensor]:
    """Which of four features, summed over a node and its neighbour, is the largest?"""
    x = torch.randn(60, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x, (x + x.roll(1, 0))[:, :4].argmax(1)


def _digits(loss: str) -> Callable[[int, Backend], dvi.Problem]:
    return lambda seed, backend: digits("mlp", loss, n=300, width=32, seed=seed, derivatives=backend)


#: A method; or, for gradient descent, the learning rate as a fraction of the one at which the warmed-up start is at
#: the edge.
How = float | Method
Family = tuple[Callable[..., dvi.Problem], How]

NOT_CHOSEN_ON: dict[str, Family] = {
    "MLP tanh, MSE, GD": (classify(lambda: MLP([64, 24, 24, 10], "tanh"), 150, "mse"), 1.0),
    "MLP GELU, CE, GD": (classify(lambda: MLP([64, 24, 24, 10], "gelu"), 150, "ce"), 0.5),
    "ResNet, MSE, GD": (classify(resnet, 60, "mse"), 1.0),
    "ViT, MSE, RMSProp": (classify(ViT, 60, "mse"), RMSProp(1e-3, 0.95, **ADAM_LIKE)),
    "language model, CE, RMSProp": (sort(lambda: Decoder(4, 9, 5), "ce"), RMSProp(1e-3, 0.95, **ADAM_LIKE)),
    "language model, tied, CE, GD": (sort(lambda: Decoder(4, 9, 5, tied=True), "ce"), 0.5),
    "LSTM, CE, GD": (sort(lambda: Recurrent(nn.LSTM, 4, 5), "ce"), 0.5),
    "RNN, MSE, RMSProp-Norm": (sort(lambda: Recurrent(nn.RNN, 4, 5), "mse"), RMSPropNorm(0.1, 0.95, **ADAM_LIKE)),
}
CHOSEN_ON: dict[str, Family] = {
    "ViT, CE, GD": (classify(ViT, 60, "ce"), 0.5),
    "graph attention, CE, GD": (Network(lambda: GraphAttention(60, 6), ring, "ce"), 0.5),
    "digits MLP, MSE, GD 0.2": (_digits("mse"), GradientDescent(0.2)),
    "digits MLP, MSE, RMSProp-Norm 0.1": (_digits("mse"), RMSPropNorm(0.1, 0.99, **ADAM_LIKE)),
    "digits MLP, CE, GD 1.5": (_digits("ce"), GradientDescent(1.5)),
    "transformer, CE, RMSProp": (
        lambda seed, d: sorting("transformer", "ce", n=60, width=12, depth=1, length=6, seed=seed, derivatives=d),
        RMSProp(1e-3, 0.99, **ADAM_LIKE),
    ),
}
FAMILIES = NOT_CHOSEN_ON | CHOSEN_ON
#: Seeds of a family: two, or the catalogue's own if constants were chosen on it.
SEEDS = (
    {name: [1, 3] for name in NOT_CHOSEN_ON}
    | {name: [0] for name in CHOSEN_ON}
    | {name: [1, 3] for name in ("graph attention, CE, GD", "ViT, CE, GD")}
)


def warmed_up(problem: dvi.Problem, part: float) -> tuple[Tensor, Method]:
    """The weights after thirty small steps, and ``part`` times the learning rate of the edge there.

    A network that was just initialised is in a transient.  After these steps the edge is near, and sharpening reaches
    it.
    """
    w, lr = problem.w0, 0.3 / sharpness(problem, problem.w0)
    for _ in range(30):
        w = w - lr * problem.value_and_grad(w)[1]
    return w, GradientDescent(part * 1.9 / sharpness(problem, w))


def sharpness(problem: dvi.Problem, w: Tensor) -> float:
    """The largest |eigenvalue| of H(w), by 40 power iterations."""
    v = torch.randn(len(w), 1, generator=torch.Generator().manual_seed(0), dtype=w.dtype)
    for _ in range(40):
        v = problem.hvp(w, v / v.norm())
    return float(v.norm())


def run(name: str, seed: int, backend: Backend, budget: float = 100.0, steps: int = STEPS) -> dict[str, Any]:
    """One row: the time reached, the cost, and the distance from the optimizer."""
    make, how = FAMILIES[name]
    problem, started = make(seed, backend), time.process_time()
    if isinstance(how, float):
        w, method = warmed_up(problem, how)
        problem = make(seed, backend, w)
    else:
        method = how
    options = {"eigen_every": 0, "progress": False, "throw": False}
    begin = float(problem.value(problem.w0))
    alone = dvi.solve(dvi.discrete(problem, method), steps, **options)
    tame = alone.status is dvi.Status.SUCCESS and max(alone.loss) < 3 * begin
    race = dvi.compare(problem, method, steps, integrator=dvi.MacroStep(budget=budget), check=False, **options)
    flow, row = race.central, {"case": name, "seed": seed, "derivatives": backend, "weights": problem.dim}
    since = race.t >= (flow.breakpoints[0][0] if flow.breakpoints else np.inf)
    return row | {
        "status": race.status.name,
        "optimizer": "goes on" if tame else "diverges",
        "reached": float(flow.ledger.t[-1]) if len(flow.ledger.t) else 0.0,
        "k": max((k for _, _, k in flow.breakpoints), default=0),
        "GE": flow.ledger.per_unit_time(),
        "unit steps": sum(end - start for start, end in flow.about.get("unit_steps", [])),
        "central": _mean(race.distance["discrete", "central"][since[: len(race.t)]]),
        "stable": _mean(race.distance["discrete", "stable"][since[: len(race.t)]]),
        "CPU seconds": time.process_time() - started,
    }


def _mean(values: Any) -> float | None:
    return float(np.mean(values)) if len(values) else None


def table(rows: list[dict[str, Any]], backend: str) -> Iterator[str]:
    """The rows as Markdown; families on which no constant was chosen come first."""
    for words, families in (("Not chosen on", NOT_CHOSEN_ON), ("Chosen on", CHOSEN_ON)):
        chosen = [r for r in rows if r["case"] in families and r["derivatives"] == backend]
        if not chosen:
            continue
        yield f"{words}: {summary(chosen)}"
        yield ""
        yield "| case | seed | weights | GE per unit | k ≤ | unit steps | ‖discrete − central‖ | ‖discrete − stable‖ |"
        yield "|" + "---|" * 8
        for r in chosen:
            ended = "" if r["reached"] >= STEPS else f", {r['status']} at t = {r['reached']:.0f}"
            near = ["–" if r[name] is None else f"{r[name]:.3g}" for name in ("central", "stable")]
            cells = (
                r["case"],
                r["seed"],
                r["weights"],
                f"{r['GE']:.1f}{ended}",
                r["k"],
                f"{r['unit steps']:.0f}",
                *near,
            )
            yield f"| {' | '.join(map(str, cells))} |"
        yield ""


def summary(rows: list[dict[str, Any]]) -> str:
    """How many cases stay within the bar, of those whose optimizer does not diverge; their median and largest cost."""
    sane = [r for r in rows if r["optimizer"] == "goes on"]
    costs = [r["GE"] for r in sane]
    arrived = sum(r["reached"] >= STEPS and r["GE"] <= BAR for r in sane)
    wild = len(rows) - len(sane)
    more = f" (in {wild} more the optimizer diverges)" if wild else ""
    return (
        f"{arrived} of {len(sane)} runs arrive within {BAR:g} GE per unit{more}; median {np.median(costs):.1f}, "
        f"most {max(costs):.1f}."
    )


def main() -> None:
    """Run the rows that are not in the file yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], help="parts of the names of families")
    parser.add_argument("--seeds", nargs="+", type=int, help="in place of each family's own")
    parser.add_argument("--derivatives", default="mixed")
    parser.add_argument("--budget", type=float, default=100.0, help="gradient equivalents per unit time")
    parser.add_argument("--out", type=Path, default=FILE)
    parser.add_argument("--table", action="store_true", help="print the tables, run nothing")
    asked = parser.parse_args()
    kept = json.loads(asked.out.read_text()) if asked.out.exists() else {"rows": []}
    rows = kept["rows"]
    torch.set_num_threads(1)
    logging.getLogger("dvi").setLevel(logging.ERROR)
    done = {(r["case"], r["seed"], r["derivatives"]) for r in rows}
    for name in () if asked.table else FAMILIES:
        if asked.only and not any(part in name for part in asked.only):
            continue
        for seed in asked.seeds or SEEDS[name]:
            if (name, seed, asked.derivatives) in done:
                continue
            rows.append(run(name, seed, asked.derivatives, asked.budget))
            print(json.dumps(rows[-1], ensure_ascii=False), file=sys.stderr, flush=True)
            text = json.dumps({"machine": machine.describe()["words"], "rows": rows}, indent=1, ensure_ascii=False)
            asked.out.write_text(text + "\n")
    print("\n".join(table(rows, asked.derivatives)))


if __name__ == "__main__":
    main()
