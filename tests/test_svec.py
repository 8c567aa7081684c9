import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dvi.solvers.svec import dimension, order, outer, skron, smat, svec, triu

EPS = np.finfo(np.float64).eps

sizes = st.integers(0, 9)
seeds = st.integers(0, 2**32 - 1)


def symmetric(rng, *shape):
    M = rng.normal(size=shape)
    return M + np.swapaxes(M, -1, -2)


def test_order_is_the_upper_triangle_row_by_row():
    M = np.array([[1.0, 2.0, 3.0], [2.0, 4.0, 5.0], [3.0, 5.0, 6.0]])
    r = np.sqrt(2.0)
    expected = [1.0, 2.0 * r, 3.0 * r, 4.0, 5.0 * r, 6.0]
    # one multiplication by the rounded √2
    np.testing.assert_allclose(svec(M), expected, rtol=2 * EPS)
    np.testing.assert_allclose(smat(np.array(expected)), M, rtol=4 * EPS)


@given(sizes, seeds)
def test_isometry_and_inverse(k, seed):
    rng = np.random.default_rng(seed)
    A, B = symmetric(rng, k, k), symmetric(rng, k, k)
    assert svec(A).shape == (dimension(k),)
    # √2 · √½ is 1 up to rounding
    np.testing.assert_allclose(smat(svec(A)), A, rtol=4 * EPS)
    # sums of n products of numbers of size |A|, |B|
    assert abs(svec(A) @ svec(B) - np.sum(A * B)) <= 100 * EPS * (np.linalg.norm(A) * np.linalg.norm(B) + 1)
    v = rng.normal(size=dimension(k))
    np.testing.assert_allclose(svec(smat(v)), v, rtol=4 * EPS)
    assert np.array_equal(smat(v), smat(v).T)


@given(sizes, seeds)
def test_the_methods_without_checks_are_the_same_maps(k, seed):
    rng = np.random.default_rng(seed)
    M, v = symmetric(rng, k, k), rng.normal(size=dimension(k))
    for matrix in (M, np.asfortranarray(M), M.T[::-1, ::-1]):
        assert np.array_equal(triu(k).vector(matrix), svec(matrix))
    assert np.array_equal(triu(k).matrix(v), smat(v))


@given(sizes, seeds)
def test_skron_is_the_congruence(k, seed):
    rng = np.random.default_rng(seed)
    G, H, M = rng.normal(size=(k, k)), rng.normal(size=(k, k)), symmetric(rng, k, k)
    # two sums of k products each
    size = 100 * EPS * (np.linalg.norm(G) ** 2 + 1)
    assert np.abs(skron(G) @ svec(M) - svec(G @ M @ G.T)).max(initial=0) <= size * np.linalg.norm(M)
    assert np.abs(skron(G).T - skron(G.T)).max(initial=0) <= size
    assert np.abs(skron(G @ H) - skron(G) @ skron(H)).max(initial=0) <= size * (np.linalg.norm(H) ** 2 + 1)
    wide = rng.normal(size=(2, k))
    assert np.abs(skron(wide) @ svec(M) - svec(wide @ M @ wide.T)).max() <= size * (np.linalg.norm(wide) ** 2 + 1) * (
        np.linalg.norm(M) + 1
    )
    Q = np.linalg.qr(G)[0] if k else G
    assert np.abs(skron(Q).T @ skron(Q) - np.eye(dimension(k))).max(initial=0) <= 1e-13


@given(st.integers(0, 400))
def test_order_inverts_dimension(k):
    assert dimension(k) == len(np.triu_indices(k)[0])
    assert order(dimension(k)) == k


@pytest.mark.parametrize("n", [-1, -2, 2, 4, 5, 7, 9, 11, 10**9])
def test_other_lengths_are_refused(n):
    with pytest.raises(ValueError, match="svec of length"):
        order(n)


def test_other_shapes_are_refused():
    with pytest.raises(ValueError, match="square"):
        svec(np.zeros((2, 3)))
    with pytest.raises(ValueError, match="square"):
        svec(np.zeros(3))
    with pytest.raises(ValueError, match="length 4"):
        smat(np.zeros(4))
    with pytest.raises(ValueError, match="scalar"):
        smat(np.array(1.0))


@given(sizes, seeds, st.sampled_from([(), (1,), (3,), (2, 4), (0,)]))
@settings(deadline=None)  # the first call of torch is slow
def test_tensors_and_batches_agree_with_numpy(k, seed, batch):
    M = symmetric(np.random.default_rng(seed), *batch, k, k)
    v = svec(M)
    assert v.shape == (*batch, dimension(k))
    for index in np.ndindex(*batch):
        assert np.array_equal(v[index], svec(M[index]))
        assert np.array_equal(smat(v)[index], smat(v[index]))
    tensor = svec(torch.from_numpy(M))
    assert isinstance(tensor, torch.Tensor)
    # the same products in the same order
    assert np.array_equal(tensor.numpy(), v)
    assert np.array_equal(smat(tensor).numpy(), smat(v))


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_precision_is_kept(kind):
    M = np.eye(3, dtype=kind)
    assert svec(M).dtype == kind
    assert smat(svec(M)).dtype == kind
    tensor = torch.from_numpy(M)
    assert svec(tensor).dtype == tensor.dtype
    assert smat(svec(tensor)).dtype == tensor.dtype


def test_device_is_that_of_the_argument():
    M = torch.eye(3, device="cpu")
    torch.set_default_device("meta")  # a factory that forgets the device would fail
    try:
        v = svec(M)
        assert v.device.type == "cpu"
        assert smat(v).device.type == "cpu"
    finally:
        torch.set_default_device(None)
    assert svec(torch.empty(3, 3, device="meta")).device.type == "meta"


def test_tensors_are_differentiable():
    M = torch.randn(2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(lambda M: smat(svec(M)), (M,))


def test_shared_indices_cannot_be_overwritten():
    index = triu(3)
    assert index is triu(3)
    with pytest.raises(ValueError, match="read-only"):
        index.weight[0] = 2.0


@given(seeds, st.integers(1, 6), st.integers(1, 6))
def test_outer_gives_the_quadratic_forms_of_columns(seed, k, m):
    rng = np.random.default_rng(seed)
    Q, A = rng.normal(size=(k, m)), symmetric(rng, k, k)
    found = outer(Q)
    assert found.shape == (m, dimension(k))
    forms = np.einsum("ij,ik,kj->j", Q, A, Q)
    np.testing.assert_allclose(found @ svec(A), forms, atol=1e3 * EPS * (1 + np.abs(A).max() * np.square(Q).sum()))
