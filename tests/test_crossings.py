"""What leaves the device in the stages of a macro step, where nearly all gradients are made.

On a CPU nothing crosses, but every place where it would is seen: a number read off a tensor is an operation of its own,
and small matrices go through one function.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import dvi
from dvi.solvers import protocol
from dvi.solvers.macro import stage

METHODS = {
    "GradientDescent": dvi.methods.GradientDescent,
    "with a schedule": lambda lr: dvi.methods.GradientDescent(lambda t: lr * (1 + 1e-3 * t)),
    "RMSProp": lambda lr: dvi.methods.RMSProp(lr, 0.99),
    "with bias correction": lambda lr: dvi.methods.RMSProp(lr, 0.99, eps=1e-8, bias_correction=True),
    "RMSPropNorm": lambda lr: dvi.methods.RMSPropNorm(lr, 0.99),
}


def sharpening(w):
    """Three directions, the curvature of which grows while the fourth falls."""
    return 0.5 * torch.exp(w[3]) * (w[:3] ** 2 * w.new_tensor([3.0, 2.8, 1.0])).sum() - w[3]


def at_the_edge(make, problem):
    """The flow with the learning rate for which the largest effective sharpness is 1.9 at the start."""

    def flow(lr):
        return dvi.central_flow(problem, make(lr), check=False)

    one = flow(1.0)
    A = one.effective_hessian(one.initial)(torch.eye(problem.dim, dtype=problem.dtype))
    return flow(1.9 / float(torch.linalg.eigvalsh(A)[-1]))


class Reads(TorchDispatchMode):
    """Counts numbers that are read off tensors."""

    number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default):
            self.number += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("derivatives", ["autodiff", "finite-difference"])
@pytest.mark.parametrize("name", METHODS)
def test_a_stage_sends_one_packet(monkeypatch, name, derivatives):
    """α, β and the gap, with whether gradient and P are sound; where nothing is critical, the latter alone."""
    packets, stages, inside, reads = [], [], [], Reads()
    sent, stepped = protocol.host, stage.rkc

    def host(*tensors):
        packets.append(len(tensors))
        return sent(*tensors)

    def rkc(rate, start, h, number, first):
        def counted(at):
            stages.append(len(at["z"]) > 0)
            return rate(at)

        before = len(packets)
        with reads:
            out = stepped(counted, start, h, number, first)
        inside.append(len(packets) - before)
        return out

    monkeypatch.setattr(stage, "rkc", rkc)
    monkeypatch.setattr("dvi.compiler.linearised.host", host)
    start = torch.tensor([0.02, 0.03, 0.01, 0.0], dtype=torch.float64)
    flow = at_the_edge(METHODS[name], dvi.Problem(sharpening, start, derivatives=derivatives))
    dvi.solve(flow, 40, integrator=dvi.MacroStep(1e-3), progress=False, throw=False)
    assert len(stages) > 30
    assert sum(stages) > 10
    assert sum(inside) == len(stages)
    # (a schedule and its slope are numbers of the host: see methods/schedules.py)
    assert reads.number == 0 or name == "with a schedule"
