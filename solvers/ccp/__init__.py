"""The cone complementarity problem: X ⪰ 0, β[X] − α ⪰ 0, ⟨X, β[X] − α⟩ = 0."""

from dvi.solvers.ccp.cascade import CCPError, CCPResult, solve

__all__ = ["CCPError", "CCPResult", "solve"]
