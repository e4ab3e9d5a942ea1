"""What general-purpose compressors make of the held-out text: the yardstick that bits per byte are read against.

A language model's mean loss is a code length: negative log2-likelihood of the text divided by its bytes is what an
arithmetic coder driven by the model would need. gzip and xz see each file by itself, as nobody trained them on the
rest; xz on all files joined may use each file for the next, which is the hardest of the three to beat.
"""

from __future__ import annotations

import gzip
import lzma
from collections.abc import Iterable


def compressed_sizes(documents: Iterable[tuple[str, bytes]]) -> dict[str, float]:
    """Bits per byte of each compressor, headers included.

    Args:
        documents: (origin, bytes) of each file, as ``Dataset.documents`` gives them; all are held in memory.
    """
    texts = [text for _, text in documents]
    total = sum(map(len, texts))
    if not total:
        raise ValueError("there is no text to compress: give at least one document that is not empty")
    sizes = {
        "gzip -9": sum(len(_gzip(text)) for text in texts),
        "xz -9": sum(len(_xz(text)) for text in texts),
        "xz -9 joined": len(_xz(b"".join(texts))),
    }
    return {name: 8 * size / total for name, size in sizes.items()}


def _gzip(text: bytes) -> bytes:
    """As ``gzip -9n`` writes it, without name and time."""
    return gzip.compress(text, compresslevel=9, mtime=0)


def _xz(text: bytes) -> bytes:
    """As ``xz -9`` writes it, with a dictionary no larger than the text.

    The preset's 64 MiB dictionary costs some 674 MB of memory (xz's manual), which a run that is about to finish need
    not have; a dictionary that covers the whole text finds the same matches.
    """
    preset_dictionary = 64 << 20
    dictionary = min(preset_dictionary, max(4096, 1 << (len(text) - 1).bit_length() if text else 0))
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": dictionary}]
    return lzma.compress(text, format=lzma.FORMAT_XZ, filters=filters)
