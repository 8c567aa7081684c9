"""Measures the cost and the accuracy of central flows: ``make bench``, or ``python benchmarks/run.py``.

    --quick            two short runs and a few complementarity problems: some minutes
    --problems NAME …  only cases whose name contains one of these
    --kind KIND        only short runs ("hard") or only runs of 1,000 steps ("whole")
    --only PART …      runs, ccp, scale, gpu (default: runs and ccp, and gpu where there is CUDA)
    --scale            also a network of a million weights on the CPU
    --gpu              only the part on a GPU
    --add              keep the results that results.json already contains
    --out FOLDER       results.json, report.md and the work–precision diagram go there (default: runs/benchmarks)

Costs are counts, which are the same on every machine.  Times are CPU seconds, which mean little on a shared machine.
"""

from __future__ import annotations

import threads  # noqa: F401  (first: it tells numpy and torch to use one thread)

# isort: split

import argparse
import dataclasses
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from cases import CASES, ENTRIES, Case
from ccp_timing import time_solvers
from figures import work_precision
from machine import describe
from measure import measured_weights, run, warm_started
from reference import reference
from report import render
from scale import gpu_run, scale_run

PARTS = ("runs", "ccp", "scale", "gpu")


def run_case(case: Case, quick: bool, folder: Path, known: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Run all integrators on one case, and yield the results so far after each of them.

    Args:
        folder: the folder of the fine solutions.
        known: an earlier run of this case, whose rows are kept.
    """
    problem, start, taken = warm_started(case)
    fine = reference(case, start, folder / "references")
    weights = measured_weights(problem)
    about: dict[str, Any] = {
        "dim": problem.dim,
        "steps": case.steps,
        "warm_start": taken,
        "weights": weights,
        "breakpoints": ", ".join(f"{t:.1f} {what} (k = {k})" for t, what, k in fine.breakpoints),
        "doubt": fine.doubt,
        "doubt_X": fine.doubt_X,
        "rows": list(known.get("rows", [])),
    }
    done = {row["integrator"] for row in about["rows"]}
    for entry in ENTRIES:
        if entry.runs_on(case, quick) and entry.name not in done:
            row = run(case, entry, start, fine, weights)
            about["rows"].append(row)
            print(f"{case.name}: {entry.name}: {row['cpu_seconds']:.1f} s, {row['status']}", flush=True)
            yield about


def main() -> None:
    """Run the chosen parts, and write JSON and Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--problems", nargs="+", default=[])
    parser.add_argument("--kind", choices=("hard", "whole"))
    parser.add_argument("--only", nargs="+", choices=PARTS, default=["runs", "ccp", "gpu"])
    parser.add_argument("--scale", action="store_true")
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--add", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"))
    options = parser.parse_args()
    parts = ["gpu"] if options.gpu else [*options.only, *(["scale"] if options.scale else [])]
    torch.set_num_threads(1)
    logging.getLogger("dvi").setLevel(logging.ERROR)
    options.out.mkdir(parents=True, exist_ok=True)
    stored = options.out / "results.json"
    results: dict[str, Any] = json.loads(stored.read_text()) if options.add and stored.exists() else {"cases": {}}
    results["machine"] = describe()
    print(results["machine"]["words"], flush=True)

    def keep() -> None:
        stored.write_text(json.dumps(results, indent=1, default=float))
        (options.out / "report.md").write_text(render(results))

    if "runs" in parts:
        for case in chosen(options):
            known = results["cases"].get(case.title, {})
            for about in run_case(case, options.quick, options.out, known):
                results["cases"][case.title] = about
                keep()
        figure = work_precision(results["cases"])
        if figure is not None:
            figure.savefig(options.out / "work_precision.png", dpi=150)
    if "ccp" in parts:
        ks, instances = ((1, 2, 3, 5, 8), 10) if options.quick else ((1, 2, 3, 5, 8, 20), 40)
        results["ccp"] = [dataclasses.asdict(timing) for timing in time_solvers(ks, instances)]
        keep()
    for name, call in (("scale", scale_run), ("gpu", gpu_run)):
        if name in parts:
            results[name] = call()
            keep()
    keep()
    print((options.out / "report.md").read_text())
    print(f"written: {options.out}/report.md, results.json")


def chosen(options: argparse.Namespace) -> Iterator[Case]:
    """The cases that the command line asks for."""
    for case in CASES:
        asked = not options.problems or any(part in case.name for part in options.problems)
        if asked and options.kind in (None, case.kind) and (case.quick or not options.quick):
            yield case


if __name__ == "__main__":
    main()
