"""The flow with mini-batch noise in closed form: one step, and the stationary oscillation.

    w⁺ − w = −P(ν)⁻¹ [∇L + ½∇³L[Σ]] − γw
    ν⁺ − ν = f(ν, g) + ½∇²_g f[HΣH + N]
    X⁺_ij  = (1−λ_i)(1−λ_j) X_ij + (UᵀNU)_ij,       Σ = UXUᵀ,  UᵀP̃U = I,  HU = P̃UΛ.

With weight decay, P̃ = (1 − γ/2)P, 1 − γ − (1 − γ/2)λ replaces 1 − λ, and the noise has a factor (1 − γ/2)².
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import sympy
from sympy import Eq, Expr
from torch.utils import _pytree as pytree

from dvi.methods import Nu, SpecError
from dvi.solvers.protocol import Array
from dvi.solvers.svec import triu
from dvi.symbolic.evaluation import Point, value_of, values_of
from dvi.symbolic.formulas import SymbolicSpec
from dvi.symbolic.printing import latex, text
from dvi.symbolic.simplification import factored
from dvi.symbolic.stationary import stationary
from dvi.symbolic.vectors import letters, noisy


@dataclass(frozen=True, eq=False)
class NoisyValues:
    """The formulas in numbers, at one moment.

    Attributes:
        w: w⁺ − w [d].
        nu: ν⁺ − ν, of the structure of ν.
        X: X⁺ [k, k].
        stationary_X: the stationary X [k, k].
    """

    w: Array
    nu: Nu
    X: Array
    stationary_X: Array


@dataclass(frozen=True, eq=False)
class NoisyDerivation:
    """The result of ``dvi.derive(method, noise=True)``: a step of the flow with mini-batch noise, in sympy expressions.

    A vector [d] is represented by its generic entry, as in :class:`dvi.Derivation`.  Unit time is one step.

    Attributes:
        spec: f and P as expressions.
        P: p for P = p·I, or the generic entry of p for P = diag(p).
        w: w⁺ − w.
        nu: ν⁺ − ν for each part of ν, with the effects of Σ and N.
        X: X⁺_ij, in a frame of eigenvectors with effective eigenvalues λ.
        stationary_X: X_ij where X⁺ = X.
        stationary_nu: for each part of ν that forgets, ν⁺ = ν solved for it, as in :class:`dvi.Derivation`.
        symbols: the letters by name: ``g``, ``nu``, ``X_ij``, …
    """

    spec: SymbolicSpec
    P: Expr
    w: Expr
    nu: dict[str, Expr]
    X: Expr
    stationary_X: Expr
    stationary_nu: dict[str, Eq]
    symbols: dict[str, Expr]

    def evaluate(
        self,
        g: Any,
        nu: Nu,
        U: Any,
        HU: Any,
        T: Any,
        X: Any,
        N: Any,
        t: float = 0.0,
        w: Any = None,
        **hyperparameters: float,
    ) -> NoisyValues:
        """The formulas in numbers (numpy, float64).

        Args:
            g: ∇L(w) [d].
            nu: the state, of the structure that ``init`` gives.
            U: eigenvectors of P̃⁻¹H with UᵀP̃U = I [d, k].
            HU: the Hessian times U [d, k].
            T: ∇_w u_aᵀH(w)u_b [k(k+1)/2, d] in svec order.
            X: the covariance of the oscillation in U [k, k].
            N: the covariance of a mini-batch's gradient [d, d].
            t: the time for schedules (unit times).
            w: the weights [d], needed only for weight decay.
            hyperparameters: values by field; by default those of the method that was given.

        Raises:
            SpecError: if a hyperparameter has no value, or a name is not that of a hyperparameter, or w is missing.
        """
        x, spec = letters(), self.spec
        at = Point(g, nu, U, HU, T, X, t, None, w).arrays()
        noise = Point(N, nu, U, HU, T).arrays().g
        index, state = triu(at.U.shape[1]), pytree.tree_leaves(at.nu)
        known: dict[Expr, Any] = {x.g: at.g, x.d: len(at.U), x.t: at.t} | values_of(spec, at.t, hyperparameters)
        known |= {leaf.symbol: value for leaf, value in zip(spec.leaves, state, strict=True)}
        if spec.decay != 0:
            if at.w is None:
                raise SpecError("evaluate(…, w=…): the weights decay, so w is needed.")
            known[x.w] = at.w
        known[x.D3L] = np.einsum("ab,abi->i", at.X, (at.T / index.weight[:, None])[index.position])
        known |= {x.HSH: ((at.HU @ at.X) * at.HU).sum(1), x.Nii: noise.diagonal()}
        matrices = {"HSigmaH": (at.HU, at.X), "N": (np.eye(len(noise)), noise)}
        rates = [
            value_of(self.nu[leaf.name], known, value.shape, matrices)
            for leaf, value in zip(spec.leaves, state, strict=True)
        ]
        eigenvalues, inside = (at.U * at.HU).sum(0), at.U.T @ noise @ at.U
        known |= {x.lambda_i: eigenvalues[:, None], x.lambda_j: eigenvalues, x.X_ij: at.X, x.N_ij: inside}
        return NoisyValues(
            w=value_of(self.w, known, at.g.shape),
            nu=pytree.tree_unflatten(rates, pytree.tree_structure(at.nu)),
            X=value_of(self.X, known, at.X.shape),
            stationary_X=value_of(self.stationary_X, known, at.X.shape),
        )

    def latex(self) -> str:
        """A step, and the stationary X and ν, as an ``align*`` environment (amsmath)."""
        x = letters()
        lines = [f"w^{{+}} - w &= {latex(self.w)}"]
        lines += [f"{latex(s)}^{{+}} - {latex(s)} &= {latex(e)}" for s, e in self._moving()]
        lines += [f"X_{{ij}}^{{+}} &= {latex(self.X)}", f"P &= {latex(self.P)}"]
        settled = [Eq(x.X_ij, self.stationary_X, evaluate=False), *self.stationary_nu.values()]
        lines += [rf"\text{{stationary: }} {latex(e.lhs)} &= {latex(e.rhs)}" for e in settled]
        body = " \\\\\n".join(f"  {line}" for line in lines)
        return f"\\begin{{align*}}\n{body}\n\\end{{align*}}"

    def _repr_latex_(self) -> str:
        return self.latex()

    def __str__(self) -> str:
        x = letters()
        lines = [f"w⁺ - w = {text(self.w)}"]
        lines += [f"{text(s)}⁺ - {text(s)} = {text(e)}" for s, e in self._moving()]
        lines += [f"Xᵢⱼ⁺ = {text(self.X)}", f"P = {text(self.P)}"]
        settled = [Eq(x.X_ij, self.stationary_X, evaluate=False), *self.stationary_nu.values()]
        lines += [f"stationary: {text(e.lhs)} = {text(e.rhs)}" for e in settled]
        return "\n".join([f"A step of the flow with noise of {self.spec.name}", *(f"  {line}" for line in lines)])

    def __repr__(self) -> str:
        return f"derive({self.spec.method!r}, noise=True)"

    def _moving(self) -> list[tuple[Expr, Expr]]:
        """The symbols and changes of the parts of ν, apart from clocks."""
        return [(leaf.symbol, self.nu[leaf.name]) for leaf in self.spec.leaves if not leaf.clock]


def with_noise(spec: SymbolicSpec, curvature: Sequence[Expr]) -> NoisyDerivation:
    """The flow with noise of a declaration.

    Args:
        spec: the declaration.
        curvature: ½∇²_g f[HΣH] for each part of ν.

    Raises:
        SpecError: if the method has momentum, because X is then a part of a larger covariance.
    """
    if spec.momentum:
        raise SpecError(
            f"{spec.name} has momentum, so that X is one block of the covariance of w and the filter's memory. It has "
            "no closed form here. dvi.noise.companion.Companion.of(Q, M, S).stationary(N) gives it in numbers."
        )
    x = letters()
    averaged = [noisy(bend) for bend in curvature]
    share = spec.threshold / 2  # 1 − γ/2
    kept_i, kept_j = (1 - spec.decay - share * eigenvalue for eigenvalue in (x.lambda_i, x.lambda_j))
    noise, lost = share**2 * x.N_ij, 1 - kept_i * kept_j
    return NoisyDerivation(
        spec=spec,
        P=spec.p,
        w=-1 / spec.p * (x.g + x.D3L / 2) - spec.decay * x.w,
        nu={leaf.name: factored(f + bend) for leaf, f, bend in zip(spec.leaves, spec.f, averaged, strict=True)},
        X=kept_i * kept_j * x.X_ij + noise,
        stationary_X=noise / (factored(sympy.expand(lost)) if spec.decay == 0 else lost),
        stationary_nu=stationary(spec, averaged),
        symbols=vars(x) | {str(s): s for s in (*(leaf.symbol for leaf in spec.leaves), *spec.hyperparameters.values())},
    )


__all__ = ["NoisyDerivation", "NoisyValues", "with_noise"]
