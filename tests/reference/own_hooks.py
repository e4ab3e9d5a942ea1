"""A hook as a person may write it, and what is none."""

from k2train.train.hooks import Hook


class Mine(Hook):
    def __init__(self, limit=1):
        self.limit = limit


class NoHook:
    pass
