"""Whether two runs are the same: bit for bit, to rounding, or from which step and tensor they part.

The tool for a change of the code that must not change what is computed. Rounding is no fixed number: sums in another
order differ in the last bits, and training carries that on, so that a limit for the first hundreds of steps is one for
them alone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from k2train.checkpoint import Checkpoint

Record = Mapping[str, Any]

# The tensors of a checkpoint that belong to one process.
_OF_A_PROCESS = re.compile(r"rank-\d+/")
# What tells of the machine, and not of what is learnt.
MACHINE = {"elapsed", "tokens_per_second", "utilisation", "memory", "seconds", "max_logit_fallbacks"}


@dataclass(frozen=True)
class Parting:
    """Where two runs differ: a metric or a tensor, at a step."""

    step: int
    name: str
    relative: float  # difference over the larger of the two magnitudes; infinite where one has what the other lacks
    values: tuple[Any, Any] | None = None  # of a metric


@dataclass(frozen=True)
class Difference:
    """Of two logs, or of two series of checkpoints.

    Attributes:
        compared: steps that both have recorded, in order.
        bits: the first place where they are not equal in all bits; None if there is none.
        parting: the first place where they differ by more than the tolerance; None if there is none.
        others: further places at the step of the parting, the largest difference first.
        largest: the largest difference of all.
    """

    compared: Sequence[int]
    bits: Parting | None
    parting: Parting | None
    others: Sequence[Parting]
    largest: Parting | None


def compare_logs(first: Sequence[Record], second: Sequence[Record], *, tolerance: float) -> Difference:
    """Holds records of steps or of validations against each other, each with that of the same steps.

    A name that one log has alone is left out: metrics are added over time.

    Args:
        first: of one run, in order.
        second: of the other.
        tolerance: largest relative difference of a number that is rounding.
    """
    others = {_span(record): record for record in second}
    pairs = [(record, others[span]) for record in first if (span := _span(record)) in others]
    found = [[Parting(a["step"], *parts) for parts in _record(a, b)] for a, b in pairs]
    return _difference([a["step"] for a, _ in pairs], found, tolerance)


def compare_weights(pairs: Sequence[tuple[Checkpoint, Checkpoint]], *, tolerance: float) -> Difference:
    """Holds all tensors of checkpoints of the same steps against each other: weights, moments, buffers.

    What a process keeps of its own, its generators and its hooks' state, is compared between as many processes alone.

    Args:
        pairs: in order of steps.
        tolerance: largest norm of a tensor's difference that is rounding, over the tensor's norm.
    """
    steps = [one.manifest.step for one, _ in pairs]
    found = [[Parting(step, *parts) for parts in _tensors(*pair)] for step, pair in zip(steps, pairs, strict=True)]
    return _difference(steps, found, tolerance)


def _difference(steps: Sequence[int], found: Sequence[Sequence[Parting]], tolerance: float) -> Difference:
    """Args are the steps compared and, of each, what is not equal there."""
    everywhere = [parting for partings in found for parting in partings]
    beyond = [over for partings in found if (over := [p for p in partings if p.relative > tolerance])]
    at_first = sorted(beyond[0], key=lambda p: -p.relative) if beyond else []
    largest = max(everywhere, key=lambda p: p.relative, default=None)
    return Difference(steps, next(iter(everywhere), None), next(iter(at_first), None), at_first[1:], largest)


def _span(record: Record) -> tuple[int, int | None]:
    """The steps that a record is of: its last, and how many."""
    return record["step"], record.get("steps")


def _record(one: Record, other: Record) -> Iterator[tuple[str, float, tuple[Any, Any]]]:
    """Name, relative difference and values of what is not equal in two records."""
    for name in one:
        if name.split(".")[0] not in MACHINE and name in other and one[name] != other[name]:
            yield name, _relative(_numbers(one[name]), _numbers(other[name])), (one[name], other[name])


def _numbers(value: Any) -> list[float]:
    """All numbers in a value of JSON; NaN for what is none."""
    if isinstance(value, Mapping):
        return [number for key in sorted(value) for number in _numbers(value[key])]
    if isinstance(value, list):
        return [number for item in value for number in _numbers(item)]
    return [float(value)] if isinstance(value, int | float) else [math.nan]


def _relative(one: Sequence[float], other: Sequence[float]) -> float:
    """Largest difference over largest magnitude."""
    if len(one) != len(other) or any(map(math.isnan, [*one, *other])):
        return math.inf
    return max(abs(a - b) for a, b in zip(one, other, strict=True)) / max(map(abs, [*one, *other]))


def _tensors(one: Checkpoint, other: Checkpoint) -> Iterator[tuple[str, float]]:
    """Name and relative difference of the tensors that are not equal in two checkpoints."""
    own = [{name for name in each.manifest.tensors if _OF_A_PROCESS.match(name)} for each in (one, other)]
    left_out = set() if own[0] == own[1] else own[0] | own[1]
    for tensor in dict.fromkeys([*one.manifest.tensors, *other.manifest.tensors]):
        if tensor in left_out:
            continue
        if one.manifest.tensors.get(tensor) != other.manifest.tensors.get(tensor):
            yield tensor, math.inf
            continue
        name, _, key = tensor.rpartition("/")
        a, b = one.reader.read(name, key), other.reader.read(name, key)
        if not torch.equal(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8)):
            a, b = a.double(), b.double()
            relative = float((a - b).norm() / torch.maximum(a.norm(), b.norm()))
            yield tensor, math.inf if math.isnan(relative) else relative
