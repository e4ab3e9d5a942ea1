"""The model in the layout of the released checkpoints of Kimi K2 and Moonlight: written, read, and proved."""

from k2train.export.architecture import ExportError, own_config, released_config
from k2train.export.card import model_card
from k2train.export.check import check_export, why_not
from k2train.export.names import Place, own_place, own_shapes, released_name, released_shapes
from k2train.export.read import ReleasedFolder, is_released
from k2train.export.start import write_start
from k2train.export.tokenizer import released_tokenizer
from k2train.export.write import DTYPES, Vocabulary, write_folder

__all__ = [
    "DTYPES",
    "ExportError",
    "Place",
    "ReleasedFolder",
    "Vocabulary",
    "check_export",
    "is_released",
    "model_card",
    "own_config",
    "own_place",
    "own_shapes",
    "released_config",
    "released_name",
    "released_shapes",
    "released_tokenizer",
    "why_not",
    "write_folder",
    "write_start",
]
