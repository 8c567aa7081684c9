"""The contract of a problem, on losses whose derivatives are known in full."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dvi.problems import Cubic, DerivativeError, Ledger, Problem, ProblemError, Quadratic, digits

F64 = torch.float64
few = settings(max_examples=25, deadline=None)
dims = st.integers(1, 7)
seeds = st.integers(0, 2**16)


def normal(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def svec(X):
    i, j = torch.triu_indices(*X.shape)
    return X[i, j] * torch.where(i == j, torch.ones_like(X[0, 0]), math.sqrt(2))


def close(a, b, tol):
    """Agreement relative to the size of b: sums of a few dozen products round to a few hundred epsilons."""
    assert a.shape == b.shape
    assert (a - b).norm() <= tol * (1 + b.norm())


def assert_contract(problem, w, gradient, H, T, U, V, X, tol):
    k, m = U.shape[1], V.shape[1]
    i, j = torch.triu_indices(k, k)
    dense = torch.einsum("abc,bi,cj->ija", T, U, U)
    close(problem.value_and_grad(w)[1], gradient, tol)
    close(problem.value_and_grad(w)[0], problem.value(w), tol)
    close(problem.hvp(w, V), H @ V, tol)
    close(problem.hvp(w, V[:, 0]), H @ V[:, 0], tol)
    rows = problem.hessian_gradient(w, U)
    scale = svec(torch.ones(k, k, dtype=F64))
    close(rows, dense[i, j] * scale[:, None], tol)
    close(problem.hessian_gradient_of(w, U, X), torch.einsum("ija,ij->a", dense, X), tol)
    close(svec(X) @ rows, problem.hessian_gradient_of(w, U, X), tol)
    close(problem.hessian_derivative(w, U, V), torch.einsum("ija,am->mij", dense, V), tol)
    assert problem.hessian_derivative(w, U, V).shape == (m, k, k)


@few
@given(d=dims, k=st.integers(1, 4), m=st.integers(1, 4), seed=seeds)
def test_exact_derivatives_of_a_cubic(d, k, m, seed):
    cubic = Cubic(d, seed)
    w, U, V = normal(d, seed=seed), normal(d, k, seed=seed + 1), normal(d, m, seed=seed + 2)
    X = normal(k, k, seed=seed + 3)
    assert_contract(cubic.problem, w, cubic.gradient(w), cubic.hessian(w), cubic.T, U, V, X + X.T, 1e-12)


@few
@given(d=dims, k=st.integers(1, 4), seed=seeds)
def test_exact_derivatives_of_a_quadratic(d, k, seed):
    quadratic = Quadratic(range(1, d + 1), seed)
    w, U, X = normal(d, seed=seed), normal(d, k, seed=seed + 1), torch.eye(k, dtype=F64)
    gradient = quadratic.H @ (w - quadratic.minimum)
    assert_contract(quadratic.problem, w, gradient, quadratic.H, torch.zeros(d, d, d, dtype=F64), U, U, X, 1e-12)


@few
@given(d=dims, k=st.integers(1, 4), seed=seeds)
def test_finite_differences_of_a_cubic(d, k, seed):
    """On a cubic central differences have no truncation error: what is left is rounding, ε^½, times |w|.

    Products are one-sided, with an error of ε^½ as well.
    """
    cubic = Cubic(d, seed)
    problem = Problem(cubic.loss, cubic.problem.w0, derivatives="finite-difference")
    w, U = normal(d, seed=seed), normal(d, k, seed=seed + 1)
    X = normal(k, k, seed=seed + 3)
    assert_contract(problem, w, cubic.gradient(w), cubic.hessian(w), cubic.T, U, U, X + X.T, 3e-6)


def quartic(w):
    return (w.sin().sum() + 2) ** 2 + (w[0] * w[-1]).exp()


@pytest.mark.parametrize("options", [{}, {"max_directions": 2}, {"max_directions": 64}])
def test_autodiff_matches_dense_autodiff(options):
    w, U, V = normal(5), normal(5, 3, seed=1), normal(5, 2, seed=2)
    X = normal(3, 3, seed=3)
    H = torch.func.hessian(quartic)(w)
    T = torch.func.jacrev(torch.func.hessian(quartic))(w)
    problem = Problem(quartic, w, **options)
    assert_contract(problem, w, torch.func.grad(quartic)(w), H, T, U, V, X + X.T, 1e-12)


def test_a_sum_of_parts_is_their_sum():
    w, U = normal(5), normal(5, 3, seed=1)
    parts = Problem([quartic, torch.linalg.vector_norm, lambda w: w.sum()], w)
    whole = Problem(lambda w: quartic(w) + torch.linalg.vector_norm(w) + w.sum(), w)
    for a, b in zip(parts.value_and_grad(w), whole.value_and_grad(w), strict=True):
        close(a, b, 1e-13)
    close(parts.hvp(w, U), whole.hvp(w, U), 1e-13)
    close(parts.hessian_gradient(w, U), whole.hessian_gradient(w, U), 1e-13)
    close(parts.hessian_derivative(w, U, U[:, :1]), whole.hessian_derivative(w, U, U[:, :1]), 1e-13)


def test_hessian_gradient_of_takes_any_signature_and_only_the_symmetric_part():
    cubic = Cubic(5)
    problem, w, U = cubic.problem, cubic.problem.w0, normal(5, 3, seed=1)
    Q = torch.linalg.qr(normal(3, 3))[0]
    indefinite = Q @ torch.diag(torch.tensor([2.0, 0.0, -3.0], dtype=F64)) @ Q.T
    skew = normal(3, 3) - normal(3, 3).T
    before = problem.ledger.copy()
    result = problem.hessian_gradient_of(w, U, indefinite + skew)
    assert (problem.ledger - before).third_derivatives == 2  # as many as the rank
    close(result, torch.einsum("abc,bc->a", cubic.T, U @ indefinite @ U.T), 1e-12)
    assert torch.equal(problem.hessian_gradient_of(w, U, torch.zeros(3, 3, dtype=F64)), torch.zeros_like(w))


def test_empty_blocks():
    problem = Cubic(4).problem
    none = torch.zeros(4, 0, dtype=F64)
    assert problem.hvp(problem.w0, none).shape == (4, 0)
    assert problem.hessian_gradient(problem.w0, none).shape == (0, 4)
    assert problem.hessian_gradient_of(problem.w0, none, torch.zeros(0, 0, dtype=F64)).shape == (4,)
    assert problem.hessian_derivative(problem.w0, none, normal(4, 2)).shape == (2, 0, 0)


def test_dead_weights_have_zero_derivatives():
    problem = Problem(lambda w: w[:2].pow(3).sum(), normal(4))
    U = normal(4, 2, seed=1)
    assert torch.all(problem.value_and_grad(problem.w0)[1][2:] == 0)
    assert torch.all(problem.hvp(problem.w0, U)[2:] == 0)
    assert torch.all(problem.hessian_gradient(problem.w0, U)[:, 2:] == 0)


def test_new_weights_are_never_mistaken_for_the_last():
    """The graph kept for the same w must not outlive a change of it, even one that autograd cannot see."""
    for backend in ("autodiff", "mixed", "finite-difference"):
        problem = Problem(quartic, normal(5), derivatives=backend)
        w, u = normal(5), normal(5, 1, seed=1)
        problem.hvp(w, u), problem.hessian_gradient(w, u)
        w.data += 0.5
        fresh = Problem(quartic, normal(5), derivatives=backend)
        assert torch.equal(problem.hvp(w, u), fresh.hvp(w, u))
        assert torch.equal(problem.hessian_gradient(w, u), fresh.hessian_gradient(w, u))


@pytest.mark.parametrize(("dtype", "second", "third"), [(F64, 1e-7, 3e-7), (torch.float32, 1e-4, 2e-3)])
def test_finite_differences_of_a_network(dtype, second, third):
    """Differences balance rounding and truncation at ε^½ for one-sided H and for T, 1.5e-8 in float64.

    In float32 H is central, at ε^⅔ = 2e-5, and T at 3e-4.  The factors on top are higher derivatives of the network,
    along leading eigenvectors.
    """
    exact = digits(n=100)
    problem = digits(n=100, dtype=dtype, derivatives="finite-difference")
    U = normal(exact.dim, 3)
    for _ in range(20):
        U = torch.linalg.qr(exact.hvp(exact.w0, U))[0]
    w, V = exact.w0, 5 * U.to(dtype)  # directions of any length
    assert relative(problem.hvp(w.to(dtype), V), 5 * exact.hvp(w, U)) < second
    assert relative(problem.hessian_gradient(w.to(dtype), V), 25 * exact.hessian_gradient(w, U)) < third


def relative(a, b):
    return ((a.to(b) - b).norm() / b.norm()).item()


def test_results_carry_no_graph():
    problem = Cubic(4).problem
    w, U = problem.w0.clone().requires_grad_(), normal(4, 2).requires_grad_()
    X = torch.eye(2, dtype=F64)
    results = [
        *problem.value_and_grad(w),
        problem.value(w),
        problem.hvp(w, U),
        problem.hessian_gradient(w, U),
        problem.hessian_gradient_of(w, U, X),
        problem.hessian_derivative(w, U, U),
    ]
    assert not any(result.requires_grad for result in results)


def test_derivatives_inside_no_grad():
    problem = Cubic(4).problem
    with torch.no_grad():
        assert problem.value_and_grad(problem.w0)[1].norm() > 0
        assert problem.hessian_gradient(problem.w0 + 1, normal(4, 1)).norm() > 0


class Counted:
    """The quartic, and how often it was evaluated."""

    calls = 0

    def __call__(self, w):
        self.calls += 1
        return quartic(w)


class TestLedger:
    def test_counts_what_was_asked(self):
        problem = Cubic(6).problem
        w, U = problem.w0, normal(6, 3)
        problem.value(w), problem.value_and_grad(w), problem.hvp(w, U), problem.hvp(w, U[:, 0])
        problem.hessian_gradient(w, U)
        problem.hessian_derivative(w, U, U[:, :1])  # T[v, uᵢ]: 3, fewer than the 6 pairs
        problem.hessian_derivative(w, U, U)  # the pairs: 6
        expected = {"gradients": 1, "hvps": 4, "third_derivatives": 6 + 3 + 6, "values": 1}
        expected |= dict.fromkeys(("ccp_solves", "collectives", "collective_bytes"), 0)
        assert problem.ledger.counts == expected
        assert problem.ledger.gradient_equivalents == pytest.approx(1 + 4 * 2.5 + 15 * 9 + 1 / 3)

    def test_finite_differences_cost_gradients(self):
        loss = Counted()
        problem = Problem(loss, normal(5), derivatives="finite-difference")
        loss.calls = 0
        problem.hvp(problem.w0, normal(5, 2))
        problem.hessian_gradient(problem.w0, normal(5, 3))
        problem.hessian_gradient(problem.w0, normal(5, 1))
        assert problem.ledger.gradient_equivalents == loss.calls == 1 + 2 * 1 + 2 * 6 + 2
        loss.calls = 0
        w = problem.w0 + 1
        problem.value_and_grad(w)
        problem.hvp(w, normal(5, 2))  # the gradient at w is at hand
        assert loss.calls == 1 + 2

    def test_products_in_single_precision_are_central(self):
        loss = Counted()
        problem = Problem(loss, normal(5).float(), derivatives="finite-difference")
        loss.calls = 0
        problem.hvp(problem.w0, normal(5, 2).float())
        assert problem.ledger.gradient_equivalents == loss.calls == 2 * 2

    def test_a_gradient_that_was_changed_in_place_is_not_believed(self):
        problem = Problem(quartic, normal(5), derivatives="finite-difference")
        _, gradient = problem.value_and_grad(problem.w0)
        gradient.mul_(2)
        fresh = Problem(quartic, normal(5), derivatives="finite-difference")
        assert torch.equal(problem.hvp(problem.w0, normal(5, 2)), fresh.hvp(problem.w0, normal(5, 2)))

    def test_arithmetic_and_storage(self):
        ledger = Ledger(gradients=3, hvps=2, weights={"hvps": 2.0})
        before = ledger.copy()
        ledger.hvps += 5
        ledger.ccp_solves += 1
        assert before.hvps == 2
        assert (ledger - before).counts == {**Ledger().counts, "hvps": 5, "ccp_solves": 1}
        assert (ledger - before).gradient_equivalents == 10
        assert (before + before).gradients == 6
        assert Ledger.from_dict(ledger.to_dict()) == ledger
        ledger.reset()
        assert ledger == Ledger(weights={"hvps": 2.0})
        with pytest.raises(ValueError, match="no hessians to weigh"):
            Ledger(weights={"hessians": 1.0})

    def test_measured_weights_change_nothing_else(self):
        problem = digits(n=50, width=8)
        U = normal(problem.dim, 2)
        before = problem.hessian_gradient(problem.w0, U)
        counts = problem.ledger.counts
        weights = problem.measure_weights(repeats=3)
        assert problem.ledger.counts == counts
        assert weights["gradients"] == 1
        assert 0 < weights["values"] < weights["third_derivatives"]
        assert problem.measure_weights() == weights  # remembered
        assert torch.equal(problem.hessian_gradient(problem.w0, U), before)


class TestRefusals:
    @pytest.mark.parametrize(
        ("loss", "w0", "message"),
        [
            (lambda w: w, normal(3), "scalar tensor of shape"),
            (lambda w: w.sum().item(), normal(3), "scalar tensor .* gives a float"),
            (lambda w: w.sum() * math.nan, normal(3), "nan at w0: look for NaN"),
            (
                lambda w: w.float().sum(),
                normal(3),
                "computes in torch.float32 .* weights are torch.float64",
            ),
            (lambda w: w.detach().sum(), normal(3), "does not depend on w"),
            (lambda w: (w + torch.rand(3)).sum(), normal(3), "and then .* at the same w0"),
            (quartic, normal(3, 2), r"flat tensor \[d\]"),
            (quartic, [1.0, 2.0], "flat tensor .* got a list"),
            (quartic, torch.arange(3), "float32 or float64"),
            (quartic, normal(3).half(), "float32 or float64"),
            (quartic, normal(0), "empty"),
            ([], normal(3), "parts is empty"),
        ],
    )
    def test_bad_losses_and_weights(self, loss, w0, message):
        with pytest.raises(ProblemError, match=message):
            Problem(loss, w0)

    def test_bad_options(self):
        with pytest.raises(ProblemError, match='"autodiff", "mixed" or "finite-difference", not \'magic\''):
            Problem(quartic, normal(3), derivatives="magic")
        with pytest.raises(ProblemError, match="at least 1"):
            Problem(quartic, normal(3), max_directions=0)

    @pytest.mark.parametrize("w", [normal(4), normal(3).float(), normal(3, 1), torch.zeros(3, device="meta"), [0.0]])
    def test_weights_of_another_kind(self, w):
        problem = Problem(quartic, normal(3))
        U, X = normal(3, 1), torch.eye(1, dtype=F64)
        for call in (
            lambda: problem.value(w),
            lambda: problem.value_and_grad(w),
            lambda: problem.hvp(w, U),
            lambda: problem.hessian_gradient(w, U),
            lambda: problem.hessian_gradient_of(w, U, X),
            lambda: problem.hessian_derivative(w, U, U),
            lambda: problem.check(w),
        ):
            with pytest.raises(ProblemError, match="w is a tensor"):
                call()

    @pytest.mark.parametrize("U", [normal(4, 1), normal(3, 1, 1), normal(3, 2).float(), [1.0]])
    def test_blocks_of_another_kind(self, U):
        problem = Problem(quartic, normal(3))
        w, V = problem.w0, normal(3, 1)
        for call in (
            lambda: problem.hvp(w, U),
            lambda: problem.hessian_gradient(w, U),
            lambda: problem.hessian_derivative(w, U, V),
            lambda: problem.hessian_derivative(w, V, U),
        ):
            with pytest.raises(ProblemError, match=r"[UV] is"):
                call()

    def test_bad_X(self):
        problem = Problem(quartic, normal(3))
        with pytest.raises(ProblemError, match=r"X is \[k, k\] with k = 2"):
            problem.hessian_gradient_of(problem.w0, normal(3, 2), torch.eye(3))
        with pytest.raises(ProblemError, match="not finite"):
            problem.hessian_gradient_of(problem.w0, normal(3, 1), torch.full((1, 1), math.nan))

    def test_loss_that_overflows_later(self):
        problem = Problem(lambda w: w.exp().sum(), torch.zeros(2, dtype=F64))
        with pytest.raises(ProblemError, match=r"loss of .* is inf at these weights"):
            problem.value_and_grad(torch.full((2,), 1e4, dtype=F64))

    def test_derivative_that_is_not_finite(self):
        problem = Problem(lambda w: w.abs().pow(1.5).sum(), torch.ones(2, dtype=F64))
        with pytest.raises(DerivativeError, match=r"Hessian-vector product .* not finite"):
            problem.hvp(torch.zeros(2, dtype=F64), torch.ones(2, 1, dtype=F64))

    def test_operation_without_double_backward(self):
        points = normal(4, 3)
        loss = lambda w: torch.cdist(w.view(4, 3), points).sum()  # noqa: E731
        problem = Problem(loss, normal(12, seed=1))
        with pytest.raises(DerivativeError, match=r'second derivative .*cdist(.|\n)*"finite-difference"'):
            problem.hvp(problem.w0, normal(12, 1))
        differences = Problem(loss, problem.w0, derivatives="finite-difference")
        assert differences.hessian_gradient(problem.w0, normal(12, 1)).norm() > 0

    def test_what_only_a_module_has(self):
        problem = Problem(quartic, normal(3))
        for call in (
            lambda: problem.outputs(problem.w0, None),
            lambda: problem.output_curvature(problem.w0, None, normal(3, 1), torch.eye(1)),
            lambda: problem.load_into(torch.nn.Linear(1, 1), problem.w0),
        ):
            with pytest.raises(ProblemError, match="not made from a module"):
                call()


def test_names_and_sizes():
    problem = Problem(quartic, normal(3).float())
    assert (problem.name, problem.dim, problem.dtype, problem.device.type) == ("quartic", 3, torch.float32, "cpu")
    assert Problem(quartic, normal(3), name="mine").name == "mine"
    assert "quartic" in repr(problem)


def test_initial_weights_are_a_copy():
    w0 = normal(3)
    problem = Problem(quartic, w0)
    w0 += 1
    assert not torch.equal(problem.w0, w0)


@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_differences_know_how_far_off_they_are(dtype):
    """What a doubled step changes is the truncation error, at least; with rounding it is right to an order or so."""
    exact = digits(n=100)
    assert exact.uncertainty() == {}
    w = exact.w0
    u = exact.value_and_grad(w)[1][:, None]
    found = digits(n=100, dtype=dtype, derivatives="finite-difference")
    before = found.ledger.counts
    errors = found.uncertainty()
    assert found.ledger.counts == before
    off = {
        "hvps": relative(found.hvp(w.to(dtype), u.to(dtype)), exact.hvp(w, u)),
        "third_derivatives": relative(found.hessian_gradient(w.to(dtype), u.to(dtype)), exact.hessian_gradient(w, u)),
    }
    for kind, error in off.items():
        assert error / 20 < errors[kind] < 20 * error, kind
    mixed = digits(n=100, dtype=dtype, derivatives="mixed").uncertainty()
    assert list(mixed) == ["third_derivatives"]


def test_a_run_tells_how_good_its_differences_are():
    from dvi import central_flow
    from dvi.methods import GradientDescent

    problem = digits(n=60, width=8, derivatives="finite-difference")
    (note,) = [note for note in central_flow(problem, GradientDescent(0.1)).notes if "by differences" in note]
    assert "products with H to" in note
    assert "third derivatives to" in note
