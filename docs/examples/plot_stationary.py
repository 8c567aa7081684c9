"""
Where RMSProp's ν is heading
============================

RMSProp's ν is a variable of its own, yet it converges to a value that the weights alone determine: its *stationary*
value, the solution of a convex program.  On scikit-learn's digits, this example shows the convergence (Fig. 8 of the
paper) and how well the stationary flow predicts the rate at which the loss falls (Fig. 10).  It also shows the flow
without its curvature penalty (Figs. 5 and 11).

As a script: ``python docs/examples/plot_stationary.py``.  It takes about a minute on a laptop and downloads nothing.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch

import dvi

torch.set_num_threads(1)  # the matrices are small: threads would only wait for each other
folder = Path("runs/demo")
folder.mkdir(parents=True, exist_ok=True)

problem = dvi.problems.digits(network="mlp", loss="mse", n=60, width=8, depth=1)
method = dvi.methods.RMSProp(lr=2e-3, beta2=0.95)
central = dvi.central_flow(problem, method)
settled = {without: dvi.stationary_flow(problem, method, without=without) for without in (None, "curvature penalty")}

# %%
# The central flow stops every ten steps, and the stationary ν at its weights is computed.

start, point, rows = None, None, []
for stop in range(10, 161, 10):
    run = dvi.solve(central, 10, start=start, warm_start=0 if start else "auto", progress=False)
    start = dvi.State(run.w, run.nu, run.about["warm_start"] + stop)
    point = dvi.stationary(central, run.w, start=point)
    nu, stationary = run.nu["v"], point.nu["v"]
    looks = [flow.look(point) for flow in settled.values()]
    rows.append(
        (
            stop,
            float(nu @ stationary / nu.norm() / stationary.norm()),
            run.series["loss_rate"][-1],
            *(float(look.g @ look.rate) for look in looks),
            dvi.duality(central, point).gap,
        )
    )
t, cosine, rate, predicted, naive, gap = np.array(rows).T
print(f"cosine of ν and the stationary ν: {cosine[0]:.3f} at first, {cosine[-1]:.4f} at last")
for name, values in (("the stationary flow", predicted), ("the same without penalty", naive)):
    off = np.abs(values / rate - 1)
    print(f"rate of the loss, mean error of {name}: {off[:8].mean():.1%} at first, {off[8:].mean():.1%} later")
print(f"the duality gap proves each stationary ν to {gap.max():.0e}")

# %%
# The same method with its ablated flow.

race = dvi.compare(problem, method, 160, runs=("central", "ablated"), progress=False)

figure, axes = plt.subplots(1, 3, figsize=(9, 2.8), layout="constrained")
axes[0].plot(t, cosine, "k.-", lw=1)
axes[0].set(title="ν becomes stationary", ylabel="cosine of ν and the stationary ν", ylim=(None, 1))
axes[1].plot(t, -rate, "k", lw=1.1, label="central flow")
axes[1].plot(t, -predicted, ls=(0, (4, 1.6)), c="#b2182b", lw=1.2, label="stationary flow")
axes[1].plot(t, -naive, ":", c="#8c8c8c", lw=1.3, label="the same without penalty")
axes[1].set(title="how fast the loss falls", ylabel="−dL/dt per step", yscale="log")
axes[2].plot(race.t, race.central.series["effective_lr"], "k", lw=1.1, label="central flow")
axes[2].plot(race.t, race.ablated.series["effective_lr"], "-.", c="0.45", label="ablated flow")
axes[2].set(title="mean effective learning rate", ylabel="harmonic mean")
for ax in axes:
    ax.set_xlabel("time (optimizer steps)")
for ax in axes[1:]:
    ax.legend(frameon=False, fontsize=8)
figure.savefig(folder / "stationary.png", dpi=110)
print("loss at the end: central", f"{race.central.loss[-1]:.4f},", "ablated", f"{race.ablated.loss[-1]:.4f}")
print("picture:", folder / "stationary.png")
