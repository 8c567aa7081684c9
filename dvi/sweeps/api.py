"""Many runs in one folder: ``sweep(tasks, folder)`` makes the missing ones and returns a record of each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dvi.storage.files import StoreError, writable
from dvi.sweeps.cluster import Slurm, run_on_cluster
from dvi.sweeps.processes import run_here
from dvi.sweeps.records import MANIFEST, Record, Task, lock_path, read_record, records, write_manifest
from dvi.sweeps.work import forget, require_same


def sweep(
    tasks: Sequence[Task],
    folder: str | Path,
    *,
    slurm: Slurm | None = None,
    workers: int | None = None,
    threads: int = 1,
    overwrite: bool = False,
    retry: bool = False,
    stay: bool = True,
    progress: bool = True,
) -> list[Record]:
    """Make the runs of a list that are not complete yet, several at a time.

    A run that fails does not stop the others.  A run that was killed continues where it stopped.  Several sweeps may
    use one folder at the same time: one of them makes each run, and the others wait for it.

    A script must call this under ``if __name__ == "__main__":``, because worker processes import it.

    Args:
        tasks: the runs.
        folder: the folder for their files; made if missing.
        slurm: the resources of cluster jobs; by default the runs are made in processes of this machine.
        workers: processes at a time (default: one for each GPU, else one for each core).
        threads: CPU threads of each process.
        overwrite: make all runs anew.
        retry: make failed runs anew (diverged, over their budget, …).
        stay: on a cluster, wait for the runs to end.
        progress: show a progress bar, and report failed runs at once.

    Returns:
        a record of each run, in the order of the tasks.

    Raises:
        StoreError: if the folder is not writable, or holds other runs of the same names.
        ValueError: if two runs have the same name, or a number is wrong.
        ImportError: if submitit is needed but missing.
        KeyboardInterrupt: after Ctrl-C, when all runs have saved their state.
    """
    from tqdm.auto import tqdm

    folder = Path(folder)
    names = [task.name for task in tasks]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"Several runs are called {', '.join(twice)}.")
    for what, value in (("workers", workers), ("threads", threads)):
        if value is not None and value < 1:
            raise ValueError(f"{what}={value}: must be 1 or more.")
    writable(folder / MANIFEST)
    for task in tasks:
        before = read_record(folder, task.name)
        if before is not None and (overwrite or (retry and before.state == "failed")):
            if not forget(folder, task.name):
                holding = lock_path(folder, task.name).read_text().strip()
                raise StoreError(f"{holding} is working on the run {task.name}, so it cannot be made anew now.")
        else:
            require_same(task, before, folder)
    complete = {record.name for record in records(folder, names) if record.complete}
    todo = [task for task in tasks if task.name not in complete]
    failed: list[str] = []
    with tqdm(total=len(tasks), desc=str(folder), unit="run", disable=not progress) as bar:
        bar.update(len(complete))

        def told(record: Record) -> None:
            if record.state != "done":
                failed.append(record.name)
                if progress:
                    bar.write(f"{record.name}: {in_words(record)}")
            bar.update(1)
            write_manifest(folder)

        def watched(going: list[str]) -> None:
            trouble = f"{len(failed)} not done, " if failed else ""
            bar.set_postfix_str(
                trouble + ("now " + " ".join(going[:4]) + " …"[: 2 * (len(going) > 4)] if going else "")
            )

        try:
            if slurm is not None:
                if todo:
                    run_on_cluster(todo, folder, slurm, told=told, watched=watched, stay=stay)
            else:
                run_here(todo, folder, workers=workers, threads=threads, told=told, watched=watched)
        finally:
            write_manifest(folder)
    return records(folder, names)


def in_words(record: Record) -> str:
    """How a run ended, in one line."""
    first = record.message.strip().splitlines()[0] if record.message.strip() else ""
    said = f": {first}" if first else ""
    return f"{record.state}{f' ({record.status})' if record.status else ''}{said}"


__all__ = ["in_words", "sweep"]
