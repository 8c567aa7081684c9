"""Support for runs that torchrun starts as several processes of one command."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from dvi.problems import Problem, distribute

#: How long a rank waits for another that does not answer.  With gloo, a rank that has ended is noticed at once.
TIMEOUT = timedelta(minutes=10)


@contextmanager
def launched() -> Iterator[None]:
    """A context in which the processes that torchrun started form a process group.

    When one process ends, torchrun sends SIGTERM to the others.  It counts as an interruption here, so that the file is
    written first.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or not dist.is_available() or dist.is_initialized():
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=TIMEOUT)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        dist.destroy_process_group()


def first() -> bool:
    """Whether this is the process that prints and writes files."""
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0"


def who() -> str:
    """Which of several processes this is, in words; empty if there is only one."""
    size = os.environ.get("WORLD_SIZE", "1")
    return "" if size == "1" else f" (rank {os.environ.get('RANK', '0')} of {size})"


def shared(problem: Problem) -> Problem:
    """The problem distributed over all ranks, if there are several and it is not distributed yet."""
    started = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return distribute(problem) if started and problem.ranks.size == 1 else problem
