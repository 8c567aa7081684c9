"""An optimizer that diverges is reported as that: in a run, in the warm start, beside its flows, and in words."""

import logging
import re

import numpy as np
import pytest
import torch

import dvi
from dvi.methods import GradientDescent, HeavyBall, RMSProp
from dvi.results.status import Status
from dvi.solvers.eigen.block_method import CriticalSubspace
from dvi.solvers.eigen.tracker import EigenTracker


@pytest.fixture(autouse=True)
def _quiet(caplog):
    caplog.set_level(logging.ERROR, "dvi")


def quadratic(dtype=torch.float64):
    """Sharpness 5: gradient descent diverges from lr = 0.4 on, by (lr·5 − 1) a step."""
    H = torch.diag(torch.tensor([5.0, 1.0, 0.3], dtype=dtype))
    return dvi.Problem(lambda w: 0.5 * w @ H @ w, torch.ones(3, dtype=dtype))


def quartic(dtype=torch.float64):
    return dvi.Problem(lambda w: (w**4).sum() + 0.5 * (w**2).sum(), torch.ones(3, dtype=dtype))


def mlp(dtype=torch.float64):
    return dvi.problems.digits(network="mlp", loss="mse", n=20, width=4, dtype=dtype)


def barrier(dtype=torch.float64):
    """−log w: a long step leads to a negative weight, where there is no loss."""
    return dvi.Problem(lambda w: (3 * w - 0.1 * w.log() + 0.01 * w**2).sum(), torch.full((2,), 0.5, dtype=dtype))


PROBLEMS = {"quadratic": (quadratic, 1.0), "quartic": (quartic, 10.0), "mlp": (mlp, 1e4), "barrier": (barrier, 8.0)}


def descend(problem, lr, steps):
    """The loop that everybody writes: after how many steps the loss is not finite, or None."""
    w = problem.w0
    _, g = problem.value_and_grad(w)
    for step in range(1, steps + 1):
        w = w - lr * g
        try:
            _, g = problem.value_and_grad(w)
        except dvi.problems.NotFiniteError:
            return step
    return None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_the_step_is_that_of_a_loop_and_the_learning_rate_is_named(name, dtype):
    make, lr = PROBLEMS[name]
    at = descend(make(dtype), lr, 2000)
    assert at is not None
    flow = dvi.discrete(make(dtype), GradientDescent(lr))
    with pytest.raises(dvi.RunError, match=rf"The optimizer itself diverges at lr={lr:g}: after {at} steps") as caught:
        dvi.solve(flow, 2000, eigen_every=0 if name == "mlp" else 3, progress=False)
    assert caught.value.status is Status.DIVERGED
    solution = caught.value.result
    assert len(solution.t) == at - 1  # iterates whose successor is finite: the midpoint needs it
    assert np.isfinite(solution.loss).all()
    assert torch.isfinite(solution.w).all()


@pytest.mark.parametrize("warm_start", ["auto", 40])
@pytest.mark.parametrize("name", PROBLEMS)
def test_it_is_told_in_the_warm_start_too(name, warm_start):
    make, lr = PROBLEMS[name]
    words = rf"In the warm start: The optimizer itself diverges at lr={lr:g}"
    options = {"warm_start": warm_start, "progress": False}
    flow = dvi.central_flow(make(), GradientDescent(lr), check=False)
    with pytest.raises(dvi.RunError, match=words) as caught:
        dvi.solve(flow, 5, **options)
    assert caught.value.status is Status.DIVERGED
    assert isinstance(caught.value.result, dvi.Solution)
    with pytest.raises(dvi.RunError, match=words) as caught:
        dvi.compare(make(), GradientDescent(lr), 5, check=False, **options)
    assert caught.value.status is Status.DIVERGED
    assert isinstance(caught.value.result, dvi.Comparison)


def test_throw_is_honoured_in_the_warm_start(tmp_path):
    options = {"warm_start": "auto", "progress": False, "throw": False}
    solution = dvi.solve(dvi.central_flow(quartic(), GradientDescent(10.0), check=False), 5, **options)
    race = dvi.compare(quartic(), GradientDescent(10.0), 5, check=False, path=tmp_path / "race.h5", **options)
    for result in (solution, race, dvi.load(tmp_path / "race.h5")):
        assert result.status is Status.DIVERGED
        assert len(result.t) == 0
        assert "The optimizer itself diverges at lr=10" in result.notes[-1]
    with pytest.raises(dvi.StoreError, match="cannot continue from it"):  # not from a start that was never warmed up
        dvi.compare(quartic(), GradientDescent(0.01), 5, check=False, path=tmp_path / "race.h5", resume=True, **options)


def test_a_slow_divergence_is_told_as_one():
    """|1 − 5·lr| = 1.1: in 500 steps the loss grows by 1.1^1000 = 10^41, which is no overflow."""
    flow = dvi.central_flow(quadratic(), GradientDescent(0.42), check=False)
    with pytest.raises(dvi.RunError, match=r"diverges at lr=0\.42: after \d+ steps the loss has grown from 3"):
        dvi.solve(flow, 5, warm_start="auto", progress=False)


def test_a_catapult_is_no_divergence():
    """From near the minimum ab = 1 of sharpness 5 the loss grows by 10⁷ before gradient descent settles elsewhere."""
    start = torch.tensor([2.2, 0.4546], dtype=torch.float64)
    problem = dvi.Problem(lambda w: 0.5 * (w[0] * w[1] - 1) ** 2, start)
    for warm_start in ("auto", 20, 30, 40):
        solution = dvi.solve(
            dvi.central_flow(problem, GradientDescent(0.45), check=False),
            3,
            warm_start=warm_start,
            progress=False,
            throw=False,
        )
        assert solution.status is not Status.DIVERGED


def test_a_learning_rate_that_grows_is_named_as_it_was_then():
    method = GradientDescent(lambda t: 0.1 + 0.1 * t)  # above 2/5 from t = 3 on
    with pytest.raises(dvi.RunError, match=r"diverges at lr=(\d+\.?\d*): after (\d+) steps") as caught:
        dvi.solve(dvi.discrete(quadratic(), method), 500, progress=False)
    words = str(caught.value)
    lr = float(words.split("lr=")[1].split(":")[0])
    steps = int(words.split("after ")[1].split()[0])
    assert lr == pytest.approx(0.1 + 0.1 * (steps - 1), rel=1e-5)  # of the step that led there


def test_methods_without_a_learning_rate_diverge_in_words_too():
    triple = (lambda w: {}, lambda nu, g: {}, lambda nu: dvi.Scalar(0.1))
    with pytest.raises(dvi.RunError, match=r"The optimizer itself diverges: after \d+ steps"):
        dvi.solve(dvi.discrete(quartic(), triple), 50, progress=False)
    with pytest.raises(dvi.RunError, match=r"The optimizer itself diverges at lr=10: "):
        dvi.solve(dvi.discrete(quartic(), HeavyBall(10.0)), 50, progress=False)


def test_a_state_that_overflows_is_a_divergence_not_a_wrong_formula_of_P():
    """The gradient fits float32 where its square does not."""
    problem = dvi.Problem(lambda w: 1e18 * (w**2 + 0.1 * w**4).sum(), torch.ones(2, dtype=torch.float32))
    with pytest.raises(dvi.RunError, match=r"diverges at lr=20.*state ν is not finite") as caught:
        dvi.solve(dvi.discrete(problem, RMSProp(20.0, 0.9)), 50, progress=False)
    assert caught.value.status is Status.DIVERGED


def test_weights_are_looked_at_before_the_loss_is():
    """A loss may refuse infinite weights in its own way."""

    def loss(w):
        if not torch.isfinite(w).all():
            raise AssertionError("not asked for this")
        return (w**2).sum()

    problem = dvi.Problem(loss, torch.full((1,), 1e30, dtype=torch.float32) ** 0.5)
    method = (lambda w: {}, lambda nu, g: {}, lambda nu: dvi.Scalar(1e-38))
    with pytest.raises(dvi.RunError, match="after 1 steps weights are not finite"):
        dvi.solve(dvi.discrete(problem, method), 5, progress=False)


@pytest.mark.parametrize("runs", [("discrete", "stable"), ("stable", "discrete")])
def test_beside_flows_the_others_keep_what_they_have(runs):
    race = dvi.compare(
        quartic(), GradientDescent(10.0), 50, runs=runs, warm_start=0, check=False, progress=False, throw=False
    )
    assert race.status is Status.DIVERGED
    assert "The optimizer itself diverges at lr=10" in race.notes[-1]
    assert len(race.stable.t) >= 1
    assert len(race.discrete.t) >= 2
    for run in race.runs.values():
        assert np.isfinite(run.loss).all()


@pytest.mark.parametrize(
    ("runs", "words"),
    [
        (("stable",), "In the stable flow, without the optimizer beside it"),
        (("stable", "discrete"), "In the stable flow, not in the optimizer, which has come to t = "),
    ],
)
def test_a_flow_that_diverges_is_told_apart(runs, words):
    """L = √w: the flow w^(3/2) = 1 − ¾·lr·t ends at t = 0.89, the optimizer at t = 2."""
    problem = dvi.Problem(lambda w: torch.sqrt(w).sum(), torch.ones(1, dtype=torch.float64))
    race = dvi.compare(
        problem, GradientDescent(1.5), 5, runs=runs, warm_start=0, check=False, progress=False, throw=False
    )
    assert race.status is Status.DIVERGED
    assert words in race.notes[-1]
    assert race.stable.ledger.t[-1] <= 0.89


def test_eigenvectors_that_cannot_be_found_where_the_optimizer_runs_away():
    """With one iteration the block method gives up; that is not what is wrong."""
    hasty = dvi.MacroStep(watch=EigenTracker(CriticalSubspace(tol=1e-12, max_iterations=1)))
    options = {"warm_start": 0, "check": False, "progress": False, "throw": False}
    race = dvi.compare(mlp(torch.float32), GradientDescent(1e4), 5, integrator=hasty, **options)
    assert race.status is Status.DIVERGED
    assert "The optimizer itself diverges at lr=10000" in race.notes[-1]
    assert "did not converge" in race.notes[-1]


def test_a_sharpness_of_ten_to_the_13_in_float32_is_found_and_told():
    race = dvi.compare(
        quadratic(torch.float32), GradientDescent(1e12), 5, warm_start=0, check=False, progress=False, throw=False
    )
    assert race.status is Status.INFEASIBLE_START
    (found,) = re.findall(r"The effective sharpness at the start is ([\d.]+)\. ", race.notes[-1])
    assert float(found) == pytest.approx(5e12, rel=1e-6)  # the error of an eigenvalue is quadratic; float32 rounds
