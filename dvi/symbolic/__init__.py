"""The closed form of a central flow: :func:`dvi.derive` calls a declaration on sympy's symbols.

``vectors`` and ``tensors`` are what the formulas are made of, ``reader`` calls a declaration on them, ``derivation``
makes its central flow, ``evaluation`` puts numbers in, and ``printing`` writes LaTeX and text.
"""

from dvi.symbolic.derivation import Derivation, SymbolicFlow, derive
from dvi.symbolic.evaluation import Values

__all__ = ["Derivation", "SymbolicFlow", "Values", "derive"]
