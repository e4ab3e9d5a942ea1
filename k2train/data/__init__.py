"""Text in, the same tokens in the same order out, at any scale.

``prepare`` turns a corpus into shards of tokens, ``open_dataset`` opens and checks them, and ``TrainStream`` gives the
sample with a number: a pure function of the seed and that number.
"""

from k2train.data.compression import compressed_sizes
from k2train.data.dataset import Dataset, Span, TokenStream, Windows, open_dataset
from k2train.data.errors import DataError
from k2train.data.prepare import Progress, prepare
from k2train.data.stream import Trace, TrainStream
from k2train.data.stretches import DataPhase
from k2train.data.tokenizer import Tokenizer

__all__ = [
    "DataError",
    "DataPhase",
    "Dataset",
    "Progress",
    "Span",
    "TokenStream",
    "Tokenizer",
    "Trace",
    "TrainStream",
    "Windows",
    "compressed_sizes",
    "open_dataset",
    "prepare",
]
