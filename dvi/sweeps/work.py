"""One run of a sweep, in its own process: take the lock, continue where it stopped, and record how it ended."""

from __future__ import annotations

import datetime
import os
import resource
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType

import torch

from dvi.results.comparison import Comparison
from dvi.results.status import Status
from dvi.results.summary import summarise
from dvi.storage.files import StoreError
from dvi.storage.hdf5 import load
from dvi.sweeps.locks import locked
from dvi.sweeps.records import Record, Task, lock_path, read_record, record_path, result_path, write_record

_GOING_ON = (Status.RUNNING, Status.INTERRUPTED)

#: Seconds between updates of the record of an active run; if the process is killed, no more of its cost is lost.
_HEARTBEAT = 10.0

#: Seconds for which a process tries to get a lock.
_LOOKING = 0.5


def require_same(task: Task, record: Record | None, folder: Path) -> None:
    """Check that a run of the task's name in the folder is the same run.

    Raises:
        StoreError: if it is another run; the message names the differences.
    """
    if record is None or record.spec == task.spec:
        return
    keys = [key for key in {**record.spec, **task.spec} if record.spec.get(key) != task.spec.get(key)]
    told = "; ".join(f"{key} was {record.spec.get(key)!r} and is now {task.spec.get(key)!r}" for key in keys)
    raise StoreError(
        f"{folder} holds another run called {task.name}: {told}. Choose another folder, or have it made anew "
        "(--overwrite)."
    )


def work(task: Task, folder: Path) -> Record | None:
    """Make a run, or continue it, and return its record when it has ended.

    Exceptions of the run are not raised, but stored in the record.

    Returns:
        the record; None if another process is working on the run.

    Raises:
        StoreError: if the folder holds another run of that name, or is not writable.
        KeyboardInterrupt: when the process is asked to end; the state of the run is then saved.
    """
    with _patiently_locked(lock_path(folder, task.name)) as mine:
        if not mine:
            return None
        before = read_record(folder, task.name)
        require_same(task, before, folder)
        if before is not None and before.complete:
            return before
        before = before or Record(task.name, task.spec)
        record = replace(
            before,
            state="running",
            status="",
            message="",
            sessions=before.sessions + 1,
            where=f"process {os.getpid()} on {socket.gethostname()}",
            began=before.began or _now(),
        )
        with _clock(folder, record):
            try:
                _ended(record, _result(task, result_path(folder, task.name)))
            except KeyboardInterrupt:
                record.state = "unfinished"
                raise
            except Exception as error:
                traceback.print_exc()
                record.state, record.message = "error", f"{type(error).__name__}: {error}"
        return record


@contextmanager
def _patiently_locked(path: Path) -> Iterator[bool]:
    """The lock; several attempts are made, because another process may be checking whether it is held."""
    until = time.monotonic() + _LOOKING
    while True:
        with locked(path) as mine:
            if mine or time.monotonic() > until:
                yield mine
                return
        time.sleep(_LOOKING / 10)


def forget(folder: Path, name: str) -> bool:
    """Remove the result and the record of a run, so that it is made anew; False if another process works on it."""
    with locked(lock_path(folder, name)) as mine:
        if mine:
            for path in (result_path(folder, name), record_path(folder, name)):
                path.unlink(missing_ok=True)
        return mine


def _result(task: Task, path: Path) -> Comparison:
    """The result of a run; if it had ended before its record was written, the result is read, not made again."""
    if path.exists():
        there = load(path)
        if there.status is not Status.SUCCESS and there.status not in _GOING_ON:
            return there  # type: ignore[no-any-return]
    return task.run(path)


def _ended(record: Record, result: Comparison) -> None:
    record.status, record.message = result.status.name, ""
    record.state = "done" if result.status is Status.SUCCESS else "failed"
    if record.state == "failed":
        stopped = [note for note in result.notes if note.startswith("Stopped: ")]
        record.message = stopped[-1].removeprefix("Stopped: ") if stopped else str(result.status)
    record.device = str(result.about.get("device", ""))
    record.summary = summarise(result)


@contextmanager
def _clock(folder: Path, record: Record) -> Iterator[None]:
    """A context that updates the record during a run and at its end."""
    cpu, wall = record.cpu_seconds, record.wall_seconds
    begin, spent = time.monotonic(), time.process_time()
    over, writing = threading.Event(), threading.Lock()

    def write() -> None:
        with writing:
            record.cpu_seconds = round(cpu + time.process_time() - spent, 2)
            record.wall_seconds = round(wall + time.monotonic() - begin, 2)
            record.peak_mib = round(max(record.peak_mib, _peak()), 1)
            record.ended = "" if record.state == "running" else _now()
            write_record(folder, record)

    def beat() -> None:
        while not over.wait(_HEARTBEAT):
            write()

    write()
    pulse = threading.Thread(target=beat, daemon=True)
    pulse.start()
    try:
        yield
    finally:
        over.set()
        pulse.join()
        write()


def _peak() -> float:
    """The largest memory until now, MiB: of the GPU if one is in use, else of the process."""
    card = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0  # 0 if it was not used
    if card:
        return card / 2**20
    unit = 2**20 if sys.platform == "darwin" else 2**10  # bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def stop_when_asked() -> None:
    """Let SIGTERM end a run as Ctrl-C does, with its state saved, and leave Ctrl-C to the parent process."""

    def stop(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # only once: a second signal would interrupt the writing
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
