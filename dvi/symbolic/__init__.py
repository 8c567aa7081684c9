"""The closed form of a central flow: :func:`dvi.derive` calls a declaration on sympy's symbols.

From bottom to top: ``vectors`` and ``tensors`` are the parts of formulas, ``formulas`` stores them as data, and
``reader`` calls a declaration on symbols.  ``variance`` finds σ², ``evaluation`` inserts numbers, and ``printing``
writes LaTeX and text.  ``derivation`` makes the central flow, and ``noise`` the flow with mini-batch noise.
"""

from dvi.symbolic.derivation import Derivation, derive
from dvi.symbolic.evaluation import Values
from dvi.symbolic.formulas import SymbolicFlow, SymbolicSpec
from dvi.symbolic.noise import NoisyDerivation, NoisyValues

__all__ = ["Derivation", "NoisyDerivation", "NoisyValues", "SymbolicFlow", "SymbolicSpec", "Values", "derive"]
