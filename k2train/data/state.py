"""What a checkpoint keeps of the data: enough to tell that a run goes on with the samples it would have had.

The order is a function of the number of the next sample, so nothing else is needed to resume. The rest names what the
function depends on. Of the phases only the past counts: what is yet to come may be planned anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from k2train.data.errors import DataError
from k2train.data.order import VERSION

if TYPE_CHECKING:
    from k2train.data.stream import TrainStream


def make_state(stream: TrainStream, next_sample: int) -> dict[str, Any]:
    """The state of a run whose next sample has this number; equal on all ranks."""
    skips = stream.samples.skips
    return {
        "algorithm": VERSION,
        "seed": stream.seed,
        "next_sample": next_sample,
        "dataset": stream.dataset.fingerprint,
        "tokenizer": stream.dataset.manifest["tokenizer"]["sha256"],
        "packing": stream.packing,
        "group_shards": stream.group_shards,
        "lengths": past_lengths(stream, next_sample),
        "skips": [list(pair) for pair in skips.pairs if pair[0] < skips.passed(next_sample)],
        "drops": stream.drops.before(next_sample),
        "tokens": stream.tokens_seen(next_sample),
    }


def past_lengths(stream: TrainStream, next_sample: int) -> list[list[int]]:
    """[samples, sequence length] of what was read so far; phases of one length are one."""
    number, found = stream.samples.skips.passed(next_sample), list[list[int]]()
    *_, last = stream.samples.plans
    for plan in stream.samples.plans:
        read = number - plan.first_sample
        samples = read if plan is last else min(plan.samples, read)
        if samples > 0 and found and found[-1][1] == plan.sequence_length:
            found[-1][0] += samples
        elif samples > 0:
            found.append([samples, plan.sequence_length])
    return found


def check_state(stream: TrainStream, state: Mapping[str, Any]) -> int:
    """The next sample.

    Raises:
        DataError: the stream would not go on as the one that wrote the state.
    """
    then, now = dict(state), make_state(stream, int(state["next_sample"]))
    remedies = {
        "algorithm": "go on with the version of k2train that began the run, or give the new run another name",
        "seed": "set seed back, or give the run another name",
        "tokenizer": "bring back the tokenizer, or give the run another name",
        "dataset": "the text, its split or Python changed; bring the data back, or give the run another name",
        "packing": "set data.order.packing back, or give the run another name",
        "group_shards": "set data.order.group_shards back, or give the run another name",
        "skips": "what was left out so far is part of the run: bring back the skips, or give the run another name",
        "drops": "from_sample of a new entry must be {next_sample} or more, and those of the past stay as they are",
        "lengths": "set train.sequence_length back; to change it from a step on, add a phase to schedule.phases",
        "tokens": "the weights of the past changed: set data.weights back, or change them from a phase on",
    }
    what = {
        "algorithm": "the order of samples was made by version",
        "seed": "the order of samples has the seed",
        "tokenizer": "the run was trained with the tokenizer",
        "dataset": "the run was trained on the data set",
        "packing": "the run was trained with data.order.packing",
        "group_shards": "the run was trained with data.order.group_shards",
        "lengths": "the run has read samples of lengths ([samples, tokens each])",
        "skips": "the run has left out the samples",
        "drops": "the run has dropped documents ([from_sample, xxh3 of their names])",
        "tokens": "the run has read of each source the tokens",
    }
    for key, remedy in remedies.items():
        if then.get(key) != now[key]:
            way = remedy.format(next_sample=then["next_sample"])
            raise DataError(f"{what[key]} {then.get(key)}, now {now[key]}: {way}")
    return int(state["next_sample"])
