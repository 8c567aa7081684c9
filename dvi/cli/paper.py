"""The shell commands ``dvi paper list``, ``run``, ``figure`` and ``table``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro

from dvi.cli.names import Make, UsageError
from dvi.cli.sweep import Engine, ended, engine_of
from dvi.paper.drawing import draw
from dvi.paper.making import CIFAR10, task_of
from dvi.paper.report import markdown, overview
from dvi.paper.stored import folder_of, is_of
from dvi.paper.table import Experiment, table
from dvi.plotting import picture
from dvi.sweeps.api import sweep
from dvi.sweeps.records import MANIFEST, records

Size = Literal["small", "full"]
_Names = Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="NAME", help_behavior_hint="")]
_Figure = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FIGURE", help_behavior_hint="")]


def list_(names: _Names = (), *, size: Size = "small", folder: Path | None = None) -> int:
    """List the paper's experiments, with the state of their runs.

    Try:
      dvi paper list
      dvi paper list fig14 fig28b --size full

    Args:
        names: rows or figures, as in fig14b or fig14; by default all.
        size: "small" (for a CPU) or "full" (the paper's).
        folder: where the runs are; by default runs/paper/SIZE.
    """
    where = folder_of(size, folder)
    rows = _rows(names, everything=not names)
    print("\n".join(overview(rows, size, records(where, [row.name for row in rows]))))
    return 0


def run(
    names: _Names = (),
    *,
    all: bool = False,
    main: bool = False,
    size: Size = "small",
    device: str = "cpu",
    cifar10: Path = CIFAR10,
    folder: Path | None = None,
    engine: Engine = "local",
    workers: int | None = None,
    threads: int = 1,
    partition: str | None = None,
    hours: float = 24.0,
    slurm: tuple[str, ...] = (),
    wait: bool = True,
    overwrite: bool = False,
    retry: bool = False,
    quiet: bool = False,
) -> int:
    """Make the runs of experiments, several at a time; complete ones are skipped, killed ones continue.

    Each run writes NAME.h5 (for `dvi info` and `dvi plot`), NAME.json (how it ended, what it cost) and NAME.log into
    the folder; manifest.json lists them.  Exit code 0: all have ended well; 1: some have not; 2: wrong input.

    Try:
      dvi paper run fig12 fig22b
      dvi paper run --main
      dvi paper run --all --size full --device cuda --cifar10 data/cifar-10-batches-bin
      dvi paper run --all --size full --device cuda --engine slurm --partition gpu --hours 48

    Args:
        names: rows or figures, as in fig14b or fig14.
        all: all experiments.
        main: the experiments of the figures in the main text, 2 to 11.
        size: "small" (for a CPU) or "full" (the paper's).
        device: device of the tensors, cpu or cuda.  With several GPUs, each run has one to itself.
        cifar10: the folder with the official binary files of CIFAR-10, for the full size.
        folder: the folder for the runs; by default runs/paper/SIZE.
        engine: "local": processes of this machine; "slurm": jobs of a cluster.
        workers: runs at a time; by default one for each GPU, or one for each core.
        threads: CPU threads of each run.
        partition: partition of the cluster.
        hours: time limit of a job; a run that takes longer continues in another job.
        slurm: further parameters of jobs by submitit's names, as in slurm_account=physics mem_gb=32.
        wait: wait for the jobs of the cluster.
        overwrite: make existing runs anew.
        retry: make failed runs anew.
        quiet: print nothing unless something goes wrong.
    """
    rows = _rows(names, everything=all, main=main)
    if not rows:
        raise UsageError("No experiment is given. Name some, as in `dvi paper run fig14b fig28`, or give --all.")
    left_out = [row for row in rows if row.why_not(size)]
    tasks = [task_of(row, size, device, cifar10) for row in rows if row not in left_out]
    where = folder_of(size, folder)
    jobs = engine_of(engine, partition, hours, threads, workers, slurm, cards=int(device.startswith("cuda")))
    found = sweep(
        tasks,
        where,
        slurm=jobs,
        workers=workers,
        threads=threads,
        overwrite=overwrite,
        retry=retry,
        stay=wait,
        progress=not quiet,
    )
    if not quiet:
        for row in left_out:
            print(f"{row.name}: left out: {row.why_not(size)}")
        print(f"written: {where / MANIFEST}; for the results: dvi paper table --size {size}")
    return ended(found, submitted=jobs is not None and not wait)


def figure(number: _Figure, *, out: Path | None = None, size: Size = "small", folder: Path | None = None) -> int:
    """Draw a figure of the paper from its stored runs.

    Try:
      dvi paper run fig6
      dvi paper figure 6 --out fig6.pdf

    Args:
        number: number of the figure, as in 6.
        out: the file; its ending determines the format (.png, .pdf, .svg).  By default figN.png in the folder of the
            runs.
        size: "small" or "full".
        folder: where the runs are; by default runs/paper/SIZE.
    """
    number = number.removeprefix("fig")
    drawing = picture(folder_of(size, folder) / f"fig{number}.png" if out is None else out)
    print(draw(number, drawing, size, folder))
    return 0


def table_(names: _Names = (), *, out: Path | None = None, size: Size = "small", folder: Path | None = None) -> int:
    """Print a Markdown table of the existing runs: edge, distances, predicted loss, and cost.

    Try:
      dvi paper table fig28 fig29
      dvi paper table --out table.md

    Args:
        names: rows or figures; by default all.
        out: a file for the table; by default it is printed.
        size: "small" or "full".
        folder: where the runs are; by default runs/paper/SIZE.
    """
    rows = _rows(names, everything=not names)
    pairs = zip(rows, records(folder_of(size, folder), [row.name for row in rows]), strict=True)
    known = [(row, record) for row, record in pairs if not record.complete or is_of(row, size, record)]
    text = "\n".join(markdown([row for row, _ in known], size, [record for _, record in known]))
    if out is None:
        print(text)
    else:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text + "\n", encoding="utf-8")
        print(out)
    return 0


def _rows(names: tuple[str, ...], everything: bool = False, main: bool = False) -> list[Experiment]:
    """The chosen rows, in the table's order."""
    known = table()
    chosen = {row.name for row in known.chosen(names)}
    if main:
        chosen |= {row.name for figure in range(2, 12) for row in known.of_figure(figure)}
    return [row for row in known.experiments.values() if everything or row.name in chosen]


#: The commands by name.
COMMANDS: dict[str, Make] = {"list": list_, "run": run, "figure": figure, "table": table_}
