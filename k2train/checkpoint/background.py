"""Saving beside training: the state is copied at once, and written by a thread while the next steps run."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
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
        intervals = [replace(i, values=i.values.detach().contiguous()) for i in intervals]
        runs = list(_runs(intervals))
        lengths = [sum(intervals[number].values.nbytes for number in run) for run in runs]
        ends = np.cumsum([-(-length // 64) * 64 for length in lengths]).tolist()
        on_gpu = any(i.values.is_cuda for i in intervals)
        if ends and ends[-1] > len(self._memory):
            if on_gpu:
                self._memory = torch.empty(ends[-1], dtype=torch.uint8, pin_memory=True)
            else:  # numpy asks for large pages, torch does not
                self._memory = torch.from_numpy(np.empty(ends[-1], np.uint8))
        copies = list(intervals)
        for run, length, start in zip(runs, lengths, [0, *ends], strict=False):
            first = intervals[run[0]].values
            source = first.as_strided((length // first.element_size(),), (1,)).view(torch.uint8)
            room = self._memory[start : start + length]
            if source.is_cuda:
                room.copy_(source, non_blocking=True)
            else:
                np.copyto(room.numpy(), source.numpy())
            for number in run:
                interval = intervals[number]
                values, room = room[: interval.values.nbytes], room[interval.values.nbytes :]
                copies[number] = replace(interval, values=values.view(interval.values.dtype))
        if on_gpu:
            torch.cuda.synchronize()
        return copies


def _runs(intervals: Sequence[Interval]) -> Iterator[list[int]]:
    """Numbers of intervals that lie one after the other in memory: one large copy is faster than its parts."""
    run: list[int] = []
    end = None
    for number in sorted(range(len(intervals)), key=lambda number: intervals[number].values.data_ptr()):
        values = intervals[number].values
        place = (values.untyped_storage().data_ptr(), values.dtype, values.data_ptr())
        if run and place != end:
            yield run
            run = []
        run.append(number)
        end = (*place[:2], values.data_ptr() + values.nbytes)
    if run:
        yield run


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
