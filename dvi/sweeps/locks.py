"""Locks on files, so that two sweeps on one folder do not disturb each other."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from dvi.storage.files import StoreError, unwritable


@contextlib.contextmanager
def locked(path: Path) -> Iterator[bool]:
    """A context that holds the lock of a file; it yields False if another process holds the lock.

    The operating system frees the lock of a process when it ends, so there are no stale locks.  The file stays, and
    contains the last holder.

    Raises:
        StoreError: if the file cannot be made, or if the file system does not support locks.
    """
    try:
        import fcntl
    except ImportError as error:
        raise StoreError("Sweeps lock their files with fcntl, which this system (Windows?) lacks.") from error
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise unwritable(path, error) from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError as error:
            raise StoreError(
                f"{path} cannot be locked: {error}. The file system has no locks; choose a folder on another one."
            ) from error
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        yield True
    finally:
        os.close(handle)


def holder(path: Path) -> str:
    """The process that holds the lock of the file, in words; "" if none does."""
    if not path.exists():
        return ""
    with locked(path) as mine:
        return "" if mine else path.read_text().strip() or "another process"
