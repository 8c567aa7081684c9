"""The shell commands ``dvi compare``, ``dvi plot`` and ``dvi info``."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch

import dvi
from dvi.cli_options import INTEGRATORS, METHODS, PROBLEMS, Options, UsageError, at_least_one, shown
from dvi.cli_report import draw, hushed, picture_path, report, say
from dvi.files import writable

try:
    import tyro
except ImportError:  # told by main, so that this module can be imported without the extra
    tyro = None  # type: ignore[assignment,unused-ignore]

DONE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130  # exit codes


@dataclass(frozen=True)
class Compare(Options):
    """Run an optimizer, its central flow and its stable flow side by side, and draw the paper's picture.

    OUT/race.h5 holds everything and is kept up to date while the run goes on; OUT/race.png is the picture.
    Exit code 0: done; 1: the run could not go on (what was computed is in OUT); 2: wrong input; 130: interrupted.

    Try:
      dvi compare --problem digits-mlp --method rmsprop --lr 2e-3 --steps 1000 --out runs/x
      dvi compare --problem digits-cnn --method gd --lr 0.02 --n 200 --steps 500 --runs discrete central
      dvi compare --problem digits-mlp --method rmsprop --lr 2e-3 --steps 1000 --out runs/x --resume
    """

    out: Annotated[Path | None, shown("FOLDER", "runs/PROBLEM-METHOD")] = None
    """Folder for race.h5 and race.png; made if missing."""
    resume: bool = False
    """Go on from OUT/race.h5 to the same result as an uninterrupted run; give the flags of the first call again, or
    more --steps to make the run longer."""
    overwrite: bool = False
    """Replace the race.h5 of an earlier run, which otherwise is an error."""
    checkpoint_every: float = 10.0
    """Time between updates of race.h5, in seconds: as much is lost when the machine goes down."""
    threads: Annotated[int | None, shown("COUNT", "all cores")] = None
    """CPU threads for the linear algebra."""
    no_plot: bool = False
    """Do not draw race.png."""
    quiet: bool = False
    """No progress bar and no summary: nothing is printed unless something goes wrong."""

    def __call__(self) -> int:
        """Run, and return the exit code."""
        folder = self.out or Path("runs") / f"{self.problem}-{self.method}"
        file, picture = folder / "race.h5", folder / "race.png"
        if os.path.exists(file) and not (self.resume or self.overwrite):
            raise UsageError(
                f"{file} exists: --resume goes on from it, --overwrite replaces it, or choose another --out."
            )
        if self.threads is not None:
            torch.set_num_threads(at_least_one("threads", self.threads))
        problem, method, integrator = self._problem(), self._method(), self._integrator()
        writable(file)  # before the run, not after it
        if not self.no_plot:
            picture_path(picture)
        failure = None
        with hushed(self.quiet):
            try:
                race = dvi.compare(
                    problem,
                    method,
                    self.steps,
                    runs=self.runs,
                    integrator=integrator,
                    accuracy=self._accuracy(),
                    warm_start=self._warm_start(),
                    save_every=self.save_every,
                    eigen_every=self.eigen_every,
                    path=file,
                    resume=self.resume,
                    checkpoint_every=self.checkpoint_every,
                    progress=not self.quiet,
                )
            except dvi.RunError as error:
                if not isinstance(error.result, dvi.Comparison):
                    raise
                race, failure = error.result, error
            except KeyboardInterrupt:
                there = f" What was computed is in {file}." if file.exists() else ""
                say(f"Interrupted.{there} Go on with --resume, or start again with --overwrite.")
                return INTERRUPTED
        written = [file]
        if not self.no_plot:
            written.append(draw(race, picture))
        if failure is not None:
            say(f"{failure}\nWhat was computed until then: {', '.join(map(str, written))}")
            return FAILED
        if not self.quiet:
            print("\n".join([*report(race), "written: " + ", ".join(map(str, written))]))
        return DONE


@dataclass(frozen=True)
class Plot:
    """Draw results again: train loss, effective eigenvalues, distances, learning rate or oscillations.

    Try:
      dvi plot runs/x/race.h5
      dvi plot runs/x/race.h5 --out figure.pdf --sigma 30
      dvi plot runs/*/race.h5 --out figures
    """

    files: Annotated[tuple[Path, ...], tyro.conf.Positional, shown("FILE", "")]
    """Results to draw, as `dvi compare`, race.save or solution.save wrote them; also of runs that are not finished."""
    out: Annotated[Path | None, shown("PATH", "FILE with .png")] = None
    """A file (its ending says the format: .png, .pdf, .svg) or, for several, a folder."""
    sigma: Annotated[float | None, shown("STEPS", "50, or a tenth of the run if less")] = None
    """Width (standard deviation) of the time averages, in optimizer steps."""
    leading: int = 8
    """How many eigenvalues of each process are drawn, at most."""
    title: Annotated[str | None, shown("TEXT", "method and problem")] = None
    """Title of the picture."""

    def __call__(self) -> int:
        """Draw, and return the exit code."""
        if not self.files:
            raise UsageError("Which results? Give one file or more, as in: dvi plot runs/x/race.h5")
        targets = [picture_path(target) for target in self._targets()]
        for file, picture in zip(self.files, targets, strict=True):
            options: dict[str, Any] = {"sigma": self.sigma, "leading": self.leading, "title": self.title}
            print(draw(dvi.load(file), picture, **options))
        return DONE

    def _targets(self) -> list[Path]:
        if self.out is None:
            return [file.with_suffix(".png") for file in self.files]
        if len(self.files) == 1 and self.out.suffix and not self.out.is_dir():
            return [self.out]
        if self.out.suffix and not self.out.is_dir():
            raise UsageError(f"--out {self.out} is one file, for {len(self.files)} results; give a folder.")
        names = [file.stem for file in self.files]
        if len(set(names)) < len(names):  # runs/x/race.h5, runs/y/race.h5
            names = [f"{file.resolve().parent.name}-{file.stem}" for file in self.files]
        if len(set(names)) < len(names):
            raise UsageError("Several of these results have the same name; draw them one by one.")
        return [self.out / f"{name}.png" for name in names]


@dataclass(frozen=True)
class Info:
    """Say what result files hold: method and problem, how far they got and how they ended, notes, and cost.

    Try:
      dvi info runs/x/race.h5
    """

    files: Annotated[tuple[Path, ...], tyro.conf.Positional, shown("FILE", "")]
    """Results, as `dvi compare`, race.save or solution.save wrote them; also of runs that are not finished."""

    def __call__(self) -> int:
        """Print, and return the exit code."""
        if not self.files:
            raise UsageError("Which results? Give one file or more, as in: dvi info runs/x/race.h5")
        for file in self.files:
            result = dvi.load(file)
            kind = type(result).__name__.lower()
            print(f"{file}: a {kind}, {result.status.name}: {result.status}")
            for name, value in result.about.items():
                print(f"  {name}: {', '.join(map(str, value)) if isinstance(value, list) else value}")
            print("\n".join(report(result)))
        return DONE


COMMANDS: Mapping[str, type[Compare] | type[Plot] | type[Info]] = {"compare": Compare, "plot": Plot, "info": Info}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a shell command.

    Args:
        arguments: what stands after ``dvi`` (default: the process's own).

    Returns:
        the exit code: 0 done, 1 a run could not go on, 2 wrong input, 130 interrupted.

    Raises:
        SystemExit: where ``--help`` is asked for (0) or a flag cannot be read (2).

    """
    if tyro is None:
        say("The shell commands need tyro: pip install 'dvi-flows[cli]'.")
        return BAD_INPUT
    command: Any = tyro.extras.subcommand_cli_from_dict(
        dict(COMMANDS),
        prog="dvi",
        description="Central flows: what an optimizer at the edge of stability does on average. "
        "Run one beside its flows, draw what came out, or look into a file; `dvi COMMAND --help` has examples.",
        args=list(sys.argv[1:] if arguments is None else arguments),
    )
    try:
        return int(command())
    except dvi.RunError as error:  # before anything was computed: the start itself is impossible
        say(str(error))
        return FAILED
    except dvi.StoreError as error:
        say(str(error))
        return BAD_INPUT if error.result is None else FAILED
    except (ImportError, OSError, ValueError) as error:  # wrong flags, hyperparameters, losses and sizes: ValueErrors
        say(str(error))
    return BAD_INPUT


__all__ = ["COMMANDS", "INTEGRATORS", "METHODS", "PROBLEMS", "Compare", "Info", "Plot", "UsageError", "main"]
