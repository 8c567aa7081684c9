"""A reader of the LaTeX that a derivation is printed in, to see that it says what the expression says.

sum     = ["-"] product (("+" | "-") product)*
product = power+, with or without \\odot between
power   = atom ["^" group]
atom    = name | number | \\frac group group | \\sqrt group | \\log group | (sum) | [sum] | group
        | |sum|  | <sum, sum>  | \\sum_i [sum]_i
"""

import re

import sympy

from dvi.symbolic.printers import PRINTED, latex
from dvi.symbolic.vectors import Total, entry, letters

TOKEN = re.compile(
    r"@\d+@|\\(?:left|right)?\s*\\?(?:langle|rangle)|\\left[(\[]|\\right[)\]](?:_\{i\})?|\\sum_\{i\}|\\[a-z]+|\\\||\d+(?:\.\d+)?|[-+^{},]"
)


class Reader:
    """Reads expressions in given symbols."""

    def __init__(self, symbols):
        known = {
            PRINTED[name][0]: s for name, s in vars(letters()).items() if name in PRINTED and s.func != sympy.Symbol
        }
        known |= {latex(s): s for s in symbols} | {r"-\nabla L(w)": -entry("g")}
        known |= {latex(Total(x)): Total(x) for x in (letters().HSH, letters().Sii)}
        known |= {latex(s.diff(letters().t)): s.diff(letters().t) for s in symbols if s.is_Function}
        self.known = sorted(known.items(), key=lambda item: -len(item[0]))

    def read(self, text):
        """The expression that a formula says."""
        for i, (name, _) in enumerate(self.known):
            # a minus that belongs to ∇L(w) stands alone, at the start of a group
            pattern = r"(?<=[{ ])" + re.escape(name) if name.startswith("-") else re.escape(name)
            if re.fullmatch(r"[a-zA-Z]", name):
                pattern = rf"(?<![\\a-zA-Z@]){name}(?![a-zA-Z(])"
            text = re.sub(pattern, f"@{i}@", text)
        self.tokens = TOKEN.findall(text)
        assert re.sub(r"\s|\\,", "", "".join(self.tokens)) == re.sub(r"\s|\\,", "", text), text
        self.at = 0
        out = self.sum()
        assert self.at == len(self.tokens), self.tokens[self.at :]
        return out

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
        if token == "\\sum_{i}":
            return Total(self.atom())
        assert token in ("\\left[", "\\left("), token
        out = self.sum()
        assert self.take().startswith("\\right")
        return out
