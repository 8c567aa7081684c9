"""Runs that the tests of sweeps send to worker processes, which import them by name."""

import itertools
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import dvi

PLACES = torch.linspace(-1, 1, 6, dtype=torch.float64)


def loss(w):
    """A network of three tanh units, on six points."""
    a, b, c = w.view(3, 3)
    return 0.5 * (torch.tanh(torch.outer(PLACES, a) + b) @ c - torch.sin(3 * PLACES)).square().sum()


def gd(path, lr=0.15, steps=40, checkpoints=False, gradient=None, writing=None, gate=None):
    """A small comparison, which may be stopped at a moment that the test chooses.  No clock decides anything.

    Args:
        path: the file of the run.
        lr, steps: of the comparison.
        checkpoints: the file is written at every unit of time; otherwise only at the end.
        gradient: at this gradient of the session the process is killed; or waits, if there is a gate.
        writing: the process is killed in the midst of this writing of the file: before it gets its name.
        gate: a file; the run waits for as long as it is there.
    """
    problem = dvi.Problem(loss, torch.linspace(0.5, 1.5, 9, dtype=torch.float64))
    inner, gradients = problem.value_and_grad, itertools.count(1)

    def watched(*given, **named):
        if next(gradients) == gradient:
            while gate is not None and gate.exists():
                time.sleep(0.01)
            if gate is None:
                os.kill(os.getpid(), signal.SIGKILL)
        return inner(*given, **named)

    problem.value_and_grad = watched
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dvi.storage.hdf5.time", SimpleNamespace(monotonic=lambda: 0.0))
        if writing is not None:
            patch.setattr(os, "replace", dying_in(writing, path))
        return dvi.compare(
            problem,
            dvi.methods.GradientDescent(lr=lr),
            steps,
            path=path,
            resume=True,
            checkpoint_every=0.0 if checkpoints else 1.0,
            progress=False,
            throw=False,
        )


def dying_in(writing, path):
    """os.replace that kills this process when the file is to get its name for the n-th time."""
    inner, writings = os.replace, itertools.count(1)

    def replace(source, target):
        if Path(target) == path and next(writings) == writing:
            os.kill(os.getpid(), signal.SIGKILL)
        return inner(source, target)

    return replace


def broken(path):
    """Raises what no run raises."""
    raise RuntimeError("nothing works")


def killed(path):
    """Is killed, as by a system that runs out of memory."""
    os.kill(os.getpid(), signal.SIGKILL)
