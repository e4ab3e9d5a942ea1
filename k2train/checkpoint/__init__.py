"""Checkpoints as intervals of global tensors: written by any layout, read by any other, nothing executed.

A checkpoint is a folder ``step-00000400`` of one safetensors file a rank and a ``manifest.json`` that says which file
holds which elements of which global tensor, and the size and hash of each file.
"""

from k2train.checkpoint.intervals import Interval, IntervalReader
from k2train.checkpoint.manifest import CheckpointError, Manifest
from k2train.checkpoint.publish import Checkpoint, newest_checkpoint, prune, save_checkpoint

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Interval",
    "IntervalReader",
    "Manifest",
    "newest_checkpoint",
    "prune",
    "save_checkpoint",
]
