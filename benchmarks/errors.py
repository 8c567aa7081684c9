"""Numerical error and model distance for each backend of derivatives, on the rows of the README.

    python benchmarks/errors.py [--only PART …] [--table]

Each row is solved four times: with the defaults and exact or mixed derivatives, with tol 1e-4, and with tol 1e-5 as the
reference.  The error is the mean distance in w from the reference, from the first breakpoint on; the model distance is
that of the optimizer's midpoint.  A row covers only the first units after the edge is reached, because references are
expensive.  Each finished row is written to a JSON file.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import machine
import numpy as np
import torch
from agreement import CASES

import dvi

FILE = Path(__file__).with_name("errors.json")
#: Unit times of each row: some tens after the edge, fewer if a reference costs a thousand gradients a unit.
UNITS = {
    "digits MLP, CE, GD 1.5": 20,
    "digits CNN, MSE, GD 0.5": 115,
    "digits CNN, MSE, RMSProp 5e-4": 80,
    "sorting transformer, MSE, GD 0.02": 90,
    "sorting transformer, CE, RMSProp 5e-4": 40,
}
RUNS = {
    "default": (None, "autodiff"),
    "mixed": (None, "mixed"),
    "1e-4": (1e-4, "mixed"),
    "reference": (1e-5, "mixed"),
}


def measure(name: str) -> dict[str, Any]:
    """One row: errors relative to the model distance, gradient equivalents per unit and CPU seconds of each run."""
    make, method, steps = CASES[name]
    steps = min(steps, UNITS.get(name, 100))
    options = {"warm_start": "auto", "save": ("w",), "progress": False, "throw": False}
    weights, row, edge = {}, {"case": name, "units": steps}, np.inf
    for run, (tol, backend) in RUNS.items():
        flow = dvi.central_flow(make(derivatives=backend), method, check=False)
        started = time.process_time()
        solution = dvi.solve(flow, steps, integrator=dvi.MacroStep(tol), **options)
        row[run] = {"GE": solution.ledger.per_unit_time(), "CPU seconds": time.process_time() - started}
        if solution.status is not dvi.Status.SUCCESS:
            row[run]["status"] = solution.status.name
        weights[run] = solution.series["w"]
        if solution.breakpoints:
            edge = min(edge, solution.breakpoints[0][0])
    optimizer = dvi.solve(dvi.discrete(make(), method), steps, eigen_every=0, **options)
    weights["optimizer"] = optimizer.series["w"]
    count = min(len(w) for w in weights.values())
    since = np.arange(count) >= edge
    off = {run: np.linalg.norm(w[:count] - weights["reference"][:count], axis=1)[since] for run, w in weights.items()}
    for run in RUNS:
        row[run]["error"] = float(off[run].mean())
    return row | {"edge": float(edge), "model distance": float(off["optimizer"].mean())}


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """The rows as Markdown."""
    yield "| run | units | model distance | error over it: exact | mixed | tol 1e-4 | GE: exact | mixed | CPU s |"
    yield "|" + "---|" * 9
    for row in rows:
        ratios = [f"{row[run]['error'] / row['model distance']:.2g}" for run in ("default", "mixed", "1e-4")]
        costs = [f"{row[run]['GE']:.1f}" for run in ("default", "mixed")]
        seconds = " / ".join(f"{row[run]['CPU seconds']:.1f}" for run in ("default", "mixed"))
        cells = [row["case"], row["units"], f"{row['model distance']:.3g}", *ratios, *costs, seconds]
        yield f"| {' | '.join(map(str, cells))} |"


def main() -> None:
    """Run the rows that are not in the file yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], help="parts of the names of rows")
    parser.add_argument("--out", type=Path, default=FILE)
    parser.add_argument("--table", action="store_true", help="print the table, run nothing")
    asked = parser.parse_args()
    rows = json.loads(asked.out.read_text())["rows"] if asked.out.exists() else []
    torch.set_num_threads(1)
    logging.getLogger("dvi").setLevel(logging.ERROR)
    for name in () if asked.table else CASES:
        if any(row["case"] == name for row in rows) or (asked.only and not any(part in name for part in asked.only)):
            continue
        rows.append(measure(name))
        print(json.dumps(rows[-1], ensure_ascii=False), file=sys.stderr, flush=True)
        kept = {"machine": machine.describe()["words"], "rows": rows}
        asked.out.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n")
    print("\n".join(table(rows)))


if __name__ == "__main__":
    main()
