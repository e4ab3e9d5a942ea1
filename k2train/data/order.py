"""The order of training samples: a pure function of (seed, sample number), with nothing to store or to resume.

Sample ``n`` is window ``permutation[n % windows]`` of epoch ``n // windows``, where each epoch has a permutation of its
own. The permutation is a Feistel network on the smallest even number of bits that holds all windows; a result outside
the range is put through it again until it falls inside (cycle walking; under four rounds of it on average, as the
domain is under four times the range). Each window therefore comes once an epoch, and any sample is found in O(1).

Sources: Luby and Rackoff 1988 (a Feistel network of random functions is a pseudorandom permutation); Black and
Rogaway 2002, "Ciphers with arbitrary finite domains", section 3 (cycle walking). The round function is the finaliser of
SplitMix64 (Steele, Lea and Flood 2014, figure 15).
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import xxhash
from numpy.typing import ArrayLike, NDArray

ROUNDS = 8


def positions(numbers: ArrayLike, *, windows: int, seed: int, name: str = "train") -> NDArray[np.int64]:
    """The window of each sample number.

    Args:
        numbers: (S,) sample numbers, from 0 on, in any order.
        windows: in an epoch.
        seed: another seed, another order.
        name: of the stream: two streams of one seed are in unrelated orders.

    Returns:
        (S,) in [0, windows).
    """
    if windows < 1:
        raise ValueError(f"windows={windows} must be at least 1: there is nothing to put in order")
    wanted = np.asarray(numbers, dtype=np.int64)
    if wanted.size and wanted.min() < 0:
        raise ValueError(f"sample number {wanted.min()} is negative: samples are numbered from 0")
    epochs, places = np.divmod(wanted, windows)
    result = np.empty_like(wanted)
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        result[chosen] = _permute(places[chosen], windows=windows, keys=_keys(seed, name, int(epoch)))
    return result


@lru_cache(maxsize=64)
def _keys(seed: int, name: str, epoch: int) -> NDArray[np.uint64]:
    """(ROUNDS,) one key a round, by xxh3 of a spelled-out text: the same on any machine and Python."""
    spelled = [f"{seed}/{name}/{epoch}/{turn}".encode() for turn in range(ROUNDS)]
    return np.array([xxhash.xxh3_64_intdigest(text) for text in spelled], dtype=np.uint64)


def _permute(places: NDArray[np.int64], *, windows: int, keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    half = np.uint64(max(1, ((windows - 1).bit_length() + 1) // 2))  # bits of each half
    result = places.astype(np.uint64)
    outside = np.ones(result.shape, dtype=bool)
    while outside.any():
        result[outside] = _feistel(result[outside], half=half, keys=keys)
        outside = result >= windows
    return result.astype(np.int64)


def _feistel(values: NDArray[np.uint64], *, half: np.uint64, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = values >> half, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    joined: NDArray[np.uint64] = (left << half) | right
    return joined


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """64 bits to 64 bits, each output bit depending on each input bit; arithmetic modulo 2^64."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: NDArray[np.uint64] = z ^ (z >> np.uint64(31))
    return mixed
