"""The shell commands ``dvi compare``, ``plot``, ``report``, ``info``, ``sweep`` and ``paper``."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a shell command.

    Args:
        arguments: the words after ``dvi`` (default: those of the process).

    Returns:
        the exit code: 0 done, 1 a run could not continue, 2 wrong input, 130 interrupted.

    Raises:
        SystemExit: for ``--help`` (0), or if the value of a flag cannot be read (2).
    """
    try:
        import tyro  # noqa: F401  an extra, without which the commands cannot be imported
    except ImportError:
        print("dvi: The shell commands need tyro: pip install 'dvi-flows[cli]'.", file=sys.stderr)
        return 2
    from dvi.cli.commands import run

    return run(sys.argv[1:] if arguments is None else arguments)


__all__ = ["main"]
