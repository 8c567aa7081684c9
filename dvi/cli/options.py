"""Makes the flags of the shell from signatures and docstrings, so that nothing is written twice."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import operator
import re
import types
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
import tyro

from dvi.cli.names import Make, UsageError, load

_MISSING = inspect.Parameter.empty


def flags(
    make: Make,
    owner: str = "",
    *,
    defaults: Mapping[str, Any] = types.MappingProxyType({}),
    without: Collection[str] = (),
    taken: Collection[str] = (),
    instead: Mapping[str, Any] = types.MappingProxyType({}),
) -> Make:
    """A function that tyro calls with the arguments of ``make``; it returns ``make`` with these arguments bound.

    Arguments that cannot be written in the shell (a module, a matrix) are left out if they have a default.

    Args:
        make: a class or a function; the ``Args:`` of its docstring become the help.
        owner: the first part of the flags, ``--owner.name``; with "method", numbers may be schedules.
        defaults: defaults for arguments that have none.
        without: arguments that get no flag.
        taken: names with another meaning; flags with other names may be given without their owner.
        instead: types that replace those of the signature.

    Raises:
        UsageError: if an argument without a default cannot be written in the shell.
    """
    function, bound = (make.func, make.keywords) if isinstance(make, partial) else (make, {})
    hints = _hints(function)
    found = []
    for name, argument in inspect.signature(function).parameters.items():
        named = argument.kind in (argument.POSITIONAL_OR_KEYWORD, argument.KEYWORD_ONLY)
        if not named or name in bound or name in without:
            continue
        default = defaults.get(name, _MISSING) if argument.default is _MISSING else argument.default
        kind = instead.get(name) or _kind(hints.get(name, _MISSING), default, schedules=owner == "method")
        if kind is not None:
            free = owner and name not in taken and not name.startswith("no_")  # --no-NAME turns a switch off
            short = [f"--{name.replace('_', '-')}"] if free else None
            hint = "(optional)" if default in (None, ()) else None
            kind = Annotated[kind, tyro.conf.arg(aliases=short, help_behavior_hint=hint)]
            found.append(inspect.Parameter(name, argument.KEYWORD_ONLY, default=default, annotation=kind))
        elif default is _MISSING:
            raise UsageError(
                f"The {owner} needs {name}, which cannot be written in the shell. "
                f"Make the {owner} in a file of your own, and give --{owner} FILE.py:NAME."
            )

    def build(**given: Any) -> Any:
        return partial(make, **given)

    build.__signature__ = inspect.Signature(found)  # type: ignore[attr-defined]  # what tyro reads
    build.__annotations__ = {parameter.name: parameter.annotation for parameter in found}
    build.__doc__ = _plain(inspect.getdoc(function) or "")
    return build


def _plain(doc: str) -> str:
    """A docstring without markup, and with one line for each argument."""
    doc = re.sub(r":\w+:`~?(?:[\w.]*\.)?([^`]*)`|``([^`]*)``", lambda found: found[1] or found[2], doc)
    doc = re.sub(r"\n {8,}(?=\S)", " ", doc)
    return re.sub(r"^(\s+)(\w+), (\w+): (.*)$", r"\1\2: \4\n\1\3: \4", doc, flags=re.MULTILINE)


# ---- types that can be written in the shell -------------------------------------------------------------


def _number_or_schedule(words: list[str]) -> Any:
    try:
        return float(words[0])
    except ValueError:
        if ":" not in words[0]:
            raise ValueError(f"{words[0]!r} is neither a number nor a schedule of your own, as in my.py:NAME") from None
    schedule = load(words[0], words[0])
    if not callable(schedule):
        raise ValueError(f"{words[0]} is a {type(schedule).__name__}, not a function of the time")
    return schedule


_Primitive = tyro.constructors.PrimitiveConstructorSpec
_SCHEDULE = _Primitive(
    nargs=1,
    metavar="NUMBER|FILE.py:SCHEDULE",
    instance_from_str=_number_or_schedule,
    is_instance=lambda value: isinstance(value, (int, float)) or callable(value),
    str_from_instance=lambda value: ["a schedule" if callable(value) else f"{value:g}"],
)
_DTYPE = _Primitive(
    nargs=1,
    metavar="float64|float32",
    choices=("float64", "float32"),
    instance_from_str=lambda words: getattr(torch, words[0]),
    is_instance=lambda value: isinstance(value, torch.dtype),
    str_from_instance=lambda value: [str(value).removeprefix("torch.")],
)


def _hints(make: Make) -> dict[str, Any]:
    """The types of arguments by name; empty if they are unknown (imported for a type checker only)."""
    source: Any = make
    if inspect.isclass(make) and not dataclasses.is_dataclass(make):
        source = make.__init__
    try:
        return get_type_hints(source, include_extras=True)
    except (NameError, TypeError, AttributeError):
        return {}


def _kind(hint: Any, default: Any, schedules: bool) -> Any:
    """The type of an argument for tyro, or None if it cannot be written in the shell."""
    words = (types.NoneType, bool, int, float, str, tuple, list, Path, torch.dtype, torch.device)
    if not (default is _MISSING or isinstance(default, words) or (schedules and callable(default))):
        return None
    if hint in (_MISSING, Any):
        known = (bool, str, int) if hint is _MISSING else (bool, str)
        hint = float | str | None if default is None else type(default) if isinstance(default, known) else float
    if schedules and hint is float:
        return Annotated[Any, _SCHEDULE]
    if hint is torch.dtype:
        return Annotated[hint, _DTYPE]
    if get_origin(hint) in (Union, types.UnionType):
        parts = [part for part in get_args(hint) if part is not torch.device]
        names = [part.__name__.upper() for part in parts if get_origin(part) is None and part is not types.NoneType]
        names += [str(value) for part in parts if get_origin(part) is Literal for value in get_args(part)]
        hint = Annotated[functools.reduce(operator.or_, parts), tyro.conf.arg(metavar="|".join(names))]
    return hint if _simple(hint) else None


def _simple(hint: Any) -> bool:
    """Whether values of a type can be written in the shell: words, numbers, and sequences of them."""
    parts = get_args(hint)
    if get_origin(hint) is Annotated:
        return _simple(parts[0])
    if get_origin(hint) in (list, Sequence) and get_origin(parts[0]) in (list, Sequence):
        return False  # words in the shell show no nesting
    if get_origin(hint) in (tuple, list, Sequence, Union, types.UnionType):
        return all(part is Ellipsis or _simple(part) for part in parts)
    return get_origin(hint) is Literal or hint in (bool, int, float, str, Path, types.NoneType)
