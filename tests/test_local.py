"""Specs whose curvature in g is diagonal: the short way must give what the generic one does."""

from typing import Any

import numpy as np
import torch
from conftest import CubicLoss, examples
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import softplus

import dvi
from dvi.compiler.jacobian_structure import is_local
from dvi.methods import GradientDescent, RMSProp, RMSPropNorm

EPS = np.finfo(np.float64).eps
seeds = st.integers(0, 2**32 - 1)


class Entrywise(dvi.Method):
    """A made-up optimizer that treats every coordinate alone in g; ``mixed``: not in ν nor in P."""

    draw: Any
    mixed: bool
    lr: Any = 0.3

    def init(self, w):
        return {"a": torch.zeros_like(w), "rest": (torch.zeros_like(w), w.new_zeros(()))}

    def f(self, nu, g):
        c, a, (b, t) = self.draw, nu["a"], nu["rest"]
        da = 0.2 * (g**2 * torch.cos(b) - a) + 0.1 * torch.sin(c["u"] * g + t)
        db = 0.3 * (torch.tanh(g**2 + a) * c["u"] - b)
        if self.mixed:
            da = da + 0.1 * torch.tanh(c["K"] @ a)
        return {"a": da, "rest": (db, torch.ones_like(t))}

    def P(self, nu):
        a, (b, t) = nu["a"], nu["rest"]
        inside = self.draw["K"] @ a if self.mixed else a
        return dvi.Diagonal((softplus(inside + b * t) + 0.5) / self.lr)


class Capped(RMSProp):
    """RMSProp whose root is capped by its norm: the entries of P are coupled, where the gradients are large."""

    limit: float = 1.0

    def P(self, nu):
        root = nu["v"].sqrt() + 1e-3
        return dvi.Diagonal(root / torch.linalg.vector_norm(root).clamp(min=self.limit) / self.lr)


class Clipped(dvi.Method):
    """RMSProp of a gradient whose norm is clipped: the entries are coupled, at large gradients only."""

    lr: Any = 0.3
    limit: float = 1.0

    def init(self, w):
        return {"v": torch.zeros_like(w)}

    def f(self, nu, g):
        size = torch.linalg.vector_norm(g).clamp(min=self.limit)
        return {"v": 0.1 * ((g * self.limit / size) ** 2 - nu["v"])}

    def P(self, nu):
        return dvi.Diagonal((nu["v"].sqrt() + 1e-3) / self.lr)


def compiled(seed, d, mixed):
    rng = np.random.default_rng(seed)
    draw = {"K": torch.tensor(rng.normal(size=(d, d)) / np.sqrt(d)), "u": torch.tensor(rng.normal(size=d))}
    w = rng.normal(size=d)
    method = Entrywise(draw, mixed)
    nu = {
        "a": torch.tensor(rng.normal(size=d)),
        "rest": (torch.tensor(rng.normal(size=d)), torch.tensor(rng.normal(size=()))),
    }
    flow = dvi.central_flow(CubicLoss.random(rng, d).problem(w), method, check=False)
    return flow, torch.tensor(w), nu, rng


@given(seeds, st.integers(2, 6), st.integers(1, 3), st.booleans())
@examples(15)
def test_the_short_way_is_the_generic_one(seed, d, k, mixed):
    flow, w, nu, rng = compiled(seed, d, mixed)
    U = torch.tensor(rng.normal(size=(d, min(k, d))))
    assert flow.calculus.local
    assert flow.calculus.metric.local is not mixed
    short = flow.linearise(w, nu, U)
    flow.calculus.local = flow.calculus.metric.simple = False
    generic = flow.linearise(w, nu, U)
    # The same sums and products in another order: some hundred operations on each entry
    scale = float(generic.beta.abs().max())
    assert float((short.beta - generic.beta).abs().max()) <= 200 * EPS * scale
    X = np.eye(U.shape[1])
    for a, b in zip((x for x in leaves(short.drift(X).nu)), leaves(generic.drift(X).nu), strict=True):
        assert float((a - b).abs().max()) <= 200 * EPS * max(1.0, float(b.abs().max()))


def leaves(nu):
    return torch.utils._pytree.tree_leaves(nu)


def test_which_methods_are_local():
    rng = np.random.default_rng(0)
    w, g = (torch.tensor(rng.normal(size=6)) for _ in range(2))
    v = {"v": g**2}
    assert is_local(RMSProp(0.1, 0.9), v, g)
    assert is_local(RMSProp(0.1, 0.9, bias_correction=True), v | {"t": torch.ones((), dtype=w.dtype)}, g)
    assert not is_local(RMSPropNorm(0.1, 0.9), {"v": (g**2).sum()}, g)
    # gradients a thousand times smaller than these are not clipped, and show no coupling
    assert not is_local(Clipped(), v, g)
    assert not is_local(Clipped(limit=100.0), v, g)
    assert is_local(Clipped(limit=1e9), v, g)
    assert not dvi.central_flow(
        dvi.Problem(lambda w: (w**4).sum(), w), GradientDescent(0.1), check=False
    ).calculus.local


def test_of_which_methods_each_entry_of_P_follows_its_own():
    rng = np.random.default_rng(0)
    w = torch.tensor(rng.normal(size=6))

    def local(method):
        return dvi.central_flow(dvi.Problem(lambda w: (w**4).sum(), w), method, check=False).calculus.metric.local

    assert local(RMSProp(0.1, 0.9))
    assert local(RMSProp(0.1, 0.9, bias_correction=True))
    assert not local(RMSPropNorm(0.1, 0.9))  # p is one number
    assert not local(GradientDescent(0.1))  # and has no ν
    # at roots a thousand times smaller there is no coupling
    assert not local(Capped(0.1, 0.9))
    assert not local(Capped(0.1, 0.9, limit=100.0))
    assert local(Capped(0.1, 0.9, limit=1e9))


def test_dead_coordinates_give_no_nan_the_short_way():
    """The derivative of √v is infinite where v = 0; such a coordinate has no part in P's rate."""
    data = torch.tensor([1.0, 0.7, 0.4], dtype=torch.float64)
    problem = dvi.Problem(
        lambda w: ((w[:3] * data) ** 2).sum() + (w[:3] ** 4).sum(), torch.ones(4, dtype=torch.float64)
    )
    flow = dvi.central_flow(problem, RMSProp(0.1, 0.9), check=False)
    assert flow.calculus.local
    y = flow.initial
    lin = flow.linearise(y.w, y.nu, torch.eye(4, dtype=torch.float64)[:, :2])
    assert torch.isfinite(lin.beta).all()
    assert torch.isfinite(lin.alpha).all()
