"""Compares the flow with noise with replicas of the optimizer: `python benchmarks/noise.py [FILE.json] [NAME …]`.

Each case is run once and stored in the file, so that an interrupted run can continue.  `--table` prints the file, and
a summary of the cases of gradient descent over seeds.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import dvi
from dvi.methods import Adam, AdamW, GradientDescent, HeavyBall, RMSProp

TIMES = (40, 80, 120)
EPOCHS = {"replacement": False, "epochs": True}


def digits(seed: int = 0, **options: Any) -> dvi.Problem:
    return dvi.problems.digits(**{"n": 300, "width": 32, "seed": seed} | options)


def case(problem: Any, method: Any, batch: int, **settings: Any) -> dict[str, Any]:
    return {"problem": problem, "method": method, "batch": batch, "settings": settings}


CASES: dict[str, dict[str, Any]] = {
    f"GD {lr:g}, B = {B}, seed {seed}": case(lambda seed=seed: digits(seed), GradientDescent(lr), B)
    for seed in range(3)
    for lr, B in ((0.2, 100), (0.2, 30), (0.2, 10), (0.1, 3))
}
CASES |= {f"RMSProp 0.002, B = {B}": case(digits, RMSProp(0.002, 0.95, 1e-8, True), B) for B in (20, 5)}
CASES |= {
    "GD 0.2, B = 10, 30 directions": case(digits, GradientDescent(0.2), 10, max_directions=30),
    "GD 0.2, B = 10, 3 directions": case(digits, GradientDescent(0.2), 10, max_directions=3),
    "GD 0.2, B = 10, 2 pairs": case(digits, GradientDescent(0.2), 10, pairs=2),
    "heavy ball 0.05, B = 30": case(digits, HeavyBall(0.05, 0.8), 30),
    "Adam 0.002, B = 20": case(digits, Adam(0.002, 0.9, 0.95), 20),
    "CE GD 0.7, B = 30": case(lambda: digits(loss="ce"), GradientDescent(0.7), 30),
    "CE GD 1.5, B = 5": case(lambda: digits(loss="ce"), GradientDescent(1.5), 5),
    "GD 0.05, B = 1": case(digits, GradientDescent(0.05), 1),
    "CNN GD 0.2, B = 30": case(lambda: digits(network="cnn", width=4, n=200), GradientDescent(0.2), 30),
    "CNN GD 1.5, B = 30": case(lambda: digits(network="cnn", width=4, n=200), GradientDescent(1.5), 30),
    "AdamW 0.002, λ = 1, B = 20": case(digits, AdamW(0.002, 0.9, 0.95, weight_decay=1.0), 20),
    "GD 0.2, B = 30, epochs": case(digits, GradientDescent(0.2), 30, **EPOCHS),
    "GD 0.2, B = 10, epochs": case(digits, GradientDescent(0.2), 10, **EPOCHS),
    "GD 0.1, B = 3, epochs": case(digits, GradientDescent(0.1), 3, **EPOCHS),
    "RMSProp 0.002, B = 20, epochs": case(digits, RMSProp(0.002, 0.95, 1e-8, True), 20, **EPOCHS),
    "GPT CE RMSProp 0.0005, B = 20": case(
        lambda: dvi.problems.sorting(n=200, width=24, depth=1), RMSProp(5e-4, 0.95, 1e-8, True), 20
    ),
}


def measured(name: str) -> dict[str, Any]:
    """Replicas and flow at a few times, with the flow's own estimates of its quality."""
    it, began = CASES[name], time.process_time()
    sampling = dvi.Sampling(**{"replacement": True} | it["settings"])
    race = dvi.compare(
        it["problem"](),
        it["method"],
        TIMES[-1],
        batch_size=it["batch"],
        sampling=sampling,
        runs=("sgd", "noisy", "central"),
        save_every=10,
        eigen_every=40,
        progress=False,
        throw=False,
    )
    out: dict[str, Any] = {"status": race.status.name, "warm_start": race.about["warm_start"], "notes": race.notes}
    rows = [int(i) for i in np.flatnonzero(np.isin(race.t, TIMES))]
    out["t"] = race.t[rows].tolist()
    if not all(len(run.t) for run in race.runs.values()):
        return out | {"t": [], "seconds": time.process_time() - began}
    sgd, noisy, central = race.sgd, race.noisy, race.central
    out["sharpness"] = {
        "runs": (sgd.eigenvalues[rows, 0] / 2).tolist(),
        "spread": (sgd.series["sharpness_spread"][rows] / 2).tolist(),
        "flow": (noisy.eigenvalues[rows, 0] / 2).tolist(),
        "full": (central.eigenvalues[rows, 0] / 2).tolist(),
    }
    window = [slice(max(0, i - 1), i + 2) for i in rows]  # because runs are averaged over ±10 steps
    out["loss"] = {
        "runs": sgd.loss[rows].tolist(),
        "flow": [float(noisy.predicted_loss[w].mean()) for w in window],
        "full": central.predicted_loss[rows].tolist(),
        "spread": sgd.series["loss_spread"][rows].tolist(),
    }
    out["replicas"] = sampling.replicas
    for key in ("effective_lr", "batch_grad_sq"):
        out[key] = {"runs": sgd.series[key][rows].tolist(), "flow": noisy.series[key][rows].tolist()}
    out["effective_lr"]["full"] = central.series["effective_lr"][rows].tolist()
    out["distance"] = {
        "flow": race.distance["sgd", "noisy"][rows].tolist(),
        "full": race.distance["sgd", "central"][rows].tolist(),
        "floor": (sgd.series["apart"][rows] / 2**0.5).tolist(),
    }
    out["trust"] = {key: noisy.series[key][rows].tolist() for key in ("taylor", "radius", "outside", "directions")}
    out["cost"] = {"flow": noisy.ledger.per_unit_time(20, TIMES[-1]) if len(noisy.t) > 3 else None}
    return out | {"seconds": time.process_time() - began}


def table(found: dict[str, Any]) -> str:
    """One line for each case, at the last time."""
    lines = [
        "| case | sharpness over 2 at t = 40, 80, 120: runs | flow | full batch | averaged loss: runs, flow, full | "
        "distance: flow, floor, full | effective lr: runs, flow, full | cost |",
        "|---|---|---|---|---|---|---|---|",
    ]

    def row(values: list[float], digits: int = 3) -> str:
        return "/".join(f"{value:.{digits}f}".removeprefix("0") if value is not None else "–" for value in values)

    for name, it in found.items():
        if not it["t"]:
            lines.append(f"| {name} | {it['status']} | | | | | | |")
            continue
        s, loss, d, lr = it["sharpness"], it["loss"], it["distance"], it["effective_lr"]
        spread = max(s["spread"])
        cost = "–" if it["cost"]["flow"] is None else f"{it['cost']['flow']:.1f}"
        lines.append(
            f"| {name if it['status'] == 'SUCCESS' else name + ', ' + it['status']} "
            f"| {row(s['runs'])} (±{spread:.2f}) "
            f"| {row(s['flow'])} | {row(s['full'])} | {row([loss[k][-1] for k in ('runs', 'flow', 'full')], 4)} "
            f"| {row([d[k][-1] for k in ('flow', 'floor', 'full')])} "
            f"| {' / '.join(f'{lr[k][-1]:.3g}' for k in ('runs', 'flow', 'full'))} | {cost} |"
        )
    return "\n".join(lines)


def summary(found: dict[str, Any]) -> str:
    """Median errors of gradient descent over seeds and times, beside those that a flow without any error would have.

    Such a flow would still differ from the mean of a few runs, by 0.674 of its standard error at the median.
    """
    groups: dict[str, dict[str, list[float]]] = {}
    for name, it in found.items():
        if ", seed" not in name or not it["t"]:
            continue
        for group in (name.split(", seed")[0], "all"):
            errors = groups.setdefault(group, {})
            d = it["distance"]
            for key, quantity, side in (
                ("S", "sharpness", "flow"),
                ("S full", "sharpness", "full"),
                ("loss", "loss", "flow"),
                ("loss full", "loss", "full"),
            ):
                both = zip(it[quantity][side], it[quantity]["runs"], strict=True)
                errors.setdefault(key, []).extend(a / b - 1 for a, b in both)
            for key, quantity in (("S least", "sharpness"), ("loss least", "loss")):
                both = zip(it[quantity]["spread"], it[quantity]["runs"], strict=True)
                errors.setdefault(key, []).extend(0.674 * a / b / it["replicas"] ** 0.5 for a, b in both)
            for key in ("flow", "full"):
                errors.setdefault(f"distance {key}", []).extend(a / b for a, b in zip(d[key], d["floor"], strict=True))
    keys = list(next(iter(groups.values()), {}))
    lines = ["| case | " + " | ".join(keys) + " |", "|---" * (len(keys) + 1) + "|"]
    for group, errors in groups.items():
        lines.append(f"| {group} | " + " | ".join(f"{np.median(np.abs(errors[key])):.3f}" for key in keys) + " |")
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    torch.set_num_threads(1)
    names = [word for word in arguments if not word.endswith(".json") and word != "--table"]
    file = Path(next((word for word in arguments if word.endswith(".json")), "noise.json"))
    found = json.loads(file.read_text()) if file.exists() else {}
    if "--table" not in arguments:
        for name in names or CASES:
            if name not in found:
                found[name] = measured(name)
                file.write_text(json.dumps(found, indent=1))
                print(f"{name}: {found[name]['status']}, {found[name]['seconds']:.0f} s", flush=True)
    print(table(found))
    print()
    print(summary(found))


if __name__ == "__main__":
    main(sys.argv[1:])
