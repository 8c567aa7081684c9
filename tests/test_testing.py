"""What an integrator of anybody's may say and leave out, and how it runs; and the conformance checks of dvi.testing."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import dvi
import dvi.testing
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
    problem = dvi.problems.digits(network="mlp", loss="mse", n=20, width=3)
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
    with pytest.raises(TypeError, match=r"cannot hold a Remembering\. Make an integrator's memory of tuples"):
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


# ---- dvi.testing: what is right passes, what is wrong is named --------------------------------------------------


class Midpoint(dvi.solvers.IntegratorBase):
    """The explicit midpoint rule with the complementarity linearised over the step, written without the library's."""

    fixed_steps = True

    def __init__(self, h=0.25):
        self.h, self.watch = h, dvi.solvers.EigenTracker()

    def init(self, flow, y):
        return None  # afterwards the eigenpairs of the last step, to start from

    def step(self, flow, memory, y, h):
        h = min(h, self.h)
        node, rate, seen = self.look(flow, memory, y, h)
        _, middle, _ = self.look(flow, seen, y.moved(rate, h / 2), h / 2)
        return dvi.solvers.StepResult(y.moved(middle, h), seen, node, lambda t: y.moved(middle, t - y.t))

    def observe(self, flow, memory, y):
        return self.look(flow, memory, y, self.h)[0]

    def look(self, flow, memory, y, h):
        loss, g = flow.value_and_grad(y)
        if flow.constrained:
            seen = self.watch.update(flow, y, memory, h)
            frame = self.watch.frame(flow, y, seen, h)
        else:
            seen = self.watch.update_leading(flow, y, memory)
            none = y.w.new_zeros(len(y.w), 0)
            frame = dvi.solvers.Frame(y.w, none, none, np.zeros((0, 0)), none.T)
        lin = flow.linearised(y, g, frame)
        X = np.zeros((frame.k, frame.k))
        if frame.k:
            X = dvi.solvers.ccp.solve(lin.alpha - lin.gap / h, lin.beta).X
            flow.count_ccp()
        rate = lin.drift(X)
        node = dvi.solvers.Node(y.t, float(loss), float(g @ g), seen.eigenvalues, frame.U, frame.HU, X, y.t, g, rate)
        return node, rate, seen


@pytest.mark.parametrize(
    "integrator", [Foreign(), Midpoint(), dvi.SemiImplicit(), dvi.MacroStep()], ids=lambda x: type(x).__name__
)
def test_integrators_that_keep_the_contract(integrator):
    """Half a step of the speed 0.16 is cut off at each entry; MacroStep's tolerance is 1e-3 a unit and above."""
    dvi.testing.check_integrator(integrator, tolerance=0.02)


def test_a_midpoint_rule_from_outside_runs_in_compare(tmp_path):
    """Close to the library's own; from a file bit for bit."""

    def run(steps, integrator, **options):
        race = dvi.compare(sweep(), GradientDescent(0.2), steps, integrator=integrator, progress=False, **options)
        return race.runs["central"].w

    whole = run(10, Midpoint())
    assert (whole - run(10, dvi.RungeKutta(4))).norm() < 0.02
    run(5, Midpoint(), path=tmp_path / "run.h5")
    assert torch.equal(run(10, Midpoint(), path=tmp_path / "run.h5", resume=True), whole)


class Inexact(Foreign):
    inner = dvi.Euler(1.0)


class Overstepping(Foreign):
    inner = dvi.Euler(4.0)

    def step(self, flow, memory, y, h):
        return super().step(flow, memory, y, 4.0)


class Forgetful(Foreign):
    """Keeps between calls what belongs into its memory."""

    def __init__(self):
        self.calls = 0

    def step(self, flow, memory, y, h):
        self.calls += 1
        return dvi.Euler(0.25 + 1e-4 * (self.calls % 2)).step(flow, memory, y, h)


class Late(Foreign):
    def step(self, flow, memory, y, h):
        result = super().step(flow, memory, y, h)
        return replace(result, node=replace(result.node, t=result.y.t))


class Uncounted(Foreign):
    def step(self, flow, memory, y, h):
        counted = flow.problem.ledger.ccp_solves
        result = super().step(flow, memory, y, h)
        flow.problem.ledger.ccp_solves = counted
        return result


class Constant(Foreign):
    """Between its ends it gives the beginning."""

    def step(self, flow, memory, y, h):
        return replace(super().step(flow, memory, y, h), interpolate=lambda t: y)


class ShortSighted(Foreign):
    def horizon(self, memory):
        return 0.0

    def step(self, flow, memory, y, h):
        return dvi.Euler(h / 16).step(flow, memory, y, h)


class GivingUp(Foreign):
    def step(self, flow, memory, y, h):
        if y.t > 5:
            raise dvi.solvers.StepError("no further")
        return super().step(flow, memory, y, h)


class Recalling(Foreign):
    """Its memory is an object that a file cannot hold."""

    def init(self, flow, y):
        return {"inner": super().init(flow, y), "seen": set()}

    def step(self, flow, memory, y, h):
        result = super().step(flow, memory["inner"], y, h)
        return replace(result, memory={"inner": result.memory, "seen": set()})

    def observe(self, flow, memory, y):
        return super().observe(flow, memory["inner"], y)


@pytest.mark.parametrize(
    ("integrator", "tolerance", "words"),
    [
        (Inexact(), 1e-3, "from the exact ones"),
        (Overstepping(), 1, "ends at 4, with h = 3 allowed"),
        (Forgetful(), 1, "taken again"),
        (Late(), 1, "not of the beginning"),
        (Uncounted(), 1, "were not counted"),
        (Constant(), 1, "interpolated at its end"),
        (ShortSighted(), 1, "beyond its horizon"),
        (Recalling(), 1, "cannot hold a set"),
        (GivingUp(), 1, "ends early"),
        (dvi.Quasistatic(), 1, "accepts no central flow"),
    ],
    ids=lambda x: type(x).__name__ if hasattr(x, "step") else "",
)
def test_integrators_that_break_the_contract(integrator, tolerance, words):
    with pytest.raises(AssertionError, match=words):
        dvi.testing.check_integrator(integrator, tolerance)


def test_methods():
    dvi.testing.check_method(RMSProp(0.01, 0.9))
    dvi.testing.check_method(dvi.methods.Adam(0.01, 0.8, 0.99), dvi.problems.digits(n=30, width=4))


class Negative(dvi.Method):
    lr: float

    def init(self, w):
        return torch.zeros_like(w)

    def f(self, nu, g):
        return g.square()

    def P(self, nu):
        return dvi.Diagonal(-1 - nu)


def test_methods_that_are_wrong(monkeypatch):
    with pytest.raises(AssertionError, match=r"does not compile.*positive"):
        dvi.testing.check_method(Negative(0.1))
    with pytest.raises(AssertionError, match=r"does not compile.*method"):
        dvi.testing.check_method("sgd")
    with pytest.raises(AssertionError, match="cannot be pickled"):
        dvi.testing.check_method(RMSProp(lr=lambda t: 0.01, beta2=0.9))
    right = dvi.CentralFlow.linearise
    for name in ("alpha", "beta"):

        def wrong(self, *args, name=name, **kwargs):
            lin = right(self, *args, **kwargs)
            return replace(lin, **{name: 1.01 * getattr(lin, name)})

        monkeypatch.setattr(dvi.CentralFlow, "linearise", wrong)
        with pytest.raises(AssertionError, match="gap changes at a rate"):
            dvi.testing.check_method(RMSProp(0.01, 0.9))


class Changed(dvi.Diagonal):
    """A diagonal preconditioner with one operation changed."""

    def __init__(self, name, operation):
        super().__init__(torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64))
        right = getattr(self, name)
        setattr(self, name, lambda *args: operation(right(*args), *args))


@pytest.mark.parametrize(
    ("name", "operation", "words"),
    [
        ("apply", lambda out, V: out + V[:1].expand_as(V) if V.ndim == 2 else out, "apply"),
        ("apply", lambda out, V: out + V.roll(1, 0), "not symmetric"),
        ("apply", lambda out, V: out - 3 * V, "not positive definite"),
        ("apply", lambda out, V: out.float(), "torch.float32"),
        ("solve", lambda out, V: 1.001 * out, "solve is"),
        ("sqrt", lambda out, V: -out, "sqrt is"),
        ("inv_sqrt", lambda out, V: V.mul_(0.5), "changes its argument"),
        ("effective_lr", lambda out: 2 * out, "harmonic mean"),
    ],
)
def test_preconditioners(name, operation, words):
    dvi.testing.check_preconditioner(dvi.Diagonal(torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)), 3)
    with pytest.raises(AssertionError, match=words):
        dvi.testing.check_preconditioner(Changed(name, operation), 3)


def test_problems(monkeypatch):
    for make in (sweep, two_scales, lambda: dvi.problems.Cubic(5).problem):
        dvi.testing.check_problem(make())
    for derivatives in ("autodiff", "finite-difference"):
        problem = dvi.problems.digits(n=30, width=4, dtype=torch.float32, derivatives=derivatives, chunk_size=7)
        dvi.testing.check_problem(problem)
    right = dvi.Problem.hvp, dvi.Problem.hessian_gradient
    with monkeypatch.context() as patched:
        patched.setattr(dvi.Problem, "hvp", lambda self, w, V: right[0](self, w, V) + V.roll(1, 0))
        with pytest.raises(AssertionError, match="H is not symmetric"):
            dvi.testing.check_problem(dvi.problems.Cubic(5).problem)
    with monkeypatch.context() as patched:
        patched.setattr(dvi.Problem, "hessian_gradient", lambda *args: right[1](*args).roll(1, 1))
        with pytest.raises(AssertionError, match="third derivative is not symmetric"):
            dvi.testing.check_problem(dvi.problems.Cubic(5).problem)


def test_a_loss_whose_derivative_is_wrong_is_named():
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, w):
            ctx.save_for_backward(w)
            return w.pow(3)

        @staticmethod
        def backward(ctx, grad):
            (w,) = ctx.saved_tensors
            return 2 * w.square() * grad

    problem = dvi.Problem(lambda w: Wrong.apply(w).sum(), torch.ones(3, dtype=torch.float64))
    with pytest.raises(AssertionError, match=r"gradient|first derivative"):
        dvi.testing.check_problem(problem)
