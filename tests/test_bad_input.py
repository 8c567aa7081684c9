"""Bad input, one test each: an error that names the cause and the remedy.

What is refused where it is declared is in test_methods.py and test_problem.py, files in test_results.py.
"""

import pytest
import torch

import dvi


def tiny(**options):
    return dvi.problems.digits(network="mlp", loss="mse", n=60, width=8, **options)


def test_unknown_device():
    with pytest.raises(dvi.ProblemError, match=r"(?s)device.*cpu"):
        tiny(device="warp")


def test_more_directions_than_memory_allows():
    """k is bounded by what k(k+1)/2 vectors of third derivatives may take; what was computed until then is given."""
    flow = dvi.central_flow(tiny(), dvi.methods.GradientDescent(0.2), max_gib=1e-6)
    with pytest.raises(dvi.RunError, match="max_gib") as failure:
        dvi.solve(flow, 200, warm_start="auto", progress=False)
    assert failure.value.status is dvi.Status.OUT_OF_MEMORY
    assert "directions are critical" in failure.value.detail
    assert failure.value.result.status is dvi.Status.OUT_OF_MEMORY


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda p, m: dvi.compare(p, m, 0), "steps=0"),
        (lambda p, m: dvi.compare(p, m, 10, save_every=-1), "save_every=-1"),
        (lambda p, m: dvi.compare(p, m, 10, runs=("central", "stabel")), "choose from"),
        (lambda p, m: dvi.compare(p, m, 10, warm_start=-3), "warm_start=-3"),
        (lambda p, m: dvi.compare(p, m, 10, resume=True), "path"),
        (lambda p, m: dvi.central_flow(p, m, covariance="all"), "gradient-covariance"),
        (lambda p, m: dvi.solve(dvi.discrete(p, m), 3, integrator=dvi.Euler(0.25)), "its own steps"),
    ],
)
def test_arguments_out_of_range(call, words):
    with pytest.raises(ValueError, match=words):
        call(tiny(), dvi.methods.GradientDescent(0.05))


def test_a_method_that_is_none():
    with pytest.raises(dvi.SpecError, match=r"GradientDescent\(lr=…\)"):
        dvi.central_flow(tiny(), dvi.methods.GradientDescent)
    with pytest.raises(dvi.SpecError, match="declares no P"):
        dvi.central_flow(tiny(), type("Nothing", (dvi.Method,), {})())


def test_a_quadratic_cannot_be_held_at_the_edge():
    """No third derivative: when a growing step size brings the sharpness to 2, nothing can hold it there."""
    H = torch.diag(torch.tensor([1.0, 0.5], dtype=torch.float64))
    problem = dvi.Problem(lambda w: 0.5 * w @ H @ w, torch.ones(2, dtype=torch.float64))
    flow = dvi.central_flow(problem, dvi.methods.GradientDescent(lambda t: 1.0 + 0.1 * t))
    for integrator in (dvi.MacroStep(), dvi.Euler(0.25), dvi.RungeKutta(4)):
        solution = dvi.solve(flow, 40, integrator=integrator, progress=False, throw=False)
        assert solution.status is dvi.Status.NO_SOLUTION
        # λ = η reaches 2 at t = 10.  MacroStep's Baumgarte model asks for help up to two units before.
        assert 7 <= solution.t[-1] <= 10.5


def test_floats_of_another_kind_are_told():
    flow = dvi.central_flow(tiny(), dvi.methods.GradientDescent(0.05))
    w = flow.initial.w.float()
    with pytest.raises(dvi.ProblemError, match="float32"):
        flow.linearise(w, {})


def test_an_infeasible_start_is_told_apart_from_an_infeasible_flow():
    """λ = 2.5 at time 0 on a quadratic: the first step fails for want of a third derivative, the cause is the start."""
    H = torch.diag(torch.tensor([5.0, 1.0], dtype=torch.float64))
    problem = dvi.Problem(lambda w: 0.5 * w @ H @ w, torch.ones(2, dtype=torch.float64))
    with pytest.raises(dvi.RunError, match=r"at the start is 2\.500") as failure:
        dvi.solve(dvi.central_flow(problem, dvi.methods.GradientDescent(0.5)), 5, progress=False)
    assert failure.value.status is dvi.Status.INFEASIBLE_START


def test_an_optimizer_that_diverges_in_its_warm_start():
    with pytest.raises(dvi.RunError, match="In the warm start"):
        dvi.compare(tiny(), dvi.methods.GradientDescent(1e4), 5, warm_start=50, progress=False)


def test_a_look_for_display_does_not_decide_how_a_run_ends():
    solution = dvi.solve(dvi.discrete(tiny(), dvi.methods.GradientDescent(1e4)), 2000, progress=False, throw=False)
    assert solution.status is dvi.Status.DIVERGED


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"runs": "central"}, "a tuple of names"),
        ({"runs": ("central", "central")}, "each once"),
        ({"coordinates": (10**6,)}, "whole numbers below"),
        ({"coordinates": (1.5,)}, "whole numbers below"),
        ({"integrator": dvi.SemiImplicit()}, 'accuracy="second-order"'),
    ],
)
def test_arguments_of_compare(options, words):
    with pytest.raises(ValueError, match=words):
        dvi.compare(tiny(), dvi.methods.GradientDescent(0.05), 5, progress=False, **options)


def test_arguments_of_solve():
    flow = dvi.central_flow(tiny(), dvi.methods.GradientDescent(0.05))
    with pytest.raises(ValueError, match=r"dvi\.State"):
        dvi.solve(flow, 5, start=flow.initial.w, progress=False)
    with pytest.raises(ValueError, match="finite"):
        dvi.solve(flow, float("inf"), progress=False)


@pytest.mark.parametrize("q", [0.9, dvi.Filter([], [1.0]), dvi.Filter(1.0, [1.0]), dvi.Filter("ab")])
def test_a_momentum_that_is_no_filter(q):
    class Mine(dvi.Method):
        def P(self, nu):
            return dvi.Scalar(1.0)

        def Q(self):
            return q

    with pytest.raises(dvi.SpecError, match=r"filter|lists"):
        dvi.central_flow(tiny(), Mine())


def test_a_run_that_stopped_says_why_also_where_nothing_is_raised():
    race = dvi.compare(tiny(), dvi.methods.GradientDescent(0.3), 5, warm_start=0, progress=False, throw=False)
    assert race.status is dvi.Status.INFEASIBLE_START
    assert "sharpness at the start" in race.notes[-1]


def test_the_accuracy_that_is_told_is_the_central_flows():
    gd = dvi.methods.GradientDescent(0.05)
    race = dvi.compare(tiny(), gd, 2, runs=("map", "central"), progress=False)
    assert race.about["accuracy"] == "paper"


def test_the_ablated_flow_beside_flows_of_second_order_says_so():
    adam = dvi.methods.Adam(1e-3)
    race = dvi.compare(tiny(), adam, 2, runs=("central", "ablated"), warm_start=5, progress=False)
    assert any("ablated" in note for note in race.notes)
