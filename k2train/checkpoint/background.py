"""Saving beside training: the state is copied at once, and written by a thread while the next steps run."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch

from k2train.checkpoint.intervals import Interval


class HostCopy:
    """Copies of a rank's intervals in host memory, the same memory each time.

    Fresh memory would have to be mapped page by page, at a fraction of the speed. It is page-locked where the state is
    on a GPU.
    """

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def take(self, intervals: Sequence[Interval]) -> list[Interval]:
        """The intervals as they are now, whatever happens to their tensors later; valid until the next ``take``."""
        ends = np.cumsum([-(-i.values.nbytes // 64) * 64 for i in intervals]).tolist()
        on_gpu = any(i.values.is_cuda for i in intervals)
        if ends and ends[-1] > len(self._memory):
            if on_gpu:
                self._memory = torch.empty(ends[-1], dtype=torch.uint8, pin_memory=True)
            else:  # numpy asks for large pages, torch does not
                self._memory = torch.from_numpy(np.empty(ends[-1], np.uint8))
        copies = []
        for interval, start in zip(intervals, [0, *ends], strict=False):
            room = self._memory[start : start + interval.values.nbytes].view(interval.values.dtype)
            values = interval.values.detach()
            if values.is_cuda:
                room.copy_(values, non_blocking=True)
            else:
                np.copyto(room.view(torch.uint8).numpy(), values.contiguous().view(torch.uint8).numpy())
            copies.append(replace(interval, values=room))
        if on_gpu:
            torch.cuda.synchronize()
        return copies


class Background:
    """One piece of work at a time in a thread; what it raises is raised by ``wait``."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def busy(self) -> bool:
        """Whether work was begun and not yet waited for."""
        return self._thread is not None

    @property
    def done(self) -> bool:
        """Whether ``wait`` would return at once."""
        return self._thread is None or not self._thread.is_alive()

    def start(self, work: Callable[[], None]) -> None:
        """Begins a piece of work; the one before must have been waited for."""
        assert self._thread is None

        def run() -> None:
            try:
                work()
            except BaseException as error:  # it is raised in the thread that waits
                self._error = error

        # A daemon: a process that ends by an error must not hang on a thread that waits for ranks which are gone.
        self._thread = threading.Thread(target=run, name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Returns once nothing is being done; raises what the work raised."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if (error := self._error) is not None:
            self._error = None
            raise error
