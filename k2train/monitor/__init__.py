"""Watching a run: what is out of the ordinary in a step, and whether its update may happen. No torch."""

from k2train.monitor.decision import Decision, Monitor
from k2train.monitor.detector import Finding
from k2train.monitor.drift import Drift

__all__ = ["Decision", "Drift", "Finding", "Monitor"]
