"""What the ranks of tests/test_distributed.py do, and a pool of processes that do it (started once a module)."""

from __future__ import annotations

import datetime
import os
import traceback

import torch
import torch.distributed as dist
from torch import nn

import dvi

D = torch.float64


class Pool:
    """Processes of one gloo group, which stay and take one job after the other."""

    def __init__(self, size, folder):
        context = torch.multiprocessing.get_context("spawn")
        self.pipes, self.processes = [], []
        for rank in range(size):
            mine, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, size, str(folder / "store"), theirs), daemon=True)
            process.start()
            self.pipes.append(mine)
            self.processes.append(process)

    def __call__(self, size, job, *args):
        """What ``job(group, *args)`` gives on each of the first ``size`` ranks; an exception is given back, too."""
        for pipe in self.pipes:
            pipe.send((size, job, args))
        found = []
        for pipe in self.pipes:
            assert pipe.poll(120), "a rank does not answer"
            found.append(pipe.recv())
        return found[:size]

    def close(self):
        for pipe in self.pipes:
            pipe.send(None)
        for process in self.processes:
            process.join(30)
            assert process.exitcode == 0


def _serve(rank, size, store, pipe):
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", f"file://{store}", timeout, size, rank)
    groups = {n: dist.new_group(list(range(n))) for n in range(1, size + 1)}
    while (task := pipe.recv()) is not None:
        n, job, args = task
        result = None
        if rank < n:
            try:
                result = job(groups[n], *args)
            except Exception as error:
                result = error
                if not isinstance(error, (dvi.ProblemError, dvi.RanksError, dvi.RunError, dvi.StoreError)):
                    traceback.print_exc()
        pipe.send(result)
    dist.destroy_process_group()
