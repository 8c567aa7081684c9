"""The records of runs: what each run was asked to do, how it ended, and what it cost.

A run called NAME has these files in its folder: NAME.h5 (its result), NAME.json (its record), NAME.log (its output) and
NAME.lock (the process that works on it).  ``manifest.json`` collects the records of a folder.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dvi.results.comparison import Comparison
from dvi.storage.files import StoreError, replacing
from dvi.sweeps.locks import holder

MANIFEST = "manifest.json"

#: The state of a run.  "failed": the run could not continue, and its status says why; "error": it could not be made.
STATES = ("new", "running", "unfinished", "done", "failed", "error")


@dataclass(frozen=True)
class Task:
    """A run to be made.

    Attributes:
        name: the name of the run and of its files.
        run: makes the run.  Its argument is the path of the HDF5 file that it updates and continues from.  It is sent
            to other processes, so it must be a function of a module, or a ``functools.partial`` of one.
        spec: the description of the run as plain data; a folder refuses two runs with one name and different specs.
    """

    name: str
    run: Callable[[Path], Comparison]
    spec: dict[str, Any]

    def __post_init__(self) -> None:
        if not self.name or set(self.name) & set("/\\\0") or self.name.startswith("."):
            raise ValueError(f"A run cannot be called {self.name!r}, because its files get its name.")


@dataclass
class Record:
    """The record of a run.

    Attributes:
        name, spec: see :class:`Task`.
        state: one of STATES.
        status: how it ended, the name of a :class:`dvi.Status`; "" before its end.
        message: its last message.
        summary: the result in numbers, see :func:`dvi.results.summary.summarise`.
        cpu_seconds, wall_seconds: the time it has taken until now, all sessions together.
        peak_mib: the largest memory of its process in MiB, or of the GPU if it ran on one.
        sessions: how often it was started or continued.
        where: host and process that worked on it last.
        device: the device of its tensors.
        began, ended: times of the clock (UTC).
    """

    name: str
    spec: dict[str, Any]
    state: str = "new"
    status: str = ""
    message: str = ""
    summary: dict[str, Any] = field(default_factory=dict)
    cpu_seconds: float = 0.0
    wall_seconds: float = 0.0
    peak_mib: float = 0.0
    sessions: int = 0
    where: str = ""
    device: str = ""
    began: str = ""
    ended: str = ""

    @property
    def complete(self) -> bool:
        """Whether nothing is left to do."""
        return self.state in ("done", "failed")


def result_path(folder: Path, name: str) -> Path:
    """The path of the result of a run."""
    return folder / f"{name}.h5"


def record_path(folder: Path, name: str) -> Path:
    """The path of the record of a run."""
    return folder / f"{name}.json"


def lock_path(folder: Path, name: str) -> Path:
    """The path of the file that a process locks while it works on a run."""
    return folder / f"{name}.lock"


def log_path(folder: Path, name: str) -> Path:
    """The path of the output of a run."""
    return folder / f"{name}.log"


def read_record(folder: Path, name: str) -> Record | None:
    """The record of a run, or None if there is none.

    Raises:
        StoreError: if there is a file that is not a record.
    """
    path = record_path(folder, name)
    try:
        return Record(**json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, OSError) as error:
        raise StoreError(f"{path} is not the record of a run: {error}. Move it away to continue the run.") from error


def write_record(folder: Path, record: Record) -> None:
    """Write the record of a run, atomically."""
    _write(record_path(folder, record.name), dataclasses.asdict(record))


def records(folder: Path, names: Iterable[str] | None = None) -> list[Record]:
    """The records of a folder, or of the named runs; a run without a record is "new".

    If a record says "running", but no process works on the run, it is "unfinished": it was killed or interrupted.
    """
    if names is None:
        names = sorted(path.stem for path in folder.glob("*.json") if path.name != MANIFEST)
    found = []
    for name in names:
        record = read_record(folder, name) or Record(name, {})
        if record.state == "running" and not holder(lock_path(folder, name)):
            record.state = "unfinished"
        found.append(record)
    return found


def write_manifest(folder: Path) -> Path:
    """Write the records of a folder into one file: which runs exist, how they ended, and what they cost."""
    rows = [dataclasses.asdict(record) for record in records(folder)]
    totals = {
        "runs": len(rows),
        **{state: sum(row["state"] == state for row in rows) for state in STATES[1:]},
        "cpu_seconds": sum(row["cpu_seconds"] for row in rows),
    }
    _write(folder / MANIFEST, {"totals": totals, "runs": rows})
    return folder / MANIFEST


def _write(path: Path, content: Any) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False, default=str) + "\n", encoding="utf-8")
