"""The reproductions by their names."""

from k2train.experiments.reproductions.efficiency import EFFICIENCY
from k2train.experiments.reproductions.heads import HEADS
from k2train.experiments.reproductions.logits import LOGITS
from k2train.experiments.reproductions.sparsity import SPARSITY
from k2train.experiments.reproductions.spectrum import SPECTRUM
from k2train.experiments.reproductions.stability import STABILITY

REPRODUCTIONS = {
    "logits": LOGITS,
    "efficiency": EFFICIENCY,
    "stability": STABILITY,
    "sparsity": SPARSITY,
    "spectrum": SPECTRUM,
    "heads": HEADS,
}
