"""Toy problems: their exact answers satisfy the equations they are said to solve."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dvi.problems import Circle, Cubic, MatrixSweep, ProblemError, Quadratic, TwoScales, two_scales

F64 = torch.float64


def central_residual(problem, w, U, X, lr, velocity):
    """dw/dt + η (∇L + ½∇³L[UXUᵀ]), zero on a central flow of gradient descent."""
    drift = problem.value_and_grad(w)[1] + problem.hessian_gradient_of(w, U, X) / 2
    return (velocity + lr * drift).norm().item()


def time_derivative(weights, t, h=1e-4):
    """Fourth order: the error is 1e-16 times fifth derivatives, beside rounding of 1e-16 / h."""
    return (8 * (weights(t + h) - weights(t - h)) - (weights(t + 2 * h) - weights(t - 2 * h))) / (12 * h)


def dense_hessian(problem, w):
    return problem.hvp(w, torch.eye(problem.dim, dtype=w.dtype))


class TestMatrixSweep:
    lr = 0.4
    cases = pytest.mark.parametrize("decay", [0.0, 0.05])
    seeds = pytest.mark.parametrize("seed", [None, 3])

    def sweep(self, decay, seed):
        return MatrixSweep(rates=[1.0, 0.5, 0.7], gaps=[0.6, 0.4, 1.2], lr=self.lr, decay=decay, seed=seed)

    @cases
    @seeds
    def test_solves_the_complementarity_system(self, decay, seed):
        sweep = self.sweep(decay, seed)
        k = 3
        U = torch.eye(sweep.problem.dim, k, dtype=F64)  # the directions of x
        for t in (0.3, 1.1, 2.2, 3.3, 5.5, 8.0, 11.0, 20.0, 40.0):
            w, Sigma, lr = sweep.weights(t), sweep.covariance(t), sweep.learning_rate(t)
            gap = 2 / lr * torch.eye(k, dtype=F64) - dense_hessian(sweep.problem, w)[:k, :k]
            assert torch.linalg.eigvalsh(gap).min() > -1e-12
            assert torch.linalg.eigvalsh(Sigma).min() > -1e-12
            assert abs((gap * Sigma).sum()) < 1e-11
            velocity = time_derivative(sweep.weights, t)
            assert central_residual(sweep.problem, w, U, Sigma, lr, velocity) < 1e-9

    def test_constant_rate(self):
        sweep = self.sweep(0.0, 1)
        assert sweep.entry_times == pytest.approx([0.6 / 0.4, 0.4 / 0.2, 1.2 / 0.28])
        assert sweep.exit_times == [math.inf] * 3
        assert torch.allclose(sweep.variances(1e3), torch.tensor([2.0, 1.0, 1.4], dtype=F64))
        assert torch.allclose(self.lr * sweep.sharpness(1e3), torch.full((3,), 2.0, dtype=F64))

    def test_decaying_rate_enters_and_leaves(self):
        sweep = self.sweep(0.05, 1)
        for i, (enter, leave) in enumerate(zip(sweep.entry_times, sweep.exit_times, strict=True)):
            assert enter < leave < math.inf
            assert sweep.variances(leave - 1e-9)[i] == pytest.approx(0, abs=1e-8)
            assert sweep.variances(leave + 1e-9)[i] == 0
            assert sweep.gaps(enter - 1e-6)[i] > 0 == sweep.gaps((enter + leave) / 2)[i]
            assert sweep.gaps(leave + 1)[i] > 0
        assert MatrixSweep([0.1], [5.0], self.lr, decay=0.2).entry_times == [math.inf]
        assert MatrixSweep([0.1], [5.0], self.lr, decay=0.2).exit_times == [math.inf]

    def test_start(self):
        sweep = self.sweep(0.0, 1)
        assert torch.all(sweep.problem.w0 == 0)
        rounding = 16 * torch.finfo(F64).eps * float(sweep.S0.norm())  # of two products with a rotation
        assert torch.allclose(sweep.weights(0.0), sweep.problem.w0, atol=rounding)
        sweep.problem.check(sweep.weights(1.0) + 0.1)

    def test_bad_numbers(self):
        for arguments in (([1.0], [1.0, 2.0], 0.1), ([-1.0], [1.0], 0.1), ([1.0], [0.0], 0.1), ([1.0], [1.0], 0.1, -1)):
            with pytest.raises(ProblemError, match="positive"):
                MatrixSweep(*arguments)


class TestCircle:
    @pytest.mark.parametrize("entry", [0.0, 1.5])
    def test_solves_the_complementarity_system(self, entry):
        circle = Circle(lr=0.5, a=0.8, angle=-1.2, entry=entry)
        U = torch.eye(3, 1, dtype=F64)
        for t in (0.2, 1.0, 2.0, 7.0):
            w = circle.weights(t)
            X = torch.full((1, 1), circle.variance(t), dtype=F64)
            residual = central_residual(circle.problem, w, U, X, circle.lr, time_derivative(circle.weights, t))
            assert residual < 1e-10
            sharpness = dense_hessian(circle.problem, w)[0, 0] * circle.lr
            assert sharpness == pytest.approx(2, abs=1e-13) if t >= entry else sharpness < 2
        assert torch.equal(circle.weights(0.0), circle.problem.w0)
        circle.problem.check(circle.weights(1.0) + 0.1)

    def test_bad_numbers(self):
        with pytest.raises(ProblemError, match="below π/2"):
            Circle(angle=2.0)
        with pytest.raises(ProblemError, match="outside the circle"):
            Circle(entry=100.0)


class TestTwoScales:
    @settings(max_examples=40, deadline=None)
    @given(lr=st.floats(0.1, 0.6), zeta=st.floats(-0.4, 0.0), x=st.floats(0.05, 0.4), t=st.floats(0.0, 4.0))
    def test_solves_the_complementarity_system(self, lr, zeta, x, t):
        toy = TwoScales(lr, zeta, x)  # in these ranges the flow comes to rest on the edge
        w, Sigma = toy.weights(t + 1e-3), toy.covariance(t + 1e-3)
        H = dense_hessian(toy.problem, w)
        assert torch.linalg.eigvalsh(Sigma).min() > -1e-13
        assert lr * torch.linalg.eigvalsh(H).max() == pytest.approx(2, abs=1e-12)
        assert torch.allclose(H @ Sigma, 2 / lr * Sigma, rtol=0, atol=1e-11)
        velocity = time_derivative(toy.weights, t + 1e-3)
        # rounding of weights of size 20, divided by h = 1e-4
        assert central_residual(toy.problem, w, torch.eye(2, dtype=F64), Sigma, lr, velocity) < 1e-9
        assert toy.variance(t + 1e-3) == pytest.approx(Sigma.trace().item())

    @pytest.mark.parametrize("zeta", [0.0, -0.3, -0.1])
    def test_start_and_rest(self, zeta):
        toy = TwoScales(zeta=zeta)
        assert torch.equal(toy.weights(0.0), toy.problem.w0)
        assert torch.equal(toy.weights(-1.0), toy.problem.w0)
        rest = toy.weights(60.0)  # e^-120 from it
        assert torch.allclose(rest, toy.weights(70.0), rtol=0, atol=1e-14)
        g = toy.problem.value_and_grad(rest)[1]
        tangent = torch.tensor([toy.edge, -(2 * rest[0] + 3 * zeta * toy.edge)], dtype=F64)
        assert abs(float(g @ tangent)) < 1e-12

    def test_bad_numbers(self):
        with pytest.raises(ProblemError, match="lr must be positive"):
            TwoScales(lr=-0.3)
        with pytest.raises(ProblemError, match="leaves the edge"):
            TwoScales(x=-1.0)
        with pytest.raises(ProblemError, match="without end"):
            TwoScales(x=10.0)


class TestQuadratic:
    def test_flow_and_descent(self):
        quadratic = Quadratic([3.0, 1.0, -0.1, 0.0], seed=2)
        problem, lr = quadratic.problem, 0.3
        velocity = time_derivative(lambda t: quadratic.gradient_flow(t, lr), 1.0)
        gradient = problem.value_and_grad(quadratic.gradient_flow(1.0, lr))[1]
        assert (velocity + lr * gradient).norm() < 1e-11
        w = problem.w0
        for _ in range(5):
            w = w - lr * problem.value_and_grad(w)[1]
        assert torch.allclose(w, quadratic.gradient_descent(5, lr), rtol=1e-12)
        assert torch.allclose(torch.linalg.eigvalsh(quadratic.H), quadratic.eigenvalues.sort().values, atol=1e-13)


@settings(max_examples=20, deadline=None)
@given(d=st.integers(1, 6), seed=st.integers(0, 1000))
def test_cubic_is_symmetric_and_seeded(d, seed):
    cubic = Cubic(d, seed, scale=0.5)
    assert torch.allclose(cubic.T, cubic.T.permute(2, 0, 1), atol=1e-15)
    assert torch.allclose(cubic.T, cubic.T.permute(1, 0, 2), atol=1e-15)
    assert torch.equal(cubic.T, Cubic(d, seed, scale=0.5).T)
    assert torch.allclose(2 * cubic.T, Cubic(d, seed).T, atol=1e-15)


def test_two_scales():
    problem = two_scales(zeta=0.5)
    x, y = 0.3, 0.7
    w = torch.tensor([x, y], dtype=F64)
    gradient = torch.tensor([(y + 0.75 * x) * x - 1, x * x / 2 - 1], dtype=F64)
    assert problem.value(w).item() == pytest.approx(0.5 * (y + 0.5 * x) * x * x - x - y)
    assert torch.allclose(problem.value_and_grad(w)[1], gradient)
    problem.check()


@pytest.mark.parametrize("make", [lambda **k: Cubic(3, **k), lambda **k: Quadratic([1.0, 2.0], **k)])
def test_dtype_and_random_state(make):
    state = torch.get_rng_state()
    toy = make(dtype=torch.float32)
    assert toy.problem.dtype == torch.float32
    assert torch.equal(state, torch.get_rng_state())
