"""All checks, one after the other, by all ranks together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

from k2train.comm import World, gather_json
from k2train.config import ConfigError, RunConfig
from k2train.doctor import data, folders, machine, network, verdicts
from k2train.doctor.machine import Machine
from k2train.doctor.network import Network
from k2train.doctor.verdicts import Verdict
from k2train.paths import cache_dir
from k2train.plan.count import parameters
from k2train.train.phases import build_plan


def examine(config: RunConfig, world: World) -> Iterator[Verdict]:
    """The verdicts, on every rank, as they are found; all ranks take all of them.

    Args:
        config: of the run.
        world: its processes.
    """
    yield from verdicts.config(list(_faults(config, world.size)))
    machines = [Machine(**found) for found in gather_json(asdict(machine.look(world)))]
    yield verdicts.versions(machines)
    yield verdicts.devices(machines)
    yield verdicts.products(machines)
    yield verdicts.shared_memory(machines)
    yield verdicts.open_files(machines)
    measured = network.measure(world)
    everywhere = gather_json(None if measured is None else asdict(measured))
    yield verdicts.network([None if found is None else Network(**found) for found in everywhere], machines)
    (offsets, *_) = gather_json(network.clock_offsets(world))
    yield verdicts.clocks(offsets, machines)
    runs, cache = Path(config.runs_dir).expanduser(), cache_dir(config.data.cache_dir)
    yield verdicts.folder("runs_dir", folders.probe(runs, world), machines, needed=checkpoint_bytes(config))
    yield verdicts.folder("data.cache_dir", folders.probe(cache, world), machines)
    yield verdicts.data(data.look(config.data, cache=cache, world=world), machines)


def _faults(config: RunConfig, processes: int) -> Iterator[str]:
    yield from config.check_world(processes)
    try:
        build_plan(config)
    except ConfigError as error:
        yield from error.faults


def checkpoint_bytes(config: RunConfig) -> int:
    """Of masters and momenta, two numbers of fp32 a weight with Muon and three with AdamW; at least.

    Where the vocabulary follows the tokenizer, embeddings count by the size that is asked for.
    """
    vocabulary = config.model.vocab_size or config.data.tokenizer.vocab_size or 1
    found = parameters(replace(config.model, vocab_size=vocabulary))
    muon = config.optim.muon_roles
    return 4 * sum(p.elements * (2 if p.role in muon else 3) for p in found)
