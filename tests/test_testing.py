"""What an integrator of anybody's may say and leave out, and how it runs."""

import pytest
import torch

import dvi
from dvi.methods import GradientDescent, RMSProp
from dvi.problems import MatrixSweep, two_scales


class Foreign:
    """An integrator from outside the library, with the three methods and nothing else: Euler's steps."""

    inner = dvi.Euler(0.25)

    def init(self, flow, y):
        return self.inner.init(flow, y)

    def step(self, flow, memory, y, h):
        return self.inner.step(flow, memory, y, h)

    def observe(self, flow, memory, y):
        return self.inner.observe(flow, memory, y)


def sweep():
    return MatrixSweep([0.6, 0.5], [0.3, 0.2], lr=0.2, seed=1).problem


def stationary():
    problem = dvi.problems.digits(network="mlp", loss="mse", n=40, width=4)
    return dvi.stationary_flow(problem, RMSProp(0.01, 0.9), check=False)


FLOWS = {
    "central": lambda: dvi.central_flow(two_scales(), GradientDescent(0.3)),
    "stable": lambda: dvi.stable_flow(two_scales(), GradientDescent(0.3)),
    "ablated": lambda: dvi.ablated_flow(two_scales(), RMSProp(0.02, 0.9)),
    "second order": lambda: dvi.central_flow(two_scales(), GradientDescent(0.3), accuracy="second-order"),
    "second order, stable": lambda: dvi.stable_flow(two_scales(), GradientDescent(0.3), accuracy="second-order"),
    "map": lambda: dvi.central_map(two_scales(), GradientDescent(0.3)),
    "stationary": stationary,
}
SMOOTH = {"central", "stable", "ablated"}
INERTIAL = {"second order", "second order, stable"}
DRIVES = {
    "macro": (dvi.MacroStep(), SMOOTH),
    "euler": (dvi.Euler(), SMOOTH),
    "runge-kutta": (dvi.RungeKutta(), SMOOTH),
    "torchdiffeq": (dvi.TorchDiffEq(), SMOOTH),
    "semi-implicit": (dvi.SemiImplicit(), INERTIAL),
    "semi-implicit, whole steps": (dvi.SemiImplicit(dt=1), INERTIAL | {"map"}),
    "quasistatic": (dvi.Quasistatic(), {"stationary"}),
    "foreign": (Foreign(), SMOOTH),
}


@pytest.mark.parametrize("name", FLOWS)
def test_an_integrator_says_what_it_can_drive(name):
    """It runs what it accepts, and is refused in words elsewhere; what a flow takes by default accepts it."""
    flow = FLOWS[name]()
    for integrator, driven in DRIVES.values():
        refusal = dvi.solvers.integrator.Driver(integrator).accepts(flow)
        assert (refusal == "") == (name in driven)
        if refusal:
            with pytest.raises(ValueError, match=r"SemiImplicit|MacroStep|Quasistatic"):
                dvi.solve(flow, 1, integrator=integrator, progress=False)
        else:
            assert dvi.solve(flow, 1, integrator=integrator, progress=False).status is dvi.Status.SUCCESS
    assert dvi.runs.solving.default_integrator(flow).accepts(flow) == ""


class Choosy(Foreign):
    def accepts(self, flow):
        return "" if flow.name == "stable" else "Choosy drives the stable flow only: take dvi.Euler()."


class WithoutStep:
    init = observe = Foreign.init


@pytest.mark.parametrize(
    ("integrator", "words"),
    [
        (Choosy(), "stable flow only"),
        (dvi.Euler, "Euler is a class"),
        (WithoutStep(), "has no step"),
        ("rk4", "no init"),
    ],
)
def test_an_integrator_is_refused_in_words(integrator, words):
    with pytest.raises(ValueError, match=words):
        dvi.solve(dvi.central_flow(two_scales(), GradientDescent(0.3)), 1, integrator=integrator, progress=False)


def test_an_integrator_with_three_methods_runs_in_compare(tmp_path):
    """The same bits as the integrator it calls; from a file, too, and longer than before."""

    def run(steps, integrator, **options):
        race = dvi.compare(sweep(), GradientDescent(0.2), steps, integrator=integrator, progress=False, **options)
        return race.runs["central"]

    whole = run(12, dvi.Euler(0.25))
    assert whole.breakpoints
    assert torch.equal(run(12, Foreign()).w, whole.w)
    keep = {"path": tmp_path / "run.h5", "resume": True}
    run(6, Foreign(), **keep)
    assert torch.equal(run(12, Foreign(), **keep).w, whole.w)


class Remembering(Foreign):
    """Its memory is an object of its own, which a file cannot hold."""

    def init(self, flow, y):
        return self


def test_a_memory_that_no_file_holds_is_refused_before_the_run(tmp_path):
    with pytest.raises(TypeError, match="cannot hold a Remembering: make an integrator's memory of tuples"):
        dvi.compare(
            sweep(), GradientDescent(0.2), 2, integrator=Remembering(), progress=False, path=tmp_path / "run.h5"
        )


def test_a_jump_begins_anew_or_with_restart():
    """A schedule jumps at 2: without ``restart`` the memory is that of ``init``."""
    calls = []

    class Told(Foreign):
        def init(self, flow, y):
            calls.append(("init", y.t))
            return super().init(flow, y)

    class Restarted(Told):
        def restart(self, flow, memory, y):
            calls.append(("restart", y.t))
            return self.inner.init(flow, y)

    for integrator in (Told(), Restarted()):
        method = GradientDescent(lr=lambda t: 0.1 if t < 2 else 0.05)
        dvi.solve(dvi.central_flow(two_scales(), method), 4, integrator=integrator, progress=False)
    assert calls == [("init", 0.0), ("init", 2.0), ("init", 0.0), ("restart", 2.0)]
