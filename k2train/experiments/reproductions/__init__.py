"""The reproductions by their names."""

from k2train.experiments.reproductions.efficiency import EFFICIENCY
from k2train.experiments.reproductions.logits import LOGITS

REPRODUCTIONS = {"logits": LOGITS, "efficiency": EFFICIENCY}
