"""The central flow of a declared optimizer in closed form.

:mod:`dvi.symbolic.reader` calls the declaration on symbols, and sympy differentiates (paper, C.7 with its errata):

    dw/dt = −P(ν)⁻¹ [∇L(w) + ½∇³L(w)[Σ]]
    dν/dt = (I + ∂f/∂ν)⁻¹ ( f(ν, g) + ½∇²_g f[HΣH] )
    α     = 𝒯ᵀ[−P⁻¹∇L] − 2 ∂P[ν̇₀]|_U,           ν̇₀ = (I + ∂f/∂ν)⁻¹ f
    β[Σ]  = ½ 𝒯ᵀP⁻¹𝒯[Σ] + 2 ∂P[ν̇_Σ]|_U,         ν̇_Σ = (I + ∂f/∂ν)⁻¹ ½∇²_g f[HΣH].

Momentum is a filter Q with threshold c, gain Q₁ and lag τ (docs/momentum.md).  It replaces P⁻¹ by Q₁P⁻¹, and the P in
2P and ∂P by P̃ = cP/2.  At second order the momentum m is a state of the flow, and ν has its logarithmic rate, with
J = ∂f/∂ν:

    dw/dt = −Q₁P(ν)⁻¹ m,     (τ + ½) dm/dt = ∇L + ½∇³L[Σ] − m,     dν/dt = log(I+J) J⁻¹ ( f + ½∇²_g f[HΣH] ).

With weight decay γ, c = (2 − γ)/Q(z = −1); 𝒯ᵀ[γw] is subtracted from α, and γw from dw/dt.  At second order,
dw/dt = (log(1−γ)/γ) (γw + Q₁P⁻¹m).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, overload

import sympy
from sympy import Add, Derivative, Eq, Expr, Function, Matrix

from dvi.compiler.exact_rates import Accuracy
from dvi.interop.binding import MethodLike
from dvi.methods import Method, Nu, SpecError
from dvi.symbolic.evaluation import Point, Values, evaluate
from dvi.symbolic.formulas import Formulas, SymbolicFlow, SymbolicSpec, bends
from dvi.symbolic.noise import NoisyDerivation, with_noise
from dvi.symbolic.printing import latex_page, text_page
from dvi.symbolic.reader import read
from dvi.symbolic.simplification import factored
from dvi.symbolic.stationary import stationary
from dvi.symbolic.variance import one_direction
from dvi.symbolic.vectors import Total, contract, directional, letters, on_edge


class Derivation(Formulas):
    """The result of :func:`dvi.derive`: the central flow of an optimizer in closed form, as sympy expressions.

    A vector [d] is represented by its generic entry: ``g`` stands for gᵢ, and ``Total(e)`` is Σᵢ e over the coordinates
    (:mod:`dvi.symbolic.vectors`).  The letters are in :attr:`symbols`.  Unit time is one step of the optimizer.

    Attributes:
        spec: f, P and Q as expressions.
        P: p for P = p·I, or the generic entry of p for P = diag(p).
        flow: dw/dt and dν/dt (eq. 31 with its errata; eqs. 16, 19, 24 for the paper's three optimizers).
        factor: the matrix over the parts of ν, at one coordinate, by which dν/dt multiplies f.  It is (I + ∂f/∂ν)⁻¹
            (1/β₂ for an EMA, C.4.2), or at second order log(I+J) J⁻¹ (−log β₂/(1−β₂)).
        alpha: α_ab = Σᵢ −Q₁ T_ab g/p − T_ab γw − 2 u_a u_b dp̃/dt, where HU = 2P̃U.  It is −d/dt Uᵀ(cP − H)U
            without oscillation.
        beta: β_ab,cd, by which an oscillation Σ = UXUᵀ gives d/dt Uᵀ(cP − H)U = β[X] − α.  At either accuracy, α and β
            are those of the ``"paper"`` flow, whose drift is −Q₁P⁻¹(g + ½∇³L[Σ]).
        sigma2_parts: α and β for one direction, whose quotient is :attr:`sigma2`.
        stationary_nu: for each part of ν that forgets, dν/dt = 0 solved for it (eq. 26).  If f is not affine in the
            part, it is the condition itself.
        P_free: the generic entry of the rate of P̃ without oscillation, ∂P̃[ν̇₀] + ∂P̃/∂t.
        P_pushed: the generic entry of the rate that oscillation adds, ∂P̃[ν̇_Σ].
        symbols: the letters by name: ``g``, ``nu``, ``eta``, …
        accuracy: the accuracy of :attr:`flow`, ``"paper"`` or ``"second-order"``.
        on_edge: was HΣH replaced by c²PΣP (:meth:`at_edge`)?
    """

    def at_edge(self) -> Derivation:
        """The same with complementarity inserted, as in the paper: HΣ = cPΣ, so HΣH = c²PΣP and HU = cPU (C.5)."""
        if self.on_edge:
            return self

        def put(e: Expr) -> Expr:
            return on_edge(e, self.spec.edge)

        def put_into(equations: dict[str, Eq]) -> dict[str, Eq]:
            return {name: Eq(put(e.lhs), put(e.rhs), evaluate=False) for name, e in equations.items()}

        return dataclasses.replace(
            self,
            flow=dataclasses.replace(self.flow, nu=put_into(self.flow.nu)),
            beta=put(self.beta),
            stationary_nu=put_into(self.stationary_nu),
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
        w: Any = None,
        **hyperparameters: float,
    ) -> Values:
        """Evaluate the formulas in numbers (numpy, float64).

        The formulas are evaluated as they are written, so that log(1 + exp(x)), for example, overflows for x > 710.

        Args:
            g: ∇L(w) [d].
            nu: the state, of the structure that ``init`` gives.
            U: critical directions [d, k].
            HU: the Hessian times U [d, k].
            T: ∇_w u_aᵀH(w)u_b [k(k+1)/2, d] in svec order, as ``problem.hessian_gradient(w, U)`` gives it.
            X: the covariance in U [k, k]; by default 0.
            t: the time for schedules (unit times).
            m: the momentum [d], if it is a state of the flow.  By default it is g + ½∇³L[Σ], to which it relaxes.
            w: the weights [d], needed only for weight decay.
            hyperparameters: values by field; by default those of the method that was given.

        Raises:
            SpecError: if a hyperparameter has no value, or a name is not that of a hyperparameter, or w is missing.
        """
        return evaluate(self, Point(g, nu, U, HU, T, X, t, m, w), hyperparameters)

    def latex(self) -> str:
        """The flow, α, β, σ² and the stationary ν as an ``align*`` environment (amsmath).

        Products, powers and quotients of vectors are entry by entry (⊙).  𝒯ᵀ is the adjoint of
        𝒯[Σ] = ∇³L(w)[Σ], and diag_U(x) is Uᵀdiag(x)U.
        """
        return latex_page(self)

    def _repr_latex_(self) -> str:
        return self.latex()

    def __str__(self) -> str:
        return text_page(self)

    def __repr__(self) -> str:
        return f"derive({self.spec.method!r})" + (".at_edge()" if self.on_edge else "")


@overload
def derive(
    method: MethodLike | type[Method],
    *,
    numeric: bool = False,
    accuracy: Accuracy | None = None,
    noise: Literal[False] = False,
) -> Derivation: ...


@overload
def derive(method: MethodLike | type[Method], *, numeric: bool = False, noise: Literal[True]) -> NoisyDerivation: ...


def derive(
    method: MethodLike | type[Method],
    *,
    numeric: bool = False,
    accuracy: Accuracy | None = None,
    noise: bool = False,
) -> Derivation | NoisyDerivation:
    """Derive the central flow of an optimizer in closed form.

    The average of f over the oscillation is f + ½∇²_g f[HΣH], the default of :func:`dvi.central_flow`
    (``"gradient-covariance"``).

    Args:
        method: a :class:`dvi.Method` with ``Scalar`` or ``Diagonal`` preconditioner, a triple ``(init, f, P)``, or a
            class of methods.  The hyperparameters of a class that have no default become symbols.
        numeric: insert the numbers of the hyperparameters instead of their letters (lr → η, eps → ε, beta2 → β₂, …).
            A hyperparameter that is 0 never appears in the formulas.
        accuracy: of the flow, as in :func:`dvi.central_flow`.  ``"second-order"`` has the momentum as a state and the
            logarithmic rate of ν.  The default is ``"paper"``, and ``"second-order"`` for a method with momentum.
        noise: derive the flow with mini-batch noise (:func:`dvi.noisy_flow`) in place of the central flow: a
            :class:`~dvi.symbolic.NoisyDerivation`.  For methods without momentum.

    Raises:
        SpecError: if f, P or Q has no closed form: it branches on a value, uses a function without derivatives, or
            has a matrix as preconditioner or as part of ν.  Also if ν has no memory (β₂ = 0); at second order, if
            parts of ν depend on one another; and if the first instability of a filter is not of period two.  This last
            check needs numbers: the formulas of a class hold for hyperparameters that pass it.
        ValueError: for any other ``accuracy``, or if it is given together with noise.
    """
    if accuracy not in (None, "paper", "second-order"):
        raise ValueError(f'accuracy is "paper" or "second-order", not {accuracy!r}.')
    if noise and accuracy is not None:
        raise ValueError("The flow with noise takes the optimizer's own steps: leave accuracy out.")
    spec = read(method, numeric, None if accuracy is None else accuracy == "second-order")
    accuracy = accuracy or ("second-order" if spec.momentum else "paper")
    x = letters()

    J = _jacobian(spec)
    inverse = _inverse(spec, J)
    factor = _logarithmic(spec, J) if accuracy == "second-order" else inverse
    # what oscillations h add to the average of f: as a bilinear form in h, and with HΣH inserted
    bilinear = bends(spec)
    curvature = [contract(b, x.HU_c, x.HU_d) for b in bilinear]
    if noise:
        return with_noise(spec, curvature)

    P_free = _rate_of_P(spec, inverse, spec.f) + factored(directional(spec.edge, {x.t: sympy.Integer(1)}))
    P_push, P_pushed = _rate_of_P(spec, inverse, bilinear), _rate_of_P(spec, inverse, curvature)
    UaUb, drift = x.U_a * x.U_b, spec.gain * x.T_ab / spec.p
    return Derivation(
        spec=spec,
        P=spec.p,
        flow=_flow(spec, factor, curvature, accuracy),
        factor=factor,
        alpha=-Total(drift * x.g) - spec.decay * Total(x.T_ab * x.w) - 2 * Total(UaUb * P_free),
        beta=Total(drift * x.T_cd) / 2 + 2 * Total(UaUb * P_push),
        sigma2_parts=one_direction(spec, P_free, P_pushed),
        stationary_nu=stationary(spec, curvature),
        P_free=P_free,
        P_pushed=P_pushed,
        symbols=vars(x) | {str(s): s for s in (*(leaf.symbol for leaf in spec.leaves), *spec.hyperparameters.values())},
        accuracy=accuracy,
    )


def _jacobian(spec: SymbolicSpec) -> Matrix:
    """J = ∂f/∂ν at one coordinate."""
    one, n = sympy.Integer(1), len(spec.leaves)
    return Matrix(n, n, [factored(directional(f, {leaf.symbol: one})) for f in spec.f for leaf in spec.leaves])


def _inverse(spec: SymbolicSpec, J: Matrix) -> Matrix:
    """(I + J)⁻¹."""
    if not J.rows:
        return J  # older versions of sympy cannot invert an empty matrix
    matrix = sympy.eye(J.rows) + J
    if factored(sympy.expand(matrix.det())) == 0:
        raise SpecError(
            f"{spec.method}: I + ∂f/∂ν is singular, so ν follows the gradient at once (β₂ = 0) and has no differential "
            "equation. Give it some memory (β₂ ≥ 1e-3)."
        )
    return matrix.inv(method="ADJ").applyfunc(factored)


def _logarithmic(spec: SymbolicSpec, J: Matrix) -> Matrix:
    """log(I + J) J⁻¹, which is 1 where J is 0."""
    if not J.is_diagonal():
        raise SpecError(
            f"{spec.method}: parts of ν depend on one another, so its rate at second order is the logarithm of "
            'a matrix. accuracy="paper" has a closed form; flow.linearise(w, nu) gives this rate in numbers.'
        )
    slopes = [J[i, i] for i in range(J.rows)]
    return sympy.diag(*(sympy.log(factored(1 + slope)) / slope if slope != 0 else 1 for slope in slopes))


def _rate_of_P(spec: SymbolicSpec, inverse: Matrix, changes: Sequence[Expr]) -> Expr:
    """The rate of P̃ for given changes of the parts of ν, with one term for each part."""
    rates = inverse * Matrix(len(changes), 1, list(changes))
    moved = (directional(spec.edge, {leaf.symbol: rate}) for leaf, rate in zip(spec.leaves, rates, strict=True))
    return Add(*map(factored, moved))


def _flow(spec: SymbolicSpec, factor: Matrix, curvature: Sequence[Expr], accuracy: Accuracy) -> SymbolicFlow:
    x = letters()
    averages = Matrix(len(spec.f), 1, [f + bend for f, bend in zip(spec.f, curvature, strict=True)])
    nu = {
        leaf.name: Eq(_rate(str(leaf.symbol)), factored(rate), evaluate=False)
        for leaf, rate in zip(spec.leaves, factor * averages, strict=True)
    }
    force = x.g + x.D3L / 2
    if accuracy == "paper":
        return SymbolicFlow(Eq(_rate("w"), -spec.gain / spec.p * force - spec.decay * x.w), nu)
    relaxation = Eq(_rate("m"), (force - x.m) / (spec.lag + sympy.Rational(1, 2)))
    w = -spec.gain / spec.p * x.m
    if spec.decay != 0:  # w forgets like ν, with −γ in place of J
        w = sympy.log(1 - spec.decay) * (x.w - factored(w / spec.decay))
    return SymbolicFlow(Eq(_rate("w"), w), nu, relaxation)


def _rate(name: str) -> Derivative:
    t = letters().t
    return Derivative(Function(name)(t), t)


__all__ = ["Derivation", "derive"]
