import gzip
import json
import lzma
from pathlib import Path

import pytest

from k2train.data import compressed_sizes
from k2train.data.compression import _xz

TEXTS = [Path(module.__file__).read_bytes() for module in (json, gzip, lzma, json.decoder)]


def test_sizes_are_those_of_the_programs():
    total = sum(map(len, TEXTS))
    found = compressed_sizes([(str(number), text) for number, text in enumerate(TEXTS)])
    assert list(found) == ["gzip -9", "xz -9", "xz -9 joined"]
    assert found["gzip -9"] == 8 * sum(len(gzip.compress(text, 9)) for text in TEXTS) / total
    assert found["xz -9 joined"] == 8 * len(lzma.compress(b"".join(TEXTS), preset=9)) / total
    assert found["xz -9 joined"] < found["xz -9"]


@pytest.mark.parametrize("text", [b"", b"a", *TEXTS, b"".join(TEXTS)])
def test_the_smaller_dictionary_costs_nothing(text):
    assert len(_xz(text)) == len(lzma.compress(text, preset=9))
    assert lzma.decompress(_xz(text)) == text


def test_nothing_to_compress_is_refused():
    with pytest.raises(ValueError, match="no text to compress"):
        compressed_sizes([("a", b"")])
