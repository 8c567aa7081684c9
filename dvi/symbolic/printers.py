"""Expressions of a derivation in print: LaTeX without indices, and a line of text."""

from __future__ import annotations

from typing import Any

import sympy
from sympy import Add, Expr, Integer, Mul, Pow, Rational, Symbol
from sympy.printing.latex import LatexPrinter
from sympy.printing.precedence import precedence
from sympy.printing.pretty.pretty_symbology import pretty_symbol, pretty_use_unicode
from sympy.printing.str import StrPrinter

from dvi.symbolic.simplification import negative, outer
from dvi.symbolic.vectors import Entry, Total, changes, entry, is_vector, letters

#: How the letters of :func:`dvi.symbolic.vectors.letters` are printed: LaTeX, text.
PRINTED = {
    "g": (r"\nabla L(w)", "∇L"),
    "m": ("m", "m"),
    "descent": (r"-\nabla L(w)", "(-∇L)"),
    "D3L": (r"\nabla^3 L(w)[\Sigma]", "∇³L[Σ]"),
    "HSH": (r"\mathrm{diag}(H \Sigma H)", "diag(HΣH)"),
    "Sii": (r"\mathrm{diag}(\Sigma)", "diag(Σ)"),
    "HSigmaH": (r"H \Sigma H", "HΣH"),
    "Sigma": (r"\Sigma", "Σ"),
    "T_ab": (r"\mathcal{T}_{ab}", "𝒯_ab"),
    "T_cd": (r"\mathcal{T}_{cd}", "𝒯_cd"),
    "HU_c": (r"(H u_{c})", "(Hu_c)"),
    "HU_d": (r"(H u_{d})", "(Hu_d)"),
    **{f"U_{a}": (f"u_{{{a}}}", f"u_{a}") for a in "abcd"},
    "u": ("u", "u"),
    "Tuu": (r"\nabla^3 L(w)[u, u]", "∇³L[u,u]"),
    "dS": (r"\nabla S(w)", "∇S"),
    "S": ("S(w)", "S"),
}
_TRACES = {"HSH": (r"\mathrm{tr}(H \Sigma H)", "tr(HΣH)"), "Sii": (r"\mathrm{tr}(\Sigma)", "tr(Σ)")}
#: The order of reading within a sum and within an inner product; then the state, then numbers.
_ORDER = ("descent", "T_ab", "Tuu", "dS", "g", "HSH", "Sii", "S")
_FIRST = ("dS", "Tuu", "T_ab", "U_a", "u")
_DESCENT = entry("descent")
_SUPERSCRIPT = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


def latex(e: Expr) -> str:
    """An expression in LaTeX."""
    return str(_Latex().doprint(_downhill(e)))


def text(e: Expr) -> str:
    """An expression in a line of text."""
    return str(_Text().doprint(_downhill(e)))


def _letter(name: str) -> str:
    """``eta`` as η, whatever stdout was when sympy was first loaded (it then decides whether there is Unicode)."""
    before = pretty_use_unicode(True)
    try:
        return str(pretty_symbol(name))
    finally:
        pretty_use_unicode(before)


def _downhill(e: Expr) -> Expr:
    """⟨∇S, −∇L⟩ for −⟨∇S, ∇L⟩, as the paper writes progressive sharpening."""
    x = letters()

    def sharpening(e: Expr) -> bool:
        return isinstance(e, Total) and x.g in e.args[0].args and bool(e.free_symbols & {x.dS, x.Tuu, x.T_ab})

    return e.replace(sharpening, lambda e: -Total(e.args[0] / x.g * _DESCENT))


def _printed(symbol: Symbol, column: int) -> str | None:
    known = symbol == _DESCENT or symbol == vars(letters()).get(symbol.name)
    return PRINTED[symbol.name][column] if known and symbol.name in PRINTED else None


def _names(e: Expr) -> set[str]:
    return {s.name for s in e.free_symbols}


def _place(e: Expr, order: tuple[str, ...]) -> int:
    """Where it stands: after how many of the names."""
    names = _names(e)
    return next((i for i, name in enumerate(order) if name in names), len(order))


def _terms(e: Add) -> list[Expr]:
    """The terms in the order of reading: what is added before what is taken away, gradients first, numbers last."""
    return sorted(e.args, key=lambda x: (negative(x), _place(x, _ORDER), not changes(x), sympy.default_sort_key(x)))


def joined(parts: list[str]) -> str:
    """Terms with signs between them."""
    out = parts[0]
    for part in parts[1:]:
        out += f" - {part[1:].lstrip()}" if part.startswith("-") else f" + {part}"
    return out


def _common(e: Add) -> tuple[Rational, Expr]:
    """The number that all terms share, up to sign."""
    sizes = {abs(term.as_coeff_Mul()[0]) for term in e.args}
    size = sizes.pop() if len(sizes) == 1 else Integer(1)
    return size, Add(*(term / size for term in e.args))


def _norm(e: Pow) -> tuple[Expr, Integer] | None:
    """|x|ⁿ as (x, n), where e is such a power."""
    if not (isinstance(e.base, Total) and isinstance(e.base.args[0], Pow) and e.base.args[0].exp == 2):
        return None
    power = 2 * e.exp
    return (e.base.args[0].base, power) if power.is_Integer and power > 0 else None


class _Latex(LatexPrinter):  # type: ignore[misc]
    """Vectors without indices: ⊙ between them, ⊙2 for a square, norms and inner products for sums."""

    def _print_Symbol(self, e: Symbol, style: str = "plain") -> str:
        return _printed(e, 0) or super()._print_Symbol(e, style)

    _print_Entry = _print_Level = _print_Symbol

    def _print_Rational(self, e: Rational) -> str:
        return str(super()._print_Rational(e) if e.q < 1000 else super()._print_Float(sympy.Float(e, 15)))

    def _print_Pow(self, e: Pow) -> str:
        if isinstance(e.base, Entry) and e.exp.is_Integer and e.exp > 1:
            return rf"{self._print(e.base)}^{{\odot {e.exp}}}"
        if (norm := _norm(e)) is not None:
            x, power = norm
            return rf"\|{self._print(x)}\|" + (f"^{{{power}}}" if power != 1 else "")
        return str(super()._print_Pow(e))

    def _print_Add(self, e: Add, order: Any = None) -> str:
        if not changes(e):
            return str(super()._print_Add(e, order))
        number, terms = _common(e)
        shown = joined([self._print(term) for term in _terms(terms)])
        return shown if number == 1 else rf"{self._print(number)} \left[{shown}\right]"

    def _print_Mul(self, e: Mul) -> str:
        if not changes(e):
            return str(super()._print_Mul(e))
        if negative(e):
            return f"-{self._inside(-e)}"
        outside, rest = outer(e)
        if outside != 1 and not rest.is_number:
            shown = rf"\left({self._print(outside)}\right)" if isinstance(outside, Add) else self._print(outside)
            number, bare = rest.as_coeff_Mul()
            if number != 1 and sympy.fraction(bare)[1] == 1:  # a number stands in front
                return f"{self._print(number)} {shown} {self._inside(bare)}"
            return f"{shown} {self._inside(rest)}"
        numerator, denominator = sympy.fraction(e)
        factors = Mul.make_args(numerator)
        brackets = [x for x in factors if isinstance(x, Add)]
        vectors = sorted((x for x in factors if is_vector(x) and x not in brackets), key=self._state_first)
        scalars = sorted((x for x in factors if not is_vector(x) and x not in brackets), key=lambda x: x.has(Total))
        if len(vectors) + len(brackets) <= 1 and not (brackets and (scalars or denominator == 1)):
            return self._fraction([*scalars, *vectors, *brackets], denominator)
        head = [self._fraction(scalars, denominator)] if scalars or denominator != 1 else []
        parts = head + [self._inside(x) for x in (*vectors, *brackets)]
        kinds = ([is_vector(denominator)] if head else []) + [is_vector(x) for x in (*vectors, *brackets)]
        out = parts[0]
        for i in range(1, len(parts)):
            out += rf" \odot {parts[i]}" if kinds[i] and any(kinds[:i]) else rf" {parts[i]}"
        return out

    @staticmethod
    def _state_first(e: Expr) -> tuple[Any, ...]:
        return bool(_names(e) & {"HSH", "Sii"}), sympy.default_sort_key(e)

    def _inside(self, e: Expr) -> str:
        """As a factor: a sum in brackets."""
        shown = str(self._print(e))
        bracketed = not isinstance(e, Add) or (changes(e) and _common(e)[0] != 1)  # as a number times a bracket
        return shown if bracketed else rf"\left[{shown}\right]"

    def _fraction(self, factors: list[Expr], denominator: Expr) -> str:
        number = Mul(*(x for x in factors if x.is_Rational))
        rest = [x for x in factors if not x.is_Rational]
        shown = [self._print(number)] if number != 1 or not rest else []
        alone = not shown and len(rest) == 1
        top = " ".join(shown + [self._print(x) if alone else self._inside(x) for x in rest])
        return top if denominator == 1 else rf"\frac{{{top}}}{{{self._print(denominator)}}}"

    def _print_Total(self, e: Expr, exp: str | None = None) -> str:
        shown = self._sum(e.args[0])
        return shown if exp is None else rf"\left({shown}\right)^{{{exp}}}"

    def _sum(self, inner: Expr) -> str:
        """Σᵢ of an expression."""
        if isinstance(inner, Entry) and inner.name in _TRACES:
            return _TRACES[inner.name][0]
        if isinstance(inner, Pow) and inner.exp == 2:
            return rf"\|{self._print(inner.base)}\|^{{2}}"
        numerator, denominator = sympy.fraction(inner)
        factors = sorted(Mul.make_args(numerator), key=lambda x: _place(x, _FIRST))
        if len(factors) > 1 or denominator != 1:
            left, right = factors[0], Mul(*factors[1:]) / denominator
            return rf"\left\langle {self._print(left)}, {self._print(right)} \right\rangle"
        return rf"\sum_{{i}} \left[{self._print(inner)}\right]_{{i}}"

    def _print_Bilinear(self, e: Expr, exp: str | None = None) -> str:
        a, b, M = map(self._print, e.args)
        shown = rf"\left\langle {a}, {M} \left[{b}\right] \right\rangle"
        return shown if exp is None else rf"{shown}^{{{exp}}}"

    def _print_Image(self, e: Expr, exp: str | None = None) -> str:
        b, M = map(self._print, e.args)
        shown = rf"{M} \left[{b}\right]"
        return shown if exp is None else rf"\left({shown}\right)^{{\odot {exp}}}"

    def _print_Derivative(self, e: Expr) -> str:
        return rf"{self._print(Symbol(str(e.expr.func)))}'(t)"

    def _print_Function(self, e: Expr, exp: str | None = None) -> str:
        if e.args != (letters().t,):
            return str(super()._print_Function(e, exp))
        shown = f"{self._print(Symbol(str(e.func)))}(t)"
        return shown if exp is None else f"{shown}^{{{exp}}}"


class _Text(StrPrinter):  # type: ignore[misc]
    """The same in one line of plain text."""

    def _print_Symbol(self, e: Symbol) -> str:
        return _printed(e, 1) or _letter(e.name)

    _print_Entry = _print_Level = _print_Symbol

    def _print_Add(self, e: Add, order: Any = None) -> str:
        return joined([self._print(term) for term in _terms(e)]) if changes(e) else super()._print_Add(e, order)

    def _print_Pow(self, e: Pow, rational: bool = False) -> str:
        if (norm := _norm(e)) is not None:
            x, power = norm
            return f"|{self._print(x)}|" + (str(power).translate(_SUPERSCRIPT) if power != 1 else "")
        if e.exp == sympy.S.Half:
            return f"√{self._inside(e.base, simple=True)}"
        if not (e.exp.is_Integer and e.exp > 1):
            return str(super()._print_Pow(e, rational))
        base = self.parenthesize(e.base, precedence(e))
        return f"{base}{str(e.exp).translate(_SUPERSCRIPT)}"

    def _print_Rational(self, e: Rational) -> str:
        return str(super()._print_Rational(e)) if e.q < 1000 else f"{float(e):.15g}"

    def _print_Mul(self, e: Mul) -> str:
        if negative(e):
            return f"-{self._inside(-e)}"
        numerator, denominator = sympy.fraction(e)
        factors = sorted(Mul.make_args(numerator), key=lambda x: (changes(x), x.has(Total), isinstance(x, Add)))
        top = "·".join(map(self._inside, factors))
        return top if denominator == 1 else f"{top}/{self._inside(denominator, simple=True)}"

    def _inside(self, e: Expr, simple: bool = False) -> str:
        """As a factor: a sum in brackets, and a product, too, if asked for."""
        compound = isinstance(e, Add) or (simple and (isinstance(e, Mul) or (e.is_Rational and e.q != 1)))
        return f"({self._print(e)})" if compound else str(self._print(e))

    def _print_Total(self, e: Expr) -> str:
        (inner,) = e.args
        if isinstance(inner, Entry) and inner.name in _TRACES:
            return _TRACES[inner.name][1]
        if isinstance(inner, Pow) and inner.exp == 2:
            return f"|{self._print(inner.base)}|²"
        return f"Σᵢ[{self._print(inner)}]"

    def _print_Bilinear(self, e: Expr) -> str:
        a, b, M = map(self._print, e.args)
        return f"⟨{a}, {M}[{b}]⟩"

    def _print_Image(self, e: Expr) -> str:
        b, M = map(self._print, e.args)
        return f"{M}[{b}]"

    def _print_Function(self, e: Expr) -> str:
        return f"{_letter(str(e.func))}({', '.join(map(self._print, e.args))})"

    def _print_Derivative(self, e: Expr) -> str:
        return f"{_letter(str(e.expr.func))}'(t)"
