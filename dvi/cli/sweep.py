"""The shell command ``dvi sweep``: `dvi compare` for each combination of the values of its flags."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from dvi.cli.names import UsageError
from dvi.results.comparison import Comparison
from dvi.sweeps.api import in_words, sweep
from dvi.sweeps.cluster import Slurm
from dvi.sweeps.records import MANIFEST, Record, Task

Engine = Literal["local", "slurm"]

#: Flags of `dvi compare` that belong to the sweep as a whole.
_TAKEN = ("--out", "--overwrite", "--resume", "--no-resume", "--quiet", "--plot", "--no-plot", "--threads")

#: Makes a run from the arguments of `dvi compare` and writes it to a file.
Runner = Callable[[list[str], Path], Comparison]


def sweep_(
    *,
    out: Path = Path("runs") / "sweep",
    engine: Engine = "local",
    workers: int | None = None,
    threads: int = 1,
    partition: str | None = None,
    hours: float = 24.0,
    cards: int = 0,
    slurm: tuple[str, ...] = (),
    wait: bool = True,
    overwrite: bool = False,
    retry: bool = False,
    quiet: bool = False,
    rest: Any = (),
    understood: Any = None,
    runner: Any = None,
) -> int:
    """Run `dvi compare` for each combination of values: each of its flags takes several values here.

    Several runs are made at a time.  Complete runs are skipped, killed runs continue, and a run that fails does not
    stop the others.  Each run writes NAME.h5 (for `dvi info` and `dvi plot`), NAME.json (how it ended, what it cost)
    and NAME.log into OUT, where NAME consists of its values; manifest.json lists them.  Exit code 0: all have ended
    well; 1: some have not; 2: wrong input; 130: interrupted.

    Try:
      dvi sweep --problem digits-mlp --method gd --method.lr 0.1 0.2 0.4 --seed 0 1 2 --steps 500
      dvi sweep --problem digits-mlp digits-cnn --method gd --lr 0.1 --n 100 --runs discrete central --out runs/nets
      dvi sweep --problem my.py:problem --method rmsprop --lr 1e-3 2e-3 --device cuda --engine slurm --partition gpu

    Args:
        out: the folder for the runs; made if missing.
        engine: "local": processes of this machine; "slurm": jobs of a cluster.
        workers: runs at a time; by default one for each GPU, or one for each core.
        threads: CPU threads of each run.
        partition: partition of the cluster.
        hours: time limit of a job; a run that takes longer continues in another job.
        cards: GPUs of each job of the cluster.
        slurm: further parameters of jobs by submitit's names, as in slurm_account=physics mem_gb=32.
        wait: wait for the jobs of the cluster.
        overwrite: make existing runs anew.
        retry: make failed runs anew.
        quiet: print nothing unless something goes wrong.
    """
    tasks = [
        Task(name, partial(_run, runner=runner, arguments=row, place=os.getcwd()), {"arguments": row})
        for name, row in grid(list(rest), understood)
    ]
    found = sweep(
        tasks,
        out,
        slurm=engine_of(engine, partition, hours, threads, workers, slurm, cards),
        workers=workers,
        threads=threads,
        overwrite=overwrite,
        retry=retry,
        stay=wait,
        progress=not quiet,
    )
    if not quiet:
        print("\n".join(_report(found)))
        print(f"written: {out / MANIFEST}")
    return ended(found, submitted=engine == "slurm" and not wait)


def _run(path: Path, runner: Runner, arguments: list[str], place: str) -> Comparison:
    os.chdir(place)  # paths of the user's files are relative to it
    return runner(arguments, path)


def grid(rest: Sequence[str], understood: Callable[[list[str]], list[str]]) -> list[tuple[str, list[str]]]:
    """The runs for flags with several values: a name and the arguments of `dvi compare` for each.

    Args:
        rest: flags and values as given.
        understood: parses the arguments of one run, and returns those that are not understood.

    Raises:
        UsageError: if a flag belongs to the sweep, or is not understood.
    """
    flags: list[tuple[str, list[str]]] = []
    for word in rest:
        number = re.fullmatch(r"-[\d.].*", word)
        if word.startswith("-") and not number:
            name, is_there, value = word.partition("=")
            flags.append((name, [value] if is_there else []))
        elif not flags:
            raise UsageError(f"{word} is not understood here; flags begin with --.")
        else:
            flags[-1][1].append(word)
    names = [name for name, _ in flags]
    for name in names:
        if name in _TAKEN:
            raise UsageError(f"{name} is not for the runs of a sweep; dvi sweep --help lists its own flags.")
        if names.count(name) > 1:
            raise UsageError(f"{name} is given twice; give it once, with all its values.")

    def line(chosen: Sequence[Sequence[str]]) -> list[str]:
        return [word for name, values in zip(names, chosen, strict=True) for word in (name, *values)]

    first = [values[:1] for _, values in flags]
    choices: list[list[list[str]]] = []
    for i, (_, values) in enumerate(flags):
        several = [*first[:i], values, *first[i + 1 :]]
        at_once = len(values) < 2 or not understood(line(several))  # a flag of compare that takes several values
        choices.append([values] if at_once else [[value] for value in values])
    runs = []
    for chosen in itertools.product(*choices):
        row = line(chosen)
        understood(row)
        told = [
            f"{name.lstrip('-')}={values[0]}"
            for (name, _), values, all_ in zip(flags, chosen, choices, strict=True)
            if len(all_) > 1
        ]
        runs.append((re.sub(r"[^\w.=,+:-]", "-", ",".join(told)).replace(":", "-") or "run", row))
    return runs


def engine_of(
    engine: Engine,
    partition: str | None,
    hours: float,
    threads: int,
    workers: int | None,
    more: Sequence[str],
    cards: int,
) -> Slurm | None:
    """The resources of cluster jobs; None for runs on this machine.

    Raises:
        UsageError: for flags of a cluster without --engine slurm, or for a parameter without a value.
    """
    if engine == "local":
        if partition is not None or more:
            raise UsageError("--partition and --slurm are for --engine slurm.")
        return None
    given: dict[str, Any] = {}
    for word in more:
        name, is_there, value = word.partition("=")
        if not is_there:
            raise UsageError(f"--slurm {word}: give NAME=VALUE, as in slurm_account=physics.")
        given[name] = int(value) if value.isdigit() else value
    return Slurm(partition, hours, cards, threads, at_once=workers or 64, more=given)


def ended(found: Sequence[Record], submitted: bool = False) -> int:
    """The exit code of a sweep: 0 if all runs have ended well (or were only submitted), else 1."""
    return 0 if submitted or all(record.state == "done" for record in found) else 1


def _report(found: Sequence[Record]) -> list[str]:
    """A line for each run: how it ended, and the loss and the distance in the end."""
    width = max(len(record.name) for record in found)
    lines = []
    for record in found:
        loss = record.summary.get("loss", {})
        told = ", ".join(f"{name} {value:.4g}" for name, value in loss.items())
        apart = (record.summary.get("distance") or {}).get("discrete–central")
        between = f"; discrete–central {apart:.3g} apart on average" if apart is not None else ""
        ending = f"loss {told}{between}" if record.complete and told else ""
        how = in_words(record) if record.state != "done" else "done"
        lines.append(f"{record.name:{width}}  {how}{'; ' if ending else ''}{ending}")
    return lines
