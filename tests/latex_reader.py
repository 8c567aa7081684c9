"""A reader of the LaTeX that a derivation is printed in, to see that it says what the expression says.

sum     = ["-"] product (("+" | "-") product)*
product = power+, with or without \\odot between
power   = atom ["^" group]
atom    = name | number | \\frac group group | \\sqrt group | \\log group | (sum) | [sum] | group
        | |sum|  | <sum, sum>  | map group
"""

import re

import sympy

from dvi.symbolic.vectors import Level, Total, entry, letters

TOKEN = re.compile(
    r"@\d+@|\\(?:left|right)?\s*\\?(?:langle|rangle)|\\left[(\[]|\\right[)\]]|\\[a-z]+|\\\||\d+(?:\.\d+)?|[-+^{},]"
)


NAMES = {
    r"\nabla L(w)": entry("g"),
    r"\nabla^3 L(w)[\Sigma]": entry("D3L"),
    r"\nabla^3 L(w)[u, u]": entry("Tuu"),
    r"\nabla S(w)": entry("dS"),
    "S(w)": Level("S", positive=True),
    "u": entry("u"),
    "w": entry("w"),
    r"\mathrm{diag}(H \Sigma H)": entry("HSH"),
    r"\mathrm{diag}(\Sigma)": entry("Sii"),
    r"\mathrm{tr}(H \Sigma H)": Total(entry("HSH")),
    r"\mathrm{tr}(\Sigma)": Total(entry("Sii")),
    r"\mathcal{T}[\Sigma]": entry("T_cd"),  # for Σ = u_c u_dᵀ
    "I": sympy.Symbol("I"),
    r"\tau": sympy.Symbol("tau"),
    **{rf"\mathcal{{T}}_{{{pair}}}": entry(f"T_{pair}") for pair in ("ab", "cd")},
    **{f"u_{{{a}}}": entry(f"U_{a}") for a in "abcd"},
    **{f"(H u_{{{a}}})": entry(f"HU_{a}") for a in "cd"},
}
# What a map makes of a vector, by the entry ab of the matrix [k, k]; diag(p) is P, which is read as p.
MAPS = {
    r"\mathcal{T}^{\mathsf{T}}": lambda e: Total(entry("T_ab") * e),
    r"\mathrm{diag}_{U}": lambda e: Total(entry("U_a") * entry("U_b") * e),
    r"\mathrm{diag}{": lambda e: e,
}


class Reader:
    """Reads expressions in given symbols, which it knows by sympy's names for them."""

    def __init__(self, symbols):
        known = NAMES | {sympy.latex(s): s for s in symbols}
        for s in symbols:
            if s.is_Function:
                known[rf"\frac{{d{sympy.latex(sympy.Symbol(str(s.func)))}}}{{dt}}"] = s.diff(letters().t)
        self.known = sorted(known.items(), key=lambda item: -len(item[0]))

    def read(self, text):
        """The expression that a formula says."""
        for i, name in enumerate(MAPS):
            text = text.replace(name, rf"\map{'abc'[i]}" + "{" * name.endswith("{"))
        for i, (name, _) in enumerate(self.known):
            pattern = re.escape(name)
            if re.fullmatch(r"[a-zA-Z]", name):
                pattern = rf"(?<![\\a-zA-Z@]){name}(?![a-zA-Z(])"
            text = re.sub(pattern, f"@{i}@", text)
        self.tokens = TOKEN.findall(text)
        assert re.sub(r"\s|\\,", "", "".join(self.tokens)) == re.sub(r"\s|\\,", "", text), text
        self.at = 0
        out = self.sum()
        assert self.at == len(self.tokens), self.tokens[self.at :]
        return out

    def read_page(self, page):
        """What the equations of a page say, by their left sides; complementarity is left out."""
        lines = [line.strip().removesuffix(r" \\") for line in page.splitlines()[1:-1]]
        return {
            left.strip(): self.read(right.strip().removeprefix("= "))
            for left, right in (line.split("&") for line in lines)
            if right.strip().startswith("=")
        }

    def peek(self):
        return self.tokens[self.at].replace(" ", "") if self.at < len(self.tokens) else None

    def take(self, *expected):
        token = self.peek()
        assert not expected or token in expected, (expected, self.tokens[self.at :])
        self.at += 1
        return token

    def sum(self):
        out, sign = sympy.Integer(0), 1
        if self.peek() == "-":
            self.take()
            sign = -1
        while True:
            out += sign * self.product()
            if self.peek() not in ("+", "-"):
                return out
            sign = 1 if self.take() == "+" else -1

    def product(self):
        out = self.power()
        while (token := self.peek()) is not None and token not in "+-,}" and not self.closes(token):
            if token in ("\\odot", "\\cdot"):
                self.take()
            out *= self.power()
        return out

    def closes(self, token):
        return token.startswith("\\right") or (token == "\\|" and self.open_norm)

    open_norm = False

    def power(self):
        if self.peek() == "\\|":
            self.take()
            self.open_norm = True
            inner = self.sum()
            self.open_norm = False
            self.take("\\|")
            base, scale = Total(inner**2), sympy.Rational(1, 2)
        else:
            base, scale = self.atom(), 1
        if self.peek() == "^":
            self.take()
            scale *= self.group()
        return base**scale

    def group(self):
        self.take("{")
        if self.peek() == "\\odot":
            self.take()
        out = self.sum()
        self.take("}")
        return out

    def atom(self):
        token = self.peek()
        if token == "{":
            return self.group()
        self.take()
        if token.startswith("@"):
            return self.known[int(token[1:-1])][1]
        if token[0].isdigit():
            return sympy.Rational(token)
        if token == "\\frac":
            return self.group() / self.group()
        if token in ("\\sqrt", "\\log"):
            return getattr(sympy, token[1:])(self.group())
        if token == "\\left\\langle":
            left = self.sum()
            self.take(",")
            right = self.sum()
            self.take("\\right\\rangle")
            return Total(left * right)
        if token.startswith("\\map"):
            return list(MAPS.values())["abc".index(token[-1])](self.group())
        assert token in ("\\left[", "\\left("), token
        out = self.sum()
        assert self.take().startswith("\\right")
        return out
