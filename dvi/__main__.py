"""``python -m dvi``: the shell commands, see :mod:`dvi.cli`."""

from dvi.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
