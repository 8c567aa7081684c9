"""Runs in worker processes of this machine, each with its own GPU if there are several."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from dvi.sweeps.locks import holder
from dvi.sweeps.records import Record, Task, lock_path, log_path, read_record, write_record
from dvi.sweeps.work import stop_when_asked, work

#: Exit codes of workers: another process is working on the run; the worker was asked to stop.
_BUSY, _STOPPED = 75, 130

#: Seconds that workers have for a last checkpoint after they are asked to stop.
_PATIENCE = 60.0

#: Seconds after which a run of another process is checked again.
_AGAIN = 1.0


@dataclass
class _Worker:
    task: Task
    process: BaseProcess
    slot: int


def default_workers(threads: int = 1) -> int:
    """The number of GPUs, or the number of workers that the cores allow if there is no GPU."""
    return torch.cuda.device_count() or max(1, cores() // threads)


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_here(
    tasks: Sequence[Task],
    folder: Path,
    *,
    workers: int | None = None,
    threads: int = 1,
    told: Callable[[Record], None] = lambda record: None,
    watched: Callable[[list[str]], None] = lambda names: None,
) -> None:
    """Make runs in processes of this machine, one process for each run, until all have ended.

    A run that fails, or whose process is killed, does not stop the others.  If a second sweep on the same folder is
    working on a run, this one waits for it.  If this process dies, its workers write a checkpoint and end.

    Args:
        tasks: the runs, in order.
        folder: the folder for their files.
        workers: number of processes at a time (default: :func:`default_workers`).
        threads: CPU threads of each process.
        told: called with the record of each run that has ended.
        watched: called with the names of the active runs, whenever they change.

    Raises:
        KeyboardInterrupt: after Ctrl-C, when all workers have saved their state.
    """
    count = default_workers(threads) if workers is None else workers
    cards = _cards()
    context: Any = multiprocessing.get_context("forkserver" if sys.platform != "win32" else "spawn")
    if sys.platform != "win32":
        context.set_forkserver_preload(["dvi.sweeps.work"])  # imported once, instead of by each worker
    waiting, running = list(tasks), list[_Worker]()
    later = dict.fromkeys((task.name for task in tasks), 0.0)  # the times at which runs may be checked again
    try:
        while waiting or running:
            now = time.monotonic()
            for task in [task for task in waiting if later[task.name] <= now]:
                if len(running) >= count:
                    break
                if holder(lock_path(folder, task.name)):
                    later[task.name] = now + _AGAIN
                    continue
                slot = min(set(range(count)) - {worker.slot for worker in running})
                card = cards[slot % len(cards)] if cards else None
                process = context.Process(target=_worker, args=(task, folder, threads, card), name=task.name)
                process.start()
                waiting.remove(task)
                running.append(_Worker(task, process, slot))
                watched([worker.task.name for worker in running])
            pause = _AGAIN if waiting and len(running) < count else None
            if running:
                ready = wait([worker.process.sentinel for worker in running], pause)
            else:
                time.sleep(_AGAIN)
                ready = []
            for worker in [worker for worker in running if worker.process.sentinel in ready]:
                worker.process.join()
                running.remove(worker)
                if worker.process.exitcode == _BUSY:
                    later[worker.task.name] = time.monotonic() + _AGAIN
                    waiting.append(worker.task)
                else:
                    told(_seen(worker, folder))
                watched([worker.task.name for worker in running])
    finally:
        _stop(running)


def _seen(worker: _Worker, folder: Path) -> Record:
    """The record of a run whose process has ended, for whatever reason."""
    task, code = worker.task, worker.process.exitcode
    record = read_record(folder, task.name) or Record(task.name, task.spec)
    if code == 0:
        return record
    if record.spec == task.spec and record.state != "error":
        killed = code is not None and code < 0
        how = f"was killed ({signal.Signals(-code).name})" if killed and code else f"ended with exit code {code}"
        record.state = "unfinished" if killed or code == _STOPPED else "error"
        record.message = f"Its process {how}; memory may have run out. Its output is in {log_path(folder, task.name)}"
        write_record(folder, record)
    return record


def _stop(running: list[_Worker]) -> None:
    """Ask workers to end, wait for their last checkpoints, and kill those that do not end."""
    for worker in running:
        worker.process.terminate()
    deadline = time.monotonic() + _PATIENCE
    for worker in running:
        with contextlib.suppress(KeyboardInterrupt):
            worker.process.join(max(0.0, deadline - time.monotonic()))
        if worker.process.is_alive():
            worker.process.kill()


def _cards() -> list[str]:
    """The GPUs that this process may use, by the system's names."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = [name.strip() for name in named.split(",") if name.strip()]
    count = torch.cuda.device_count()
    return names[:count] if names else [str(i) for i in range(count)]


def _worker(task: Task, folder: Path, threads: int, card: str | None) -> None:
    """The main function of a worker process."""
    try:
        stop_when_asked()
        if card is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = card  # set before the first use of a GPU, which is then cuda:0
        parent = multiprocessing.parent_process()
        if parent is not None:
            threading.Thread(target=_follow, args=(parent,), daemon=True).start()
        torch.set_num_threads(threads)
        log = os.open(log_path(folder, task.name), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.exit(_BUSY if work(task, folder) is None else 0)
    except KeyboardInterrupt:
        sys.exit(_STOPPED)


def _follow(parent: BaseProcess) -> None:
    """End this process when its sweep has died."""
    wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_PATIENCE)
    os._exit(_STOPPED)
