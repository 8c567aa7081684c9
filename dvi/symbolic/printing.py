"""A derived flow in print: LaTeX as in the paper's C.3–C.5, and plain text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sympy import Add, Expr

from dvi.symbolic.printers import latex, text
from dvi.symbolic.simplification import each, negative
from dvi.symbolic.vectors import is_vector, letters

if TYPE_CHECKING:
    from dvi.symbolic.derivation import Derivation

_FORCE = r"\left[\nabla L(w) + \tfrac12 \nabla^3 L(w)[\Sigma]\right]"
_T = r"\mathcal{T}"
_TT = r"\mathcal{T}^{\mathsf{T}}"


def equations(d: Derivation) -> list[tuple[str, str]]:
    """(left, right) of every equation, in LaTeX; the right side begins with its relation."""
    inverse = latex(d.gain / d.P)
    times = rf"{inverse} \odot" if is_vector(d.P) else inverse
    lines = [(r"\frac{dw}{dt}", rf"= -{times} {_FORCE if d.flow.m is None else 'm'}")]
    if d.flow.m is not None:
        lag = r"\left(\tau + \tfrac12\right)" if d.spec.momentum else r"\tfrac12"
        lines.append((rf"{lag} \frac{{dm}}{{dt}}", rf"= {_FORCE} - m"))
    for leaf in d.spec.leaves:
        if not leaf.clock:
            lines.append((rf"\frac{{d{latex(leaf.symbol)}}}{{dt}}", f"= {latex(d.flow.nu[leaf.name].rhs)}"))
    lines.append((r"0 \preceq \Sigma", rf"\perp {'c' if d.spec.momentum else '2'}P - H(w) \succeq 0"))
    if d.spec.momentum:
        lines += [
            (name, f"= {latex(value)}") for name, value in (("c", d.threshold), ("Q_1", d.gain), (r"\tau", d.lag))
        ]
    lines.append(("P", f"= {_matrix(d.P, d.spec.diagonal)}"))
    if d.spec.diagonal:
        alpha = rf"{_TT}\left[-{latex(d.gain * letters().g / d.P)}\right]"
        beta = rf"\tfrac12 {_TT}\left[{times} {_T}[\Sigma]\right]"
    else:
        alpha = rf"{inverse}\, {_TT}\left[-\nabla L(w)\right]"
        beta = rf"\tfrac12 {inverse}\, {_TT} {_T}[\Sigma]"
    lines.append((r"\alpha", f"= {alpha}{_moved(d, each(d.P_free, lambda e: -2 * e))}"))
    lines.append((r"\beta[\Sigma]", f"= {beta}{_moved(d, each(d.P_pushed, lambda e: 2 * e))}"))
    lines.append((r"\sigma^2", f"= {_quotient(*d.sigma2_parts)}"))
    for condition in d.stationary_nu.values():
        lines.append((rf"\text{{stationary: }} {latex(condition.lhs)}", f"= {latex(condition.rhs)}"))
    return lines


def _quotient(numerator: Expr, denominator: Expr) -> str:
    if isinstance(numerator, Add) or isinstance(denominator, Add):
        return rf"\frac{{{latex(numerator)}}}{{{latex(denominator)}}}"
    return latex(numerator / denominator)


def _matrix(e: Expr, diagonal: bool) -> str:
    """e·I or diag(e)."""
    if diagonal:
        return rf"\mathrm{{diag}}\left[{latex(e)}\right]"
    return rf"\left[{latex(e)}\right] I" if isinstance(e, Add) else rf"{latex(e)}\, I"


def _moved(d: Derivation, e: Expr) -> str:
    """What a moving P adds to α or β, on the critical subspace."""
    if e == 0:
        return ""
    sign, e = ("-", -e) if negative(e) else ("+", e)
    matrix = _matrix(e, d.spec.diagonal)
    return rf" {sign} \left.{matrix}\right|_{{U}}" if d.spec.diagonal else f" {sign} {matrix}"


def document(d: Derivation) -> str:
    """All equations as one ``align*`` environment."""
    body = " \\\\\n".join(f"  {left} &{right}" for left, right in equations(d))
    return f"\\begin{{align*}}\n{body}\n\\end{{align*}}"


def plain(d: Derivation) -> str:
    """All equations in plain text, one a line."""
    inverse = d.gain / d.P
    shown = f"({text(inverse)})" if inverse.is_Add else text(inverse)
    force = "[∇L + ½∇³L[Σ]]"
    lines = [f"dw/dt = -{shown} {force if d.flow.m is None else 'm'}"]
    if d.flow.m is not None:
        lines.append(f"{'(τ + ½)' if d.spec.momentum else '½'} dm/dt = {force} - m")
    for leaf in d.spec.leaves:
        if not leaf.clock:
            lines.append(f"d{text(leaf.symbol)}/dt = {text(d.flow.nu[leaf.name].rhs)}")
    matrix = "diag[{}]" if d.spec.diagonal else "({}) I"
    lines.append(f"0 ⪯ Σ ⟂ {'c' if d.spec.momentum else '2'}P - H ⪰ 0,  P = {matrix.format(text(d.P))}")
    if d.spec.momentum:
        lines.append(f"c = {text(d.threshold)},  Q₁ = {text(d.gain)},  τ = {text(d.lag)}")
    free, pushed = each(d.P_free, lambda e: -2 * e), each(d.P_pushed, lambda e: 2 * e)
    first = (f"𝒯ᵀ[-{text(d.gain * letters().g / d.P)}]", f"½ 𝒯ᵀ[{shown} 𝒯[Σ]]")
    if not d.spec.diagonal:
        first = (f"{shown} 𝒯ᵀ[-∇L]", f"½ {shown} 𝒯ᵀ𝒯[Σ]")
    for name, start, moved in zip(("α", "β[Σ]"), first, (free, pushed), strict=True):
        sign, moved = ("-", -moved) if negative(moved) else ("+", moved)
        lines.append(f"{name} = {start}" + (f" {sign} {matrix.format(text(moved))}" if moved != 0 else ""))
    numerator, denominator = d.sigma2_parts
    lines.append(f"σ² = ({text(numerator)}) / ({text(denominator)})")
    lines += [f"stationary: {text(c.lhs)} = {text(c.rhs)}" for c in d.stationary_nu.values()]
    return "\n".join([f"Central flow of {d.spec.name}", *(f"  {line}" for line in lines)])
