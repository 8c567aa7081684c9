"""The shell commands ``dvi compare``, ``dvi plot`` and ``dvi info``."""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
import torch

import dvi
from dvi.solve import WarmStart
from dvi.solvers.protocol import Integrator

try:
    import tyro
except ImportError:  # told by main, so that this module can be imported without the extra
    tyro = None  # type: ignore[assignment,unused-ignore]

DONE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130  # exit codes

#: Problems by name: what makes them, and the arguments the name stands for.
PROBLEMS: Mapping[str, tuple[Callable[..., dvi.Problem], dict[str, Any]]] = {
    "digits-mlp": (dvi.problems.digits, {"network": "mlp"}),
    "digits-cnn": (dvi.problems.digits, {"network": "cnn"}),
    "sorting-transformer": (dvi.problems.sorting, {"network": "transformer"}),
    "sorting-rnn": (dvi.problems.sorting, {"network": "rnn"}),
}

#: Methods by name, and hyperparameters that need not be given.
METHODS: Mapping[str, tuple[type[dvi.Method], dict[str, Any]]] = {
    "gd": (dvi.methods.GradientDescent, {}),
    "rmsprop-norm": (dvi.methods.RMSPropNorm, {"beta2": 0.99}),
    "rmsprop": (dvi.methods.RMSProp, {"beta2": 0.99}),
}

#: Integrators of the central flow by name, and the one flag each listens to.
INTEGRATORS: Mapping[str, tuple[Callable[..., Integrator], str]] = {
    "macro-step": (dvi.MacroStep, "tol"),
    "euler": (dvi.Euler, "dt"),
}

T = TypeVar("T")

DTYPES = {"float64": torch.float64, "float32": torch.float32}


def _shown(metavar: str, default: str) -> Any:
    """How --help shows a flag whose default depends on other flags."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=f"(default: {default})" if default else "(required)")


class UsageError(ValueError):
    """A flag that is wrong or does not apply; the message says which and what would do."""


@dataclass(frozen=True)
class Compare:
    """Run an optimizer, its central flow and its stable flow side by side, and draw the paper's picture.

    OUT/race.h5 holds everything and is kept up to date while the run goes on; OUT/race.png is the picture.
    Exit code 0: done; 1: the run could not go on (what was computed is in OUT); 2: wrong input; 130: interrupted.

    Try:
      dvi compare --problem digits-mlp --method rmsprop --lr 2e-3 --steps 1000 --out runs/x
      dvi compare --problem digits-cnn --method gd --lr 0.02 --n 200 --steps 500 --runs discrete central
      dvi compare --problem digits-mlp --method rmsprop --lr 2e-3 --steps 1000 --out runs/x --resume
    """

    problem: str = "digits-mlp"
    """What is minimised: digits-mlp, digits-cnn (8×8 handwritten digits), sorting-transformer, sorting-rnn."""
    loss: Annotated[str | None, _shown("LOSS", "mse for digits, ce for sorting")] = None
    """mse (½ squared distance to one-hot targets) or ce (cross-entropy)."""
    n: Annotated[int | None, _shown("COUNT", "1000")] = None
    """How many training examples."""
    classes: Annotated[int | None, _shown("COUNT", "10")] = None
    """How many of the ten digits are told apart, 2 to 10 (digits only)."""
    width: Annotated[int | None, _shown("COUNT", "32 for mlp, 8 for cnn, 48 for transformer, 64 for rnn")] = None
    """Width of the hidden layers, in neurons or channels."""
    activation: Annotated[str | None, _shown("NAME", "tanh for mlp, gelu for cnn and transformer")] = None
    """tanh, gelu, silu, softplus, relu, or beta-gelu:β for x Φ(βx)."""
    seed: Annotated[int | None, _shown("SEED", "0")] = None
    """Seed of the examples and of the initial weights."""
    dtype: str = "float64"
    """Precision of all that meets the weights: float64, or float32 (half the memory, less accurate eigenvectors)."""
    device: str = "cpu"
    """Where to compute: cpu, cuda, cuda:1, mps."""
    chunk_size: Annotated[int | None, _shown("COUNT", "all at once")] = None
    """How many examples to differentiate at a time: less memory, same result."""

    method: str = "rmsprop"
    """What minimises it: gd, rmsprop-norm (one adaptive step size) or rmsprop (one for each weight)."""
    lr: float = 1e-3
    """Learning rate η, positive, in units of weight²/loss for gd, of weight for rmsprop."""
    beta2: Annotated[float | None, _shown("β₂", "0.99")] = None
    """Decay β₂ of the average of squared gradients per step, 0 < β₂ < 1 (rmsprop, rmsprop-norm)."""
    eps: Annotated[float | None, _shown("ε", "0")] = None
    """ε ≥ 0, added to the root of that average, in units of the gradient (rmsprop, rmsprop-norm)."""
    bias_correction: bool = False
    """Divide the average by 1 − β₂ᵗ, as Adam does, so that early steps are not too long (rmsprop, rmsprop-norm)."""

    steps: int = 1000
    """How long to run, in steps of the optimizer (= unit times of the flows), after the warm start."""
    runs: tuple[str, ...] = ("discrete", "central", "stable")
    """Which processes: discrete (the optimizer itself), central, stable."""
    integrator: Annotated[str | None, _shown("NAME", "macro-step")] = None
    """How the central flow is integrated: macro-step (adaptive) or euler (the paper's)."""
    dt: Annotated[float | None, _shown("TIME", "0.25, the paper’s")] = None
    """Length of a substep of --integrator euler, in optimizer steps."""
    tol: Annotated[float | None, _shown("TOL", "0.001")] = None
    """Error allowed in a step of --integrator macro-step, in the norm of the weights."""
    warm_start: str = "auto"
    """Steps of the real optimizer before time 0: a number, or auto: until the effective sharpness is at most 2."""
    save_every: float = 1.0
    """Time between recorded moments of the flows, in optimizer steps; the optimizer is recorded at every step."""
    eigen_every: float = 5.0
    """Time between looks at the eigenvalues of the optimizer and the stable flow, in optimizer steps; 0 for never."""

    out: Annotated[Path | None, _shown("FOLDER", "runs/PROBLEM-METHOD")] = None
    """Folder for race.h5 and race.png; made if missing."""
    resume: bool = False
    """Go on from OUT/race.h5 to the same result as an uninterrupted run; give the flags of the first call again."""
    overwrite: bool = False
    """Replace the race.h5 of an earlier run, which otherwise is an error."""
    checkpoint_every: float = 10.0
    """Time between updates of race.h5, in seconds: as much is lost when the machine goes down."""
    threads: Annotated[int | None, _shown("COUNT", "all cores")] = None
    """CPU threads for the linear algebra."""
    no_plot: bool = False
    """Do not draw race.png."""
    quiet: bool = False
    """No progress bar and no summary: nothing is printed unless something goes wrong."""

    def __call__(self) -> int:
        """Run, and return the exit code."""
        folder = self.out or Path("runs") / f"{self.problem}-{self.method}"
        file = folder / "race.h5"
        if file.exists() and not (self.resume or self.overwrite):
            raise UsageError(
                f"{file} exists: --resume goes on from it, --overwrite replaces it, or choose another --out."
            )
        if self.threads is not None:
            torch.set_num_threads(_at_least(1, "--threads", self.threads))
        problem = self._problem()
        method = self._method()
        integrator = self._integrator()
        failure = None
        with _hushed(self.quiet):
            try:
                race = dvi.compare(
                    problem,
                    method,
                    self.steps,
                    runs=self.runs,
                    integrator=integrator,
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
                _say(f"Interrupted.{there} Go on with --resume, or start again with --overwrite.")
                return INTERRUPTED
        written = [file]
        if not self.no_plot:
            written.append(_draw(race, folder / "race.png"))
        if failure is not None:
            _say(f"{failure}\nWhat was computed until then: {', '.join(map(str, written))}")
            return FAILED
        if not self.quiet:
            print("\n".join([*_summary(race), *_notes(race.notes), "written: " + ", ".join(map(str, written))]))
        return DONE

    def _problem(self) -> dvi.Problem:
        make, fixed = _chosen("--problem", self.problem, PROBLEMS)
        dtype = _chosen("--dtype", self.dtype, DTYPES)
        known = inspect.signature(make).parameters
        given = {name: getattr(self, name) for name in _FOR_PROBLEMS if getattr(self, name) is not None}
        for name in given:
            if name not in known:
                raise UsageError(f"--{name.replace('_', '-')} does not apply to {self.problem}; leave it out.")
        for name in ("n", "classes", "width", "chunk_size"):
            if name in given:
                _at_least(1, f"--{name.replace('_', '-')}", given[name])
        return make(**fixed, **given, dtype=dtype, device=_device(self.device))

    def _method(self) -> dvi.Method:
        make, defaults = _chosen("--method", self.method, METHODS)
        flags = {"lr": self.lr, "beta2": self.beta2, "eps": self.eps, "bias_correction": self.bias_correction or None}
        given = {name: value for name, value in flags.items() if value is not None}
        known = set(inspect.signature(make).parameters)
        for name in given:
            if name not in known:
                raise UsageError(f"--{name.replace('_', '-')} does not apply to {self.method}; leave it out.")
        return make(**{**defaults, **given})

    def _integrator(self) -> Integrator | None:
        flags = {"dt": self.dt, "tol": self.tol}
        given = {name: value for name, value in flags.items() if value is not None}
        if self.integrator is None and not given:
            return None
        name = self.integrator
        if name is None:
            fitting = [name for name, (_, flag) in INTEGRATORS.items() if {flag} == set(given)]
            if not fitting:
                raise UsageError("--dt is for --integrator euler, --tol for macro-step: give one of them.")
            (name,) = fitting
        make, flag = _chosen("--integrator", name, INTEGRATORS)
        for other in given:
            if other != flag:
                raise UsageError(f"--{other} does not apply to --integrator {name}; it listens to --{flag}.")
        return make(**given)

    def _warm_start(self) -> WarmStart:
        if self.warm_start == "auto":
            return "auto"
        try:
            return _at_least(0, "--warm-start", int(self.warm_start))
        except ValueError:
            raise UsageError(f"--warm-start {self.warm_start}: a number of optimizer steps, or auto.") from None


_FOR_PROBLEMS = ("loss", "n", "classes", "width", "activation", "seed", "chunk_size")


@dataclass(frozen=True)
class Plot:
    """Draw results again: train loss, effective eigenvalues, distances, learning rate or oscillations.

    Try:
      dvi plot runs/x/race.h5
      dvi plot runs/x/race.h5 --out figure.pdf --sigma 30
      dvi plot runs/*/race.h5 --out figures
    """

    files: Annotated[tuple[Path, ...], tyro.conf.Positional, _shown("FILE", "")]
    """Results to draw, as `dvi compare`, race.save or solution.save wrote them; also of runs that are not finished."""
    out: Annotated[Path | None, _shown("PATH", "FILE with .png")] = None
    """A file (its ending says the format: .png, .pdf, .svg) or, for several, a folder."""
    sigma: Annotated[float | None, _shown("STEPS", "50, or a tenth of the run if less")] = None
    """Width (standard deviation) of the time averages, in optimizer steps."""
    leading: int = 8
    """How many eigenvalues of each process are drawn, at most."""
    title: Annotated[str | None, _shown("TEXT", "method and problem")] = None
    """Title of the picture."""

    def __call__(self) -> int:
        """Draw, and return the exit code."""
        if not self.files:
            raise UsageError("Which results? Give one file or more, as in: dvi plot runs/x/race.h5")
        for file, picture in zip(self.files, self._targets(), strict=True):
            options: dict[str, Any] = {"sigma": self.sigma, "leading": self.leading, "title": self.title}
            print(_draw(dvi.load(file), picture, **options))
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

    files: Annotated[tuple[Path, ...], tyro.conf.Positional, _shown("FILE", "")]
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
            print("\n".join([*_summary(result), *_notes(result.notes)]))
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
        _say("The shell commands need tyro: pip install 'dvi-flows[cli]'.")
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
    except UsageError as error:
        _say(str(error))
    except dvi.RunError as error:  # before anything was computed: the start itself is impossible
        _say(str(error))
        return FAILED
    except dvi.StoreError as error:
        _say(str(error))
        return BAD_INPUT if error.result is None else FAILED
    except (ImportError, OSError, ValueError) as error:  # wrong hyperparameters, losses and sizes are ValueErrors
        _say(f"{error}")
    return BAD_INPUT


# ---- small things ---------------------------------------------------------------------------------------


def _say(text: str) -> None:
    print(f"dvi: {text}", file=sys.stderr)


def _chosen(flag: str, name: str, table: Mapping[str, T]) -> T:
    if name not in table:
        raise UsageError(f"{flag} {name}: choose from {', '.join(table)}.")
    return table[name]


def _at_least(least: int, flag: str, value: int) -> int:
    if value < least:
        raise UsageError(f"{flag} {value}: must be {least} or more.")
    return value


def _device(name: str) -> torch.device:
    """Return the device, once it was seen to work."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # PyTorch raises any of them
        reason = str(error).splitlines()[0]
        raise UsageError(f"--device {name} cannot be used here: {reason}") from None
    return device


@contextmanager
def _hushed(quiet: bool) -> Iterator[None]:
    """Hold back the library's warnings, which are notes of the result, too."""
    logger = logging.getLogger("dvi")
    before = logger.level
    logger.setLevel(logging.ERROR if quiet else before)
    try:
        yield
    finally:
        logger.setLevel(before)


def _draw(result: dvi.Comparison | dvi.Solution, path: Path, **options: Any) -> Path:
    from dvi.plot import plot_comparison, plot_solution

    if isinstance(result, dvi.Comparison):
        plot_comparison(result, path, **options)
    else:
        plot_solution(result, path, **options)
    return path


def _summary(result: dvi.Comparison | dvi.Solution) -> list[str]:
    """Return a table of the runs and the distances between them at the end."""
    runs = result.runs if isinstance(result, dvi.Comparison) else {result.name: result}
    lines = [f"{'':10}{'until step':>12}{'train loss':>12}{'predicted':>12}{'oscillating':>13}{'cost':>9}"]
    for name, run in runs.items():
        if not len(run.t):
            lines.append(f"{name:10}{'nothing recorded':>24}")
            continue
        predicted = run.predicted_loss[-1] if len(run.predicted_loss) else np.nan
        oscillating = str(run.k[-1]) if name == "central" else "–"
        cost = run.ledger.per_unit_time() if len(run.ledger.t) > 1 else np.nan
        shown = "–" if np.isnan(predicted) or predicted == run.loss[-1] else f"{predicted:.4g}"
        lines.append(f"{name:10}{run.t[-1]:>12g}{run.loss[-1]:>12.4g}{shown:>12}{oscillating:>13}{cost:>9.3g}")
    lines.append("(predicted: the optimizer's time average; cost: gradients' worth of work per optimizer step)")
    if isinstance(result, dvi.Comparison):
        for (a, b), values in result.distance.items():
            if len(values):
                lines.append(
                    f"distance {a}–{b} in weight space: {values[-1]:.4g} at the end, at most {values.max():.4g}"
                )
    return lines


def _notes(notes: Sequence[str]) -> list[str]:
    return [f"note: {note}" for note in notes]


__all__ = ["COMMANDS", "INTEGRATORS", "METHODS", "PROBLEMS", "Compare", "Info", "Plot", "UsageError", "main"]
