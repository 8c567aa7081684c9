"""The errors of the numerics."""


class SolverError(RuntimeError):
    """A computation failed; the message names the cause and the remedy."""


class ConvergenceError(SolverError):
    """Eigenpairs did not converge."""


class DomainError(SolverError):
    """A trial state lies outside the domain of the flow; an integrator may avoid it by a smaller step."""


class MemoryLimitError(SolverError):
    """The third derivatives of all critical directions would not fit into the allowed memory."""


class StepError(SolverError):
    """An integrator could not make a step."""


class BudgetError(StepError):
    """A run would cost more per unit time than its budget allows."""
