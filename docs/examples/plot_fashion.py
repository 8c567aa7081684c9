"""
A convolutional network on pictures of clothes
==============================================

This example runs RMSProp on Fashion-MNIST together with its central flow and its stable flow.  The network is the
small version of the paper's CNN, and the pictures ship with the library.  It takes less than a minute on a laptop and
downloads nothing.
"""

import sys
import time
from pathlib import Path

import torch

import dvi
from dvi.problems.catalogue.fashion import load_fashion

torch.set_num_threads(1)  # the matrices are so small that threads would only wait for each other
folder = Path("runs/demo")
folder.mkdir(parents=True, exist_ok=True)

# %%
# The problem: 100 pictures of four classes, averaged to 14×14 pixels.  Third derivatives by differences ("mixed") are
# cheaper, and accurate enough here.

problem = dvi.problems.fashion("cnn-pool", loss="mse", n=100, classes=4, pixels=14, derivatives="mixed")
method = dvi.methods.RMSProp(lr=5e-4, beta2=0.99, eps=1e-8, bias_correction=True)

# %%
# The network's outputs for four test pictures are observed during the run, and predicted.

pictures = load_fashion(n=100, classes=4, pixels=14)
print(f"{method}\n  on {problem} … ", end="", flush=True)
started = time.perf_counter()
race = dvi.compare(
    problem, method, 400, eigen_every=10, test_inputs=pictures.test_inputs[:4], progress=sys.stderr.isatty()
)
race.save(folder / "fashion.h5")
print(f"{time.perf_counter() - started:.0f} s")
race.plot(folder / "fashion.png")

# %%
# From the first breakpoint on, the network is at the edge of stability.  The central flow stays close to the optimizer;
# the stable flow, whose steps grow too large, does not.

since = race.t >= race.central.breakpoints[0][0]
for flow in ("central", "stable"):
    print(f"mean distance to the {flow} flow: {race.distance['discrete', flow][since].mean():.2g}")
print("picture:", folder / "fashion.png")
