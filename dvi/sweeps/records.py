"""What is kept of each run beside its result: what it was asked to do, how it ended, and what it cost.

A run called NAME leaves these files in its folder: NAME.h5 (the result), NAME.json (its record), NAME.log (what it
said) and NAME.lock (who works on it).  ``manifest.json`` gathers the records of a folder.
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

#: How far a run is.  "failed": the run itself could not go on, and its status says why; "error": it could not be made.
STATES = ("new", "running", "unfinished", "done", "failed", "error")


@dataclass(frozen=True)
class Task:
    """A run to be made.

    Attributes:
        name: its own name, which its files have.
        run: makes the run: it is given the path of the HDF5 file that it keeps up to date and goes on from.  It is sent
            to other processes, so it is a function of a module, or a ``functools.partial`` of one.
        spec: what the run is, as plain data; a folder does not take two runs of one name and different specs.
    """

    name: str
    run: Callable[[Path], Comparison]
    spec: dict[str, Any]

    def __post_init__(self) -> None:
        if not self.name or set(self.name) & set("/\\\0") or self.name.startswith("."):
            raise ValueError(f"A run cannot be called {self.name!r}, since its files have its name.")


@dataclass
class Record:
    """What is known of a run.

    Attributes:
        name, spec: see :class:`Task`.
        state: one of STATES.
        status: how it ended, the name of a :class:`dvi.Status`; "" before.
        message: what it said in the end.
        summary: the result in numbers, see :func:`dvi.results.summary.summarise`.
        cpu_seconds, wall_seconds: what it has taken until now, all sessions together.
        peak_mib: the largest memory of its process, or of the card where it ran on one.
        sessions: how many times it was started or gone on with.
        where: host and process that worked on it last.
        device: where its tensors were.
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
    """Where the result of a run lies."""
    return folder / f"{name}.h5"


def record_path(folder: Path, name: str) -> Path:
    """Where the record of a run lies."""
    return folder / f"{name}.json"


def lock_path(folder: Path, name: str) -> Path:
    """The file whose lock a process holds that works on a run."""
    return folder / f"{name}.lock"


def log_path(folder: Path, name: str) -> Path:
    """Where a run writes what it says."""
    return folder / f"{name}.log"


def read_record(folder: Path, name: str) -> Record | None:
    """The record of a run, or None where there is none.

    Raises:
        StoreError: if there is a file that is not a record.
    """
    path = record_path(folder, name)
    try:
        return Record(**json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, OSError) as error:
        raise StoreError(f"{path} is not the record of a run: {error}. Move it away, and the run goes on.") from error


def write_record(folder: Path, record: Record) -> None:
    """Write the record of a run, at once and as a whole."""
    _write(record_path(folder, record.name), dataclasses.asdict(record))


def records(folder: Path, names: Iterable[str] | None = None) -> list[Record]:
    """The records of a folder, or of these runs (a run that has none is "new").

    A run that is said to be running, and on which no process works, is "unfinished": it was killed or interrupted.
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
    """Gather the records of a folder in one file: which runs exist, how they ended, what they cost."""
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
