"""What a run says when it cannot go on."""


class RunError(ValueError):
    """A run that cannot start or go on; the message says why and what to do."""


class TooManyRewinds(RunError):
    """A run would go back to a checkpoint once more than it may."""
