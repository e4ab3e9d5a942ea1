"""The order of training samples: a pure function of (seed, sample number), with nothing to store or to resume.

Sample ``n`` is window ``permutation[n % windows]`` of epoch ``n // windows``, where each epoch has a permutation of its
own. The permutation is a Feistel network on the smallest even number of bits that holds all windows; a result outside
the range is put through it again until it falls inside (cycle walking; under four rounds of it on average, as the
domain is under four times the range). Each window therefore comes once an epoch, and any sample is found in O(1).

``Order`` has two levels: groups of windows, which lie in neighbouring shards, come in a permuted order, and so do the
windows of each group. While a group is read, only its shards and the next one's need be near. With a single group the
order is the one above.

Sources: Luby and Rackoff 1988 (a Feistel network of random functions is a pseudorandom permutation); Black and
Rogaway 2002, "Ciphers with arbitrary finite domains", section 3 (cycle walking). The round function is the finaliser of
SplitMix64 (Steele, Lea and Flood 2014, figure 15).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import xxhash
from numpy.typing import ArrayLike, NDArray

ROUNDS = 8
VERSION = 2  # of the whole order, sources and all; a run whose state names another one is not resumed


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
    if not wanted.size:
        return np.empty(0, np.int64)
    if wanted.min() < 0:
        raise ValueError(f"sample number {wanted.min()} is negative: samples are numbered from 0")
    epochs, places = np.divmod(wanted, windows)
    different, which = np.unique(epochs, return_inverse=True)
    keys = np.concatenate([_keys(seed, name, epoch) for epoch in different.tolist()], axis=1)
    return _permute(places, windows=windows, keys=keys if len(different) == 1 else keys[:, which])


class Order:
    """The windows of one source, in groups; holds nothing that changes but what it has worked out before."""

    def __init__(self, sizes: Sequence[int], *, seed: int, name: str = "train") -> None:
        """Fixes the order.

        Args:
            sizes: (G,) windows of each group; window numbers run on over the groups.
            seed: another seed, another order.
            name: of the source.
        """
        self.windows = int(sum(sizes))
        if self.windows < 1:
            raise ValueError(f"windows={self.windows} must be at least 1: there is nothing to put in order")
        self._seed, self._name = seed, name
        self._sizes = np.asarray(sizes, dtype=np.int64)
        self._starts = np.concatenate([[0], np.cumsum(self._sizes)])
        self._turns = lru_cache(maxsize=4)(self._turns_of_epoch)

    def positions(self, numbers: ArrayLike) -> NDArray[np.int64]:
        """(S,) the window of each of the source's samples, numbered through all epochs."""
        if len(self._sizes) == 1:
            return positions(numbers, windows=self.windows, seed=self._seed, name=self._name)
        epochs, places, turns = self._locate(np.asarray(numbers, dtype=np.int64))
        result = np.empty_like(places)
        for epoch, turn in set(zip(epochs.tolist(), turns.tolist(), strict=True)):
            chosen = (epochs == epoch) & (turns == turn)
            groups, begins = self._turns(epoch)
            group = int(groups[turn])
            keys = _keys(self._seed, f"{self._name}/{group}", epoch)
            inside = _permute(places[chosen] - begins[turn], windows=int(self._sizes[group]), keys=keys)
            result[chosen] = self._starts[group] + inside
        return result

    def groups_from(self, number: int) -> tuple[int, int]:
        """The group that a sample of the source lies in, and the one that comes after it."""
        epochs, _, turns = self._locate(np.array([number]))
        epoch, turn = int(epochs[0]), int(turns[0])
        after = (epoch, turn + 1) if turn + 1 < len(self._sizes) else (epoch + 1, 0)
        return int(self._turns(epoch)[0][turn]), int(self._turns(after[0])[0][after[1]])

    def _locate(self, numbers: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Of each sample its epoch, its place in the epoch, and which of the epoch's groups, in turn, that is in."""
        epochs, places = np.divmod(numbers, self.windows)
        turns = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            chosen = epochs == epoch
            turns[chosen] = np.searchsorted(self._turns(epoch)[1], places[chosen], side="right") - 1
        return epochs, places, turns

    def _turns_of_epoch(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(G,) the groups in the order in which the epoch takes them, and (G,) at which place each begins."""
        number = len(self._sizes)
        groups = _permute(np.arange(number), windows=number, keys=_keys(self._seed, f"{self._name}/groups", epoch))
        return groups, np.cumsum(self._sizes[groups]) - self._sizes[groups]


@lru_cache(maxsize=64)
def _keys(seed: int, name: str, epoch: int) -> NDArray[np.uint64]:
    """(ROUNDS, 1) one key a round, by xxh3 of a spelled-out text: the same on any machine and Python."""
    spelled = [f"{seed}/{name}/{epoch}/{turn}".encode() for turn in range(ROUNDS)]
    return np.array([[xxhash.xxh3_64_intdigest(text)] for text in spelled], dtype=np.uint64)


def _permute(places: NDArray[np.int64], *, windows: int, keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """(S,) where each place goes; keys are (ROUNDS, S), or (ROUNDS, 1) for all of them."""
    half = np.uint64(max(1, ((windows - 1).bit_length() + 1) // 2))  # bits of each half
    result = places.astype(np.uint64)
    outside = np.arange(len(result))
    while len(outside):
        moved = _feistel(result[outside], half=half, keys=keys if keys.shape[1] == 1 else keys[:, outside])
        result[outside] = moved
        outside = outside[moved >= windows]
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
