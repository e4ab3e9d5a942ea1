"""What a step reads comes from a thread that is ahead of it: the same batches, errors and hangs included."""

import dataclasses
import threading
import time

import pytest
import torch
from synthetic_data import documents_of, make_dataset

from k2train.cli.commands import TRAIN
from k2train.cli.compose import compose
from k2train.comm import World
from k2train.config import RunConfig, ScheduleConfig, parse
from k2train.data import DataError, TrainStream, open_dataset
from k2train.model import SequenceParallel
from k2train.train.failures import describe
from k2train.train.feed import Feed
from k2train.train.phases import build_plan
from k2train.train.watchdog import Watchdog

LATER = {"steps": 3, "sequence_length": 128, "global_batch_size": 16}


@pytest.fixture(scope="module")
def plan():
    config = parse(RunConfig, compose(TRAIN, ["experiment=tiny", "train.micro_batch_size=2"]))
    plain = dict.fromkeys(field.name for field in dataclasses.fields(ScheduleConfig))
    schedule = parse(ScheduleConfig, plain | {"batch_ramp": [], "phases": {"a": {"steps": 4}, "b": LATER}})
    return build_plan(dataclasses.replace(config, schedule=schedule))


@pytest.fixture
def manifest(tmp_path):
    return make_dataset(tmp_path, {"one": documents_of(200, seed=3)}, per_shard=200)


def stream_of(manifest, plan) -> TrainStream:
    return TrainStream(open_dataset(manifest), plan.data_phases(), seed=1)


def feed_of(stream, plan, *, rank: int = 0, size: int = 1, sharing: int = 1) -> Feed:
    parallel = SequenceParallel(None, sharing, rank % sharing) if sharing > 1 else None
    return Feed(stream, plan, world=World(rank, size, rank, size, torch.device("cpu")), sequence_parallel=parallel)


def prefetching() -> bool:
    return any(thread.name == "k2train-prefetch" for thread in threading.enumerate())


def test_ranks_that_share_out_sequences_get_parts_of_the_same_samples(manifest, plan):
    stream = stream_of(manifest, plan)
    whole = [feed_of(stream, plan, rank=rank, size=2) for rank in range(2)]
    parts = [feed_of(stream, plan, rank=rank, size=8, sharing=4) for rank in range(8)]
    for number in (3, 4):  # of both lengths
        step = plan.step(number)
        for first, feed in zip((0, 4), whole, strict=True):
            shared = zip(*(part.take(step) for part in parts[first : first + 4]), strict=True)
            for (tokens, labels, starts), batches in zip(feed.take(step), shared, strict=True):
                assert torch.equal(torch.cat([batch[0] for batch in batches], 1), tokens)
                assert torch.equal(torch.cat([batch[1] for batch in batches], 1), labels)
                assert all(torch.equal(batch[2], starts) for batch in batches)
    for feed in whole + parts:
        feed.close()


@pytest.mark.parametrize("size", [1, 2, 4])
def test_ranks_get_their_samples_of_each_step_wherever_the_run_goes_on(manifest, plan, size):
    stream = stream_of(manifest, plan)
    feeds = [feed_of(stream, plan, rank=rank, size=size) for rank in range(size)]
    for number in [*range(2, plan.steps), 0, 1]:  # resumed, and once more from the beginning
        step = plan.step(number)
        found = {}
        for rank, feed in enumerate(feeds):
            parts = step.micro_batches(rank=rank, processes=size)
            for part, (tokens, labels, starts) in zip(parts, feed.take(step), strict=True):
                found |= dict(zip(part, zip(tokens, labels, starts, strict=True), strict=True))
        together = map(torch.stack, zip(*(found[n] for n in sorted(found)), strict=True))
        expected = stream.batch(range(step.first_sample, step.first_sample + step.samples))
        assert all(map(torch.equal, together, expected))
    for feed in feeds:
        feed.close()
    assert not prefetching()


def test_the_next_step_is_read_while_this_one_is_computed(manifest, plan):
    stream, read = stream_of(manifest, plan), []
    batch = stream.batch
    stream.batch = lambda numbers: read.append(numbers) or batch(numbers)
    feed = feed_of(stream, plan)
    feed.take(plan.step(0))
    wanted = [part for number in (0, 1) for part in plan.step(number).micro_batches(rank=0, processes=1)]
    deadline = time.monotonic() + 10
    while read[: len(wanted)] != wanted and time.monotonic() < deadline:
        time.sleep(0.01)
    assert read[: len(wanted)] == wanted
    feed.close()


def test_damage_found_by_the_thread_is_one_sentence(manifest, plan):
    shard = manifest.parent / "one" / "train-00000.safetensors"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    feed = feed_of(stream_of(manifest, plan), plan)
    with pytest.raises(DataError, match="is damaged in bytes") as caught:
        feed.take(plan.step(0))
    assert describe(caught.value) == str(caught.value)  # no type in front of it: it speaks to the person
    assert not prefetching()


def test_a_read_that_hangs_is_seen_and_holds_up_no_end(manifest, plan, tmp_path, monkeypatch):
    monkeypatch.setattr("k2train.data.reader.PATIENCE", 0.1)
    stream, mended, told = stream_of(manifest, plan), threading.Event(), []
    batch = stream.batch
    stream.batch = lambda numbers: (numbers[0] < 8 or mended.wait(20)) and batch(numbers)
    feed = feed_of(stream, plan)
    feed.take(plan.step(0))
    with Watchdog(0.5, stacks=tmp_path / "stacks", hung=lambda sentence: told.append(sentence) or mended.set()):
        feed.take(plan.step(1))
    assert told
    assert "in step 2: reading data; the stacks" in told[0]
    assert "work" in (tmp_path / "stacks").read_text()
    mended.clear()
    feed.take(plan.step(0))
    begin = time.monotonic()
    feed.close()
    assert time.monotonic() - begin < 5
    mended.set()
