"""Vectors in sympy, represented by their generic entry: the letters of :func:`dvi.derive`.

A vector x [d] is one symbol, an :class:`Entry`.  It stands for the entry xᵢ at the same coordinate i everywhere,
and operations on it act entry by entry.  Coordinates are combined only in sums, and a sum is ``Total(e)`` = Σᵢ e.  So
‖x‖² is ``Total(x**2)``, and x/‖x‖ is ``x/sqrt(Total(x**2))``.  No index is written, so none can be confused, and equal
expressions are equal objects.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import sympy
from sympy import Add, Dummy, Expr, Function, Integer, Mul, Symbol

#: The number of weights.
DIMENSION = Symbol("d", positive=True, integer=True)


class Letter(Symbol):  # type: ignore[misc]
    """A quantity that changes along the flow, unlike a hyperparameter."""

    @classmethod
    def class_key(cls) -> tuple[int, int, str]:
        """Letters are printed after other factors."""
        return 5, 0, cls.__name__


class Entry(Letter):
    """The generic entry of a vector [d]."""


class Level(Letter):
    """A scalar that changes along the flow."""


def entry(name: str) -> Entry:
    """The generic entry of a real vector."""
    return Entry(name, real=True)


def is_vector(e: Any) -> bool:
    """Does the expression depend on the coordinate, that is, on an entry outside of every sum?"""
    if isinstance(e, (Total, Bilinear)):
        return False
    return isinstance(e, (Entry, Image)) or any(is_vector(part) for part in e.args)


class Total(Function):  # type: ignore[misc]
    """Σᵢ e over the coordinates.  It is linear, so terms and scalar factors are taken out at once."""

    nargs = 1

    @classmethod
    def eval(cls, e: Expr) -> Expr | None:
        """Linearity, and Σᵢ s = d·s for a scalar s."""
        if not is_vector(e):
            return DIMENSION * e
        scalars, vectors = split(e)
        expanded = sympy.expand(vectors, deep=False)
        if isinstance(expanded, Add):
            return scalars * Add(*map(cls, expanded.args))
        if scalars != 1 or expanded != e:
            return scalars * cls(expanded)
        return None

    def _eval_derivative(self, s: Symbol) -> Expr:
        if isinstance(s, Entry):
            raise ValueError("an entry differs at every coordinate of a sum: use directional()")
        return Total(self.args[0].diff(s))

    def _eval_is_real(self) -> bool:
        return True


class Bilinear(Function):  # type: ignore[misc]
    """The form aᵀMb for vectors a, b and a symmetric matrix M, which a symbol names."""

    nargs = 3

    @classmethod
    def eval(cls, a: Expr, b: Expr, M: Symbol) -> Expr | None:
        """Take scalar factors out; order a and b."""
        (s, a1), (t, b1) = split(a), split(b)
        a2, b2 = sorted((a1, b1), key=sympy.default_sort_key)
        return None if (a2, b2) == (a, b) else s * t * cls(a2, b2, M)


class Image(Function):  # type: ignore[misc]
    """The entry of M b for a vector b and a symmetric matrix M, which a symbol names."""

    nargs = 2

    @classmethod
    def eval(cls, b: Expr, M: Symbol) -> Expr | None:
        """Take scalar factors out."""
        s, b1 = split(b)
        return None if s == 1 else s * cls(b1, M)


def split(e: Expr) -> tuple[Expr, Expr]:
    """A product as (scalar factors, factors that depend on the coordinate)."""
    factors = Mul.make_args(e)
    vectors = [x for x in factors if is_vector(x)]
    return Mul(*(x for x in factors if not is_vector(x))), Mul(*vectors)


def directional(e: Expr, rates: Mapping[Symbol, Expr]) -> Expr:
    """d/ds e at s = 0 with x + s·rates[x] in place of every symbol x, also inside of sums.

    Like automatic differentiation, it takes the derivative of sign(x) to be 0 everywhere.
    """
    sums = {total: Dummy(real=True) for total in e.atoms(Total)}  # the outermost replace the inner ones, too
    flat = e.xreplace(sums)
    terms = [flat.diff(x) * rate for x, rate in rates.items() if flat.has(x)]
    for total, dummy in sums.items():
        if flat.has(dummy):
            terms.append(flat.diff(dummy) * Total(directional(total.args[0], rates)))
    return _without_jumps(Add(*terms).xreplace({dummy: total for total, dummy in sums.items()}))


def _without_jumps(e: Expr) -> Expr:
    """The expression with δ(x) = 0 and sign(x)² = 1."""
    if not e.has(sympy.sign, sympy.DiracDelta):
        return e
    e = e.replace(sympy.DiracDelta, lambda *_: Integer(0))
    return e.replace(lambda x: x.is_Pow and isinstance(x.base, sympy.sign) and x.exp == 2, lambda x: Integer(1))


def contract(e: Expr, h: Entry, k: Entry) -> Expr:
    """Replace hᵢkⱼ by (HΣH)ᵢⱼ in an expression that is linear in the vector h and in the vector k."""
    return Add(*(_contract_term(term, h, k) for term in Add.make_args(e)))


def _contract_term(term: Expr, h: Entry, k: Entry) -> Expr:
    x, factors = letters(), Mul.make_args(term)
    rest, holding = Mul(*(f for f in factors if not f.has(h, k))), [f for f in factors if f.has(h, k)]
    if any(isinstance(f, Add) for f in holding):
        return contract(sympy.expand_mul(term, deep=False), h, k)
    if not holding:
        return term  # 0
    if len(holding) == 1:  # Σᵢ(… hᵢkᵢ)
        return rest * Total(contract(holding[0].args[0], h, k))
    # each of two factors is the direction itself, or a sum that contains it
    sums = [f.args[0] / (h if f.has(h) else k) for f in holding if isinstance(f, Total)]
    if not sums:
        return rest * x.HSH
    return rest * (Image(*sums, x.HSigmaH) if len(sums) == 1 else Bilinear(*sums, x.HSigmaH))


def along(e: Expr, h: Expr) -> Expr:
    """Replace HΣH by hhᵀ, an oscillation along one direction u, with h = Hu."""
    x = letters()
    e = e.replace(Bilinear, lambda a, b, _: Total(a * h) * Total(b * h))
    return e.replace(Image, lambda b, _: h * Total(b * h)).xreplace({x.HSH: h**2})


def noisy(e: Expr) -> Expr:
    """Replace HΣH by HΣH + N, where N is the covariance of the gradient of a mini-batch."""
    x = letters()
    e = e.replace(Bilinear, lambda a, b, M: Bilinear(a, b, M) + Bilinear(a, b, x.N))
    return e.replace(Image, lambda b, M: Image(b, M) + Image(b, x.N)).xreplace({x.HSH: x.HSH + x.Nii})


def on_edge(e: Expr, p: Expr) -> Expr:
    """Replace HΣH by 4P̃ΣP̃ and HU by 2P̃U, where P̃ = p·I or diag(p)."""
    x = letters()
    e = e.replace(Bilinear, lambda a, b, _: 4 * Bilinear(p * a, p * b, x.Sigma))
    e = e.replace(Image, lambda b, _: 4 * p * Image(p * b, x.Sigma))
    return e.xreplace({x.HSH: 4 * p**2 * x.Sii, x.HU_c: 2 * p * x.U_c, x.HU_d: 2 * p * x.U_d})


def letters() -> SimpleNamespace:
    """The letters of the derivation, besides those of the optimizer (its state and hyperparameters).

    Vectors [d]:
        ``w`` are the weights, ``g`` is ∇L(w), ``m`` the momentum, ``D3L`` ∇³L(w)[Σ], ``HSH`` diag(HΣH), ``Sii``
        diag(Σ) and ``Nii`` diag(N).
        ``T_ab`` is ∇_w u_aᵀH(w)u_b, ``U_a`` is u_a and ``HU_c`` is H u_c; the same with other indices.
        For one direction, ``u`` is the direction and ``Tuu`` is ∇³L(w)[u, u].  ``dS`` is ∇S(w), for |u| = 1.

    Matrices and scalars:
        ``HSigmaH``, ``Sigma`` and ``N`` are the matrices HΣH, Σ and N, the covariance of a mini-batch's gradient.
        ``X_ij`` and ``N_ij`` are entries of X and UᵀNU, ``lambda_i`` and ``lambda_j`` effective eigenvalues.
        ``t`` is the time for schedules, ``S`` the sharpness S(w) and ``d`` the number of weights.
    """
    vectors = ["w", "g", "m", "D3L", "HSH", "Sii", "Nii", "T_ab", "T_cd", *(f"U_{a}" for a in "abcd"), "HU_c", "HU_d"]
    return SimpleNamespace(
        **{name: entry(name) for name in (*vectors, "u", "Tuu", "dS")},
        S=Level("S", positive=True),
        t=Symbol("t", real=True),
        HSigmaH=Symbol("HSigmaH"),
        Sigma=Symbol("Sigma"),
        N=Symbol("N"),
        **{name: Level(name, real=True) for name in ("X_ij", "N_ij", "lambda_i", "lambda_j")},
        d=DIMENSION,
    )
