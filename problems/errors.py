"""The errors of problems."""


class ProblemError(ValueError):
    """A loss, a module, data or an argument does not make a well-posed problem; the message says which and why."""


class DerivativeError(ProblemError):
    """A derivative of the loss is wrong, not available or not finite; the message names the cause."""


class NotFiniteError(DerivativeError):
    """The loss or a derivative is NaN or infinite at these weights: a run has left the loss's domain, or diverged."""


class LossChangedError(ProblemError):
    """The loss at w0 has changed since the problem was made: it is not a function of the weights alone."""


class RanksError(RuntimeError):
    """Processes that compute a loss together cannot go on: one has ended, or they no longer have the same weights."""
