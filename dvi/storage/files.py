"""Paths and files: checks before a run, atomic writes, and errors that name the cause."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dvi.results.comparison import Comparison
    from dvi.results.solution import Solution

_ADVICE = {
    errno.ENOSPC: "Free some space or choose another path.",
    errno.EDQUOT: "Free some space or choose another path.",
    errno.EROFS: "The file system is read-only: choose another path.",
    errno.EACCES: "This user may not write there: change the permissions or choose another path.",
    errno.EPERM: "This user may not write there: change the permissions or choose another path.",
    errno.ENAMETOOLONG: "Give the file a shorter name.",
}


class StoreError(OSError):
    """A result could not be written or read; the message says which files are intact.

    Attributes:
        result: the result that could not be written, if any.
    """

    result: Comparison | Solution | None = None


def writable(path: str | Path) -> Path:
    """The path of a file, after a check that it can be written; missing folders are made.

    The check does not change an older file at the path, and leaves no file behind.

    Raises:
        StoreError: if the file cannot be written; the message names the cause and a remedy.
    """
    name, path = os.fspath(path), Path(path)
    if os.path.isdir(path) or name.endswith(("/", os.sep)):
        raise StoreError(f"{name} is a folder. Give the path of a file in it, as in {path / 'race.h5'}.")
    trial = _beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(trial, "wb"):
            pass
        trial.unlink()
    except OSError as error:
        raise unwritable(path, error) from error
    return path


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A context with the path of a temporary file, which replaces ``path`` atomically if no exception is raised.

    Raises:
        StoreError: if the file cannot be written; an older one at ``path`` is then intact.
    """
    path = writable(path)
    temporary = _beside(path)
    try:
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # h5py raises RuntimeError when a flush on close fails
        raise unwritable(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def unwritable(path: Path, error: Exception) -> StoreError:
    """The error for a file that cannot be written, with the cause, whether an older file is intact, and a remedy."""
    for part in reversed(path.parents):
        if os.path.exists(part) and not os.path.isdir(part):
            return StoreError(
                f"{path} could not be written: {part} is a file, so nothing can lie below it. Choose another path."
            )
    before = " The file written earlier is intact." if os.path.exists(path) else ""
    advice = _ADVICE.get(number(error), "Free some space or choose another path.")
    return StoreError(f"{path} could not be written: {error}.{before} {advice}")


def number(error: Exception) -> int:
    """The system's number of an error, or 0 if there is none; h5py writes it only into the message."""
    if isinstance(error, OSError) and error.errno:
        return error.errno
    found = re.search(r"errno\s*=\s*(\d+)", str(error))
    return int(found[1]) if found else 0


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")
