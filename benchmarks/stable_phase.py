"""Measures the distance of flows from optimizers while nothing oscillates: the table of docs/momentum.md.

``python benchmarks/stable_phase.py`` takes a minute.  Every row starts at the optimizer's state after some steps.  It
runs the optimizer, the flow of first order (integrated finely) and that of second order, and compares their ends.
"""

from __future__ import annotations

import torch
from agreement import digits_mlp

import dvi
from dvi.methods import Adam, AdamW, GradientDescent, HeavyBall, NAdam, Nesterov, RMSProp, RMSPropNorm

#: Steps of the optimizer before and during the comparison; half the learning rate gets twice as many of both.
CASES: dict[str, tuple[dvi.Method, int, int]] = {
    "GD, η = 0.1": (GradientDescent(0.1), 20, 60),
    "GD, η = 0.05": (GradientDescent(0.05), 40, 120),
    "GD, η = 0.025": (GradientDescent(0.025), 80, 240),
    "RMSProp-Norm, η = 0.02, β₂ = 0.95": (RMSPropNorm(0.02, 0.95), 20, 60),
    "RMSProp, η = 2e-4, β₂ = 0.95": (RMSProp(2e-4, 0.95, eps=1e-8), 20, 60),
    "RMSProp, η = 2e-4, β₂ = 0.99": (RMSProp(2e-4, 0.99, eps=1e-8), 20, 60),
    "heavy ball, η = 0.02, β = 0.9": (HeavyBall(0.02, 0.9), 40, 100),
    "heavy ball, η = 0.01, β = 0.9": (HeavyBall(0.01, 0.9), 40, 200),
    "Nesterov, η = 0.01, β = 0.9": (Nesterov(0.01, 0.9), 40, 100),
    "Adam, η = 2e-4, β = 0.9, 0.95": (Adam(2e-4, 0.9, 0.95), 40, 60),
    "AdamW, η = 2e-4, β = 0.9, 0.95, λ = 0.01": (AdamW(2e-4, 0.9, 0.95, weight_decay=0.01), 40, 60),
    "AdamW, η = 2e-4, β = 0.9, 0.95, λ = 50": (AdamW(2e-4, 0.9, 0.95, weight_decay=50.0), 40, 60),
    "NAdam, η = 2e-4, β = 0.9, 0.95": (NAdam(2e-4, 0.9, 0.95), 40, 60),
}


def main() -> None:
    """Print the table as Markdown."""
    torch.set_num_threads(1)
    problem = digits_mlp()
    print("| | steps before | steps | path | first order | second order | ratio | gradients per step, second order |")
    print("|" + "---|" * 8)
    for name, (method, before, steps) in CASES.items():
        optimizer = dvi.discrete(problem, method)
        y = optimizer.initial
        _, g = optimizer.value_and_grad(y)
        for _ in range(before):
            y, _, g = optimizer.step(y, g)
        start = y
        for _ in range(steps):
            y, _, g = optimizer.step(y, g)
        first = dvi.solve(
            dvi.stable_flow(problem, method, accuracy="paper"),
            steps,
            start=start,
            integrator=dvi.RungeKutta(4, h=1 / 16 if isinstance(method, (HeavyBall, Nesterov, Adam, NAdam)) else 1 / 4),
            progress=False,
        )
        second = dvi.solve(
            dvi.stable_flow(problem, method, accuracy="second-order"),
            steps,
            start=start,
            integrator=dvi.SemiImplicit(dt=1 / 4),
            progress=False,
        )
        a, b = (float((flow.w - y.w).norm()) for flow in (first, second))
        path = float((y.w - start.w).norm())
        cost = second.ledger.gradients / steps
        print(
            f"| {name} | {before} | {steps} | {path:.2f} | {a:.2g} | {b:.2g} | {a / b:.0f} | {cost:.1f} |", flush=True
        )


if __name__ == "__main__":
    main()
