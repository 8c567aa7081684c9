"""Compares two gloo ranks with one process, and estimates the cost of more ranks.

    python benchmarks/distributed.py

Times are wall-clock times on a machine that others may use.  Only the trajectory, the number of collectives and their
bytes apply to other machines.  The second table is computed from these counts and the given speeds.
"""

from __future__ import annotations

import json
import multiprocessing
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import machine
import torch
import torch.distributed as dist

import dvi
from dvi.methods import GradientDescent, RMSProp
from dvi.problems import digits

CASES = {
    "GD 0.2": (lambda: GradientDescent(0.2), 150),
    "RMSProp 1e-3": (lambda: RMSProp(lr=1e-3, beta2=0.99), 60),
}

#: Speeds for one GPU: FLOP/s in single precision, and bytes/s of a ring all_reduce within a node and between nodes.
FLOPS, WITHIN, BETWEEN = 40e12, 200e9, 40e9


def one(case: str, problem: dvi.Problem) -> dict[str, Any]:
    make, steps = CASES[case]
    spent = {"collectives": 0.0}
    ranks, began = problem.ranks, time.perf_counter()
    if ranks.size > 1:
        reduce = ranks._sum  # type: ignore[attr-defined]

        def timed(x: torch.Tensor) -> None:
            start = time.perf_counter()
            reduce(x)
            spent["collectives"] += time.perf_counter() - start

        ranks._sum = timed  # type: ignore[attr-defined]
    flow = dvi.central_flow(problem, make(), check=False)
    solution = dvi.solve(flow, steps, warm_start="auto", progress=False)
    seconds, counts = time.perf_counter() - began, solution.ledger.ledger.counts
    return {
        "w": solution.w.tolist(),
        "k": max((k for _, _, k in solution.breakpoints), default=0),
        "seconds": seconds,
        "share": spent["collectives"] / seconds,
        "cost": solution.ledger.per_unit_time(),
        "collectives per unit": counts["collectives"] / steps,
        "vectors per unit": counts["collective_bytes"] / steps / problem.w0.nbytes,
    }


def work(rank: int, store: str, pipe: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{store}", world_size=2, rank=rank)
    pipe.send([one(case, dvi.distribute(digits("mlp", "mse"))) for case in CASES])
    dist.destroy_process_group()


@contextmanager
def two_ranks() -> Any:
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(2):
            mine, theirs = context.Pipe()
            processes.append(context.Process(target=work, args=(rank, str(Path(folder) / "store"), theirs)))
            processes[-1].start()
            pipes.append(mine)
        yield [pipe.recv() for pipe in pipes]
        for process in processes:
            process.join()


def weak_scaling(row: dict[str, Any], gpus: int, d: float = 1e8, examples: float = 5e4) -> tuple[float, float]:
    """Seconds per unit time for computing and for summing, with ``examples`` examples (or tokens) on each GPU.

    A gradient is 6d FLOP an example; a ring all_reduce of b bytes moves 2(R − 1)/R · b through each GPU.
    """
    compute = row["cost"] * 6 * d * examples / FLOPS
    speed = WITHIN if gpus <= 8 else BETWEEN
    return compute, 2 * (gpus - 1) / gpus * row["vectors per unit"] * 4 * d / speed


def main() -> None:
    torch.set_num_threads(1)
    print(machine.describe()["words"], "\n")
    single = [one(case, digits("mlp", "mse")) for case in CASES]
    with two_ranks() as found:
        pass
    print("| run | k ≤ | one process | two ranks | in collectives | collectives, vectors per unit | difference in w |")
    print("|---|---|---|---|---|---|---|")
    for case, alone, first, second in zip(CASES, single, *found, strict=True):
        assert first["w"] == second["w"], "the ranks differ"
        off = float((torch.tensor(first["w"]) - torch.tensor(alone["w"])).norm())
        print(
            f"| {case} | {alone['k']} | {alone['seconds']:.1f} s | {first['seconds']:.1f} s | {first['share']:.0%} | "
            f"{first['collectives per unit']:.1f}, {first['vectors per unit']:.1f} | {off:.1e} |"
        )
    print("\n| run | gradient equivalents per unit | computing | summing, 8 GPUs | summing, 64 GPUs |")
    print("|---|---|---|---|---|")
    for case, row in zip(CASES, found[0], strict=True):
        (compute, eight), (_, many) = weak_scaling(row, 8), weak_scaling(row, 64)
        print(
            f"| {case} | {row['cost']:.1f} | {compute:.1f} s | {1e3 * eight:.0f} ms ({eight / compute:.1%}) | "
            f"{1e3 * many:.0f} ms ({many / compute:.1%}) |"
        )
    for row in (*single, *found[0]):
        del row["w"]
    print("\n" + json.dumps({"single": single, "two ranks": found[0]}))


if __name__ == "__main__":
    main()
