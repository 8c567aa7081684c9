"""Paths and files: tried before a run, written whole or not at all, and named in words where they cannot be used."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dvi.compare import Comparison
    from dvi.solution import Solution

_ADVICE = {
    errno.ENOSPC: "Free some space or choose another path.",
    errno.EDQUOT: "Free some space or choose another path.",
    errno.EROFS: "The file system is read-only: choose another path.",
    errno.EACCES: "This user may not write there: change the permissions or choose another path.",
    errno.EPERM: "This user may not write there: change the permissions or choose another path.",
    errno.ENAMETOOLONG: "Give the file a shorter name.",
}


class StoreError(OSError):
    """A result could not be written or read; the message says what is still there.

    Attributes:
        result: what could not be written, if anything.
    """

    result: Comparison | Solution | None = None


def writable(path: str | Path) -> Path:
    """The path of a file, once it was seen that one can be written there; missing folders are made.

    An older file at the path is left as it is, and nothing is left behind.

    Raises:
        StoreError: naming what is in the way, and what to do.
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
    """The path of a temporary file that takes the place of ``path`` at the end, at once and only if all went well.

    Raises:
        StoreError: where the file cannot be written; an older one at ``path`` is then intact.
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
    """The error to raise where a file cannot be written: why, what is still there, and what to do."""
    for part in reversed(path.parents):
        if os.path.exists(part) and not os.path.isdir(part):
            return StoreError(
                f"{path} could not be written: {part} is a file, so nothing can lie below it. Choose another path."
            )
    before = " The file written earlier is intact." if os.path.exists(path) else ""
    advice = _ADVICE.get(number(error), "Free some space or choose another path.")
    return StoreError(f"{path} could not be written: {error}.{before} {advice}")


def number(error: Exception) -> int:
    """The system's number of an error; h5py writes it into the message only.  0 where there is none."""
    if isinstance(error, OSError) and error.errno:
        return error.errno
    found = re.search(r"errno\s*=\s*(\d+)", str(error))
    return int(found[1]) if found else 0


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")
