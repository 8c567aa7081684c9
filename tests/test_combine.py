"""Linear combinations of states: of any pytree, exact to rounding, and nothing that was given is changed."""

from collections import OrderedDict, namedtuple

import numpy as np
import torch
from conftest import examples
from hypothesis import given
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

from dvi.solvers.protocol import combine

Moments = namedtuple("Moments", ["first", "second"])


def tree(seed):
    g = torch.Generator().manual_seed(seed)

    def draw(*shape, dtype=torch.float64):
        return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)

    return {
        "w": draw(4),
        "nu": {"plain": draw(3, 2), "pair": (draw(), draw(1)), "none": {}, "list": [draw(2)]},
        "named": Moments(draw(2), OrderedDict(a=draw(2), b=draw(1))),
        "single": draw(3, dtype=torch.float32),
        "t": float(draw()),
        "z": draw(3).numpy(),
    }


@given(st.lists(st.floats(-3.0, 3.0), min_size=1, max_size=6), st.integers(0, 1000))
@examples(30)
def test_combinations_of_pytrees(coefficients, seed):
    trees = [tree(seed + i) for i in range(len(coefficients))]
    found = combine(list(zip(coefficients, trees, strict=True)))
    assert pytree.tree_structure(found) == pytree.tree_structure(trees[0])
    leaves = [pytree.tree_leaves(x) for x in trees]
    for i, leaf in enumerate(pytree.tree_leaves(found)):
        assert type(leaf) is type(leaves[0][i])
        assert getattr(leaf, "dtype", None) == getattr(leaves[0][i], "dtype", None)
        terms = np.array([c * np.asarray(x[i], dtype=np.float64) for c, x in zip(coefficients, leaves, strict=True)])
        info = np.finfo(np.asarray(leaf).dtype)  # a rounding of the product and of the sum for each, and underflow
        bound = 2 * len(terms) * (info.eps * np.abs(terms).sum(axis=0) + info.tiny)
        assert (np.abs(np.asarray(leaf) - terms.sum(axis=0)) <= bound).all()
    for i, given_tree in enumerate(trees):
        again = pytree.tree_leaves(tree(seed + i))
        assert all(np.array_equal(a, b) for a, b in zip(pytree.tree_leaves(given_tree), again, strict=True))


def test_a_wider_dtype_is_not_lost():
    half = combine([(1.0, torch.ones(2, dtype=torch.float32)), (2.0**-40, torch.ones(2, dtype=torch.float64))])
    assert half.dtype == torch.float64
    assert (half - 1 == 2.0**-40).all()
