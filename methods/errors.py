"""What can be wrong with a declaration."""


class SpecError(ValueError):
    """The declaration (init, f, P) or a hyperparameter is wrong; the message says where and what to write instead."""


class NotPositiveDefiniteError(SpecError):
    """P(ν) is not positive definite."""
