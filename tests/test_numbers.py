"""NumPy's scalars and tensors of shape [] are numbers wherever a number is asked for."""

import numpy as np
import pytest
import torch

import dvi
from dvi import methods as M
from dvi.solvers.eigen.block_method import CriticalSubspace
from dvi.solvers.eigen.tracker import EigenTracker

KINDS = {
    "float64": np.float64,
    "float32": np.float32,
    "array": np.asarray,
    "tensor": lambda x: torch.tensor(x, dtype=torch.float64),
    "float32 tensor": lambda x: torch.tensor(x, dtype=torch.float32),
}
WHOLE = {"int64": np.int64, "uint8": np.uint8, "tensor": torch.tensor, "array": np.array}


def problem():
    a = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    return dvi.Problem(lambda w: 0.5 * (a * w**2).sum() + 0.1 * (w**3).sum(), torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("kind", KINDS)
def test_hyperparameters(kind):
    make = KINDS[kind]
    method, plain = M.RMSProp(make(0.1), make(0.9), make(1e-8)), float(make(0.1))
    assert type(method.lr) is float
    assert method.lr == plain
    assert method == M.RMSProp(plain, float(make(0.9)), float(make(1e-8)))
    assert M.NormalizedGD(make(0.5), memory=make(0.25)).memory == 0.25
    assert M.AdaGradNorm(make(0.5), b0=make(1.0)).b0 == 1.0
    w = dvi.solve(dvi.discrete(problem(), method), 3, eigen_every=0, progress=False).w
    assert w.dtype == torch.float64


@pytest.mark.parametrize("kind", WHOLE)
def test_whole_numbers(kind):
    make = WHOLE[kind]
    assert type(M.GradientDescent(make(1)).lr) is int
    assert M.RMSProp(0.1, 0.9, bias_correction=np.bool_(True)).bias_correction is True
    flow = dvi.stable_flow(problem(), M.GradientDescent(0.1))
    solution = dvi.solve(flow, make(4), save_every=make(2), warm_start=make(1), progress=False)
    assert solution.t.tolist() == [0.0, 2.0, 4.0]


class Ten(dvi.Method):
    """A hyperparameter without a range, of one's own."""

    lr: float
    scale: float = 1.0

    def P(self, nu):
        return dvi.Scalar(self.scale / self.lr)


def test_hyperparameters_of_ones_own():
    method = Ten(np.float32(0.5), scale=torch.tensor(2.0))
    assert (type(method.lr), type(method.scale)) == (float, float)
    dvi.central_flow(problem(), method, check=False)


@pytest.mark.parametrize("value", [True, np.bool_(True), torch.tensor(True), "0.1", None, torch.full((1, 1), 0.1), 1j])
def test_what_is_no_number_is_refused(value):
    with pytest.raises(dvi.SpecError, match=r"GradientDescent\(lr=.*lr must be a number or a schedule"):
        M.GradientDescent(value)


@pytest.mark.parametrize("kind", KINDS)
def test_values_of_schedules(kind):
    make = KINDS[kind]
    methods = [M.GradientDescent(lambda t: make(0.125)), M.GradientDescent(0.125)]
    runs = [dvi.solve(dvi.stable_flow(problem(), m), 3, progress=False) for m in methods]
    torch.testing.assert_close(runs[0].w, runs[1].w)


@pytest.mark.parametrize("kind", KINDS)
def test_arguments_of_a_run(kind):
    make = KINDS[kind]
    flow = dvi.stable_flow(problem(), M.GradientDescent(0.1))
    solution = dvi.solve(flow, make(2), save_every=make(0.5), eigen_every=make(1.0), progress=False)
    assert solution.t.tolist() == [0.0, 0.5, 1.0, 1.5, 2.0]
    race = dvi.compare(
        problem(), M.GradientDescent(0.1), make(2), save_every=make(1), eigen_every=make(1), progress=False
    )
    assert race.central.t.tolist() == [0.0, 1.0, 2.0]


INTEGRATORS = {
    "euler": lambda x: dvi.Euler(x(0.25)),
    "macro step": lambda x: dvi.MacroStep(tol=x(0.25), watch=EigenTracker(band=x(0.25))),
    "runge-kutta": lambda x: dvi.RungeKutta(tol=x(0.25), h=x(0.25)),
    "semi-implicit": lambda x: dvi.SemiImplicit(dt=x(0.25)),
    "subspace": lambda x: CriticalSubspace(tol=x(0.25)),
}


@pytest.mark.parametrize("name", INTEGRATORS)
def test_arguments_of_integrators(name):
    make = INTEGRATORS[name]
    expected = repr(make(float))
    for kind in KINDS.values():
        assert repr(make(kind)) == expected
    for wrong in (str, bool):
        with pytest.raises(ValueError, match="must be a number"):
            make(wrong)


@pytest.mark.parametrize("wrong", ["10", True, None])
def test_arguments_of_a_run_that_are_no_numbers(wrong):
    flow = dvi.stable_flow(problem(), M.GradientDescent(0.1))
    with pytest.raises(ValueError, match=r"steps=.*must be a number"):
        dvi.solve(flow, wrong, progress=False)
