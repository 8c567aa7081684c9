"""What can go wrong in the numerics."""


class SolverError(RuntimeError):
    """A computation could not be brought to a right answer; the message names the cause and the remedy."""


class ConvergenceError(SolverError):
    """Eigenpairs did not converge."""


class DomainError(SolverError):
    """A state at which the flow is not defined was tried; with a smaller step an integrator may avoid it."""


class MemoryLimitError(SolverError):
    """So many directions are critical that their third derivatives would not fit the memory that was allowed."""


class StepError(SolverError):
    """An integrator could not make a step."""


class BudgetError(StepError):
    """A run would cost more per unit time than it was allowed."""
