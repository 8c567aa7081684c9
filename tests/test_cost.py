"""What the default integrator costs, counted and not timed, on six small problems: a sixth more is to be seen."""

import pytest

import dvi
from dvi.methods import GradientDescent, RMSProp, RMSPropNorm
from dvi.problems import digits, sorting

ADAM_LIKE = {"eps": 1e-8, "bias_correction": True}

#: Problem, method, unit times, and gradient equivalents per unit time with mixed derivatives.
CASES = {
    "MLP, MSE, GD": (lambda d: digits(n=100, width=12, derivatives=d), GradientDescent(0.3), 100, 6.74),
    "MLP, MSE, RMSProp": (
        lambda d: digits(n=100, width=12, derivatives=d), RMSProp(1e-3, 0.99, **ADAM_LIKE), 100, 5.96,
    ),
    "MLP, MSE, RMSProp-Norm": (
        lambda d: digits(n=100, width=12, derivatives=d), RMSPropNorm(0.1, 0.99, **ADAM_LIKE), 100, 5.08,
    ),
    "MLP, CE, GD": (lambda d: digits(loss="ce", n=100, width=12, derivatives=d), GradientDescent(0.7), 60, 19.4),
    "CNN, MSE, RMSProp": (
        lambda d: digits("cnn", n=40, width=3, derivatives=d), RMSProp(1e-3, 0.99, **ADAM_LIKE), 40, 8.44,
    ),
    "transformer, CE, RMSProp": (
        lambda d: sorting("transformer", "ce", n=40, width=12, depth=1, length=5, derivatives=d),
        RMSProp(1e-3, 0.99, **ADAM_LIKE), 40, 37.7,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_cost_is_what_it_was(name):
    make, method, steps, expected = CASES[name]
    flow = dvi.central_flow(make("mixed"), method, check=False)
    solution = dvi.solve(flow, steps, warm_start="auto", progress=False)
    # a run of a few dozen steps takes one more or less where rounding differs
    assert solution.ledger.per_unit_time() == pytest.approx(expected, rel=0.15)
