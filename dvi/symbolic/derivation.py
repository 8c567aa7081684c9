"""The central flow of a declared optimizer in closed form.

From the f and P that were written once for tensors, called on symbols (:mod:`dvi.symbolic.reader`), by sympy (paper,
C.7 with its errata):

    dw/dt = −P(ν)⁻¹ [∇L(w) + ½∇³L(w)[Σ]]
    dν/dt = (I + ∂f/∂ν)⁻¹ ( f(ν, g) + ½∇²_g f[HΣH] )
    α     = 𝒯ᵀ[−P⁻¹∇L] − 2 ∂P[ν̇₀]|_U,           ν̇₀ = (I + ∂f/∂ν)⁻¹ f
    β[Σ]  = ½ 𝒯ᵀP⁻¹𝒯[Σ] + 2 ∂P[ν̇_Σ]|_U,         ν̇_Σ = (I + ∂f/∂ν)⁻¹ ½∇²_g f[HΣH].

Momentum Q, with its threshold c, gain Q₁ and lag τ (docs/momentum.md), puts Q₁P⁻¹ in place of P⁻¹ and P̃ = cP/2 in place
of the P of 2P and ∂P.  At second order it is a state of the flow, and ν has its logarithmic rate, J = ∂f/∂ν:

    dw/dt = −Q₁P(ν)⁻¹ m,     (τ + ½) dm/dt = ∇L + ½∇³L[Σ] − m,     dν/dt = log(I+J) J⁻¹ ( f + ½∇²_g f[HΣH] ).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sympy
from sympy import Add, Derivative, Eq, Expr, Function, Matrix

from dvi.flows import MethodLike
from dvi.forgetting import Accuracy
from dvi.methods import Method, Nu, SpecError
from dvi.symbolic.evaluation import Values, evaluate
from dvi.symbolic.printing import document, plain
from dvi.symbolic.reader import SymbolicSpec, read
from dvi.symbolic.simplification import each, factored, tidy
from dvi.symbolic.variance import one_direction
from dvi.symbolic.vectors import Total, contract, directional, letters, on_edge


@dataclass(frozen=True)
class SymbolicFlow:
    """The differential equations: ``w`` for dw/dt, ``nu`` for the parts of ν by name, ``m`` for the momentum's."""

    w: Eq
    nu: dict[str, Eq]
    m: Eq | None = None


@dataclass(frozen=True, eq=False)
class Derivation:
    """What :func:`dvi.derive` found: the central flow of an optimizer in closed form, as sympy expressions.

    A vector [d] is written by its generic entry: ``g`` stands for gᵢ, and ``Total(e)`` is Σᵢ e over the coordinates
    (:mod:`dvi.symbolic.vectors`); the letters are in :attr:`symbols`.  Unit time is one step of the optimizer.

    Attributes:
        spec: f and P as expressions.
        P: P = p·I by p, diag(p) by the generic entry of p.
        flow: dw/dt and dν/dt (eq. 31 with its errata; 16, 19, 24 for the paper's three optimizers).
        factor: what f is multiplied by in dν/dt, at one coordinate, a matrix over the parts of ν: (I + ∂f/∂ν)⁻¹ (1/β₂
            for an EMA, C.4.2); at second order log(I+J) J⁻¹ (−log β₂/(1−β₂)).
        alpha: α_ab = Σᵢ −Q₁ T_ab g/p − 2 u_a u_b dp̃/dt, where HU = 2P̃U; −d/dt Uᵀ(cP − H)U without oscillation.
        beta: β_ab,cd, by which an oscillation Σ = UXUᵀ gives d/dt Uᵀ(cP − H)U = β[X] − α.  Both are those of the
            ``"paper"`` flow, the leading-order drift −Q₁P⁻¹(g + ½∇³L[Σ]), at either accuracy.
        sigma2_parts: α and β for one direction, whose quotient is :attr:`sigma2`.
        stationary_nu: for each part of ν that forgets, dν/dt = 0 solved for it (eq. 26), or the condition where f is
            not affine in it.
        P_free, P_pushed: by which α and β know P̃ = cP/2: ∂P̃[ν̇₀] + ∂P̃/∂t and ∂P̃[ν̇_Σ], generic entries.
        symbols: the letters by name: ``g``, ``nu``, ``eta``, …
        accuracy: of :attr:`flow`, ``"paper"`` or ``"second-order"``.
        on_edge: is HΣH = c²PΣP put in, see :meth:`at_edge`?
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
    accuracy: Accuracy = "paper"
    on_edge: bool = False

    @property
    def threshold(self) -> Expr:
        """The threshold c of H ⪯ cP, 2 without momentum."""
        return self.spec.threshold

    @property
    def gain(self) -> Expr:
        """The gain Q₁ of the drift, 1 without momentum."""
        return self.spec.gain

    @property
    def lag(self) -> Expr:
        """The mean lag τ of the momentum, unit times, 0 without."""
        return self.spec.lag

    @property
    def sigma2(self) -> Expr:
        """The variance of one oscillating direction, Σ = σ²uuᵀ with Hu = cPu, where it is positive.

        Eq. 4 for gradient descent, eqs. 10 and 20 for RMSProp-Norm.  For a scalar P, |u| = 1, and S = cp takes the
        place of ν.
        """
        numerator, denominator = self.sigma2_parts
        return numerator / denominator

    def at_edge(self) -> Derivation:
        """The same with complementarity put in: HΣ = cPΣ, so HΣH = c²PΣP and HU = cPU (C.5), as the paper prints it."""

        def put(e: Any) -> Any:
            if isinstance(e, dict):
                return {name: put(part) for name, part in e.items()}
            if isinstance(e, Eq):
                return Eq(e.lhs, put(e.rhs), evaluate=False)
            return each(e, lambda part: on_edge(part, self.spec.edge))

        if self.on_edge:
            return self
        return dataclasses.replace(
            self,
            flow=dataclasses.replace(self.flow, nu=put(self.flow.nu)),
            beta=put(self.beta),
            stationary_nu=put(self.stationary_nu),
            P_pushed=put(self.P_pushed),
            on_edge=True,
        )

    def evaluate(
        self,
        g: Any,
        nu: Nu,
        U: Any,
        HU: Any,
        T: Any,
        X: Any = None,
        t: float = 0.0,
        m: Any = None,
        **hyperparameters: float,
    ) -> Values:
        """The formulas in numbers (numpy, float64), as they stand: log(1 + exp(x)) overflows from x = 710 on.

        Args:
            g: ∇L(w) [d].
            nu: the state, of the structure that ``init`` gives.
            U, HU: critical directions [d, k], and H times them.
            T: ∇_w u_aᵀH(w)u_b [k(k+1)/2, d] in svec order, as ``problem.hessian_gradient(w, U)`` gives it.
            X: the covariance in U [k, k]; 0 if left out.
            t: the time that schedules read.
            m: the momentum [d], where it is a state of the flow; g + ½∇³L[Σ], to which it relaxes, if left out.
            hyperparameters: by field; those of the method that was given, where left out.

        Returns:
            α [k, k], β [k(k+1)/2]² in svec, dw/dt [d], dν/dt like ν, for k = 1 σ², and dm/dt [d] where m is a state.

        Raises:
            SpecError: if a hyperparameter has no value.
        """
        return evaluate(self, g, nu, U, HU, T, X, t, m, hyperparameters)

    def latex(self) -> str:
        """The flow, α, β, σ² and the stationary ν as an ``align*`` environment (amsmath)."""
        return document(self)

    def _repr_latex_(self) -> str:
        return self.latex()

    def __str__(self) -> str:
        return plain(self)

    def __repr__(self) -> str:
        return f"derive({self.spec.method!r})" + (".at_edge()" if self.on_edge else "")


def derive(method: MethodLike | type[Method], *, numeric: bool = False, accuracy: Accuracy | None = None) -> Derivation:
    """Derive the central flow of an optimizer in closed form.

    The average of f is read as :func:`dvi.central_flow` does by default, f + ½∇²_g f[HΣH] (``"gradient-covariance"``).

    Args:
        method: a :class:`dvi.Method` with ``Scalar`` or ``Diagonal`` preconditioner, a triple ``(init, f, P)``, or a
            class of methods, whose hyperparameters without a default are then symbols.
        numeric: put in the hyperparameters' numbers instead of their letters (lr → η, eps → ε, beta2 → β₂, …).  A
            hyperparameter that is 0 is left out of the formulas in any case.
        accuracy: of the flow, as in :func:`dvi.central_flow`: ``"paper"``, or ``"second-order"`` with the momentum as a
            state and ν's logarithmic rate.  Default: the paper's, and second order for a method with momentum.

    Raises:
        SpecError: where f, P or Q does what has no closed form: a branch on a value, a function without derivatives, a
            preconditioner or a part of ν that is a matrix; where ν has no memory (β₂ = 0); at second order, where
            parts of ν depend on one another; where a filter's first cycle is not of period two (this takes numbers:
            of a class, the formulas hold for hyperparameters with which it is).
        ValueError: if accuracy is neither.
    """
    if accuracy not in (None, "paper", "second-order"):
        raise ValueError(f'accuracy is "paper" or "second-order", not {accuracy!r}.')
    spec = read(method, numeric, None if accuracy is None else accuracy == "second-order")
    accuracy = accuracy or ("second-order" if spec.momentum else "paper")
    x, p, gain = letters(), spec.p, spec.gain
    symbols = [leaf.symbol for leaf in spec.leaves]

    # dν/dt: what f gives, and what oscillations h add to its average, bilinear in h
    leading = _factor(spec)
    factor = _logarithmic(spec) if accuracy == "second-order" else leading
    bend = [directional(directional(f, {x.g: x.HU_c}), {x.g: x.HU_d}) / 2 for f in spec.f]
    curvature = [contract(b, x.HU_c, x.HU_d) for b in bend]

    # and what that makes of P, part by part
    def moved(changes: Sequence[Expr]) -> Expr:
        rates = leading * Matrix(len(changes), 1, list(changes))
        return Add(*(tidy(directional(spec.edge, {nu: rate})) for nu, rate in zip(symbols, rates, strict=True)))

    P_free = moved(spec.f) + tidy(directional(spec.edge, {x.t: sympy.Integer(1)}))
    P_push, P_pushed = moved(bend), moved(curvature)

    alpha = -gain * Total(x.T_ab * x.g / p) - 2 * Total(x.U_a * x.U_b * P_free)
    beta = gain * Total(x.T_ab * x.T_cd / p) / 2 + 2 * Total(x.U_a * x.U_b * P_push)
    changes = zip(*(factor * Matrix(len(v), 1, list(v)) for v in (spec.f, curvature)), strict=True)
    rates = {
        leaf.name: Eq(_rate(str(leaf.symbol)), tidy(sum(pair)), evaluate=False)
        for leaf, pair in zip(spec.leaves, changes, strict=True)
    }
    force = x.g + x.D3L / 2
    flow = SymbolicFlow(Eq(_rate("w"), -gain * force / p), rates)
    if accuracy == "second-order":
        to_m = Eq(_rate("m"), (force - x.m) / (spec.lag + sympy.Rational(1, 2)))
        flow = SymbolicFlow(Eq(_rate("w"), -gain * x.m / p), rates, to_m)
    return Derivation(
        spec=spec,
        P=p,
        flow=flow,
        factor=factor,
        alpha=alpha,
        beta=beta,
        sigma2_parts=one_direction(spec, P_free, P_pushed),
        stationary_nu=_stationary(spec, curvature),
        P_free=P_free,
        P_pushed=P_pushed,
        symbols=vars(x) | {str(s): s for s in (*symbols, *spec.hyperparameters.values())},
        accuracy=accuracy,
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


def _logarithmic(spec: SymbolicSpec) -> Matrix:
    """log(I+J) J⁻¹ at one coordinate, J = ∂f/∂ν; 1 where J is 0.

    Raises:
        SpecError: if J is not diagonal.
    """
    one, n = sympy.Integer(1), len(spec.leaves)
    J = Matrix(n, n, [factored(directional(f, {leaf.symbol: one})) for f in spec.f for leaf in spec.leaves])
    if not J.is_diagonal():
        raise SpecError(
            f"{spec.method}: parts of ν depend on one another, and at second order ν's rate is then the logarithm of a "
            'matrix. accuracy="paper" has a closed form; flow.linearise(w, nu) has this one in numbers.'
        )
    rates = [one if J[i, i] == 0 else sympy.log(factored(1 + J[i, i])) / J[i, i] for i in range(n)]
    return Matrix(n, n, lambda i, j: rates[i] if i == j else sympy.Integer(0))


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
