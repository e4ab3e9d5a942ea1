"""Training samples by number: windows of the training tokens in the order of ``k2train.data.order``.

Legend: B samples of a batch, T tokens of a sample.

Documents are packed: the tokens of the training split are one stream, cut into windows of T + 1 tokens with stride T,
so that each token but the first is a label in exactly one window (the last, incomplete window is dropped). Sample
number n says all about a sample; world size, micro-batches and threads never enter.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress

import numpy as np
import torch
from numpy.typing import NDArray

from k2train.data.dataset import Dataset, Span, context_starts
from k2train.data.errors import DataError
from k2train.data.order import positions

Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # tokens, labels, starts


class TrainStream:
    """Samples of a data set's training split; holds nothing that changes.

    Attributes:
        windows: samples in an epoch; each window comes once before any comes again.
    """

    def __init__(self, dataset: Dataset, *, sequence_length: int, seed: int) -> None:
        """Fixes the order.

        Raises:
            DataError: the training split is smaller than one window.
        """
        self._tokens = dataset.stream("train")
        self._length = sequence_length
        self._seed = seed
        self.windows = (len(self._tokens) - 1) // sequence_length
        if self.windows < 1:
            raise DataError(
                f"the training split has {len(self._tokens)} tokens and a sample takes {sequence_length + 1} "
                f"(train.sequence_length={sequence_length} and one to predict): add text, or lower it"
            )

    def sample(self, number: int) -> NDArray[np.int64]:
        """(T + 1,) token ids of a sample: ``[:-1]`` are the tokens, ``[1:]`` the labels."""
        return self._window(self._windows_of([number])[0])

    def batch(self, numbers: Sequence[int]) -> Batch:
        """(tokens (B, T), labels (B, T), starts (B, T)), int64, of the samples with these numbers.

        starts: the index of the first token of each token's context (``context_starts``). A document's context begins
        with the end_of_text before it; what began before the window begins at 0.
        """
        windows = self._windows_of(numbers)
        samples = torch.from_numpy(np.stack([self._window(window) for window in windows]))
        starts = torch.from_numpy(np.stack([self._context_starts(window) for window in windows]))
        return samples[:, :-1].contiguous(), samples[:, 1:].contiguous(), starts

    def trace(self, number: int) -> list[Span]:
        """The documents, or pieces of them, that the T + 1 tokens of a sample come from, in order."""
        start = self._windows_of([number])[0] * self._length
        return self._tokens.spans(start, start + self._length + 1)

    def batches(self, plan: Iterable[Sequence[int]], *, ahead: int = 2) -> Iterator[Batch]:
        """``batch`` of each entry of the plan, read by one thread while the caller computes.

        Args:
            plan: sample numbers of each batch; may be endless.
            ahead: batches that are read before they are asked for.
        """
        ready: queue.Queue[Batch | Exception | None] = queue.Queue(maxsize=ahead)
        stopped = threading.Event()

        def hand_over(item: Batch | Exception | None) -> None:
            while not stopped.is_set():
                with suppress(queue.Full):
                    ready.put(item, timeout=0.1)
                    return

        def read_ahead() -> None:
            try:
                for numbers in plan:
                    if stopped.is_set():
                        return
                    hand_over(self.batch(numbers))
                hand_over(None)
            except Exception as error:  # raised again by the caller's thread
                hand_over(error)

        thread = threading.Thread(target=read_ahead, name="k2train-prefetch", daemon=True)
        thread.start()
        try:
            while (item := ready.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            stopped.set()
            thread.join()

    def _windows_of(self, numbers: Sequence[int]) -> list[int]:
        found: list[int] = positions(numbers, windows=self.windows, seed=self._seed).tolist()
        return found

    def _context_starts(self, window: int) -> NDArray[np.int64]:
        start = window * self._length
        return context_starts(self._tokens.context_begins(start, start + self._length))

    def _window(self, window: int) -> NDArray[np.int64]:
        start = window * self._length
        return self._tokens.read(start, start + self._length + 1)
