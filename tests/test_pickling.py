"""Through ``pickle``, ``copy.deepcopy`` and a pool of spawned processes: errors, problems, methods, flows, results."""

import copy
import importlib
import inspect
import multiprocessing
import pickle
import pkgutil
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn

import dvi
from dvi.methods import GradientDescent, HeavyBall, Preconditioned, RMSProp, Shampoo
from dvi.results.run_error import RunError
from dvi.results.status import Status

D = torch.float64
WAYS = {
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
    "oldest protocol": lambda x: pickle.loads(pickle.dumps(x, protocol=2)),
    "deepcopy": copy.deepcopy,
}


# ---- errors --------------------------------------------------------------------------------------------------------


def exceptions():
    """All exception classes of the library, found by walking its modules."""
    found = set()
    for module in pkgutil.walk_packages(dvi.__path__, "dvi."):
        if not module.name.endswith("__main__"):
            members = inspect.getmembers(importlib.import_module(module.name), inspect.isclass)
            found |= {c for _, c in members if issubclass(c, BaseException) and c.__module__.startswith("dvi")}
    return sorted(found, key=lambda c: c.__qualname__)


#: How those are made that take more than a message; what is not here is made of a message.
MADE = {
    RunError: lambda: RunError(Status.DIVERGED, "at t = 3", {"stands for": "a result"}),
    dvi.CCPError: lambda: dvi.CCPError("no solution", np.eye(2)),
}


def test_there_are_exceptions():
    names = {c.__name__ for c in exceptions()}
    assert {"RunError", "StoreError", "SpecError", "ProblemError", "LeftDomainError", "Impatience"} <= names


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("cls", exceptions(), ids=lambda cls: cls.__qualname__)
def test_every_error_comes_back_with_all_it_says(cls, way):
    error = MADE.get(cls, lambda: cls("what happened"))()
    error.result = {"stands for": "a result"}
    error.add_note("a note")
    back = WAYS[way](error)
    assert type(back) is cls
    assert str(back) == str(error)
    assert back.args == error.args
    assert back.__dict__.keys() == error.__dict__.keys()
    assert back.result == error.result
    assert back.__notes__ == ["a note"]
    for name in ("status", "detail"):
        assert getattr(back, name, None) == getattr(error, name, None)
    if cls is dvi.CCPError:
        assert np.array_equal(back.direction, error.direction)


# ---- what is run ---------------------------------------------------------------------------------------------------


def valley(w):
    """½(ab − 1)² + 0.02(a − 3)²."""
    return 0.5 * (w[0] * w[1] - 1) ** 2 + 0.02 * (w[0] - 3) ** 2


def quarter(w):
    return 0.25 * valley(w)


def ramp(t):
    return 0.3 + 0.01 * t


def start():
    return torch.tensor([1.1, 0.6], dtype=D)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(3, 2), nn.Linear(2, 1)

    def forward(self, x):
        return self.outer(torch.tanh(self.inner(x)))


class Own(dvi.Method):
    lr: float
    eps: float = 1e-3

    def init(self, w):
        return {"s": torch.zeros_like(w)}

    def f(self, nu, g):
        return {"s": 0.1 * (g**2 - nu["s"])}

    def P(self, nu):
        return dvi.Diagonal((nu["s"].sqrt() + self.eps) / self.lr)


def nothing(w):
    return {}


def still(nu, g):
    return {}


def thirds(nu):
    return dvi.Scalar(3.0)


def module(**options):
    torch.manual_seed(0)
    x = torch.linspace(-1, 1, 12, dtype=D).reshape(4, 3)
    return dvi.Problem.from_module(Net().to(D), nn.MSELoss(), x, x[:, :1] ** 2, **options)


PROBLEMS = {
    "plain": lambda: dvi.Problem(valley, start()),
    "sum of parts": lambda: dvi.Problem([valley, quarter], start()),
    "mixed": lambda: dvi.Problem(valley, start(), derivatives="mixed"),
    "differences": lambda: dvi.Problem(valley, start(), derivatives="finite-difference"),
    "module": module,
    "module in chunks": lambda: module(chunk_size=3),
    "digits": lambda: dvi.problems.digits(network="cnn", n=8, width=2),
    "matrix sweep": lambda: dvi.problems.MatrixSweep([1.0, 1.35], [0.37, 0.85], lr=0.7, seed=2).problem,
    "quadratic": lambda: dvi.problems.Quadratic([1.0, 2.0]).problem,
}

METHODS = {
    "gd": lambda: GradientDescent(0.5),
    "schedule": lambda: GradientDescent(ramp),
    "rmsprop": lambda: RMSProp(0.02, 0.9),
    "heavy ball": lambda: HeavyBall(0.05),
    "shampoo": lambda: Shampoo(0.05, shapes=((2, 1),)),
    "preconditioned": lambda: Preconditioned(dvi.Diagonal(torch.tensor([1.0, 2.0], dtype=D)), 0.5),
    "own": lambda: Own(0.02),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", PROBLEMS)
def test_a_problem_comes_back_also_after_it_was_used(name, way):
    problem = PROBLEMS[name]()
    w, V = problem.w0, torch.eye(problem.dim, 2, dtype=D)
    before = problem.value_and_grad(w)[1], problem.hvp(w, V), problem.hessian_gradient(w, V)
    back = WAYS[way](problem)
    assert back.ledger is not problem.ledger
    assert back.ledger.counts == problem.ledger.counts
    for a, b in zip(before, (back.value_and_grad(w)[1], back.hvp(w, V), back.hessian_gradient(w, V)), strict=True):
        assert torch.equal(a, b)
    assert back.ledger.hvps == problem.ledger.hvps + 2  # counted by its own, which its derivatives share
    assert torch.equal(problem.hvp(w, V), before[1])  # the original has kept what it had


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", METHODS)
def test_a_flow_comes_back_and_gives_the_same_run(name, way):
    method = METHODS[name]()
    assert WAYS[way](method) == method or name == "preconditioned"
    for make in (dvi.central_flow, dvi.stable_flow, dvi.discrete):
        flow = make(PROBLEMS["plain"](), METHODS[name]())
        first = dvi.solve(flow, 8, progress=False, throw=False)  # traces are made on the way
        back = WAYS[way](flow)
        assert back.calculus.replays.method is back.method  # else nothing would be replayed
        again = dvi.solve(back, 8, progress=False, throw=False)
        for result in (again, WAYS[way](first)):
            assert np.array_equal(result.loss, first.loss)
            assert torch.equal(result.w, first.w)
            assert result.status is first.status


def test_a_triple_of_functions_and_the_other_flows():
    triple = (nothing, still, thirds)
    problem = PROBLEMS["plain"]()
    for flow in (
        dvi.central_flow(problem, triple),
        dvi.central_map(problem, HeavyBall(0.05)),
        dvi.ablated_flow(problem, RMSProp(0.02, 0.9)),
        dvi.stationary_flow(problem, RMSProp(0.02, 0.9)),
    ):
        back = WAYS["pickle"](flow)
        assert torch.equal(back.initial.w, flow.initial.w)
        assert repr(back) == repr(flow)


@pytest.mark.parametrize("way", WAYS)
def test_results_states_and_integrators_come_back(way):
    race = dvi.compare(PROBLEMS["plain"](), RMSProp(0.02, 0.9), 3, progress=False)
    back = WAYS[way](race)
    assert back.status is race.status
    assert np.array_equal(back.central.loss, race.central.loss)
    assert torch.equal(back.central.nu["v"], race.central.nu["v"])
    assert back.distance.keys() == race.distance.keys()
    assert back.central.ledger.gradient_equivalents == race.central.ledger.gradient_equivalents
    state = dvi.State(start(), {"v": start()}, 2.0)
    assert torch.equal(WAYS[way](state).nu["v"], state.nu["v"])
    for integrator in (
        dvi.Euler(0.25),
        dvi.MacroStep(),
        dvi.RungeKutta(4),
        dvi.SemiImplicit(),
        dvi.TorchDiffEq(),
        dvi.Quasistatic(),
    ):
        assert repr(WAYS[way](integrator)) == repr(integrator)


# ---- what has no name ----------------------------------------------------------------------------------------------


def nameless():
    """Things that no pickle can hold: what they hold has no name that another process could find it by."""

    class Local(dvi.Method):
        lr: float = 0.1

        def P(self, nu):
            return dvi.Scalar(1 / self.lr)

    class LocalNet(Net):
        pass

    class Loss:
        def __call__(self, w):
            return valley(w)

    x = torch.ones(2, 3, dtype=D)
    lambdas = Net().to(D)
    lambdas.activation = lambda x: x
    problem = dvi.Problem(valley, start())
    return {
        "loss": dvi.Problem(lambda w: valley(w), start()),
        "loss object": dvi.Problem(Loss(), start()),
        "part": dvi.Problem([valley, lambda w: valley(w)], start()),
        "criterion": dvi.Problem.from_module(Net().to(D), lambda y, t: ((y - t) ** 2).mean(), x, x[:, :1]),
        "module": dvi.Problem.from_module(LocalNet().to(D), nn.MSELoss(), x, x[:, :1]),
        "activation": dvi.Problem.from_module(lambdas, nn.MSELoss(), x, x[:, :1]),
        "schedule": GradientDescent(lambda t: 0.1),
        "class": Local(),
        "triple": dvi.central_flow(problem, (nothing, still, lambda nu: dvi.Scalar(3.0))),
        "flow": dvi.central_flow(problem, GradientDescent(lambda t: 0.1)),
    }


@pytest.mark.parametrize("what", nameless())
def test_what_has_no_name_can_be_copied_and_pickle_says_what_it_misses(what):
    thing = nameless()[what]
    with pytest.raises((pickle.PicklingError, AttributeError), match=r"lambda|<locals>"):
        pickle.dumps(thing)
    assert type(copy.deepcopy(thing)) is type(thing)  # copies need no names
    assert type(copy.copy(thing)) is type(thing)


# ---- processes -----------------------------------------------------------------------------------------------------


def last_loss(flow):
    return dvi.solve(flow, 5, progress=False)


def sweep(problem, lr):
    return dvi.solve(dvi.central_flow(problem, GradientDescent(lr)), 5, progress=False)


def fail(cls):
    raise MADE.get(cls, lambda: cls("what happened"))()


@pytest.mark.slow
def test_a_pool_of_spawned_processes():
    """Problems and flows go there, results and errors with their partial results come back."""
    context = multiprocessing.get_context("spawn")
    problem = PROBLEMS["module"]()
    flows = [dvi.central_flow(problem, make()) for name, make in METHODS.items() if name in ("gd", "rmsprop", "own")]
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        results = list(pool.map(last_loss, flows, timeout=120))  # all are pickled before a flow is used here
        for flow, result in zip(flows, results, strict=True):
            assert np.allclose(result.loss, dvi.solve(flow, 5, progress=False).loss, rtol=1e-12)
        with pytest.raises(RunError, match="effective sharpness at the start") as caught:
            pool.submit(sweep, dvi.Problem(valley, start()), 50.0).result(timeout=120)
        assert caught.value.status is Status.INFEASIBLE_START
        assert isinstance(caught.value.result, dvi.Solution)
        for cls in exceptions():
            with pytest.raises(cls):
                pool.submit(fail, cls).result(timeout=120)
        with pytest.raises((pickle.PicklingError, AttributeError), match="lambda"):
            pool.submit(sweep, dvi.Problem(lambda w: valley(w), start()), 0.5).result(timeout=120)
        assert len(pool.submit(sweep, dvi.Problem(valley, start()), 0.5).result(timeout=120).t) == 6  # it lives
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["torch", "dvi"])
    with ProcessPoolExecutor(1, mp_context=server, max_tasks_per_child=1) as pool:  # a worker ends, its result stays
        results = [pool.submit(sweep, dvi.Problem(valley, start()), lr) for lr in (0.5, 0.6)]
        assert all(len(result.result(timeout=120).t) == 6 for result in results)
