"""The shell commands except ``dvi sweep`` and ``dvi paper``, which have their own files."""

from __future__ import annotations

import functools
import inspect
import logging
import operator
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, cast

import numpy as np
import torch
import tyro

import dvi
from dvi.cli.names import KINDS, Make, UsageError, in_words, made, maker
from dvi.cli.options import flags
from dvi.cli.paper import COMMANDS
from dvi.cli.sweep import sweep_
from dvi.runs.launched import first, launched, who
from dvi.runs.solving import default_integrator
from dvi.storage.files import writable

DONE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130  # exit codes

#: Defaults in the shell for arguments that the library's own classes and functions require.
_DEFAULTS = {"steps": 1000, "lr": 1e-3, "beta2": 0.99}

_Files = Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="FILE", help_behavior_hint="")]


def run(arguments: Sequence[str]) -> int:
    """Run a shell command and return its exit code, see :func:`dvi.cli.main`."""
    before = sys.path[:]  # the folders of the user's files are added to it
    try:
        with launched():
            return _run(list(arguments))
    except dvi.RanksError as error:
        say(str(error))
        return FAILED
    except KeyboardInterrupt:
        say("Interrupted. The result until now is kept; the same command continues from it.")
        return INTERRUPTED
    except dvi.RunError as error:  # nothing was computed, because the start itself is impossible
        say(str(error))
        return FAILED
    except dvi.StoreError as error:
        say(str(error))
        return BAD_INPUT if error.result is None else FAILED
    except (ImportError, OSError, ValueError) as error:  # ValueErrors: wrong flags, hyperparameters, losses and sizes
        say(str(error))
        return BAD_INPUT
    finally:
        sys.path[:] = before


def _run(arguments: list[str]) -> int:
    own = {"rest", "understood", "runner"}  # arguments that `dvi sweep` gets here
    commands: dict[str, Make] = {
        "compare": _compare(arguments[1:] if arguments[:1] == ["compare"] else []),
        "plot": flags(plot),
        "info": flags(info),
        "report": flags(report),
        "sweep": flags(sweep_, without=own),
        "paper": _group({name: flags(command) for name, command in COMMANDS.items()}),
    }
    types = [Annotated[Any, tyro.conf.subcommand(name, constructor=make)] for name, make in commands.items()]
    command, rest = tyro.cli(
        cast(Any, functools.reduce(operator.or_, types)),
        prog="dvi",
        description="Central flows: what an optimizer at the edge of stability does on average. "
        "Run one together with its flows, draw the result, describe it in words, or show the contents of a file; "
        "make many runs, or the paper's experiments. "
        "`dvi COMMAND --help` has examples.",
        args=arguments,
        return_unknown_args=True,
    )
    if arguments[0] == "sweep":
        return int(command(rest=rest, understood=not_meant, runner=run_into))
    if rest:
        raise UsageError(_not_understood(rest[0], arguments))
    return int(command())


def _group(commands: dict[str, Make]) -> Make:
    """A command that consists of others, like `dvi paper`."""
    types = [Annotated[Any, tyro.conf.subcommand(name, constructor=make)] for name, make in commands.items()]

    def chosen(command: Any) -> Any:
        return command

    kind = cast(Any, tyro.conf.OmitSubcommandPrefixes)[functools.reduce(operator.or_, types)]
    chosen.__annotations__ = {"command": kind}
    chosen.__doc__ = "The paper's experiments: list them, run them, draw its figures, and print a table."
    return chosen


def _not_understood(word: str, arguments: Sequence[str]) -> str:
    """The message for a flag that is not understood: what it applies to, or what may have been meant."""
    if not word.startswith("--"):
        return f"{word} is not understood here. A switch is turned on by --NAME and off by --no-NAME, without a value."
    command, (owner, _, name) = f"dvi {arguments[0]}", word.split("=")[0].removeprefix("--").rpartition(".")
    accepting = {
        flag: [key for key, make in kind.table.items() if name.replace("-", "_") in inspect.signature(make).parameters]
        for flag, kind in KINDS.items()
    }
    for flag, chosen in _chosen(arguments[1:]).items():
        if command == "dvi compare" and owner in ("", flag) and accepting[flag]:
            return f"{word} does not apply to --{flag} {chosen}; it is for --{flag} {', '.join(accepting[flag])}."
    return f"{word} is not known to {command}; {command} --help lists its flags."


# ---- compare --------------------------------------------------------------------------------------------


def compare(
    problem: str = "digits-mlp",
    method: str = "rmsprop",
    integrator: str = "auto",
    *,
    out: Path | None = None,
    overwrite: bool = False,
    threads: int | None = None,
    plot: bool = True,
    quiet: bool = False,
    problem_options: Any,
    method_options: Any,
    integrator_options: Any,
    run: Any,
) -> int:
    """Run an optimizer, its central flow and its stable flow side by side, and draw the paper's figure.

    OUT/race.h5 contains all results and is updated during the run; OUT/race.png is the figure.
    Exit code 0: done; 1: the run could not continue (its result until then is in OUT); 2: wrong input;
    130: interrupted.

    Try:
      dvi compare --problem digits-mlp --method rmsprop --lr 2e-3 --steps 1000 --out runs/x
      dvi compare --problem digits-cnn --method gd --lr 0.02 --n 200 --steps 500 --runs discrete central
      dvi compare --problem my.py:problem --method my.py:Adagrad --method.lr 0.1 --out runs/mine
      dvi compare --problem digits-mlp --method rmsprop --lr 2e-3 --steps 1000 --out runs/x --resume
      torchrun --nproc-per-node 2 -m dvi compare --problem digits-mlp --method rmsprop --out runs/x

    Args:
        out: folder for race.h5 and race.png; made if missing. By default runs/PROBLEM-METHOD.
        overwrite: replace the race.h5 of an earlier run; without this flag, such a file is an error.
        threads: CPU threads for the linear algebra; all cores by default.
        plot: draw race.png.
        quiet: no progress bar and no summary; nothing is printed unless something goes wrong.
    """
    if out is None:
        out = Path("runs") / "-".join(name.rpartition(":")[2] for name in (problem, method))
    file, drawing = out / "race.h5", out / "race.png"
    quiet, plot = quiet or not first(), plot and first()
    if first() and os.path.exists(file) and not (run.keywords["resume"] or overwrite):
        raise UsageError(f"{file} exists: give --resume to continue, --overwrite, or another --out.")
    if threads is not None:
        if threads < 1:
            raise UsageError(f"--threads {threads}: must be 1 or more.")
        torch.set_num_threads(threads)
    loss, optimizer, how = _ingredients(
        problem, method, integrator, problem_options, method_options, integrator_options, run.keywords["accuracy"]
    )
    if first():
        writable(file)  # fail before the run, not after it
    if plot:
        _picture(drawing)
    written, failure = [file], None
    with _hushed(quiet):
        try:
            with in_words(f"The run of {method} on {problem}", always=False):
                race = run(loss, optimizer, integrator=how, path=file, progress=not quiet)
        except dvi.RunError as error:
            if not isinstance(error.result, dvi.Comparison):
                raise
            race, failure = error.result, error
        except KeyboardInterrupt:
            there = f" The result until now is in {file}." if file.exists() else ""
            say(f"Interrupted.{there} Continue with --resume, or start again with --overwrite.")
            return INTERRUPTED
    if plot:
        race.plot(drawing)
        written.append(drawing)
    if failure is not None:
        say(f"{failure}\nThe result until then: {', '.join(map(str, written))}")
        return FAILED
    if not quiet:
        words = ["", *str(race.report()).splitlines(), ""]
        print("\n".join([*table(race), *words, "written: " + ", ".join(map(str, written))]))
    return DONE


def _ingredients(
    problem: str,
    method: str,
    integrator: str,
    problem_options: Any,
    method_options: Any,
    integrator_options: Any,
    accuracy: Any,
) -> tuple[dvi.Problem, Any, Any]:
    """The problem, the method and the integrator that the flags describe."""
    loss, optimizer = made("problem", problem, problem_options), made("method", method, method_options)
    how = made("integrator", integrator, integrator_options)
    if integrator == "auto" and how is not None:  # ``how`` is the tolerance of the integrator that suits the flow
        flow = dvi.central_flow(loss, optimizer, accuracy=accuracy, check=False)
        how = replace(default_integrator(flow), tol=how)  # type: ignore[type-var]  # a dataclass with a tol
    return loss, optimizer, how


def run_into(arguments: list[str], path: Path) -> dvi.Comparison:
    """Make or continue the run that the arguments of `dvi compare` describe; it is a run of `dvi sweep`."""
    given, _ = _read(arguments)
    named = ("problem", "method", "integrator", "problem_options", "method_options", "integrator_options")
    flags_of_run = given["run"]
    loss, optimizer, how = _ingredients(
        accuracy=flags_of_run.keywords["accuracy"], **{name: given[name] for name in named}
    )
    keywords = flags_of_run.keywords | {"resume": True, "throw": False}
    with in_words(f"The run of {given['method']} on {given['problem']}", always=False):
        race = flags_of_run.func(loss, optimizer, **keywords, integrator=how, path=path, progress=False)
    return cast(dvi.Comparison, race)


def not_meant(arguments: list[str]) -> list[str]:
    """The values among the arguments of `dvi compare` that belong to no flag.

    Raises:
        UsageError: if a flag is not known.
        SystemExit: if a value cannot be read; tyro prints which one.
    """
    _, rest = _read(arguments)
    for word in rest:
        if word.startswith("--"):
            raise UsageError(_not_understood(word, ["compare", *arguments]))
    return rest


def _read(arguments: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Parse the arguments of `dvi compare`; also return those that were not understood."""
    command, rest = tyro.cli(_compare(arguments), args=arguments, return_unknown_args=True, prog="dvi compare")
    return dict(command.keywords), list(rest)


def _chosen(arguments: Sequence[str]) -> dict[str, str]:
    """The names of the problem, the method and the integrator among the arguments."""
    names = flags(compare, without=set(inspect.signature(compare).parameters) - set(KINDS))
    found, _ = tyro.cli(names, args=arguments, return_unknown_args=True, add_help=False, prog="dvi compare")
    return dict(found.keywords)


def _compare(arguments: Sequence[str]) -> Make:
    """The command with the flags of the problem, the method and the integrator that the arguments name."""
    run = flags(
        dvi.compare,
        defaults=_DEFAULTS,
        without={*KINDS, "path", "progress", "throw", "test_inputs", "sampling", "scheduler", "start"},
    )
    kinds: dict[str, Any] = {"run": Annotated[Any, tyro.conf.OmitArgPrefixes, tyro.conf.arg(constructor=run)]}
    taken = {"help", *inspect.signature(compare).parameters, *inspect.signature(run).parameters}
    for flag, name in _chosen(arguments).items():
        table = KINDS[flag].table
        options = flags(maker(flag, name), flag, defaults=_DEFAULTS if name in table else {}, taken=taken)
        taken |= set(inspect.signature(options).parameters)
        listed = f"{', '.join(table)}; or your own: FILE.py:NAME, PACKAGE.MODULE:NAME"
        kinds[flag] = Annotated[str, tyro.conf.arg(metavar="NAME", help=listed)]
        kinds[f"{flag}_options"] = Annotated[Any, tyro.conf.arg(name=flag, constructor=options)]
    return flags(compare, instead=kinds)


# ---- results --------------------------------------------------------------------------------------------


def plot(
    files: _Files, out: Path | None = None, sigma: float | None = None, leading: int = 8, title: str | None = None
) -> int:
    """Draw results again: train loss, effective eigenvalues, distances, learning rate or oscillations.

    Try:
      dvi plot runs/x/race.h5
      dvi plot runs/x/race.h5 --out figure.pdf --sigma 30
      dvi plot runs/*/race.h5 --out figures

    Args:
        files: results written by `dvi compare`, race.save or solution.save; runs need not be finished.
        out: a file (its ending determines the format: .png, .pdf, .svg) or, for several results, a folder. By default
            next to FILE.
        sigma: width (standard deviation) of the time averages, in optimizer steps; by default 50, or a tenth of the
            run if that is less.
        leading: largest number of eigenvalues to draw for each process.
        title: title of the figure, instead of method and problem.
    """
    drawings = [_picture(path) for path in _pictures(_given(files, "plot"), out)]
    for file, drawing in zip(files, drawings, strict=True):
        dvi.load(file).plot(drawing, sigma=sigma, leading=leading, title=title)
        print(drawing)
    return DONE


def info(files: _Files) -> int:
    """Show what result files contain: method and problem, how far the runs got and how they ended, notes, and cost.

    Try:
      dvi info runs/x/race.h5

    Args:
        files: results written by `dvi compare`, race.save or solution.save; runs need not be finished.
    """
    for file in _given(files, "info"):
        result = dvi.load(file)
        print(f"{file}: a {type(result).__name__.lower()}, {result.status.name}: {result.status}")
        for name, value in result.about.items():
            print(f"  {name}: {', '.join(map(str, value)) if isinstance(value, list) else value}")
        print("\n".join(table(result)))
    return DONE


def report(files: _Files) -> int:
    """Describe what runs show of their optimizers: edge of stability, loss, curvature, and how far to trust the flow.

    Try:
      dvi report runs/x/race.h5

    Args:
        files: results written by `dvi compare`, race.save or solution.save; runs need not be finished.
    """
    print("\n\n".join(str(dvi.load(file).report()) for file in _given(files, "report")))
    return DONE


def _given(files: tuple[Path, ...], command: str) -> tuple[Path, ...]:
    if not files:
        raise UsageError(f"No result is given. Give one file or more, as in: dvi {command} runs/x/race.h5")
    return files


def _picture(path: Path) -> Path:
    """The path of a figure, after a check that it can be written."""
    from dvi.plotting import picture

    return picture(path)


def _pictures(files: tuple[Path, ...], out: Path | None) -> list[Path]:
    """The path of the figure of each result."""
    if out is None:
        return [file.with_suffix(".png") for file in files]
    is_file = bool(out.suffix) and not out.is_dir()
    if is_file and len(files) > 1:
        raise UsageError(f"--out {out} is one file, but there are {len(files)} results; give a folder.")
    if is_file:
        return [out]
    names = [file.stem for file in files]
    if len(set(names)) < len(names):  # runs/x/race.h5, runs/y/race.h5
        names = [f"{file.resolve().parent.name}-{file.stem}" for file in files]
    if len(set(names)) < len(names):
        raise UsageError("Several of these results have the same name; draw them one by one.")
    return [out / f"{name}.png" for name in names]


# ---- messages and tables --------------------------------------------------------------------------------


def say(text: str) -> None:
    """Print an error for the user; each rank prints its own errors."""
    print(f"dvi{who()}: {text}", file=sys.stderr)


def table(result: dvi.Comparison | dvi.Solution) -> list[str]:
    """The lines of a table of the runs, with the distances between them at the end and the notes."""
    runs = result.runs if isinstance(result, dvi.Comparison) else {result.name: result}
    distance = result.distance if isinstance(result, dvi.Comparison) else {}
    lines = [f"{'':10}{'until step':>12}{'train loss':>12}{'predicted':>12}{'oscillating':>13}{'cost':>9}"]
    lines += [_row(run) for run in runs.values()]
    lines.append("(predicted: the optimizer's time average; cost: gradients' worth of work per optimizer step)")
    lines += [
        f"distance {a}–{b} in weight space: {values[-1]:.4g} at the end, at most {values.max():.4g}"
        for (a, b), values in distance.items()
        if len(values)
    ]
    return lines + [f"note: {note}" for note in result.notes]


def _row(run: dvi.Solution) -> str:
    if not len(run.t):
        return f"{run.name:10}{'nothing recorded':>24}"
    t, loss, predicted = run.t[-1], run.loss[-1], run.predicted_loss[-1]
    shown = "–" if np.isnan(predicted) or predicted == loss else f"{predicted:.4g}"
    oscillating = str(run.k[-1]) if run.name not in ("discrete", "stable") else "–"
    cost = run.ledger.per_unit_time() if len(run.ledger.t) > 1 else np.nan
    return f"{run.name:10}{t:>12g}{loss:>12.4g}{shown:>12}{oscillating:>13}{cost:>9.3g}"


@contextmanager
def _hushed(quiet: bool) -> Iterator[None]:
    """Suppress the library's warnings, which are also notes of the result."""
    logger = logging.getLogger("dvi")
    before = logger.level
    logger.setLevel(logging.ERROR if quiet else before)
    try:
        yield
    finally:
        logger.setLevel(before)
