"""Momentum as a filter: what it is made of, its steps against torch's own, what is refused."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_methods import agree, bowl, torch_trajectory, trajectory

import dvi
from dvi.methods import Adam, Filter, HeavyBall, NAdam, Nesterov, QuasiHyperbolic

EPS = np.finfo(np.float64).eps
seeds = st.integers(0, 2**32 - 1)
below_one = st.floats(0.0, 0.99)

# name: (Q(β), c, Q₁, τ in closed form)
TABLE = {
    "none": (lambda b: Filter(), lambda b: 2, lambda b: 1, lambda b: 0),
    "heavy ball": (
        lambda b: HeavyBall(1.0, b).Q(),
        lambda b: 2 * (1 + b),
        lambda b: 1 / (1 - b),
        lambda b: b / (1 - b),
    ),
    "average": (
        lambda b: Adam(1.0, beta1=b).Q(),
        lambda b: 2 * (1 + b) / (1 - b),
        lambda b: 1,
        lambda b: b / (1 - b),
    ),
    "nesterov": (
        lambda b: Nesterov(1.0, b).Q(),
        lambda b: 2 * (1 + b) / (1 + 2 * b),
        lambda b: 1 / (1 - b),
        lambda b: b * b / (1 - b),
    ),
    "nadam": (
        lambda b: NAdam(1.0, beta1=b).Q(),
        lambda b: 2 * (1 + b) / ((1 - b) * (1 + 2 * b)),
        lambda b: 1,
        lambda b: b * b / (1 - b),
    ),
    "quasi-hyperbolic": (
        lambda b: QuasiHyperbolic(1.0, b, 0.7).Q(),
        lambda b: 2 / (0.3 + 0.7 * (1 - b) / (1 + b)),
        lambda b: 1,
        lambda b: 0.7 * b / (1 - b),
    ),
}


@pytest.mark.parametrize("name", TABLE)
@given(b=below_one)
def test_threshold_gain_and_lag_in_closed_form(name, b):
    Q, *expected = TABLE[name]
    q = Q(b)
    q.check()
    for got, want in zip((q.threshold, q.gain, q.lag), expected, strict=True):
        # a few sums of numbers of order one, divided by 1 − β ≥ 0.01
        assert float(got) == pytest.approx(want(b), rel=1e-12, abs=1e-12)


def test_the_known_numbers():
    assert float(Adam(1.0, beta1=0.9).Q().threshold) == pytest.approx(38, rel=1e-13)
    assert float(NAdam(1.0, beta1=0.9).Q().threshold) == pytest.approx(2 * 1.9 / (0.1 * 2.8), rel=1e-13)


def spectral_radius(q, sharpness):
    """Of the optimizer on L = ½ λ w² with P = 1: roots of (z−1) D + λ z N, both in powers of z⁻¹."""
    n, d = np.array(q.numerator, dtype=float), np.array(q.denominator, dtype=float)
    size = max(len(n), len(d))
    n, d = np.pad(n, (0, size - len(n))), np.pad(d, (0, size - len(d)))
    polynomial = np.convolve([1.0, -1.0], d) + sharpness * np.concatenate([[0.0], n])
    return np.abs(np.roots(polynomial)).max()


coefficients = st.lists(st.floats(-1, 1), min_size=1, max_size=3)


@given(numerator=coefficients, poles=st.lists(st.floats(-0.9, 0.9), max_size=2))
def test_the_first_escape_is_where_the_optimizer_becomes_unstable(numerator, poles):
    """Against the roots of the characteristic polynomial: stable just below, unstable just above."""
    denominator = np.poly(poles) if poles else np.array([1.0])
    q = Filter([1.0, *numerator], list(denominator))
    if float(q.gain) <= 0.05:  # the average step goes uphill, or hardly down: refused, or ill-conditioned
        return
    if q.escape is None:
        assert spectral_radius(q, 1e-3) < 1  # stable, and it never crosses
        assert spectral_radius(q, 1e4) < 1
        return
    _, sharpness = q.escape
    if sharpness > 1e4 or sharpness < 1e-3:
        return
    # near the crossing the root moves at a rate of order one in relative sharpness
    assert spectral_radius(q, sharpness * (1 - 1e-4)) < 1 + 1e-9
    assert spectral_radius(q, sharpness * (1 + 1e-4)) > 1 - 1e-9
    assert spectral_radius(q, 0.5 * sharpness) < 1
    assert spectral_radius(q, sharpness) == pytest.approx(1, abs=1e-5)  # a double root moves like √eps


def test_an_escape_with_another_period_is_refused_with_its_frequency():
    q = Filter([0.2, 0.9], [1.0])  # mostly the last gradient but one: a cycle of about five steps
    omega, _ = q.escape
    assert omega < math.pi
    with pytest.raises(dvi.SpecError, match=r"cycle of .* steps") as error:
        q.check()
    assert f"{2 * math.pi / omega:.3g}" in str(error.value)

    class Delayed(dvi.Method):
        lr: float

        def P(self, nu):
            return dvi.Scalar(1 / self.lr)

        def Q(self):
            return q

    with pytest.raises(dvi.SpecError, match="period two"):
        dvi.discrete(dvi.Problem(lambda w: (w**2).sum(), torch.ones(2, dtype=torch.float64)), Delayed(0.1))


@pytest.mark.parametrize(
    ("filter_", "words"),
    [
        (Filter([1.0], [1.0, -1.0]), "pole"),
        (Filter([1.0], [1.0, -1.2]), "pole"),
        (Filter([-1.0], [1.0]), "downhill"),
        (Filter([float("nan")], [1.0]), "finite"),
        (Filter([1.0], [0.0, 1.0]), "first one not zero"),
    ],
)
def test_a_filter_that_makes_no_sense_is_refused(filter_, words):
    with pytest.raises(dvi.SpecError, match=words):
        filter_.check()


@pytest.mark.parametrize("momentum", [1.0, -0.1, float("nan")])
def test_momentum_out_of_range_is_refused(momentum):
    with pytest.raises(dvi.SpecError, match="momentum"):
        HeavyBall(0.1, momentum)


@given(seed=seeds, b=st.floats(0.0, 0.9))
def test_any_filter_equals_its_impulse_response(seed, b):
    """The recursion against the convolution with the power series of Q."""
    rng = np.random.default_rng(seed)
    q = Filter(list(rng.normal(size=3)), [2.0, -b, 0.3 * b])
    g = torch.tensor(rng.normal(size=(12, 4)))
    series = np.zeros(12)
    for i in range(12):  # D · series = N
        n = q.numerator[i] if i < 3 else 0.0
        series[i] = (n - sum(q.denominator[j] * series[i - j] for j in (1, 2) if j <= i)) / q.denominator[0]
    memory = q.initial(g[0])
    for t in range(12):
        m, memory = q.step(g[t], memory)
        expected = sum(series[j] * g[t - j] for j in range(t + 1))
        torch.testing.assert_close(m, expected, rtol=0, atol=100 * EPS * (1 + np.abs(series).sum()) * 4)
    assert torch.equal(memory[-1], m)


def test_a_scheduled_momentum_acts_on_what_was_kept():
    """m_t = β_t m_{t−1} + g_t, and (1−β_t) g_t for an average: the β of now, not of when m was made."""
    g = torch.tensor([[1.0], [2.0], [-3.0], [0.5]], dtype=torch.float64)
    betas = [0.0, 0.5, 0.9, 0.3]
    for n in (lambda b: 1.0, lambda b: 1 - b):
        memory, m = Filter([1.0], [1.0, -0.5]).initial(g[0]), torch.zeros(1, dtype=torch.float64)
        for b, now in zip(betas, g, strict=True):
            m = b * m + n(b) * now
            out, memory = Filter([n(b)], [1.0, -b]).step(now, memory)
            torch.testing.assert_close(out, m, rtol=4 * EPS, atol=0)


@given(seed=seeds, b=st.floats(0.1, 0.95))
def test_heavy_ball_and_nesterov_are_torchs(seed, b):
    cubic, w = bowl(seed)
    for method, nesterov in ((HeavyBall(0.01, b), False), (Nesterov(0.01, b), True)):
        ours = trajectory(method, cubic, w, steps=100)
        theirs = torch_trajectory(
            lambda p, n=nesterov: torch.optim.SGD(p, lr=0.01, momentum=b, nesterov=n), cubic, w, steps=100
        )
        agree(ours, theirs)


@given(seed=seeds, b=st.floats(0.0, 0.95))
def test_adam_is_torchs(seed, b):
    cubic, w = bowl(seed)
    ours = trajectory(Adam(0.003, beta1=b, beta2=0.99), cubic, w, steps=100)
    theirs = torch_trajectory(lambda p: torch.optim.Adam(p, lr=0.003, betas=(b, 0.99)), cubic, w, steps=100)
    agree(ours, theirs)


@given(seed=seeds)
def test_nadam_is_torchs_once_its_corrections_have_faded(seed):
    cubic, w = bowl(seed)

    def nadam(p):
        optimizer = torch.optim.NAdam(p, lr=0.003, betas=(0.9, 0.99))
        optimizer.state[p[0]] = {
            "step": torch.tensor(1e6),
            "mu_product": torch.tensor(0.0),
            "exp_avg": torch.zeros_like(p[0]),
            "exp_avg_sq": torch.zeros_like(p[0]),
        }
        return optimizer

    agree(trajectory(NAdam(0.003, beta2=0.99), cubic, w, steps=100), torch_trajectory(nadam, cubic, w, steps=100))
