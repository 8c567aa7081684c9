"""The formulas of a central flow as plain data: the declaration, and what is derived from it."""

from __future__ import annotations

from dataclasses import dataclass

from sympy import Eq, Expr, Matrix, Symbol
from torch.utils import _pytree as pytree

from dvi.compiler.exact_rates import Accuracy
from dvi.methods import Method
from dvi.symbolic.vectors import directional, letters


@dataclass(frozen=True)
class Leaf:
    """A part of ν: its name in the declaration, its symbol, 0 or 1 axes, and whether it counts steps (f = 1)."""

    name: str
    symbol: Symbol
    ndim: int
    clock: bool = False


@dataclass(frozen=True)
class SymbolicSpec:
    """A declaration (f, P, Q) as expressions.

    Attributes:
        method: the declaration.
        leaves: the parts of ν, in the order of ``torch.utils._pytree``.
        structure: the pytree structure of the parts.
        f: the change of each part.
        p: p for P = p·I, or the generic entry of p for P = diag(p).
        diagonal: is P = diag(p)?
        hyperparameters: the symbol of each field, or η(t) for a schedule.  Numbers are not listed.
        momentum: is there a filter Q ≠ 1?
        threshold: the threshold c, 2 without momentum and decay, and (2 − γ)/Q(z = −1) with them.
        gain: the gain Q₁ of the filter, 1 without momentum.
        lag: the mean lag τ of the filter in unit times, 0 without momentum.
        decay: the weight decay γ, 0 if there is none.
    """

    method: Method | type[Method]
    leaves: tuple[Leaf, ...]
    structure: pytree.TreeSpec
    f: tuple[Expr, ...]
    p: Expr
    diagonal: bool
    hyperparameters: dict[str, Expr]
    momentum: bool
    threshold: Expr
    gain: Expr
    lag: Expr
    decay: Expr

    @property
    def edge(self) -> Expr:
        """P̃ = cP/2, which is P without momentum and decay.  Complementarity is HΣ = 2P̃Σ."""
        return self.threshold * self.p / 2

    @property
    def name(self) -> str:
        """The name of the method's class."""
        return (self.method if isinstance(self.method, type) else type(self.method)).__name__


def bends(spec: SymbolicSpec) -> list[Expr]:
    """½∇²_g f[h, h′] for each part of ν: what oscillations add to the average of f, bilinear in h and h′ = H u."""
    x = letters()
    return [directional(directional(f, {x.g: x.HU_c}), {x.g: x.HU_d}) / 2 for f in spec.f]


@dataclass(frozen=True)
class SymbolicFlow:
    """The differential equations: ``w`` for dw/dt, ``nu`` for the parts of ν by name, ``m`` for the momentum's."""

    w: Eq
    nu: dict[str, Eq]
    m: Eq | None = None


@dataclass(frozen=True, eq=False)
class Formulas:
    """The closed form of a central flow; :class:`dvi.Derivation` describes the fields."""

    spec: SymbolicSpec
    P: Expr
    flow: SymbolicFlow
    factor: Matrix
    alpha: Expr
    beta: Expr
    sigma2_parts: tuple[Expr, Expr]
    stationary_nu: dict[str, Eq]
    P_free: Expr
    P_pushed: Expr
    symbols: dict[str, Expr]
    accuracy: Accuracy = "paper"
    on_edge: bool = False

    @property
    def threshold(self) -> Expr:
        """The threshold c of H ⪯ cP, 2 without momentum and weight decay."""
        return self.spec.threshold

    @property
    def gain(self) -> Expr:
        """The gain Q₁ of the drift, 1 without momentum."""
        return self.spec.gain

    @property
    def lag(self) -> Expr:
        """The mean lag τ of the momentum in unit times, 0 without momentum."""
        return self.spec.lag

    @property
    def sigma2(self) -> Expr:
        """The variance of one oscillating direction, Σ = σ²uuᵀ with Hu = cPu, where it is positive.

        This is eq. 4 for gradient descent, and eqs. 10 and 20 for RMSProp-Norm.  For a scalar P, |u| = 1, and the
        sharpness S = cp replaces ν.
        """
        numerator, denominator = self.sigma2_parts
        return numerator / denominator
