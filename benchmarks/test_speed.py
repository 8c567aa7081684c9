"""Times the main kernels of a run: ``pytest benchmarks/test_speed.py``.

This is not part of the test suite, which collects ``tests/`` only.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from ccp_timing import generic, usual

import dvi
from dvi.methods import GradientDescent
from dvi.problems import digits
from dvi.solvers import ccp

LR, SETTLING = 0.2, 80  # at t = 80 two directions are at the edge


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def problem() -> dvi.Problem:
    return digits("mlp", "mse", n=300, width=32)


@pytest.fixture(scope="module")
def block(problem: dvi.Problem) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.linalg.qr(torch.randn(problem.dim, 3, generator=generator, dtype=torch.float64))[0]


@pytest.mark.parametrize("k", [1, 3, 8])
@pytest.mark.parametrize("make", [usual, generic])
def test_ccp(benchmark: Any, make: Any, k: int) -> None:
    alpha, beta = make(np.random.default_rng(k), k)
    result = benchmark(ccp.solve, alpha, beta)
    assert result.residual <= 1e-10


def test_gradient(benchmark: Any, problem: dvi.Problem) -> None:
    benchmark(problem.value_and_grad, problem.w0)


def test_hvp_of_three(benchmark: Any, problem: dvi.Problem, block: torch.Tensor) -> None:
    turn = iter(range(10**9))
    benchmark(lambda: problem.hvp(problem.w0 * (1 + 1e-9 * next(turn)), block))


def test_hessian_gradient_of_three(benchmark: Any, problem: dvi.Problem, block: torch.Tensor) -> None:
    turn = iter(range(10**9))
    benchmark(lambda: problem.hessian_gradient(problem.w0 * (1 + 1e-9 * next(turn)), block))


@pytest.mark.parametrize("integrator", [dvi.MacroStep(), dvi.Euler(0.25)], ids=["macro", "euler"])
def test_step(benchmark: Any, problem: dvi.Problem, integrator: Any) -> None:
    flow = dvi.central_flow(problem, GradientDescent(LR), check=False)
    y, memory = flow.initial, integrator.init(flow, flow.initial)
    while y.t < SETTLING:
        result = integrator.step(flow, memory, y, SETTLING - y.t)
        y, memory = result.y, result.memory
    benchmark(integrator.step, flow, memory, y, 100.0)
