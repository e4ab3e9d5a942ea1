"""Checkpoints as intervals of global tensors: written by any layout, read by any other, nothing executed.

A checkpoint is a folder ``step-00000400`` of one safetensors file a rank, a table of where each element of each global
tensor is, and a ``manifest.json`` with the size and hash of each file and all state that is no tensor.
"""

from k2train.checkpoint.background import Background, HostCopy
from k2train.checkpoint.find import (
    Checkpoint,
    choose_checkpoint,
    find_checkpoint,
    folder_of,
    newest_checkpoint,
    open_checkpoint,
    steps,
)
from k2train.checkpoint.intervals import DeferredInterval, Interval, IntervalReader
from k2train.checkpoint.manifest import CheckpointError, Manifest
from k2train.checkpoint.publish import SaveError, forget, mark_best, prune, save_checkpoint
from k2train.checkpoint.safetensors_file import Deferred, SafetensorsFile, write_safetensors

__all__ = [
    "Background",
    "Checkpoint",
    "CheckpointError",
    "Deferred",
    "DeferredInterval",
    "HostCopy",
    "Interval",
    "IntervalReader",
    "Manifest",
    "SafetensorsFile",
    "SaveError",
    "choose_checkpoint",
    "find_checkpoint",
    "folder_of",
    "forget",
    "mark_best",
    "newest_checkpoint",
    "open_checkpoint",
    "prune",
    "save_checkpoint",
    "steps",
    "write_safetensors",
]
