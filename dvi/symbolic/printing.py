"""Prints a derived flow: as LaTeX with the letters of the paper's C.3–C.5, and as plain text.

This module extends sympy's printers by the names of the letters and by vectors.  Products (⊙), quotients, powers and
functions of vectors are entry by entry, and a sum over coordinates is an inner product.
"""

from __future__ import annotations

from typing import Any

import sympy
from sympy import Derivative, Eq, Expr, Float, Function, Mul, Pow, Rational, Symbol
from sympy.printing.latex import LatexPrinter
from sympy.printing.precedence import PRECEDENCE
from sympy.printing.pretty.pretty_symbology import pretty_symbol, pretty_use_unicode
from sympy.printing.printer import Printer
from sympy.printing.str import StrPrinter

from dvi.symbolic.formulas import Formulas
from dvi.symbolic.simplification import each, negative
from dvi.symbolic.vectors import Entry, Letter, Level, is_vector, letters

# Letters that occur only in printed equations: 𝒯[Σ], which is a vector, and the identity.
_T_SIGMA, _IDENTITY = Entry("T_Sigma"), Level("one")

#: The letters in print: LaTeX, text.  Terms and factors are printed in this order.
NAMES: dict[Symbol, tuple[str, str]] = {
    _T_SIGMA: (r"\mathcal{T}[\Sigma]", "𝒯[Σ]"),
    **{
        vars(letters())[letter]: names
        for letter, names in {
            "dS": (r"\nabla S(w)", "∇S"),
            "Tuu": (r"\nabla^3 L(w)[u, u]", "∇³L[u,u]"),
            "T_ab": (r"\mathcal{T}_{ab}", "𝒯_ab"),
            "T_cd": (r"\mathcal{T}_{cd}", "𝒯_cd"),
            "u": ("u", "u"),
            **{f"U_{a}": (f"u_{{{a}}}", f"u_{a}") for a in "abcd"},
            **{f"HU_{a}": (f"(H u_{{{a}}})", f"(Hu_{a})") for a in "cd"},
            "w": ("w", "w"),
            "g": (r"\nabla L(w)", "∇L"),
            "D3L": (r"\nabla^3 L(w)[\Sigma]", "∇³L[Σ]"),
            "HSH": (r"\mathrm{diag}(H \Sigma H)", "diag(HΣH)"),
            "Nii": (r"\mathrm{diag}(N)", "diag(N)"),
            "Sii": (r"\mathrm{diag}(\Sigma)", "diag(Σ)"),
            "S": ("S(w)", "S"),
            "HSigmaH": (r"H \Sigma H", "HΣH"),
            "Sigma": (r"\Sigma", "Σ"),
            "N": ("N", "N"),
            "N_ij": ("(U^{\\mathsf{T}}NU)_{ij}", "(UᵀNU)ᵢⱼ"),
            "X_ij": ("X_{ij}", "Xᵢⱼ"),
            "lambda_i": (r"\lambda_{i}", "λᵢ"),
            "lambda_j": (r"\lambda_{j}", "λⱼ"),
        }.items()
    },
    _IDENTITY: ("I", "I"),
    Symbol("beta_Sigma"): (r"\beta[\Sigma]", "β[Σ]"),
    Symbol("sigma2"): (r"\sigma^2", "σ²"),
    Symbol("Q1"): ("Q_1", "Q₁"),
}
_ORDER = {symbol: place for place, symbol in enumerate(NAMES)}
_MAPS = {
    "Adjoint": (r"\mathcal{T}^{\mathsf{T}}", "𝒯ᵀ"),
    "diag": (r"\mathrm{diag}", "diag"),
    "diag_U": (r"\mathrm{diag}_{U}", "diag_U"),
}
_TRACES = {
    letters().HSH: (r"\mathrm{tr}(H \Sigma H)", "tr(HΣH)"),
    letters().Sii: (r"\mathrm{tr}(\Sigma)", "tr(Σ)"),
    letters().Nii: (r"\mathrm{tr}(N)", "tr(N)"),
}
_DECIMAL = 1000  # from this denominator on, a number is printed with a decimal point


def latex_page(d: Formulas) -> str:
    """All equations as one ``align*`` environment."""
    lines = [f"{latex(e.lhs)} &= {latex(e.rhs)}" for e in flow_equations(d)]
    lines.append(rf"0 \preceq \Sigma &\perp {_threshold(d)}P - H(w) \succeq 0")
    lines += [f"{latex(e.lhs)} &= {latex(e.rhs)}" for e in definitions(d)]
    lines += [rf"\text{{stationary: }} {latex(e.lhs)} &= {latex(e.rhs)}" for e in d.stationary_nu.values()]
    body = " \\\\\n".join(f"  {line}" for line in lines)
    return f"\\begin{{align*}}\n{body}\n\\end{{align*}}"


def text_page(d: Formulas) -> str:
    """All equations in plain text, one in each line."""
    lines = [f"d{_letter(str(e.lhs.expr.func))}/dt = {text(e.rhs)}" for e in flow_equations(d)]
    lines.append(f"0 ⪯ Σ ⟂ {_threshold(d)}P - H ⪰ 0")
    lines += [f"{text(e.lhs)} = {text(e.rhs)}" for e in definitions(d)]
    lines += [f"stationary: {text(e.lhs)} = {text(e.rhs)}" for e in d.stationary_nu.values()]
    return "\n".join([f"Central flow of {d.spec.name}", *(f"  {line}" for line in lines)])


def _threshold(d: Formulas) -> str:
    """The threshold in print: 2, or c if momentum or weight decay changes it."""
    return "c" if d.spec.momentum or d.spec.decay != 0 else "2"


def flow_equations(d: Formulas) -> list[Eq]:
    """The differential equations except those of clocks; the lag of the momentum is written τ."""
    out = [d.flow.w]
    if d.flow.m is not None:
        lag = {d.lag + sympy.S.Half: Symbol("tau") + sympy.S.Half} if d.spec.momentum else {}
        out.append(Eq(d.flow.m.lhs, d.flow.m.rhs.xreplace(lag), evaluate=False))
    return out + [d.flow.nu[leaf.name] for leaf in d.spec.leaves if not leaf.clock]


def definitions(d: Formulas) -> list[Eq]:
    """P, the constants of the momentum, α, β and σ²."""
    T, drift = Function("Adjoint"), d.gain / d.P
    named = {"P": _matrix(d, d.P, "diag")}
    if _threshold(d) == "c":
        named["c"] = d.threshold
    if d.spec.momentum:
        named |= {"Q1": d.gain, "tau": d.lag}
    named["alpha"] = T(-drift * letters().g - d.spec.decay * letters().w) + _matrix(
        d, each(d.P_free, lambda e: -2 * e), "diag_U"
    )
    named["beta_Sigma"] = T(drift * _T_SIGMA / 2) + _matrix(d, each(d.P_pushed, lambda e: 2 * e), "diag_U")
    named["sigma2"] = d.sigma2
    return [Eq(Symbol(name), value, evaluate=False) for name, value in named.items()]


def _matrix(d: Formulas, e: Expr, name: str) -> Expr:
    """The matrix e·I, or diag(e) by its name."""
    if e == 0 or not d.spec.diagonal:
        return e * _IDENTITY
    return -Function(name)(-e) if negative(e) else Function(name)(e)


def latex(e: Expr) -> str:
    """An expression in LaTeX."""
    return str(_Latex({"symbol_names": {symbol: names[0] for symbol, names in NAMES.items()}}).doprint(e))


def text(e: Expr) -> str:
    """An expression in a line of text."""
    return str(_Text().doprint(e))


def _place(e: Expr) -> int:
    """The position of a term or factor: in the order of the names, denominators last."""
    place = min((_ORDER[symbol] for symbol in e.free_symbols if symbol in _ORDER), default=len(_ORDER))
    return place + len(_ORDER) * bool(e.as_base_exp()[1].is_negative)


class _Common(Printer):  # type: ignore[misc]
    """The part of the printer that LaTeX and text share."""

    def _as_ordered_terms(self, expr: Expr, order: Any = None) -> list[Expr]:
        """Terms with a plus sign come before terms with a minus sign."""
        terms = super()._as_ordered_terms(expr, order)
        return sorted(terms, key=lambda term: (negative(term), _place(term)))

    def _print_Rational(self, e: Rational) -> str:
        return str(self._print(Float(e, 15)) if e.q >= _DECIMAL else super()._print_Rational(e))


class Entrywise(Letter):
    """The printed form of a product of vectors."""


class _Latex(_Common, LatexPrinter):  # type: ignore[misc]
    def _print_Mul(self, e: Mul) -> str:
        for part, power in zip(sympy.fraction(e, exact=True), (1, -1), strict=True):
            vectors = sorted((x for x in Mul.make_args(part) if is_vector(x)), key=_place)
            if len(vectors) > 1:  # one name, a ⊙ b, replaces them
                shown = r" \odot ".join(self.parenthesize(x, PRECEDENCE["Mul"]) for x in vectors)
                e = e / Mul(*vectors) ** power * Entrywise(shown) ** power
        return str(super()._print_Mul(e))

    def _print_Entrywise(self, e: Symbol) -> str:
        return str(e.name)

    def _print_Pow(self, e: Pow) -> str:
        root = e.exp.is_Rational and abs(e.exp.p) == 1
        if root or e.exp.is_negative or not (is_vector(e.base) or e.base.is_Function):
            return str(super()._print_Pow(e))
        base = self.parenthesize(e.base, PRECEDENCE["Pow"])
        if e.base.is_Symbol or e.base.is_Function:
            base = self.parenthesize_super(base)
        exponent = self._print(e.exp)
        return rf"{base}^{{\odot {exponent}}}" if is_vector(e.base) else f"{base}^{{{exponent}}}"

    def _print_Total(self, e: Expr) -> str:
        inner = e.args[0]
        if inner in _TRACES:
            return _TRACES[inner][0]
        if isinstance(inner, Pow) and inner.exp == 2:
            return rf"\|{self._print(inner.base)}\|^{{2}}"
        first, *others = sorted(Mul.make_args(inner), key=_place)
        return rf"\left\langle {self._print(first)}, {self._print(Mul(*others))} \right\rangle"

    def _print_Bilinear(self, e: Expr) -> str:
        a, b, M = map(self._print, e.args)
        return rf"\left\langle {a}, {M} \left[{b}\right] \right\rangle"

    def _print_Image(self, e: Expr) -> str:
        b, M = map(self._print, e.args)
        return rf"{M} \left[{b}\right]"

    def _print_Derivative(self, e: Derivative) -> str:
        return rf"\frac{{d{self._print(Symbol(str(e.expr.func)))}}}{{dt}}"

    def _hprint_Function(self, name: str) -> str:
        return _MAPS[name][0] if name in _MAPS else str(super()._hprint_Function(name))


class _Text(_Common, StrPrinter):  # type: ignore[misc]
    def _print_Symbol(self, e: Symbol) -> str:
        return NAMES[e][1] if e in NAMES else _letter(e.name)

    def _print_Total(self, e: Expr) -> str:
        inner = e.args[0]
        if inner in _TRACES:
            return _TRACES[inner][1]
        if isinstance(inner, Pow) and inner.exp == 2:
            return f"|{self._print(inner.base)}|²"
        return f"Σᵢ[{self._print(inner)}]"

    def _print_Bilinear(self, e: Expr) -> str:
        a, b, M = map(self._print, e.args)
        return f"⟨{a}, {M}[{b}]⟩"

    def _print_Image(self, e: Expr) -> str:
        b, M = map(self._print, e.args)
        return f"{M}[{b}]"

    def _print_Derivative(self, e: Derivative) -> str:
        return f"{_letter(str(e.expr.func))}'(t)"

    def _print_Function(self, e: Expr) -> str:
        name = e.func.__name__
        return f"{_MAPS[name][1] if name in _MAPS else _letter(name)}({self.stringify(e.args, ', ')})"


def _letter(name: str) -> str:
    """``eta`` as η, even if sympy found no Unicode in stdout when it was first imported."""
    before = pretty_use_unicode(True)
    try:
        return str(pretty_symbol(name))
    finally:
        pretty_use_unicode(before)
