"""The curvature of f in the gradient, ∂²f/∂g², and the question whether one evaluation gives all of it.

For most optimizers, entry i of ν depends on gᵢ alone.  Then ∂²f/∂g² is diagonal, and its values for all pairs of
directions are products with the diagonal.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import grad
from torch.utils import _pytree as pytree

from dvi.compiler.tangents import derivative
from dvi.methods import Method, Nu


def curvature(method: Method, nu: Nu, g: Tensor, h: Tensor, other: Tensor) -> Nu:
    """∂²f/∂g²[h, other] at (ν, g), a pytree like ν; h, other [d]."""

    def slope(g: Tensor) -> Nu:
        return derivative(lambda g: method.f(nu, g), g, h)

    return derivative(slope, g, other)


def diagonal_curvature(method: Method, nu: Nu, g: Tensor) -> Nu:
    """The diagonal of ∂²f/∂g², a pytree like ν; for an f whose curvature is diagonal (:func:`is_local`).

    It takes two backward passes over the sum of a leaf, a tenth of the time of two nested forward passes.
    """

    def diagonal(i: int, leaf: Tensor) -> Tensor:
        if leaf.shape != g.shape:
            return torch.zeros_like(leaf)
        slope = grad(lambda g: pytree.tree_leaves(method.f(nu, g))[i].sum())
        found: Tensor = grad(lambda g: slope(g).sum())(g)
        return found

    leaves, spec = pytree.tree_flatten(nu)
    return pytree.tree_unflatten([diagonal(i, leaf) for i, leaf in enumerate(leaves)], spec)


def diagonal_slope(method: Method, nu: Nu, g: Tensor) -> Nu:
    """The diagonal of ∂f/∂ν, a pytree like ν; for an f with a diagonal ∂f/∂ν."""
    slope: Nu = grad(lambda nu: sum(leaf.sum() for leaf in pytree.tree_leaves(method.f(nu, g))))(nu)
    return slope


def is_local(method: Method, nu: Nu, g: Tensor) -> bool:
    """Is ∂²f/∂g² diagonal?

    It is if entry i of every leaf shaped like g is nonlinear in gᵢ alone, and all other leaves are linear in g.  The
    curvature along ones shows the diagonal, and random probes must agree with it.  Gradients of three sizes are tried,
    because a clipped norm couples all entries at some sizes only.

    Args:
        method: the declaration.
        nu: an example of ν, after a first update.
        g: the gradient [d] there.
    """
    generator = torch.Generator().manual_seed(1)
    method = method.at(0.0)
    nu = generic(method, nu, g, generator)
    size, ones = typical(g), torch.ones_like(g)
    for scale in (1e-3, 1.0, 1e3):
        at, h, other = (random_like(g, generator) for _ in range(3))
        at = scale * size * at
        shown = pytree.tree_leaves(curvature(method, nu, at, ones, ones))
        seen = pytree.tree_leaves(curvature(method, nu, at, h, other))
        for c, s in zip(shown, seen, strict=True):
            if c.shape != g.shape:
                if bool((c != 0).any()) or bool((s != 0).any()):
                    return False
                continue
            expected = c * h * other
            # Both sides are products and sums of few numbers: they agree to some hundred eps of the largest entry.
            largest = float(torch.maximum(expected.abs().max(), s.abs().max()))
            if not float((s - expected).abs().max()) <= 1e3 * torch.finfo(g.dtype).eps * largest:
                return False
    return True


def random_like(x: Tensor, generator: torch.Generator) -> Tensor:
    """Normal numbers like x, the same on every device."""
    return torch.randn(x.shape, generator=generator, dtype=torch.float64, device="cpu").to(x)


def generic(method: Method, nu: Nu, g: Tensor, generator: torch.Generator) -> Nu:
    """A ν in general position: the given one after two updates with random gradients.

    No entry that depends on gradients is zero there.  At zero, a root has no slope and a coupling may not show.
    """
    size = typical(g)
    for _ in range(2):
        nu = pytree.tree_map(torch.add, nu, method.f(nu, size * random_like(g, generator)))
    return nu


def typical(g: Tensor) -> float:
    """The root mean square of the entries of g, or 1 if all are zero."""
    return float(torch.linalg.vector_norm(g)) / len(g) ** 0.5 or 1.0


def away(nu: Nu, generator: torch.Generator) -> Nu:
    """A ν with every entry changed by up to a tenth, because a coupling may vanish at a special ν."""

    def moved(x: Tensor) -> Tensor:
        return x * (1 + 0.1 * random_like(x, generator).tanh()) if x.is_floating_point() else x

    return pytree.tree_map(moved, nu)
