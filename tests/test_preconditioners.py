"""Matrix preconditioners against dense algebra; their derivatives where eigenvalues repeat; what is refused."""

import numpy as np
import pytest
import torch
from conftest import CubicLoss, examples, orthogonal
from hypothesis import given
from hypothesis import strategies as st
from mpmath import mp, mpf
from scipy.linalg import block_diag, fractional_matrix_power
from torch.func import jacfwd, jacrev, jvp, vmap

import dvi
import dvi.testing
from dvi.methods.preconditioners.powers import Factor, divided_difference
from dvi.solvers.svec import smat, svec

EPS = np.finfo(np.float64).eps
seeds = st.integers(0, 2**32 - 1)


def spd(rng, n, spectrum=None):
    """A symmetric positive definite matrix: eigenvalues over four orders of magnitude, or as given."""
    values = 10 ** rng.uniform(-2, 2, n) if spectrum is None else np.asarray(spectrum)
    Q = orthogonal(rng, n)
    A = (Q * values) @ Q.T
    return torch.tensor(0.5 * (A + A.T))


def power(A, p):
    """A^p by the spectral theorem, as scipy's eigh has it."""
    values, Q = np.linalg.eigh(A.numpy())
    return (Q * values**p) @ Q.T


KINDS = {
    "one factor": lambda rng: (lambda L: (dvi.Kronecker([L], 0.5), power(L, 0.5)))(spd(rng, 4)),
    "two factors": lambda rng: (lambda L, R: (dvi.Kronecker([L, R], 0.25), np.kron(power(L, 0.25), power(R, 0.25))))(
        spd(rng, 3), spd(rng, 4)
    ),
    "two powers": lambda rng: (lambda L, R: (dvi.Kronecker([L, R], [0.3, -1.0]), np.kron(power(L, 0.3), power(R, -1))))(
        spd(rng, 2), spd(rng, 3)
    ),
    "one-sided, left": lambda rng: (lambda L: (dvi.Kronecker([L, 4], 0.5), np.kron(power(L, 0.5), np.eye(4))))(
        spd(rng, 3)
    ),
    "one-sided, right": lambda rng: (lambda R: (dvi.Kronecker([3, R]), np.kron(np.eye(3), R.numpy())))(spd(rng, 2)),
    "three factors": lambda rng: (
        lambda A, B, C: (
            dvi.Kronecker([A, B, C], 1 / 6),
            np.kron(power(A, 1 / 6), np.kron(power(B, 1 / 6), power(C, 1 / 6))),
        )
    )(spd(rng, 2), spd(rng, 3), spd(rng, 2)),
    "unit": lambda rng: (dvi.Kronecker([2, 3]), np.eye(6)),
    "dense": lambda rng: (lambda A: (dvi.Dense(A), A.numpy()))(spd(rng, 5)),
    "dense root": lambda rng: (lambda A: (dvi.Dense(A, 0.5), power(A, 0.5)))(spd(rng, 5)),
    "over lr": lambda rng: (lambda A: (dvi.Dense(A) / 0.01, A.numpy() / 0.01))(spd(rng, 5)),
    "blocks": lambda rng: (
        lambda L, R, p, A: (
            dvi.Blocks(
                [dvi.Kronecker([L, R], 0.25), dvi.Diagonal(p), dvi.Scalar(2.0), dvi.Dense(A) / 3.0], [6, 3, 2, 4]
            ),
            block_diag(np.kron(power(L, 0.25), power(R, 0.25)), np.diag(p), 2 * np.eye(2), A.numpy() / 3),
        )
    )(spd(rng, 2), spd(rng, 3), torch.tensor(rng.uniform(0.1, 3, 3)), spd(rng, 4)),
    "blocks that are scattered": lambda rng: (
        lambda A, p, order: (
            dvi.Blocks([dvi.Dense(A), dvi.Diagonal(p)], [4, 3], torch.tensor(order)),
            block_diag(A.numpy(), np.diag(p))[np.ix_(np.argsort(order), np.argsort(order))],
        )
    )(spd(rng, 4), torch.tensor(rng.uniform(0.1, 3, 3)), rng.permutation(7)),
}


@pytest.mark.parametrize("kind", KINDS)
@given(seed=seeds, k=st.integers(0, 3))
@examples(5)
def test_algebra_is_that_of_the_dense_matrix(kind, seed, k):
    rng = np.random.default_rng(seed)
    P, dense = KINDS[kind](rng)
    V = torch.tensor(rng.normal(size=(len(dense), k)))
    # an eigenvalue is known to eps times the largest of its factor, 10⁴ above the smallest at most
    room = 1e5 * EPS

    def same(actual, expected):
        np.testing.assert_allclose(
            actual.numpy(), expected, rtol=0, atol=room * max(1e-300, np.abs(expected).max(initial=0))
        )

    same(P.apply(V), dense @ V.numpy())
    same(P.solve(V), np.linalg.solve(dense, V.numpy()))
    dvi.testing.check_preconditioner(P, len(dense))
    P.check(torch.ones(len(dense), dtype=torch.float64))
    assert P.dead() is None or not P.dead().any()
    assert "(" in repr(P)


def test_a_product_acts_on_the_flattened_tensor_row_by_row():
    rng = np.random.default_rng(0)
    L, R, W = spd(rng, 2), spd(rng, 3), torch.tensor(rng.normal(size=(2, 3)))
    assert torch.allclose(dvi.Kronecker([L, R]).apply(W.reshape(-1)).reshape(2, 3), L @ W @ R, rtol=1e-13)


# ---- derivatives ----------------------------------------------------------------------------------------------------

SPECTRA = {
    "apart": [0.01, 0.3, 1.0, 7.0],
    "repeated": [0.5, 0.5, 2.0, 2.0],
    "all equal": [3.0, 3.0, 3.0, 3.0],
    "nearly equal": [1.0, 1.0 + 1e-9, 1.0 + 1e-6, 1.001],
    "small and repeated": [1e-6, 1e-6, 1.0, 1.0],
}
POWERS = [0.25, 0.5, 1.0, 1 / 6, -0.25, -0.5, -1.0, 2.0]


def reference(A, E, p):
    """d A^p[E] by central differences with 80 digits: a step of 1e-20 leaves 1e-40, however eigenvalues lie."""
    with mp.workdps(80):
        A, E, h = mp.matrix(A.tolist()), mp.matrix(E.tolist()), mp.mpf(10) ** -20

        def power(M):
            values, Q = mp.eigsy(M)
            return Q * mp.diag([x**p for x in values]) * Q.T

        rate = (power(A + h * E) - power(A - h * E)) / (2 * h)
        return np.array(rate.tolist(), dtype=float)


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("p", POWERS)
def test_the_derivative_of_a_power_is_right_where_eigenvalues_repeat(name, p):
    rng = np.random.default_rng(5)
    A = spd(rng, 4, SPECTRA[name])
    E = torch.tensor(rng.normal(size=(3, 4, 4)))
    E = E + E.mT

    def f(A):
        return Factor(A).power(p)

    value, rate = jvp(f, (A,), (E[0],))
    np.testing.assert_allclose(value.numpy(), power(A, p), rtol=0, atol=1e-9 * np.abs(power(A, p)).max())
    expected = reference(A, E[0], p)
    # an eigenvalue is known to eps |A|: 1e-10 relative for the smallest, 1e-6
    np.testing.assert_allclose(rate.numpy(), expected, rtol=0, atol=1e-9 * np.abs(expected).max())
    # and under every transform that a flow or a user may put around it
    batched = vmap(lambda e: jvp(f, (A,), (e,))[1])(E)
    for e, row in zip(E, batched, strict=True):
        assert torch.allclose(row, jvp(f, (A,), (e,))[1], rtol=1e-12, atol=1e-12 * float(batched.abs().max()))
    both = torch.stack([A, A + torch.eye(4, dtype=A.dtype)])
    nested = vmap(lambda a: vmap(lambda e: jvp(f, (a,), (e,))[1])(E))(both)
    assert torch.allclose(nested[0], batched, rtol=1e-10, atol=1e-10 * float(batched.abs().max()))
    forwards, backwards = jacfwd(f)(A), jacrev(f)(A)
    assert torch.allclose(forwards, backwards, rtol=1e-9, atol=1e-9 * float(forwards.abs().max()))


@given(st.floats(1e-8, 1e8), st.floats(-16, 8), st.sampled_from([0.25, 0.5, -0.25, -1.0, 1 / 6, 1.0, 2.0]))
def test_divided_differences_do_not_cancel(x, log_gap, p):
    y = x * (1 + 10.0**log_gap)
    with mp.workdps(80):
        exact = (mpf(y) ** mpf(p) - mpf(x) ** mpf(p)) / (mpf(y) - mpf(x)) if y != x else p * mpf(x) ** (mpf(p) - 1)
    for a, b in ((x, y), (y, x)):
        found = float(divided_difference(*torch.tensor([a, b], dtype=torch.float64), p))
        # a few roundings, and log(1+r) up to 40 as the argument of an exponential
        assert found == pytest.approx(float(exact), rel=200 * EPS)


def test_differentiating_a_power_twice_is_refused_in_words():
    A, E = torch.eye(2, dtype=torch.float64), torch.ones(2, 2, dtype=torch.float64)

    def rate(A):
        return jvp(lambda A: Factor(A).power(0.5), (A,), (E,))[1]

    with pytest.raises(NotImplementedError, match="second derivative of a matrix power"):
        jvp(rate, (A,), (E,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_follows_the_factor(dtype):
    A = torch.eye(3, dtype=dtype) * 2
    P = dvi.Blocks([dvi.Kronecker([A, A], 0.25) / 0.1, dvi.Scalar(1.0), dvi.Dense(A, 0.5)], [9, 1, 3])
    V = torch.ones(13, 2, dtype=dtype)
    for operation in (P.apply, P.solve, P.sqrt, P.inv_sqrt):
        assert operation(V).dtype == dtype
    assert P.effective_lr().dtype == dtype
    _, rate = jvp(lambda A: dvi.Dense(A, 0.5).apply(V[:3]), (A,), (torch.ones_like(A),))
    assert rate.dtype == dtype


# ---- a spec made of them, compiled ----------------------------------------------------------------------------------


class Matrices(dvi.Method):
    """A made-up optimizer with matrix state: a Kronecker, a dense and a diagonal block, f with and without memory."""

    lr: float = 0.3

    def init(self, w):
        return {"L": torch.eye(2).to(w), "R": torch.eye(3).to(w), "A": 2 * torch.eye(2).to(w), "s": w.new_ones(2)}

    def f(self, nu, g):
        G, a, s = g[:6].reshape(2, 3), g[6:8], g[8:]
        return {
            "L": 0.2 * (G @ G.T - nu["L"]) + 0.01 * torch.trace(nu["R"]) * nu["L"],
            "R": 0.3 * (G.T @ G - nu["R"]),
            "A": torch.outer(a, a),
            "s": 0.1 * (torch.sin(s) ** 2 - nu["s"]),
        }

    def P(self, nu):
        parts = [dvi.Kronecker([nu["L"], nu["R"]], 0.25), dvi.Dense(nu["A"], 0.5), dvi.Diagonal(1 + nu["s"] ** 2)]
        return dvi.Blocks(parts, [6, 2, 2]) / self.lr


STATES = {
    "apart": lambda rng, n: spd(rng, n, rng.uniform(0.5, 3, n)),
    "repeated": lambda rng, n: spd(rng, n, [1.5] * n),
}


@pytest.mark.parametrize("state", STATES)
@given(seed=seeds, k=st.integers(1, 3))
@examples(8)
def test_alpha_and_beta_are_the_rates_of_the_gap(state, seed, k):
    rng = np.random.default_rng(seed)
    cubic, w = CubicLoss.random(rng, 10), rng.normal(size=10)
    method = Matrices()
    nu = {name: STATES[state](rng, n) for name, n in (("L", 2), ("R", 3), ("A", 2))}
    nu["s"] = torch.tensor(rng.uniform(0.1, 1, 2))
    flow = dvi.central_flow(cubic.problem(w), method, check=False)
    assert not flow.calculus.elementwise  # L and R are coupled
    U, X = rng.normal(size=(10, k)), rng.normal(size=(k, k))
    X = X + X.T
    lin = flow.linearise(torch.tensor(w), nu, torch.tensor(U))
    rate = lin.drift(X)

    def gap(s):
        moved = {name: x + s * rate.nu[name] for name, x in nu.items()}
        PU = method.P(moved).apply(torch.tensor(U)).numpy()
        return U.T @ (2 * PU - cubic.hessian(w + s * rate.w.numpy()) @ U)

    np.testing.assert_allclose(lin.gap.numpy(), gap(0.0), rtol=0, atol=1e-11 * np.abs(gap(0.0)).max())
    # five points, as in tests/test_compile.py: truncation s⁴ G⁽⁵⁾/30 with the rates scaled out, rounding eps |G|/s
    speed = 1 + float(rate.w.norm()) + sum(float(x.norm()) for x in rate.nu.values())
    s = 1e-3 / speed
    slope = (8 * (gap(s) - gap(-s)) - (gap(2 * s) - gap(-2 * s))) / (12 * s)
    size = np.abs(gap(0.0)).max() + np.linalg.norm(U) ** 2 * (np.abs(cubic.A).max() + 1)
    tolerance = 1e-8 * np.abs(slope).max() + 30 * EPS * size / s
    assert tolerance < 1e-4 * np.abs(slope).max()  # else this shows nothing
    predicted = smat(lin.beta.numpy() @ svec(X)) - lin.alpha.numpy()
    assert np.abs(slope - predicted).max() <= tolerance


# ---- what is refused ------------------------------------------------------------------------------------------------

two = torch.eye(2, dtype=torch.float64)
REFUSED = {
    "a vector": (lambda: dvi.Kronecker([torch.ones(2)]), "square matrices"),
    "not square": (lambda: dvi.Dense(torch.ones(2, 3)), "square matrices"),
    "no factors": (lambda: dvi.Kronecker([]), "one power for each factor"),
    "powers": (lambda: dvi.Kronecker([two, two], [0.5]), "1 for 2 factors"),
    "sizes": (lambda: dvi.Blocks([dvi.Scalar(1.0)], [1, 2]), "2 sizes for 1 parts"),
    "indefinite": (lambda: dvi.Dense(torch.diag(torch.tensor([1.0, -1.0]))).check(), "eigenvalues reach from -1"),
    "singular": (lambda: dvi.Kronecker([two, torch.ones(2, 2)]).check(), "factor 2 .* eps > 0"),
    "not symmetric": (lambda: dvi.Dense(two + torch.tensor([[0.0, 0.1], [0, 0]])).check(), "not symmetric"),
    "not finite": (lambda: dvi.Dense(two / 0).check(), "not finite"),
    "too short": (lambda: dvi.Kronecker([two, two]).check(torch.ones(5)), "2×2 = 4 weights, not on 5"),
    "blocks too short": (lambda: dvi.Blocks([dvi.Scalar(1.0)], [4]).check(torch.ones(5)), "cannot act on 5"),
    "a block": (
        lambda: dvi.Blocks([dvi.Scalar(1.0), dvi.Dense(-two)], [2, 2]).check(),
        r"Block 2 of 2 \(2 weights\).*positive definite",
    ),
    "a negative rate": (lambda: (dvi.Dense(two) / -0.1).check(), "not positive definite"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_preconditioner(name):
    make, words = REFUSED[name]
    with pytest.raises(dvi.NotPositiveDefiniteError, match=words):
        make()


def test_dead_weights_in_a_block():
    """A layer that nothing reaches has P = 0 and no gradient: it stays, and the others move."""
    P = dvi.Blocks([dvi.Diagonal(torch.zeros(2)), dvi.Diagonal(torch.tensor([0.0, 4.0])), dvi.Scalar(2.0)], [2, 2, 1])
    g = torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0])
    P.check(g)
    assert P.dead().tolist() == [True, True, True, False, False]
    assert P.solve(g).tolist() == [0.0, 0.0, 0.0, 0.25, 0.5]
    assert float(P.effective_lr()) == pytest.approx(2 / 6)
    with pytest.raises(dvi.NotPositiveDefiniteError, match="Block 1"):
        P.check(torch.ones(5))


def test_the_root_of_scipy_agrees():
    A = spd(np.random.default_rng(1), 5)
    np.testing.assert_allclose(Factor(A).power(-0.25).numpy(), fractional_matrix_power(A.numpy(), -0.25), rtol=1e-10)
