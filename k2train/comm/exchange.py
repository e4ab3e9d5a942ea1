"""What processes tell each other beside tensors of the model: numbers, JSON, and that something went wrong.

Object collectives of torch.distributed pickle; these send JSON, so that nothing received is ever executed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist


class FailedTogether(RuntimeError):
    """Another rank failed in a step that all ranks take or refuse together; its sentence is the message."""


def sum_across(values: Sequence[float | torch.Tensor], *, device: torch.device | str = "cpu") -> list[float]:
    """Sums scalars over all ranks in float64, in one all-reduce and one transfer to the host.

    Args:
        values: numbers or 0-d tensors, as many and in the same order on each rank.
        device: where the reduction happens.
    """
    packed = torch.stack([torch.as_tensor(v, dtype=torch.float64, device=device).detach() for v in values])
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(packed)
    return [float(v) for v in packed.tolist()]


def start_max(value: int) -> Callable[[], int]:
    """Starts to ask all ranks for the largest of their values; the function returned waits for the answer.

    The question travels over the host's network, so that it neither waits for a device nor holds one up.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return lambda: value
    largest = torch.tensor(value)
    work = dist.all_reduce(largest, op=dist.ReduceOp.MAX, async_op=True)

    def answer() -> int:
        work.wait()
        return int(largest)

    return answer


def gather_json(value: Any, *, group: dist.ProcessGroup | None = None) -> list[Any]:
    """What each rank gave, in rank order, on every rank. Values must be fit for JSON.

    Args:
        value: this rank's.
        group: all ranks, in a group of its own where a thread beside the main one asks.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [json.loads(json.dumps(value))]
    data = pack_json(value)
    lengths = torch.zeros(dist.get_world_size(), dtype=torch.int64)
    lengths[dist.get_rank()] = len(data)
    dist.all_reduce(lengths, group=group)
    padded = torch.zeros(int(lengths.max()), dtype=torch.uint8)
    padded[: len(data)] = data
    received = [torch.empty_like(padded) for _ in range(len(lengths))]
    dist.all_gather(received, padded, group=group)
    return [unpack_json(part[:length]) for part, length in zip(received, lengths.tolist(), strict=True)]


def pack_json(value: Any) -> torch.Tensor:
    """A value that is fit for JSON as bytes (uint8, 1-D)."""
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def unpack_json(packed: torch.Tensor) -> Any:
    """The inverse of ``pack_json``."""
    return json.loads(bytes(packed.numpy()))


@contextmanager
def together() -> Iterator[None]:
    """A block that all ranks pass or none: if it raises anywhere, every rank leaves it with an error.

    The rank that failed raises its own error, the others FailedTogether with that rank's sentence. Without this, the
    ranks that passed would wait in their next collective for those that did not. The block itself must hold no
    collective that a failing rank would miss.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:  # whatever it is, it is raised again below
        failure = error
    sentences = gather_json(None if failure is None else str(failure) or type(failure).__name__)
    if failure is not None:
        raise failure
    for rank, sentence in enumerate(sentences):
        if sentence is not None:
            raise FailedTogether(f"rank {rank}: {sentence}")
