"""From a row of the table to its problem, its method and its run."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

import dvi
from dvi.paper.table import Experiment, Size, table
from dvi.problems import ModuleProblem, ProblemError
from dvi.results.comparison import Comparison
from dvi.sweeps.records import Task

DTYPES = {"float32": torch.float32, "float64": torch.float64}

#: Records that are measures of :func:`dvi.compare`; the others are arguments of their own.
_OWN = ("outputs", "coordinates")

#: Where the official CIFAR-10 files are looked for, unless another folder is named.
CIFAR10 = "cifar10"


def spec_of(row: Experiment, size: Size, device: str = "cpu") -> dict[str, Any]:
    """All that a run depends on, as plain data: what is built, and how it is run."""
    made = table()
    options = dict(row.options[size])
    lr_free = {key: options.pop(key) for key in ("steps", "measure_every") if key in options}
    return {
        "problem": made.problems[row.problem][size] | {key[8:]: options.pop(key) for key in [*options] if key[:8] == "problem_"},
        "method": made.methods[row.method][size] | options,
        "run": lr_free | {"runs": list(row.runs), "record": list(row.record), "warm_start": row.warm_start},
        "device": device.partition(":")[0],
    }
