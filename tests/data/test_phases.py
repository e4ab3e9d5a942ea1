"""Streams over phases, sources and skips: the order is the same at any scale, and goes on where it stopped."""

import itertools
import json
import multiprocessing
import random
import re
import signal
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash
from synthetic_data import documents_of, make_dataset

from k2train.data import DataError, DataPhase, TrainStream, open_dataset
from k2train.data.phases import Skips
from k2train.paths import atomic_write

LINES = {"code": ((0, 1), (9000, 1), (9001, 0)), "math": ((4000, 0), (16000, 3)), "web": 2.0}
EVEN = {"code": 1.0, "math": 1.0, "web": 1.0}
PHASES = [DataPhase(300, 16, LINES), DataPhase(500, 16, EVEN), DataPhase(400, 40, LINES)]
opened = cache(open_dataset)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> Path:
    sources = {"code": documents_of(40, seed=1), "math": documents_of(15, seed=2), "web": documents_of(90, seed=3)}
    return make_dataset(tmp_path_factory.mktemp("sources"), sources)


def stream_of(manifest: Path, phases=PHASES, **settings) -> TrainStream:
    return TrainStream(opened(manifest), phases, seed=7, **settings)


def rows(stream: TrainStream, numbers) -> list[list[int]]:
    return [stream.batch([number])[1][0].tolist() for number in numbers]


@pytest.mark.parametrize("settings", [{}, {"packing": True}, {"group_shards": 2}], ids=["cut", "packed", "groups"])
def test_any_number_of_processes_reads_the_same_order(manifest, settings):
    """The world changes now and then; what all ranks read, put together, is one order: nothing lost or twice."""
    rng, step, batch = random.Random(1), 0, 48
    whole, together = stream_of(manifest, **settings), []
    for world in rng.sample([1, 2, 3, 4, 8, 16], 6):
        micro = rng.choice([1, 3])
        ranks = [stream_of(manifest, **settings) for _ in range(world)]
        for _ in range(rng.randint(1, 3)):
            numbers = range(step * batch, (step + 1) * batch)
            pieces = {}
            for rank, start in itertools.product(range(world), range(0, batch // world, micro)):
                mine = [numbers[rank * (batch // world) + i] for i in range(start, min(start + micro, batch // world))]
                pieces |= dict(zip(mine, ranks[rank].batch(mine)[1].tolist(), strict=True))
            together += [pieces[number] for number in numbers]
            step += 1
    assert together == rows(whole, range(step * batch))


def read_on(manifest: Path, folder: Path) -> None:
    """From the state that is there, or from the beginning; each sample that is read is written down, then the state."""
    stream, path = stream_of(manifest), folder / "state.json"
    first = stream.load_state_dict(json.loads(path.read_text())) if path.exists() else 0
    with open(folder / "read", "a", encoding="utf-8") as log:
        for number, ((_, labels, _),) in enumerate(stream.steps([[n]] for n in range(first, 1200)), first):
            log.write(f"{json.dumps([number, labels[0].tolist()])}\n")
            log.flush()
            atomic_write(path, json.dumps(stream.state_dict(number + 1)))


@pytest.mark.full
def test_a_reader_killed_at_random_points_reads_on_bit_for_bit(manifest, tmp_path):
    rng, context = random.Random(4), multiprocessing.get_context("fork")

    def start(seconds: float | None) -> int | None:
        process = context.Process(target=read_on, args=(manifest, tmp_path))
        process.start()
        process.join(seconds)
        process.kill()
        process.join()
        return process.exitcode

    kills = [start(rng.uniform(0, 0.2)) for _ in range(20)].count(-signal.SIGKILL)
    assert kills > 5
    assert start(None) == 0
    found = [json.loads(line) for line in (tmp_path / "read").read_text().splitlines()]
    assert len(found) <= 1200 + kills  # of each kill at most the sample before its state comes again
    assert dict(found) == dict(enumerate(rows(stream_of(manifest), range(1200))))


def test_a_run_resumed_at_any_point_reads_on_bit_for_bit(manifest):
    """At 50 random points, twice in a row, over epochs, weights that change and another sequence length."""
    rng = random.Random(2)
    whole = stream_of(manifest)
    for _ in range(50):
        number = rng.randrange(1200)
        for after in (0, rng.randrange(20)):
            state = json.loads(json.dumps(whole.state_dict(number + after)))
            resumed = stream_of(manifest)
            start = resumed.load_state_dict(state)
            assert start == number + after
            assert rows(resumed, range(start, start + 5)) == rows(whole, range(start, start + 5))


def test_each_window_of_a_source_comes_once_before_any_comes_again(manifest):
    stream = stream_of(manifest)
    seen: dict[tuple[str, int, int], list[int]] = {}
    for number in range(1200):
        trace = stream.trace(number)
        seen.setdefault((trace.source, trace.epoch, 16 if number < 800 else 40), []).append(trace.window)
    for windows in seen.values():
        assert len(set(windows)) == len(windows)
    for (source, epoch, length), windows in seen.items():
        if (source, epoch + 1, length) in seen:  # a whole epoch
            assert sorted(windows) == list(range(len(windows)))


def test_a_batch_is_of_one_length(manifest):
    with pytest.raises(ValueError, match="samples 799 to 800 are of different lengths"):
        stream_of(manifest).batch([799, 800])


def test_tokens_of_each_source_are_known_without_reading(manifest):
    stream = stream_of(manifest)
    counted = dict.fromkeys(("code", "math", "web"), 0)
    for number in range(1200):
        if number % 97 == 0:
            assert stream.tokens_seen(number) == counted
        counted[stream.trace(number).source] += 16 if number < 800 else 40
    assert stream.tokens_seen(1200) == counted
    assert counted["code"] > 0


def test_weights_follow_their_lines(manifest):
    """Over the tokens of the run, whichever phase they fall into."""
    stream = stream_of(manifest, [DataPhase(4000, 16, {"code": 1.0, "math": ((0, 1), (64000, 0)), "web": 0.0})])
    seen = stream.tokens_seen(4000)
    assert seen["web"] == 0
    # Shares go from 1/2 and 1/2 to 1 and 0, in a straight line.
    assert seen["code"] / 16 == pytest.approx(3000, abs=1)
    faded = stream_of(
        manifest, [DataPhase(4000, 16, {"code": 1, "math": 1, "web": 0}, {"code": 1, "math": 0, "web": 0})]
    )
    assert faded.tokens_seen(4000) == seen


def test_another_length_begins_epochs_anew_and_says_so(manifest):
    notes = stream_of(manifest).notes
    assert any(
        re.fullmatch(r"web: from sample 800 on, of 40 tokens, its epoch begins anew; \d+% of it were seen in .*", note)
        for note in notes
    )
    assert stream_of(manifest, PHASES[:2]).notes == []


def test_limits_on_epochs_are_checked_before_the_run(manifest):
    with pytest.raises(
        DataError,
        match=r"would see the source math \d+\.\d\d times, and data.max_epochs.math allows 0.5: lower its weight",
    ):
        stream_of(manifest, max_epochs={"math": 0.5})
    stream_of(manifest, max_epochs={"math": 1000, "web": 1000})


def test_without_weights_sources_come_by_their_size(manifest):
    dataset = open_dataset(manifest)
    sizes = {name: dataset.tokens("train", name) for name in dataset.sources}
    seen = stream_of(manifest, [DataPhase(4096, 16)]).tokens_seen(4096)
    for name, size in sizes.items():
        assert seen[name] / 16 == pytest.approx(4096 * size / sum(sizes.values()), abs=1)


def test_a_source_too_small_for_a_window_is_named(manifest):
    with pytest.raises(DataError, match=r"the training split of math has \d+ tokens and a sample takes 100001"):
        stream_of(manifest, [DataPhase(1, 100_000, {"math": 1, "code": 0, "web": 0})])


def test_weights_for_other_sources_are_refused(manifest):
    with pytest.raises(DataError, match="weights are given for code, wb and the data set has code, math, web"):
        stream_of(manifest, [DataPhase(1, 16, {"code": 1, "wb": 1})])


# ---- skips


def test_what_is_skipped_is_left_out_and_nothing_else(manifest):
    phases = [DataPhase(790, 16, LINES), DataPhase(10, 40)]
    whole, skipping = (stream_of(manifest, phases, skips=skips) for skips in ([], [[10, 19], [100, 100], [700, 705]]))
    kept = [n for n in range(790) if not (10 <= n <= 19 or n == 100 or 700 <= n <= 705)]
    assert rows(skipping, range(len(kept))) == rows(whole, kept)
    assert skipping.batch([789])[0].shape == (1, 16)
    assert skipping.batch([790])[0].shape == (1, 40)
    seen = skipping.tokens_seen(len(kept))
    left_out = {name: sum(whole.trace(n).source == name for n in range(790) if n not in kept) for name in seen}
    assert seen == {name: tokens - 16 * left_out[name] for name, tokens in whole.tokens_seen(790).items()}


def test_a_skip_of_the_future_leaves_the_past_alone(manifest):
    state = stream_of(manifest).state_dict(50)
    later = stream_of(manifest, skips=[[60, 69]])
    assert later.load_state_dict(state) == 50
    assert rows(later, [50, 59, 60]) == rows(stream_of(manifest), [50, 59, 70])
    with pytest.raises(DataError, match=r"has left out the samples \[\], now \[\[40, 45\]\]"):
        stream_of(manifest, skips=[[40, 45]]).load_state_dict(state)


def test_what_is_left_out_right_after_the_past_is_yet_to_come(manifest):
    state = stream_of(manifest).state_dict(60)
    later = stream_of(manifest, skips=[[60, 69]])
    assert later.load_state_dict(state) == 60
    assert later.state_dict(61)["skips"] == [[60, 69]]


@pytest.mark.parametrize("skips", [[[5, 4]], [[5, 9], [9, 12]], [[5, 9], [1, 2]], [[1, 2, 3]]])
def test_skips_out_of_order_are_refused(skips):
    with pytest.raises(DataError, match="must be pairs \\[first, last\\] in rising order"):
        Skips(skips)


# ---- state


def test_the_state_is_small(manifest):
    assert len(json.dumps(stream_of(manifest).state_dict(1000))) < 600


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 8}, r"has the seed 7, now 8: set seed back"),
        ({"packing": True}, r"data.order.packing False, now True"),
        ({"group_shards": 2}, r"data.order.group_shards None, now 2"),
        ({"phases": [DataPhase(2000, 24, LINES)]}, r"\[\[400, 16\]\], now \[\[400, 24\]\].*add a phase"),
        (
            {"phases": [DataPhase(2000, 16, {"code": 1, "math": 1, "web": 1})]},
            r"of each source the tokens \{.*\}, now \{.*\}: .*data.weights",
        ),
    ],
)
def test_what_would_change_the_past_is_refused(manifest, change, message):
    state = stream_of(manifest).state_dict(400)
    settings = {"phases": PHASES, "seed": 7} | change
    phases = settings.pop("phases")
    with pytest.raises(DataError, match=message):
        TrainStream(open_dataset(manifest), phases, **settings).load_state_dict(state)


def test_the_future_may_be_planned_anew(manifest):
    state = stream_of(manifest).state_dict(400)
    longer = [*PHASES[:1], DataPhase(9000, 16, PHASES[1].weights), DataPhase(10, 20)]
    with pytest.raises(DataError, match="lengths"):
        stream_of(manifest, [DataPhase(100, 16, LINES), DataPhase(10, 20)]).load_state_dict(state)
    assert stream_of(manifest, longer).load_state_dict(state) == 400


def test_another_data_set_or_tokenizer_is_refused(manifest, tmp_path):
    state = stream_of(manifest).state_dict(400)
    other = make_dataset(
        tmp_path, {"code": documents_of(40, seed=1), "math": documents_of(15, seed=2), "web": documents_of(90, seed=4)}
    )
    fingerprints = [open_dataset(path).fingerprint for path in (manifest, other)]
    with pytest.raises(DataError, match=f"trained on the data set {fingerprints[0]}, now {fingerprints[1]}: the text"):
        stream_of(other).load_state_dict(state)
    with pytest.raises(DataError, match=r"trained with the tokenizer abc, now \w+: bring back the tokenizer"):
        stream_of(manifest).load_state_dict(state | {"tokenizer": "abc"})
    with pytest.raises(DataError, match=r"made by version 1, now 2: go on with the version of k2train"):
        stream_of(manifest).load_state_dict(state | {"algorithm": 1})


# ---- faults: no bad sample is given out


def test_a_flipped_byte_is_found_before_its_sample(manifest, tmp_path):
    sources = {"one": documents_of(3000, seed=5, longest=600)}
    path = make_dataset(tmp_path, sources, per_shard=3000)
    good = stream_of(path, [DataPhase(500, 64)])
    expected = {number: good.batch([number])[0] for number in range(500)}
    shard = path.parent / "one" / "train-00000.safetensors"
    data = bytearray(shard.read_bytes())
    data[len(data) * 3 // 4] ^= 4
    shard.write_bytes(data)
    damaged, refused = TrainStream(open_dataset(path), [DataPhase(500, 64)], seed=7), []
    for number in range(500):
        try:
            assert torch.equal(damaged.batch([number])[0], expected[number])
        except DataError as error:
            refused.append(str(error))
    assert 0 < len(refused) < 500
    assert re.fullmatch(
        r"the shard \S+train-00000.safetensors is damaged in bytes \d+ to \d+: their xxh3 is \w{16} and was "
        r"\w{16} when it was written: delete the folder \S+ and prepare the data again",
        refused[0],
    )


def test_a_cut_or_missing_shard_is_one_sentence(manifest, tmp_path):
    path = make_dataset(tmp_path, {"one": documents_of(30, seed=5)}, per_shard=30)
    shard = path.parent / "one" / "train-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    stream = stream_of(path, [DataPhase(5, 16)])
    with pytest.raises(DataError, match=r"train-00000.safetensors has \d+ bytes and its manifest says \d+: delete"):
        stream.batch([0])
    shard.unlink()
    with pytest.raises(DataError, match=r"train-00000.safetensors is missing: delete the folder"):
        stream.batch([0])


def test_opening_reads_no_shard(manifest, monkeypatch):
    monkeypatch.setattr("k2train.data.reader.map_file", lambda path: pytest.fail(f"{path} was opened"))
    stream = TrainStream(open_dataset(manifest), PHASES, seed=7)
    stream.tokens_seen(500)


def test_a_block_is_hashed_once(manifest, monkeypatch):
    hashed = []
    digest = xxhash.xxh3_64_intdigest
    monkeypatch.setattr("k2train.data.reader.xxhash.xxh3_64_intdigest", lambda data: hashed.append(1) or digest(data))
    stream = TrainStream(open_dataset(manifest), [DataPhase(2000, 16)], seed=7)
    first = np.array(rows(stream, range(600)))
    blocks = len(hashed)
    assert np.array_equal(first, np.array(rows(stream, range(600))))
    assert len(hashed) == blocks
