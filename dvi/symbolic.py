"""The central flow of a declared optimizer in closed form.

From the f and P that were written once for tensors, called on symbols (:mod:`dvi.symbol_spec`), by sympy (paper, C.7
with its errata):

    dw/dt = −P(ν)⁻¹ [∇L(w) + ½∇³L(w)[Σ]]
    dν/dt = (I + ∂f/∂ν)⁻¹ ( f(ν, g) + ½∇²_g f[HΣH] )
    α     = 𝒯ᵀ[−P⁻¹∇L] − 2 ∂P[ν̇₀]|_U,           ν̇₀ = (I + ∂f/∂ν)⁻¹ f
    β[Σ]  = ½ 𝒯ᵀP⁻¹𝒯[Σ] + 2 ∂P[ν̇_Σ]|_U,         ν̇_Σ = (I + ∂f/∂ν)⁻¹ ½∇²_g f[HΣH].
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import sympy
from sympy import Add, Derivative, Eq, Expr, Function, Matrix

from dvi.flows import MethodLike
from dvi.latex import document, plain
from dvi.methods import Method, Nu, SpecError
from dvi.symbol_spec import SymbolicSpec, read
from dvi.symbol_values import Values, evaluate
from dvi.symbols import Total, contract, directional, letters, on_edge
from dvi.tidy import each, factored, tidy
from dvi.variance import one_direction


@dataclass(frozen=True)
class SymbolicFlow:
    """The differential equations: ``w`` for dw/dt, ``nu`` for the parts of ν by name."""

    w: Eq
    nu: dict[str, Eq]


@dataclass(frozen=True, eq=False)
class Derivation:
    """What :func:`dvi.derive` found: the central flow of an optimizer in closed form, as sympy expressions.

    A vector [d] is written by its generic entry: ``g`` stands for gᵢ, and ``Total(e)`` is Σᵢ e over the coordinates
    (:mod:`dvi.symbols`); the letters are in :attr:`symbols`.  Unit time is one step of the optimizer.

    Attributes:
        spec: f and P as expressions.
        P: P = p·I by p, diag(p) by the generic entry of p.
        flow: dw/dt and dν/dt (eq. 31 with its errata; 16, 19, 24 for the paper's three optimizers).
        factor: (I + ∂f/∂ν)⁻¹ at one coordinate, a matrix over the parts of ν (1/β₂ for an EMA, C.4.2).
        alpha: α_ab = Σᵢ −T_ab g/p − 2 u_a u_b ṗ₀, where HU = 2PU; −d/dt Uᵀ(2P − H)U without oscillation.
        beta: β_ab,cd, by which an oscillation Σ = UXUᵀ gives d/dt Uᵀ(2P − H)U = β[X] − α.
        sigma2_parts: α and β for one direction, whose quotient is :attr:`sigma2`.
        stationary_nu: for each part of ν that forgets, dν/dt = 0 solved for it (eq. 26), or the condition where f is
            not affine in it.
        P_free, P_pushed: by which α and β know P: ∂P[ν̇₀] + ∂P/∂t and ∂P[ν̇_Σ], generic entries.
        symbols: the letters by name: ``g``, ``nu``, ``eta``, …
        on_edge: is HΣH = 4PΣP put in, see :meth:`at_edge`?
    """

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
    on_edge: bool = False

    @property
    def sigma2(self) -> Expr:
        """The variance of one oscillating direction, Σ = σ²uuᵀ with Hu = 2Pu, where it is positive.

        Eq. 4 for gradient descent, eqs. 10 and 20 for RMSProp-Norm.  For a scalar P, |u| = 1, and S = 2p takes the
        place of ν.
        """
        numerator, denominator = self.sigma2_parts
        return numerator / denominator

    def at_edge(self) -> Derivation:
        """The same with complementarity put in: HΣ = 2PΣ, so HΣH = 4PΣP and HU = 2PU (C.5), as the paper prints it."""

        def put(e: Any) -> Any:
            if isinstance(e, dict):
                return {name: put(part) for name, part in e.items()}
            if isinstance(e, Eq):
                return Eq(e.lhs, put(e.rhs), evaluate=False)
            return each(e, lambda part: on_edge(part, self.P))

        if self.on_edge:
            return self
        return dataclasses.replace(
            self,
            flow=SymbolicFlow(self.flow.w, put(self.flow.nu)),
            beta=put(self.beta),
            stationary_nu=put(self.stationary_nu),
            P_pushed=put(self.P_pushed),
            on_edge=True,
        )

    def evaluate(
        self, g: Any, nu: Nu, U: Any, HU: Any, T: Any, X: Any = None, t: float = 0.0, **hyperparameters: float
    ) -> Values:
        """The formulas in numbers (numpy, float64), as they stand: log(1 + exp(x)) overflows from x = 710 on.

        Args:
            g: ∇L(w) [d].
            nu: the state, of the structure that ``init`` gives.
            U, HU: critical directions [d, k], and H times them.
            T: ∇_w u_aᵀH(w)u_b [k(k+1)/2, d] in svec order, as ``problem.hessian_gradient(w, U)`` gives it.
            X: the covariance in U [k, k]; 0 if left out.
            t: the time that schedules read.
            hyperparameters: by field; those of the method that was given, where left out.

        Returns:
            α [k, k], β [k(k+1)/2]² in svec, dw/dt [d], dν/dt like ν, and for k = 1 σ².

        Raises:
            SpecError: if a hyperparameter has no value.
        """
        return evaluate(self, g, nu, U, HU, T, X, t, hyperparameters)

    def latex(self) -> str:
        """The flow, α, β, σ² and the stationary ν as an ``align*`` environment (amsmath)."""
        return document(self)

    def _repr_latex_(self) -> str:
        return self.latex()

    def __str__(self) -> str:
        return plain(self)

    def __repr__(self) -> str:
        return f"derive({self.spec.method!r})" + (".at_edge()" if self.on_edge else "")


def derive(method: MethodLike | type[Method], *, numeric: bool = False) -> Derivation:
    """Derive the central flow of an optimizer in closed form.

    The average of f is read as :func:`dvi.central_flow` does by default, f + ½∇²_g f[HΣH] (``"gradient-covariance"``).

    Args:
        method: a :class:`dvi.Method` with ``Scalar`` or ``Diagonal`` preconditioner, a triple ``(init, f, P)``, or a
            class of methods, whose hyperparameters without a default are then symbols.
        numeric: put in the hyperparameters' numbers instead of their letters (lr → η, eps → ε, beta2 → β₂, …).  A
            hyperparameter that is 0 is left out of the formulas in any case.

    Raises:
        SpecError: where f or P does what has no closed form: a branch on a value, a function without derivatives, a
            preconditioner or a part of ν that is a matrix; where ν has no memory (β₂ = 0); and for momentum.
    """
    spec = read(method, numeric)
    x, p = letters(), spec.p
    symbols = [leaf.symbol for leaf in spec.leaves]

    # dν/dt: what f gives, and what oscillations h add to its average, bilinear in h
    factor = _factor(spec)
    bend = [directional(directional(f, {x.g: x.HU_c}), {x.g: x.HU_d}) / 2 for f in spec.f]
    curvature = [contract(b, x.HU_c, x.HU_d) for b in bend]
    free, push, pushed = (list(factor * Matrix(len(v), 1, v)) for v in (spec.f, bend, curvature))

    # and what that makes of P, part by part
    def moved(rates: list[Expr]) -> Expr:
        return Add(*(tidy(directional(p, {nu: rate})) for nu, rate in zip(symbols, rates, strict=True)))

    P_free = moved(free) + tidy(directional(p, {x.t: sympy.Integer(1)}))
    P_push, P_pushed = moved(push), moved(pushed)

    alpha = -Total(x.T_ab * x.g / p) - 2 * Total(x.U_a * x.U_b * P_free)
    beta = Total(x.T_ab * x.T_cd / p) / 2 + 2 * Total(x.U_a * x.U_b * P_push)
    rates = {
        leaf.name: Eq(_rate(str(leaf.symbol)), tidy(sum(pair)), evaluate=False)
        for leaf, *pair in zip(spec.leaves, free, pushed, strict=True)
    }
    return Derivation(
        spec=spec,
        P=p,
        flow=SymbolicFlow(Eq(_rate("w"), -(x.g + x.D3L / 2) / p), rates),
        factor=factor,
        alpha=alpha,
        beta=beta,
        sigma2_parts=one_direction(spec, P_free, P_pushed),
        stationary_nu=_stationary(spec, curvature),
        P_free=P_free,
        P_pushed=P_pushed,
        symbols=vars(x) | {str(s): s for s in (*symbols, *spec.hyperparameters.values())},
    )


def _rate(name: str) -> Derivative:
    t = letters().t
    return Derivative(Function(name)(t), t)


def _factor(spec: SymbolicSpec) -> Matrix:
    """(I + ∂f/∂ν)⁻¹ at one coordinate."""
    one, n = sympy.Integer(1), len(spec.leaves)
    slopes = [directional(f, {leaf.symbol: one}) for f in spec.f for leaf in spec.leaves]
    matrix = sympy.eye(n) + Matrix(n, n, slopes)
    if factored(sympy.expand(matrix.det())) == 0:
        raise SpecError(
            f"{spec.method}: I + ∂f/∂ν is singular, so ν follows the gradient at once (β₂ = 0) and has no differential "
            "equation. Give it some memory (β₂ ≥ 1e-3)."
        )
    return matrix.inv(method="ADJ").applyfunc(factored)


def _stationary(spec: SymbolicSpec, curvature: list[Expr]) -> dict[str, Eq]:
    """0 = f + ½∇²_g f[HΣH], solved for ν where f is affine in it."""
    out = {}
    for leaf, f, bend in zip(spec.leaves, spec.f, curvature, strict=True):
        nu, change = leaf.symbol, f + bend
        if not f.has(nu):
            continue  # it only adds up
        slope = factored(directional(change, {nu: sympy.Integer(1)}))
        if slope.has(nu):
            out[leaf.name] = Eq(tidy(change), 0, evaluate=False)
        else:
            out[leaf.name] = Eq(nu, tidy(-change.xreplace({nu: sympy.Integer(0)}) / slope), evaluate=False)
    return out


__all__ = ["Derivation", "SymbolicFlow", "Values", "derive"]
