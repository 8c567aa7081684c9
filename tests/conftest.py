"""What the tests share: one thread, one hypothesis profile, and losses whose derivatives are known exactly."""

from __future__ import annotations

import os
from dataclasses import fields

import numpy as np
import torch
from hypothesis import HealthCheck, Phase, settings

import dvi
from dvi.solvers.eigen.tracker import EigenTracker
from dvi.solvers.protocol import Frame

torch.set_num_threads(1)

# The same examples in every run: a failure in one place is a failure everywhere.  HYPOTHESIS_PROFILE=explore tries
# others, and more of them.
EXPLORE = os.environ.get("HYPOTHESIS_PROFILE") == "explore"
settings.register_profile(
    "steady",
    deadline=None,  # the first call of an operator is slow
    derandomize=True,
    print_blob=True,
    max_examples=30,
    phases=(Phase.explicit, Phase.reuse, Phase.generate),  # most examples are seeds: there is little to shrink
    suppress_health_check=[HealthCheck.too_slow],  # an example compiles a flow
)
settings.register_profile("explore", parent=settings.get_profile("steady"), derandomize=False)
settings.load_profile("explore" if EXPLORE else "steady")


def examples(count):
    """Settings for a property whose examples are dear: so many of them, twenty times as many when exploring."""
    return settings(max_examples=20 * count if EXPLORE else count)


class CubicLoss:
    """L(w) = b·w + ½ wᵀAw + ⅙ C[w, w, w]: gradient, Hessian and third derivative in closed form (numpy, float64)."""

    def __init__(self, b, A, C):
        self.b, self.A, self.C = b, A, C

    @classmethod
    def random(cls, rng, d):
        A = rng.normal(size=(d, d))
        return cls(rng.normal(size=d), A + A.T, symmetric_cube(rng, d))

    @classmethod
    def with_derivatives(cls, rng, w, g, H):
        """A random cubic whose gradient and Hessian at w are g and H."""
        C = symmetric_cube(rng, len(w))
        A = H - C @ w
        return cls(g - A @ w - 0.5 * C @ w @ w, A, C)

    def gradient(self, w):
        return self.b + self.A @ w + 0.5 * self.C @ w @ w

    def hessian(self, w):
        return self.A + self.C @ w

    def loss(self, like):
        """The loss as a torch function, in the dtype of ``like``."""
        b, A, C = (torch.as_tensor(x).to(like) for x in (self.b, self.A, self.C))

        def cubic(w):
            return b @ w + 0.5 * w @ A @ w + ((C @ w) @ w) @ w / 6

        return cubic

    def problem(self, w0):
        """The dvi.Problem, from the numpy vector w0."""
        w0 = torch.as_tensor(w0)
        return dvi.Problem(self.loss(w0), w0)


def symmetric_cube(rng, d):
    C = rng.normal(size=(d, d, d))
    return sum(np.transpose(C, axes) for axes in ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))) / 6


def orthogonal(rng, d):
    return np.linalg.qr(rng.normal(size=(d, d)))[0]


def noisy_quadratic(start=0.0, d=4, n=6):
    """ℓᵢ = ½wᵀHw + cᵢ·w with Σcᵢ = 0: noise of covariance C = Σ cᵢcᵢᵀ/n, whatever w.  The problem, H and C."""
    rng = np.random.default_rng(3)
    R = orthogonal(rng, d)
    H = torch.from_numpy(R @ np.diag([1.6, 0.9, 0.5, 0.4]) @ R.T)
    c = rng.normal(size=(n, d))
    c = torch.from_numpy(c - c.mean(axis=0))
    w0 = torch.full((d,), start, dtype=torch.float64)
    problem = dvi.Problem.from_examples(lambda w, c: 0.5 * w @ H @ w + c @ w, c, w0)
    return problem, H.numpy(), (c.T @ c / n).numpy()


def frame_of(flow, y, U):
    """The frame of directions U [d, k] at y that need be no eigenvectors, nor normalised."""
    HU = flow.problem.hvp(y.w, U)
    M = (U.T @ HU).numpy()
    return Frame(y.w, U, HU, 0.5 * (M + M.T), flow.third_derivatives(y, U))


class Distrustful(EigenTracker):
    """A tracker that believes no estimate: the macro step makes its model anew at every step."""

    def trusted(self, *_):
        return False

    @classmethod
    def like(cls, tracker):
        return cls(**{field.name: getattr(tracker, field.name) for field in fields(tracker)})


class AdaGrad(dvi.Method):
    """An optimizer as a user declares one."""

    lr: float
    eps: float = 1e-8

    def init(self, w):
        return {"s": torch.zeros_like(w)}

    def f(self, nu, g):
        return {"s": g**2}

    def P(self, nu):
        return dvi.Diagonal((nu["s"].sqrt() + self.eps) / self.lr)
