"""Arithmetic with long vectors against numpy in float64, whatever their dtype, length and layout."""

import numpy as np
import pytest
import torch
from conftest import examples
from hypothesis import given
from hypothesis import strategies as st

from dvi.solvers.eigen.linalg import beside, combined, gram, orthonormal_against, upright

seeds = st.integers(0, 2**32 - 1)
dtypes = st.sampled_from([torch.float32, torch.float64])
lengths = st.sampled_from([1, 7, 100, 2**14 - 1, 2**14, 2**14 + 1, 40_000])


def block(rng, d, m, dtype, layout):
    V = torch.from_numpy(rng.normal(size=(d, m))).to(dtype)
    return {"rows": V, "columns": upright(V), "a part": beside(V, V)[:, m:]}[layout]


layouts = st.sampled_from(["rows", "columns", "a part"])


def dense(*blocks):
    return np.concatenate([b.double().numpy() for b in blocks], axis=1)


@given(seeds, lengths, st.lists(st.integers(1, 4), min_size=1, max_size=3), dtypes, layouts)
@examples(40)
def test_gram_matrices_are_summed_in_float64(seed, d, sizes, dtype, layout):
    rng = np.random.default_rng(seed)
    S = [block(rng, d, m, dtype, layout) for m in sizes]
    T = [block(rng, d, m, dtype, layout) for m in reversed(sizes)]
    expected = dense(*S).T @ dense(*S, *T)
    # the entries are exact in float64; two orders of summation of d products, whose sizes sum up to |S||T|
    size = 4 * np.finfo(np.float64).eps * np.sqrt(d) * np.linalg.norm(dense(*S)) * np.linalg.norm(dense(*S, *T))
    for found, reference in ((gram(S, T), expected), (gram(S), expected[:, : sum(sizes)])):
        assert found.dtype == np.float64
        assert found.shape == reference.shape
        assert np.abs(found - reference).max() <= size


@given(seeds, lengths, st.lists(st.integers(1, 4), min_size=1, max_size=3), st.integers(0, 4), dtypes, layouts)
@examples(40)
def test_combinations_are_those_of_the_blocks_side_by_side(seed, d, sizes, n, dtype, layout):
    rng = np.random.default_rng(seed)
    S = [block(rng, d, m, dtype, layout) for m in sizes]
    C, onto = rng.normal(size=(sum(sizes), n)), block(rng, d, n, dtype, "columns")
    for found, reference in ((combined(S, C), 0), (combined(S, C, onto=onto), onto.double().numpy())):
        assert found.dtype == dtype
        assert found.shape == (d, n)
        assert found.T.is_contiguous()  # upright
        # C is rounded once, and every sum of at most 13 terms
        size = 16 * torch.finfo(dtype).eps * (np.abs(dense(*S)) @ np.abs(C) + np.abs(reference))
        assert (np.abs(found.double().numpy() - (dense(*S) @ C + reference)) <= size).all()


def test_upright_blocks_are_not_copied():
    V = torch.arange(12.0, device="cpu").reshape(4, 3)
    tall_one = upright(V)
    assert torch.equal(tall_one, V)
    assert tall_one.T.is_contiguous()
    assert upright(tall_one).data_ptr() == tall_one.data_ptr()


def check_basis(W, Q, X, dtype, weak):
    """Q is orthonormal and orthogonal to X, and with X it spans W."""
    n, eps = W.shape[1], torch.finfo(dtype).eps
    known = [] if X is None else [X]
    # the factors are rounded to the dtype, entry by entry; the second round starts from a basis
    assert np.abs(gram([Q], known) - np.eye(n, n + sum(x.shape[1] for x in known))).max() <= 10 * n * eps
    rest = dense(W) - dense(Q, *known) @ (dense(Q, *known).T @ dense(W))
    # a column of W is a combination of Q and X up to rounding at its own size
    assert (np.linalg.norm(rest, axis=0) <= 100 * weak * eps * np.linalg.norm(dense(W), axis=0)).all()


@given(seeds, st.sampled_from([20, 500, 20_000]), st.integers(1, 5), st.integers(0, 5), dtypes, layouts)
@examples(60)
def test_a_basis_orthogonal_to_another(seed, d, n, m, dtype, layout):
    rng = np.random.default_rng(seed)
    X = upright(torch.linalg.qr(block(rng, d, m, torch.float64, "rows"))[0]) if m else None
    X = orthonormal_against(X.to(dtype), None) if m else None
    W = block(rng, d, n, dtype, layout) * torch.tensor(10.0 ** rng.uniform(-6, 6, n), dtype=dtype)
    check_basis(W, orthonormal_against(W, X), X, dtype, weak=1)


@given(seeds, st.sampled_from([200, 20_000]), st.floats(-12, -1), dtypes)
@examples(40)
def test_nearly_dependent_columns_are_no_trouble(seed, d, exponent, dtype):
    """Where the Gram matrix cannot resolve them, reflections do."""
    rng = np.random.default_rng(seed)
    X = orthonormal_against(block(rng, d, 3, dtype, "rows"), None)
    a, b, c = block(rng, d, 3, dtype, "rows").unbind(1)
    near, inside = a + 10**exponent * b, X[:, 1] + 10**exponent * c
    W = torch.stack([a, near, inside, b], dim=1)
    check_basis(W, orthonormal_against(W, X), X, dtype, weak=10)


def test_a_basis_in_single_precision_is_orthonormal_where_reflections_are_not():
    """A million entries summed in float32 lose half of the digits."""
    W = torch.randn(1_000_000, 3, dtype=torch.float32, generator=torch.Generator().manual_seed(0), device="cpu")
    eps = torch.finfo(torch.float32).eps
    assert np.abs(gram([orthonormal_against(W, None)]) - np.eye(3)).max() <= 10 * eps
    assert np.abs(gram([torch.linalg.qr(W)[0]]) - np.eye(3)).max() > 20 * eps  # measured: 5e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_block_is_converted_as_a_whole(dtype, monkeypatch):
    """The buffer holds a piece of each vector; longer vectors need no more memory."""
    made, empty = [], torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **kw: made.append(shape) or empty(*shape, **kw))
    for d in (2**16, 2**17):
        S = torch.ones(d, 2, dtype=dtype, device="cpu")
        gram([S], [S])
    short, long = made
    assert short == long
    assert np.prod(short) <= S.numel() / 2


def test_device_is_that_of_the_blocks():
    V = torch.ones(5, 2, device="cpu")
    torch.set_default_device("meta")  # a factory that forgets the device would fail
    try:
        assert (gram([V]) == 5).all()
        assert combined([V], np.ones((2, 1))).device.type == "cpu"
        assert orthonormal_against(V[:, :1], None).device.type == "cpu"
    finally:
        torch.set_default_device(None)
