"""
How sharp a minimum do mini-batches find?
=========================================

Small batches keep an optimizer away from the edge of stability.  Here gradient descent runs on scikit-learn's digits
with batches of several sizes, in eight replicas for each size, and is compared with its central flow with mini-batch
noise.  The figure shows the effective sharpness at the end against the batch size.

As a script: ``python docs/examples/plot_minibatch.py``.  It takes about a minute on a laptop and downloads nothing.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch

import dvi

torch.set_num_threads(1)  # the matrices are small: threads would only wait for each other
folder = Path("runs/demo")
folder.mkdir(parents=True, exist_ok=True)

problem = dvi.problems.digits(network="mlp", loss="mse", n=240, width=10)
method = dvi.methods.GradientDescent(lr=0.2)
sampling = dvi.Sampling(replicas=8, window=10, max_directions=16)
steps, sizes = 150, (4, 8, 16, 30, 60, 120, 200)

# %%
# The last 50 steps of the flow are averaged, and the averages of the replicas over the same steps.

rows = []
for batch_size in sizes:
    race = dvi.compare(
        problem,
        method,
        steps,
        batch_size=batch_size,
        sampling=sampling,
        runs=("sgd", "noisy"),
        warm_start=0,
        save_every=25,
        eigen_every=25,
        progress=False,
    )
    runs = race.sgd.eigenvalues[-3:, 0].mean()
    error = race.sgd.series["sharpness_spread"][-3:].mean()
    flow = race.noisy.eigenvalues[-3:, 0].mean()
    losses = race.sgd.loss[-3:].mean(), race.noisy.predicted_loss[-3:].mean()
    rows.append((batch_size, runs, error, flow, *losses))
    print(f"B = {batch_size:3d}: sharpness of runs {runs:.2f} ± {error:.2f}, of the flow {flow:.2f}")

# %%
# The central flow of the full batch begins when gradient descent is stable; its values are taken at the same steps.

full = dvi.compare(problem, method, steps, runs=("central",), progress=False).central
at = np.array([100, 125, 150]) - int(full.about["warm_start"])
B, runs, error, flow, run_loss, flow_loss = np.array(rows).T

figure, axes = plt.subplots(1, 2, figsize=(7.2, 2.9), layout="constrained")
for ax, points, curve, spread, level in (
    (axes[0], runs, flow, error, full.eigenvalues[at, 0].mean()),
    (axes[1], run_loss, flow_loss, None, full.predicted_loss[at].mean()),
):
    ax.axhline(level, color="0.55", ls=(0, (1.2, 1.2)), lw=1.3, label="central flow of the full batch")
    ax.plot(B, curve, "k", lw=1.2, label="flow with mini-batch noise")
    ax.errorbar(B, points, spread, fmt="o", ms=4, color="#3b82c4", capsize=2, lw=1, label="runs (± sd of 8)")
    ax.set_xscale("log")
    ax.set_xticks(sizes, [str(size) for size in sizes])
    ax.minorticks_off()
    ax.set_xlabel("batch size (of 240 examples)")
axes[0].axhline(2, color="0.8", lw=0.8, zorder=0)
axes[0].set(ylabel="effective sharpness", ylim=(0, 2.25), title="(a) sharpness at steps 100 to 150")
axes[1].set(ylabel="train loss, averaged", ylim=(0, 1.1 * run_loss.max()), title="(b) loss at these steps")
handles, labels = axes[0].get_legend_handles_labels()
figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
figure.savefig(folder / "minibatch.png", dpi=160)
print("picture:", folder / "minibatch.png")
