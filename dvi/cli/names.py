"""Names in the shell, which stand for objects of the library or of the user's files."""

from __future__ import annotations

import importlib
import inspect
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import dvi

Make = Callable[..., Any]


class UsageError(ValueError):
    """A flag is wrong or does not apply; the message says which, and what is allowed."""


def auto(tol: float | None = None) -> float | None:
    """Take the integrator that suits the flow: macro-step, or semi-implicit for flows of second order.

    Args:
        tol: allowed error of a step, in the norm of w.
    """
    return tol


@dataclass(frozen=True)
class Kind:
    """The choices of one flag.

    Attributes:
        table: the library's classes and functions, by name.
        what: what they make, in words.
        fits: whether an object is of this kind.
    """

    table: Mapping[str, Make]
    what: str
    fits: Callable[[Any], bool]


KINDS: Mapping[str, Kind] = {
    "problem": Kind(
        {
            "digits-mlp": partial(dvi.problems.digits, network="mlp"),
            "digits-cnn": partial(dvi.problems.digits, network="cnn"),
            "sorting-transformer": partial(dvi.problems.sorting, network="transformer"),
            "sorting-rnn": partial(dvi.problems.sorting, network="rnn"),
            "sorting-lstm": partial(dvi.problems.sorting, network="lstm"),
            "sorting-mamba": partial(dvi.problems.sorting, network="mamba"),
            "fashion": dvi.problems.fashion,
            "cifar10": dvi.problems.cifar10,
        },
        "a dvi.Problem",
        lambda thing: isinstance(thing, dvi.Problem),
    ),
    "method": Kind(
        {
            "gd": dvi.methods.GradientDescent,
            "rmsprop-norm": dvi.methods.RMSPropNorm,
            "rmsprop": dvi.methods.RMSProp,
            "heavy-ball": dvi.methods.HeavyBall,
            "nesterov": dvi.methods.Nesterov,
            "quasi-hyperbolic": dvi.methods.QuasiHyperbolic,
            "adam": dvi.methods.Adam,
            "adamw": dvi.methods.AdamW,
            "nadam": dvi.methods.NAdam,
            "rmsprop-centred": dvi.methods.CentredRMSProp,
            "adagrad": dvi.methods.AdaGrad,
            "adagrad-norm": dvi.methods.AdaGradNorm,
            "normalized-gd": dvi.methods.NormalizedGD,
        },
        "a dvi.Method",
        lambda thing: isinstance(thing, (dvi.Method, tuple)),  # a tuple: init, f, P
    ),
    "integrator": Kind(
        {
            "auto": auto,
            "macro-step": dvi.MacroStep,
            "euler": dvi.Euler,
            "rk": dvi.RungeKutta,
            "torchdiffeq": dvi.TorchDiffEq,
            "semi-implicit": dvi.SemiImplicit,
        },
        "an integrator",
        lambda thing: not inspect.isclass(thing) and hasattr(thing, "init") and hasattr(thing, "step"),
    ),
}


def maker(flag: str, name: str) -> Make:
    """The class or function that a name stands for; for a finished object, a function that returns it.

    Args:
        flag: "problem", "method" or "integrator".
        name: one of the library's names, ``FILE.py:NAME`` or ``PACKAGE.MODULE:NAME``.

    Raises:
        UsageError: if there is no such object, its file cannot be run, or it is of another kind.
    """
    kind = KINDS[flag]
    if name in kind.table:
        return kind.table[name]
    called = f"--{flag} {name}"
    if ":" not in name:
        example = f"{name}:NAME" if name.endswith(".py") else "my.py:NAME"
        raise UsageError(f"{called}: choose from {', '.join(kind.table)}, or name your own, as in {example}.")
    thing = load(called, name)
    if kind.fits(thing):
        return lambda: thing
    if callable(thing):
        return thing  # type: ignore[no-any-return]
    raise UsageError(f"{called} is a {type(thing).__name__}, not {kind.what} nor a class or function that makes one.")


def made(flag: str, name: str, make: Make) -> Any:
    """The result of ``make()``, after a check that it is of the right kind.

    Raises:
        UsageError: if a user's class or function raises, or makes something else.
    """
    if name in KINDS[flag].table:
        return make()
    with in_words(f"--{flag} {name}"):
        thing = make()
    if not KINDS[flag].fits(thing):
        raise UsageError(f"--{flag} {name} makes a {type(thing).__name__}, not {KINDS[flag].what}.")
    return thing


# ---- the user's own -------------------------------------------------------------------------------------


def load(called: str, name: str) -> Any:
    """The object NAME of a file or a module, given as ``FILE.py:NAME`` or ``PACKAGE.MODULE:NAME``.

    After this, modules next to the file, or in the current folder, can be imported.
    """
    where, _, attribute = name.rpartition(":")
    path = Path(where).resolve()
    is_file = where.endswith(".py")
    if is_file and not path.is_file():
        raise UsageError(f"{called}: there is no file {where}.")
    sys.path.insert(0, str(path.parent if is_file else Path.cwd()))
    with in_words(f"{called}: {where}"):
        module = _module(path) if is_file else importlib.import_module(where)
    if not hasattr(module, attribute):
        own = (name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__)
        raise UsageError(f"{called}: {where} has no {attribute!r}; it defines {', '.join(own) or 'nothing'}.")
    return getattr(module, attribute)


def _module(path: Path) -> ModuleType:
    """The module of a file, which is run once.  It is registered like an import, so that annotations are found."""
    for known in list(sys.modules.values()):
        if getattr(known, "__file__", None) == str(path):
            return known
    name = path.stem if path.stem not in sys.modules else f"{path.stem} of the user"
    module = sys.modules[name] = ModuleType(name)
    module.__file__ = str(path)
    try:
        exec(compile(path.read_bytes(), str(path), "exec"), vars(module))
    except BaseException:
        del sys.modules[name]
        raise
    return module


#: Folders of files that are not the user's.
_OTHERS = ("<", str(Path(dvi.__file__).parent), *map(sysconfig.get_path, ("stdlib", "purelib", "platlib")))


@contextmanager
def in_words(called: str, *, always: bool = True) -> Iterator[None]:
    """A context that reports what a user's code raised, and in which line.

    Args:
        called: the object that raised it, in words.
        always: also report exceptions without a line of the user's code; otherwise they are raised as they are.
    """
    try:
        yield
    except (dvi.RunError, dvi.StoreError):  # their messages are for the user already
        raise
    except (Exception, SystemExit) as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(_OTHERS)]
        if not (frames or always):
            raise
        where = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
        raise UsageError(f"{called} raised {type(error).__name__}: {error}{where}") from None
