"""Results on disk: HDF5 files that are complete at every moment.

A new file is written next to the old one, and then an atomic rename replaces the old one.  If the process is killed,
the path therefore holds the last complete state.  Results are plain datasets and attributes.  The state from which a
run continues is one dataset of bytes (``checkpoint``) with data only, no code.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dvi.problems import Ledger
from dvi.problems.distributed.ranks import Ranks
from dvi.results.comparison import Comparison
from dvi.results.solution import Cost, Solution
from dvi.results.status import Status
from dvi.storage.checkpoint import from_bytes, to_bytes
from dvi.storage.difference import difference
from dvi.storage.files import StoreError, number, replacing

logger = logging.getLogger("dvi")

FORMAT = 1

_LOCKED = (errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES)  # errors for a file that another process has locked


def save(result: Comparison | Solution, path: str | Path, checkpoint: bytes | None = None) -> None:
    """Write a result to an HDF5 file, atomically.

    Args:
        result: a :class:`dvi.Comparison` or a :class:`dvi.Solution`.
        path: the file.
        checkpoint: the state from which the run can continue (see :mod:`dvi.storage.checkpoint`), if any.

    Raises:
        StoreError: if the file cannot be written (a full disk, a folder in its place, no permission …); an older file
            at ``path`` is then intact, and ``error.result`` is the result.
    """
    h5py = _h5py()
    try:
        with replacing(path) as temporary, h5py.File(temporary, "w") as file:
            file.attrs["dvi_format"] = FORMAT
            file.attrs["kind"] = type(result).__name__
            if isinstance(result, Comparison):
                _write_comparison(file, result)
            else:
                _write_solution(file, result)
            if checkpoint is not None:
                file["checkpoint"] = np.frombuffer(checkpoint, dtype=np.uint8)
    except StoreError as error:
        error.result = result
        raise


def load(path: str | Path) -> Any:
    """Read a result that :func:`save` wrote, or the file of a run that was killed.

    Returns:
        a :class:`dvi.Comparison` or a :class:`dvi.Solution`; an unfinished one has ``status`` RUNNING.

    Raises:
        StoreError: if the file is missing, truncated, not written by dvi, open elsewhere, or not readable.
    """
    path = Path(path)
    with _open(path) as file:
        try:
            return _read_comparison(file) if file.attrs["kind"] == "Comparison" else _read_solution(file)
        except (KeyError, OSError, RuntimeError, ValueError) as error:
            raise StoreError(f"{path} is damaged: {error}. The result is lost; run it again.") from error


class Keeper:
    """Keeps a run's file up to date.

    Args:
        path: the file, or None to keep nothing.
        every: least number of seconds between updates, which is raised to twenty times the duration of an update.
        device: the device of the state when it is read back.
    """

    def __init__(self, path: str | Path | None, every: float, device: torch.device) -> None:
        self.path = None if path is None else Path(path)
        self.every, self.pause = every, every
        self.last = time.monotonic()
        self.device = device
        self.identity: dict[str, Any] = {}
        if self.path is not None:
            _h5py()

    def checkpoint(self, ranks: Ranks) -> dict[str, Any] | None:
        """The state from which to continue, or None if there is no file yet; the first rank reads it for all.

        Raises:
            StoreError: if the file is damaged or has no checkpoint.
        """
        data = ranks.share(self._stored)
        if data is None:
            return None
        saved: dict[str, Any] = from_bytes(data, self.device)
        if "mark" not in saved or not isinstance(saved["identity"], dict):
            raise StoreError(
                f"{self.path} was written by an earlier development version, and this version cannot continue from its "
                "checkpoint. Its results can still be loaded. Start the run again at another path."
            )
        return saved

    def _stored(self) -> bytes | None:
        if self.path is None:
            raise ValueError("resume=True needs path=, the file to continue from.")
        if not os.path.exists(self.path):
            return None
        with _open(self.path) as file:
            if "checkpoint" not in file:
                raise StoreError(
                    f"{self.path} holds a finished result without a checkpoint, so a run cannot continue from it."
                )
            return bytes(file["checkpoint"][()])

    def identify(self, identity: dict[str, Any], saved: dict[str, Any] | None) -> bool:
        """Store the identity of the run in its file, and check that the saved state belongs to the same run.

        Returns:
            whether more steps are asked for than before.

        Raises:
            StoreError: if the file belongs to another run, with the differences in the message, or to a longer one.
        """
        self.identity = identity
        if saved is None:
            return False
        before, now = (float(known["words"]["steps"]) for known in (saved["identity"], identity))
        other = difference(saved["identity"], identity)
        if other:
            raise StoreError(
                f"{self.path} belongs to another run: {other}. Use the same problem, method and arguments, or another "
                "path."
            )
        if now < before:
            raise StoreError(
                f"{self.path} belongs to another run, of {before:g} steps, but {now:g} are asked for. A run can be "
                "made longer, but not shorter: ask for as many steps or more, or use another path."
            )
        return now > before

    def maybe(self, current: Callable[[], tuple[Comparison, dict[str, Any]]]) -> None:
        """Update the file if an update is due; a failure is logged, and the run continues."""
        if self.path is None or time.monotonic() - self.last < self.pause:
            return
        began = time.monotonic()
        result, state = current()
        try:
            self.write(result, state)
        except StoreError as error:
            logger.warning("%s The run goes on and will try again.", error)
        self.last = time.monotonic()
        self.pause = max(self.every, 20 * (self.last - began))

    def write(self, result: Comparison, state: dict[str, Any] | None = None) -> None:
        """Write the result now, with the state from which to continue if there is one."""
        if self.path is not None:
            save(result, self.path, None if state is None else to_bytes(state | {"identity": self.identity}))


# ---- the layout -----------------------------------------------------------------------------------------


def _h5py() -> Any:
    try:
        import h5py
    except ImportError as error:
        raise ImportError("Saving results needs h5py: pip install 'dvi-flows[store]'.") from error
    return h5py


def _open(path: Path) -> Any:
    h5py = _h5py()
    try:
        with open(path, "rb"):  # the system's errors are clearer than those of HDF5
            pass
    except FileNotFoundError as error:
        raise StoreError(f"{path} does not exist.") from error
    except IsADirectoryError as error:
        raise StoreError(f"{path} is a folder. Give the path of a file in it, as in {path / 'race.h5'}.") from error
    except NotADirectoryError as error:
        raise StoreError(f"{path} does not exist: what should be a folder in this path is a file.") from error
    except OSError as error:
        raise StoreError(
            f"{path} is not readable: {error}. Change its permissions, or read it as its owner."
        ) from error
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        if isinstance(error, BlockingIOError) or number(error) in _LOCKED or "unable to lock" in str(error):
            raise StoreError(
                f"{path} is open for writing in another program or notebook, which has locked it: {error}. Close it "
                "there and try again, or read a copy."
            ) from error
        raise StoreError(
            f"{path} cannot be read: {error}. It is truncated, or not an HDF5 file. dvi itself writes only "
            "complete files, so look for an interrupted copy."
        ) from error
    if file.attrs.get("dvi_format") != FORMAT:
        file.close()
        raise StoreError(f"{path} is an HDF5 file, but not a result that this version of dvi wrote.")
    return file


def _put(group: Any, name: str, values: Any) -> None:
    values = np.asarray(values)
    # checksums detect damaged data; scalars and empty arrays cannot have them
    group.create_dataset(name, data=values, fletcher32=bool(values.ndim and values.size))


def _write_comparison(file: Any, race: Comparison) -> None:
    file.attrs["status"] = race.status.name
    file.attrs["about"] = json.dumps(race.about, default=str)
    file.attrs["notes"] = json.dumps(race.notes)
    _put(file, "t", race.t)
    for name, solution in race.runs.items():
        _write_solution(file.create_group(f"runs/{name}"), solution)
    distances = file.create_group("distance")
    for (a, b), values in race.distance.items():
        _put(distances, f"{a}--{b}", values)
    distances.attrs["pairs"] = json.dumps([f"{a}--{b}" for a, b in race.distance])  # HDF5 lists by name
    file.attrs["runs"] = json.dumps(list(race.runs))


def _read_comparison(file: Any) -> Comparison:
    return Comparison(
        t=file["t"][()],
        runs={name: _read_solution(file["runs"][name]) for name in json.loads(file.attrs["runs"])},
        distance={
            tuple(name.split("--")): file["distance"][name][()] for name in json.loads(file["distance"].attrs["pairs"])
        },
        status=Status[file.attrs["status"]],
        notes=json.loads(file.attrs["notes"]),
        about=json.loads(file.attrs["about"]),
    )


def _write_solution(group: Any, solution: Solution) -> None:
    group.attrs["name"] = solution.name
    group.attrs["status"] = solution.status.name
    group.attrs["about"] = json.dumps(solution.about, default=str)
    group.attrs["notes"] = json.dumps(solution.notes)
    for name in ("t", "loss", "predicted_loss", "eigenvalues"):
        _put(group, name, getattr(solution, name))
    _put(group, "w", solution.w.detach().cpu().numpy())
    _put(group, "nu", np.frombuffer(to_bytes(solution.nu), dtype=np.uint8))
    _put(group, "X/order", [len(X) for X in solution.X])
    _put(group, "X/entries", np.concatenate([X.reshape(-1) for X in solution.X]) if solution.X else np.empty(0))
    _put(group, "breakpoints/t", [b[0] for b in solution.breakpoints])
    _put(group, "breakpoints/entered", [b[1] == "enter" for b in solution.breakpoints])
    _put(group, "breakpoints/k", [b[2] for b in solution.breakpoints])
    series = group.create_group("series")
    for name, values in solution.series.items():
        _put(series, name, values)
    cost = group.create_group("ledger")
    cost.attrs["total"] = json.dumps(solution.ledger.ledger.to_dict())
    _put(cost, "t", solution.ledger.t)
    for name in solution.ledger.counts[0] if solution.ledger.counts else ():
        _put(cost, f"counts/{name}", [counts[name] for counts in solution.ledger.counts])


def _read_solution(group: Any) -> Solution:
    order, entries = group["X/order"][()].astype(int), group["X/entries"][()]
    ends = np.cumsum(order**2) if len(order) else np.empty(0, dtype=int)
    cost = group["ledger"]
    columns = {name: values[()] for name, values in cost["counts"].items()} if "counts" in cost else {}
    rows = (
        [{name: int(values[i]) for name, values in columns.items()} for i in range(len(cost["t"]))] if columns else []
    )
    breaks = group["breakpoints"]
    return Solution(
        name=group.attrs["name"],
        t=group["t"][()],
        loss=group["loss"][()],
        predicted_loss=group["predicted_loss"][()],
        eigenvalues=group["eigenvalues"][()],
        X=[entries[end - k * k : end].reshape(k, k) for k, end in zip(order, ends, strict=True)],
        w=torch.from_numpy(group["w"][()]),
        nu=from_bytes(bytes(group["nu"][()])),
        breakpoints=[
            (float(t), "enter" if entered else "leave", int(k))
            for t, entered, k in zip(breaks["t"][()], breaks["entered"][()], breaks["k"][()], strict=True)
        ],
        status=Status[group.attrs["status"]],
        ledger=Cost(cost["t"][()], rows, Ledger.from_dict(json.loads(cost.attrs["total"]))),
        series={name: values[()] for name, values in group["series"].items()},
        notes=json.loads(group.attrs["notes"]),
        about=json.loads(group.attrs["about"]),
    )
