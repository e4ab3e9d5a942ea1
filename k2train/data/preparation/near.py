"""Near copies by MinHash: documents that share most of their sequences of five words.

The signature of a document has ``PERMUTATIONS`` numbers, and the share of them that two documents have in common
estimates the Jaccard similarity of their sets of word sequences (Broder 1997). Locality-sensitive hashing finds the
candidates; both are ``datasketch``'s.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from k2train.data.errors import DataError

PERMUTATIONS = 128
SCHEME = "affine32"  # how datasketch draws permutations of 32-bit hashes
WORDS = 5  # of a sequence


def signature(text: str) -> NDArray[np.uint32]:
    """(PERMUTATIONS,) of a text; upper case and punctuation do not matter."""
    words = re.findall(r"\w+", text.lower())
    sequences = {" ".join(words[i : i + WORDS]).encode() for i in range(max(1, len(words) - WORDS + 1))}
    minhash = _datasketch().MinHash(num_perm=PERMUTATIONS, scheme=SCHEME)
    minhash.update_batch(sorted(sequences))
    return np.asarray(minhash.hashvalues).astype(np.uint32)


class Seen:
    """Documents seen so far; keeps the first of those that are alike."""

    def __init__(self, threshold: float) -> None:
        """Nothing is seen yet."""
        self._threshold = threshold
        self._index = _datasketch().MinHashLSH(threshold=threshold, num_perm=PERMUTATIONS)
        self._signatures: list[NDArray[np.uint32]] = []

    def add(self, signature: NDArray[np.uint32]) -> bool:
        """Whether the document is new; if so, it is remembered."""
        minhash = _datasketch().MinHash(hashvalues=signature, scheme=SCHEME)
        for key in self._index.query(minhash):
            if np.mean(self._signatures[key] == signature) >= self._threshold:
                return False
        self._index.insert(len(self._signatures), minhash)
        self._signatures.append(signature)
        return True


def _datasketch() -> Any:
    try:
        import datasketch
    except ImportError as error:
        raise DataError(
            "data.dedup=near needs the library datasketch: pip install 'k2train[dedup]', or set data.dedup=exact"
        ) from error
    return datasketch
