"""``k2train rehearse``: one process in the part of any rank of a run."""

from __future__ import annotations

import dataclasses
import gc
import json
import logging
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

from k2train.cli.plan import parts
from k2train.config import ConfigError, RehearseConfig
from k2train.paths import cache_dir
from k2train.plan.estimate import Estimate, estimate, with_vocabulary
from k2train.status import FAILED, OK
from k2train.train.quiet import import_deepspeed
from k2train.units import memory

if TYPE_CHECKING:
    from k2train.data import Dataset
    from k2train.experiments.rehearsal import Rehearsal


AGREES = 0.02  # of a component's bytes, between what DeepSpeed made here and the plan


def run(config: RehearseConfig) -> int:
    """Prints what the rank is, holds, owns and reads first; 0 if it holds what the plan says, and that fits.

    Raises:
        ConfigError: the run cannot be split so, or its phases do not fit together.
        ValueError: the data, the run or the optimizer refuse.
    """
    if config.optim.own:
        raise ConfigError(
            [f"optim.name={config.optim.name} is your own: what it holds is not known; rehearse with optim=adamw"]
        )
    dataset = _dataset(config)
    if dataset is not None and config.model.vocab_size is None:
        config = _with_vocabulary(config, dataset.padded_vocab_size)
    planned = with_vocabulary(config.plan())
    found = estimate(planned, parts(planned))
    config = _with_vocabulary(config, planned.model.vocab_size)
    import_deepspeed("cpu")
    logging.disable(logging.WARNING)  # DeepSpeed tells what it builds
    warnings.simplefilter("ignore")  # it looks for addresses, which fake tensors have not
    from k2train.experiments.rehearsal import rehearse

    gc.disable()  # it would go through millions of intervals of ranks again and again: a quarter of the time
    played = rehearse(config, precision="bf16" if found.layout.bf16 else "fp32", dataset=dataset)
    print("\n".join(page(config, played, found)))
    return OK if found.fits and not differing(played, found) else FAILED


def _with_vocabulary(config: RehearseConfig, size: int | None) -> RehearseConfig:
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=size))


def _dataset(config: RehearseConfig) -> Dataset | None:
    """What was prepared elsewhere, if it is there."""
    from k2train.data import find_dataset, open_dataset

    if config.data.prepared is None:
        return None
    manifest = find_dataset(config.data.prepared, cache=cache_dir(config.data.cache_dir), limit=config.data.cache_bytes)
    return open_dataset(manifest) if manifest.is_file() else None


def differing(played: Rehearsal, found: Estimate) -> list[str]:
    """The components of which the rank holds other than what was planned."""
    planned = found.fullest.memory
    return [
        name
        for name, size in played.held.items()
        if abs(size - {**planned.host, **planned.state}[name]) > AGREES * size
    ]


def page(config: RehearseConfig, played: Rehearsal, found: Estimate) -> list[str]:
    """Lines of text."""
    world, parallel, phase = played.world, config.parallel, found.fullest
    part = world.rank % parallel.sequence_parallel
    lines = [
        f"{config.name}: rank {world.rank} of {world.size:,}, device {world.local_rank} of node "
        f"{world.rank // world.local_size}; {found.parameters:,} parameters",
        f"experts {played.experts.start} to {played.experts.stop - 1} of each layer's {config.model.n_routed_experts}"
        + (f"; part {part} of {parallel.sequence_parallel} of each sequence" if parallel.sequence_parallel > 1 else ""),
        "",
        f"{'Held':<16} {'this rank':>12} {'by the plan':>12}",
    ]
    planned = {**phase.memory.host, **phase.memory.state}
    lines += [f"  {name:<14} {memory(size):>12} {memory(planned[name]):>12}" for name, size in played.held.items()]
    lines += [f"  {'gradients':<14} {'':>12} {memory(planned['gradients']):>12}"]
    lines += [f"  {'in all':<14} {'':>12} {memory(phase.memory.total):>12} of {memory(phase.memory.capacity)}"]
    lines += ["", *_owned(played), "", *_reads(played)]
    lines += ["", "DeepSpeed's config, which DeepSpeed has taken", f"  {json.dumps(played.settings)}"]
    lines += ["", *(f"note: {note}" for note in played.notes)] if played.notes else []
    if differing(played, found):
        lines += ["", f"The plan is wrong about {', '.join(differing(played, found))}: please report it."]
    if not found.fits:
        lines += ["", f"It does not fit: see k2train plan with the same words, of phase {phase.part.name}."]
    return lines


def _owned(played: Rehearsal) -> Iterator[str]:
    if not played.owned:
        yield "No matrices: AdamW updates each rank's part by itself"
        return
    yield "Matrices to orthogonalise, and bytes sent for them in a step"
    columns = f"{'shared by':>10} {'this rank':>10} {'least':>7} {'most':>7} {'rounds':>7} {'sent':>9} {'most':>9}"
    yield f"  {'role':<10} {columns}"
    for row in played.owned:
        yield (
            f"  {row.role:<10} {row.shared_by:>10,} {row.here:>10,} {row.least:>7,} {row.most:>7,} {row.rounds:>7,} "
            f"{memory(row.sent):>9} {memory(row.most_sent):>9}"
        )
    yield f"  work: {played.work:.2f} of the mean here, {played.most_work:.2f} at most"


def _reads(played: Rehearsal) -> Iterator[str]:
    yield f"Samples that this rank reads, of {'the data' if played.real_data else 'data that stands in for yours'}"
    for read in played.reads:
        sources = ", ".join(f"{number} of {source}" for source, number in sorted(read.samples.items()))
        yield (
            f"  step {read.step:,} ({read.phase}): {read.micro_batches} micro-batches, {sources}; "
            f"the first is sample {read.first:,}, window {read.window:,}"
        )
