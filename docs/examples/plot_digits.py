"""
Two optimizers beside their central flows
=========================================

RMSProp and gradient descent train a small network on scikit-learn's handwritten digits.  For each, three runs begin at
one start: the optimizer itself, its *central flow*, which follows the optimizer's time average, and its *stable flow*,
which ignores oscillations.  The numbers and figures show which of the two flows describes the optimizer at the edge of
stability.

As a script: ``python docs/examples/plot_digits.py``.  It takes one or two minutes on a laptop and downloads nothing.
"""

import sys
import time
from pathlib import Path

import numpy as np
import torch

import dvi
from dvi.plotting import time_average

torch.set_num_threads(1)  # the matrices are so small that threads would only wait for each other
folder = Path("runs/demo")
folder.mkdir(parents=True, exist_ok=True)

# %%
# The problem: 300 images, an MLP with two tanh layers of 32, squared error, float64.
# The methods: each is declared by the change of its state and by its preconditioner, from which the flows are derived.

methods = {
    "gd": (dvi.methods.GradientDescent(lr=0.2), 1500),
    "rmsprop": (dvi.methods.RMSProp(lr=1e-3, beta2=0.99, eps=1e-8, bias_correction=True), 600),
}
races = {}
for name, (method, steps) in methods.items():
    problem = dvi.problems.digits(network="mlp", loss="mse", n=300, width=32)
    print(f"{method}\n  on {problem}, {steps} steps … ", end="", flush=True)
    started = time.perf_counter()
    races[name] = dvi.compare(problem, method, steps, eigen_every=10, progress=sys.stderr.isatty())
    races[name].save(folder / f"{name}.h5")
    print(f"{time.perf_counter() - started:.0f} s")

# %%
# Gradient descent (Fig. 2 of the paper).  At the edge of stability the largest eigenvalue of ηH stays at 2 in the
# central flow and hovers about 2 in the optimizer; the stable flow continues into ever sharper regions.

races["gd"].plot(folder / "gd.png")

# %%
# RMSProp (Fig. 6 of the paper).  The stable flow is far off: without oscillations its step sizes grow too large.

races["rmsprop"].plot(folder / "rmsprop.png")

# %%
# In numbers, over the time at the edge of stability: the mean distance in weight space between the optimizer and each
# flow, and the error of a flow's loss relative to the optimizer's time-averaged loss.  The central flow predicts that
# average as L + ½⟨H, Σ⟩, its own loss plus the contribution of oscillations.


def at_the_edge(race):
    """Mean distances, and mean relative errors of the loss in percent, from the first breakpoint on."""
    t, sigma = race.t, min(50, race.t[-1] / 10)
    since = t >= race.central.breakpoints[0][0]
    inner = since & (t > sigma) & (t < t[-1] - sigma)  # where the averaging window fits
    observed = race.smoothed("discrete", sigma)[inner]

    def error(run, loss):  # averaged in the same way as the optimizer's
        return 100 * np.mean(np.abs(time_average(run, loss, sigma)[inner] / observed - 1))

    return {
        "edge from step": race.central.breakpoints[0][0],
        "directions, at most": max(k for _, _, k in race.central.breakpoints),
        "distance to central flow": race.distance["discrete", "central"][since].mean(),
        "distance to stable flow": race.distance["discrete", "stable"][since].mean(),
        "predicted loss, error %": error(race.central, race.central.predicted_loss),
        "stable flow’s loss, error %": error(race.stable, race.stable.loss),
    }


table = {name: at_the_edge(race) for name, race in races.items()}
print(f"{'':30}" + "".join(f"{name:>12}" for name in table))
for row in next(iter(table.values())):
    print(f"{row:30}" + "".join(f"{column[row]:>12.3g}" for column in table.values()))
print("pictures:", ", ".join(str(folder / f"{name}.png") for name in races))
