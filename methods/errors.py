"""The errors in a declaration."""


class SpecError(ValueError):
    """The declaration (init, f, P) or a hyperparameter is wrong; the message says where and what to write instead."""


class ScheduleError(SpecError):
    """A schedule fails at some time, gives something that is not a number in its range, or gives two values at one
    time.
    """


class NotPositiveDefiniteError(SpecError):
    """P(ν) is not positive definite."""
