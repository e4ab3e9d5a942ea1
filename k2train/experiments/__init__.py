"""What is learnt from several runs: whether two are the same."""

from k2train.experiments.diff import Difference, Parting, compare_logs, compare_weights

__all__ = ["Difference", "Parting", "compare_logs", "compare_weights"]
