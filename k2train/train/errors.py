"""What a run says when it cannot go on."""


class RunError(ValueError):
    """A run that cannot start or go on; the message says why and what to do."""
