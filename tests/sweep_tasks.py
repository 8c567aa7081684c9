"""Runs that the tests of sweeps send to worker processes, which import them by name."""

import itertools
import os
import signal
import time
from pathlib import Path

import torch

import dvi

PLACES = torch.linspace(-1, 1, 6, dtype=torch.float64)


def loss(w):
    """A network of three tanh units, on six points."""
    a, b, c = w.view(3, 3)
    return 0.5 * (torch.tanh(torch.outer(PLACES, a) + b) @ c - torch.sin(3 * PLACES)).square().sum()


def gd(path, lr=0.15, steps=40, checkpoint_every=10.0, gradient=None, writing=None, gate=None):
    """A small comparison, which may be stopped at a moment that the test chooses.

    Args:
        path: the file of the run.
        lr, steps, checkpoint_every: of the comparison.
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
    if writing is not None:
        _die_in(writing, path)
    return dvi.compare(
        problem,
        dvi.methods.GradientDescent(lr=lr),
        steps,
        path=path,
        resume=True,
        checkpoint_every=checkpoint_every,
        progress=False,
        throw=False,
    )


def _die_in(writing, path):
    """Kill this process when the file is to get its name for the n-th time."""
    inner, writings = os.replace, itertools.count(1)

    def replace(source, target):
        if Path(target) == path and next(writings) == writing:
            os.kill(os.getpid(), signal.SIGKILL)
        return inner(source, target)

    os.replace = replace  # of the whole process, which is a worker's and makes one run


def broken(path):
    """Raises what no run raises."""
    raise RuntimeError("nothing works")


def killed(path):
    """Is killed, as by a system that runs out of memory."""
    os.kill(os.getpid(), signal.SIGKILL)
