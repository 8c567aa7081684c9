"""Runs that the tests of sweeps send to worker processes, which import them by name."""

import os
import signal
import time

import torch

import dvi

PLACES = torch.linspace(-1, 1, 6, dtype=torch.float64)


def loss(w):
    """A network of three tanh units, on six points."""
    a, b, c = w.view(3, 3)
    return 0.5 * (torch.tanh(torch.outer(PLACES, a) + b) @ c - torch.sin(3 * PLACES)).square().sum()


def gd(path, lr=0.15, steps=40, checkpoint_every=10.0, pause=0.0):
    """A small comparison; ``pause`` seconds at each gradient make it last."""
    problem = dvi.Problem(loss, torch.linspace(0.5, 1.5, 9, dtype=torch.float64))
    inner = problem.value_and_grad

    def slow(*given, **named):
        time.sleep(pause)
        return inner(*given, **named)

    problem.value_and_grad = slow
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


def broken(path):
    """Raises what no run raises."""
    raise RuntimeError("nothing works")


def killed(path):
    """Is killed, as by a system that runs out of memory."""
    os.kill(os.getpid(), signal.SIGKILL)
