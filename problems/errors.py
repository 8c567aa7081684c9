"""What can be wrong with a problem, as exceptions."""


class ProblemError(ValueError):
    """A loss, a module, data or an argument that does not make a well-posed problem; the message says which and why."""


class DerivativeError(ProblemError):
    """A derivative of the loss that is wrong, not available or not finite; the message names the cause."""


class NotFiniteError(DerivativeError):
    """The loss or a derivative is NaN or infinite at these weights: a trajectory has left its domain, or diverged."""


class LossChangedError(ProblemError):
    """The loss at w0 is not what it was when the problem was made: it is no function of the weights alone."""


class RanksError(RuntimeError):
    """Processes that compute a loss together cannot go on: one has ended, or they no longer have the same weights."""
