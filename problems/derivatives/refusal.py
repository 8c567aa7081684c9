"""The findings of the check, in words."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch

from dvi.problems.derivatives.check import Discrepancy, Finding, NotFinite
from dvi.problems.errors import DerivativeError, NotFiniteError


class Checked(Protocol):
    """The part of a problem that messages need."""

    name: str
    derivatives: Any

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of its weights."""


def refusal(problem: Checked, finding: Finding | DerivativeError, blame: Callable[[], str]) -> DerivativeError:
    """Return the error that says what is wrong with the derivatives of a problem, and which part causes it.

    Args:
        problem: the problem.
        finding: the error in its derivatives, or the exception that ended the check.
        blame: names the part at fault, in words, or raises.

    """
    name, backend, dtype = problem.name, problem.derivatives, problem.dtype
    what, kind = str(finding).rstrip("."), DerivativeError
    if isinstance(finding, NotFinite):
        what, kind = what + name_entries(finding, getattr(problem, "parameter_slices", {})), NotFiniteError
    elif isinstance(finding, Discrepancy) and finding.order > 1:
        if backend == "finite-difference" or (backend == "mixed" and finding.order == 3):
            return DerivativeError(
                f"{name}: {what} of other steps. This loss is too strongly curved for differences in {dtype}, or has "
                'kinks: take derivatives="autodiff", or float64'
            )
        what += ' (derivatives="finite-difference" needs only a right gradient)'
    try:
        culprit = blame()
    except Exception as error:  # the finding stands even if the part at fault cannot be named
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        culprit = f"not known, because the parts of this loss cannot be tried alone ({reason})"
    return kind(f"{name}: {what}.\nAt fault: {culprit}")


def name_entries(found: NotFinite, slices: Mapping[str, slice]) -> str:
    """The parameter tensors, if they have names, with the entries that are not finite."""
    counts = {name: sum(s.start <= i < s.stop for i in found.entries) for name, s in slices.items()}
    listed = [f"{name} ({n} of {slices[name].stop - slices[name].start})" for name, n in counts.items() if n]
    return f", in {', '.join(listed)}" if listed and found.order else ""
