"""Dense and matrix-free solves with I + ∂f/∂ν, for a ν whose entries depend on one another."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.func import vmap
from torch.utils import _pytree as pytree

from dvi.compiler.tangents import derivative
from dvi.methods import Nu, SpecError
from dvi.solvers.protocol import like

DENSE_LIMIT = 1500  # below this many entries of ν, I + ∂f/∂ν is solved as a dense matrix


class Flat:
    """Converts ν to one vector [n] and back.

    Args:
        nu: the state.
        rhs: what moves ν, if known: a pytree like ν, or one with a leading dimension.  Entries of ν that are zero and
            stay zero may have an infinite slope; :meth:`matrix` leaves these slopes out.
    """

    def __init__(self, nu: Nu, rhs: Nu | None = None) -> None:
        self.leaves, self.spec = pytree.tree_flatten(nu)
        self.sizes = [x.numel() for x in self.leaves]
        self.size, self.example = sum(self.sizes), self.leaves[0]
        self.still = None if rhs is None else self._still(pytree.tree_leaves(rhs))

    def _still(self, rhs: list[Tensor]) -> Tensor:
        """Which entries are zero and stay zero [n]."""
        masks = [(x == 0) & (r == 0).reshape(-1, *x.shape).all(dim=0) for x, r in zip(self.leaves, rhs, strict=True)]
        return self.ravel(masks)

    def unravel(self, flat: Tensor) -> Nu:
        """The pytree whose entries are the vector's."""
        parts = torch.split(flat, self.sizes)
        return pytree.tree_unflatten([p.reshape(x.shape) for p, x in zip(parts, self.leaves, strict=True)], self.spec)

    @staticmethod
    def ravel(tree: Nu) -> Tensor:
        """All entries of a pytree as one vector."""
        return torch.cat([x.reshape(-1) for x in pytree.tree_leaves(tree)])

    def matrix(self, apply: Callable[[Nu], Nu], still: float = 1.0) -> Tensor:
        """A linear map of ν as a dense matrix [n, n]; steep entries that stay zero get ``still`` times I."""
        eye = torch.eye(self.size, dtype=self.example.dtype, device=self.example.device)
        columns: Tensor = vmap(lambda v: self.ravel(apply(self.unravel(v))))(eye)
        if self.still is not None:
            steep = self.still & ~torch.isfinite(columns).all(dim=1)
            columns = torch.where(steep[:, None], still * eye, columns)
        return columns.T


def smallest_singular_value(f: Callable[[Nu], Nu], nu: Nu) -> float:
    """The smallest singular value of I + ∂f/∂ν; 1 if ν is too large for it (the iterative solve then fails)."""
    flat = Flat(nu, f(nu))
    if flat.size > DENSE_LIMIT:
        return 1.0
    A = flat.matrix(lambda dnu: pytree.tree_map(torch.add, dnu, derivative(f, nu, dnu)))
    return float(torch.linalg.svdvals(A)[-1])


def solve_coupled(apply: Callable[[Nu], Nu], nu: Nu, rhs: Nu, batched: bool) -> Nu:
    """Solve apply(x) = rhs if the entries of ν are coupled.

    Args:
        apply: the linear map, of pytrees like ν.
        nu: the state, as an example.
        rhs: a pytree like ν; if ``batched``, with a leading dimension.
        batched: whether there are several right-hand sides.

    Raises:
        SpecError: if the iterative solve does not converge.
    """
    from scipy.sparse.linalg import LinearOperator, gmres

    flat = Flat(nu, rhs)
    b = vmap(flat.ravel)(rhs) if batched else flat.ravel(rhs)[None]
    if flat.size <= DENSE_LIMIT:
        x = torch.linalg.solve(flat.matrix(apply), b.T).T
    else:
        operator = LinearOperator(
            (flat.size, flat.size),
            matvec=lambda v: flat.ravel(apply(flat.unravel(like(v, flat.example)))).double().cpu().numpy(),
            dtype=np.float64,
        )
        rows = []
        for row in b:
            solution, info = gmres(operator, row.double().cpu().numpy(), rtol=1e-10, atol=0.0, maxiter=200)
            if info != 0:
                raise SpecError("The solve with I + ∂f/∂ν did not converge. Is it singular (ν without memory)?")
            rows.append(like(solution, flat.example))
        x = torch.stack(rows)
    return vmap(flat.unravel)(x) if batched else flat.unravel(x[0])
