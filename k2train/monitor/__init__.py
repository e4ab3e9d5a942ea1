"""Watching a run: what is out of the ordinary in a step, and whether its update may happen. No torch."""

from k2train.monitor.decision import Decision, Monitor
from k2train.monitor.detector import Finding

__all__ = ["Decision", "Finding", "Monitor"]
