"""Text in, the same tokens in the same order out, at any scale.

``prepare`` turns sources of text into shards of tokens, ``open_dataset`` opens and checks them, and ``TrainStream``
gives the sample with a number: a pure function of the seed and that number.

What is named here is imported when it is first used: the processes that prepare data need no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from k2train.data.cache import find_dataset
    from k2train.data.compression import compressed_sizes
    from k2train.data.dataset import Dataset, Span, TokenStream, Windows, open_dataset
    from k2train.data.errors import DataError
    from k2train.data.phases import DataPhase
    from k2train.data.preparation import Progress, find_prepared, prepare
    from k2train.data.sources.own import Source
    from k2train.data.stream import Trace, TrainStream, build_stream
    from k2train.data.tokenizer import Tokenizer

__all__ = [
    "DataError",
    "DataPhase",
    "Dataset",
    "Progress",
    "Source",
    "Span",
    "TokenStream",
    "Tokenizer",
    "Trace",
    "TrainStream",
    "Windows",
    "build_stream",
    "compressed_sizes",
    "find_dataset",
    "find_prepared",
    "open_dataset",
    "prepare",
]

# No module is named as what it exports: importing it would put the module in the place of the function.
_HOMES = {
    "DataError": "errors",
    "DataPhase": "phases",
    "Dataset": "dataset",
    "Progress": "preparation",
    "Source": "sources.own",
    "Span": "dataset",
    "TokenStream": "dataset",
    "Tokenizer": "tokenizer",
    "Trace": "stream",
    "TrainStream": "stream",
    "Windows": "dataset",
    "build_stream": "stream",
    "compressed_sizes": "compression",
    "find_dataset": "cache",
    "find_prepared": "preparation",
    "open_dataset": "dataset",
    "prepare": "preparation",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
