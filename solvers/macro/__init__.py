"""The macro step: the default integrator."""

from dvi.solvers.macro.stepper import MacroMemory, MacroStep

__all__ = ["MacroMemory", "MacroStep"]
