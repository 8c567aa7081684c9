"""The table of models tried: its reference is right, and it tells a wrong derivative from a right one.

The packages are not needed: models of torch itself, and planted faults, go through the same measurement.
"""

import importlib
from pathlib import Path

import pytest
import torch
from torch import nn

import dvi


@pytest.fixture
def tried(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "benchmarks"))
    return importlib.import_module("models_tried")


class WrongTwice(torch.autograd.Function):
    """tanh with its derivative, which claims to have no derivative of its own."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * (1 - x.tanh().square()).detach()


class Activation(nn.Module):
    def forward(self, x):
        return WrongTwice.apply(x)


def given(tried, activation):
    from model_entries import Given, normal

    model = nn.Sequential(nn.Linear(6, 5), activation, nn.Linear(5, 3)).double()
    return Given(model, nn.MSELoss(), normal(10, 6), normal(10, 3, seed=2))


def entry(tried, make):
    from model_entries import Entry

    return Entry("torch", "planted", make, make)


def test_differences_are_those_of_a_quartic(tried):
    w, u = torch.linspace(-1, 1, 7, dtype=torch.float64), torch.full((7,), 7**-0.5, dtype=torch.float64)
    (H, _), (T, _) = tried.differences(lambda w: w**3, w, u)
    # Stencils of fourth order are exact for cubic gradients: rounding alone, eps/h and eps/h² with h ≤ 0.1.
    torch.testing.assert_close(H, 3 * w**2 * u, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(T, 6 * w * u**2, rtol=1e-10, atol=1e-11)


def test_a_right_model_is_accepted(tried):
    row = tried.attempt(entry(tried, lambda: given(tried, nn.Tanh())))
    assert row.verdict == "accepted"
    # Differences of fourth order in float64 were seen to be good to 1e-12 and 1e-9; a thousand times that is wrong.
    assert row.off[0] < 1e-12
    assert row.off[1] < 1e-9
    assert row.off[2] < 1e-6


def test_a_wrong_derivative_is_told_without_the_help_of_check(tried, monkeypatch):
    broken = entry(tried, lambda: given(tried, Activation()))
    assert tried.attempt(broken).verdict == "refused by check()"
    monkeypatch.setattr(dvi.Problem, "check", lambda self, w=None: None)
    row = tried.attempt(broken)
    assert row.verdict == "WRONG"
    assert row.off[0] < 1e-12
    assert row.off[1] > 0.01


def test_a_model_that_was_written_to_is_told(tried, monkeypatch):
    class Scribble(nn.Tanh):
        pass

    made = [given(tried, Scribble()) for _ in range(2)]
    monkeypatch.setattr(dvi.Problem, "check", lambda self, w=None: made[0].model[0].bias.data.add_(1))
    models = iter(made)
    assert "WROTE to 0.bias" in tried.attempt(entry(tried, lambda: next(models))).verdict


def test_a_refusal_is_told_in_its_own_words(tried):
    row = tried.attempt(entry(tried, lambda: given(tried, nn.Dropout(0.5))))
    assert row.verdict == "refused"
    assert "deterministic" in row.words


def test_complex_weights_lie_in_w_as_pairs(tried):
    class Fourier(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.c = nn.Parameter(torch.randn(4, dtype=torch.complex128))
            self.o = nn.Linear(6, 3).double()

        def forward(self, x):
            return self.o(torch.fft.irfft(torch.fft.rfft(x) * self.c, n=6).tanh())

    from model_entries import Given, normal

    row = tried.attempt(entry(tried, lambda: Given(Fourier(), nn.MSELoss(), normal(10, 6), normal(10, 3, seed=2))))
    assert row.verdict == "accepted"
    assert row.off[1] < 1e-9
