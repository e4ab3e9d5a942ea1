"""The plan of a run: which step is what."""

import dataclasses
import itertools

import pytest

from k2train.cli.commands import TRAIN
from k2train.cli.compose import compose
from k2train.config import ConfigError, RopeScalingConfig, RunConfig, ScheduleConfig, parse
from k2train.train.phases import build_plan

LENGTH, BATCH = 64, 8  # of experiment=tiny


def plan(steps=None, *, words=(), **fields):
    config = parse(RunConfig, compose(TRAIN, ["experiment=tiny", *words]))
    plain = dict.fromkeys(f.name for f in dataclasses.fields(ScheduleConfig))
    schedule = parse(ScheduleConfig, plain | {"steps": steps, "batch_ramp": [], "phases": {}, **fields})
    return build_plan(dataclasses.replace(config, schedule=schedule))


def ratios(*args, **fields):
    made = plan(*args, **fields)
    return [made.step(number).lr_ratio for number in range(made.steps)]


def decay(shape="linear", final=0.1, **length):
    return {"decay_shape": shape, "final_lr_ratio": final, **length}


def test_warmup_stable_decay():
    expected = [0.25, 0.5, 0.75, 1, 1, 1, 1, 0.7, 0.4, 0.1]
    step = BATCH * LENGTH
    for warmup in ({"warmup_steps": 4}, {"warmup_tokens": 4 * step}):
        for length in ({"decay_fraction": 0.3}, {"decay_steps": 3}, {"decay_tokens": 3 * step}):
            assert ratios(10, **warmup, **decay(**length)) == pytest.approx(expected)


def test_constant_without_warmup_or_decay():
    assert ratios(5) == [1.0] * 5
    assert ratios(5, **decay(decay_fraction=0.0)) == [1.0] * 5


def test_cosine_is_halfway_in_the_middle_and_ends_at_the_final_ratio():
    found = ratios(8, **decay("cosine", 0.2, decay_fraction=1.0))
    assert found[3] == pytest.approx(0.6)
    assert found[-1] == pytest.approx(0.2)
    assert found == sorted(found, reverse=True)


def test_warmup_may_overlap_decay():
    assert all(0 < ratio <= 1 for ratio in ratios(4, warmup_steps=4, **decay(decay_fraction=1.0)))


def test_tokens_are_rounded_up_to_steps():
    assert plan(tokens=BATCH * LENGTH * 9).steps == 9
    assert plan(tokens=BATCH * LENGTH * 9 + 1).steps == 10


PHASES = {
    "first": {"steps": 6, **decay("cosine", 0.5, decay_steps=4), "weights": {"a": 1, "b": 3}},
    "long": {
        "tokens": 2 * 4 * 128,
        "sequence_length": 128,
        "global_batch_size": 4,
        "micro_batch_size": 2,
        "weights": {"a": 1},
        "final_weights": {"a": 1, "b": 1},
        "rope_scaling": {
            "factor": 4,
            "original_max_position_embeddings": 64,
            "beta_fast": 1,
            "beta_slow": 1,
            "mscale": 1,
            "mscale_all_dim": 1,
        },
    },
    "last": {"steps": 3, **decay("linear", 0.05, decay_fraction=1.0)},
}


def check_that_steps_tile(made):
    """Samples and tokens run on through the whole run, without a gap."""
    steps = [made.step(number) for number in range(made.steps)]
    assert (steps[0].first_sample, steps[0].first_token) == (0, 0)
    for before, after in itertools.pairwise(steps):
        assert after.first_sample == before.first_sample + before.samples
        assert after.first_token == before.tokens_after
        assert after.phase.index - before.phase.index in (0, 1)
    assert steps[-1].tokens_after == made.tokens == sum(phase.tokens for phase in made.phases)
    for phase in made.phases:
        own = [step for step in steps if step.phase is phase]
        assert (own[0].number, len(own)) == (phase.first_step, phase.steps)
        assert (own[0].first_sample, sum(step.samples for step in own)) == (phase.first_sample, phase.samples)
        assert own[0].first_token == phase.first_token
    return steps


def test_phases():
    made = plan(phases=PHASES)
    steps = check_that_steps_tile(made)
    assert [phase.steps for phase in made.phases] == [6, 2, 3]
    assert [phase.sequence_length for phase in made.phases] == [64, 128, 64]
    assert [step.samples for step in steps] == [8] * 6 + [4] * 2 + [8] * 3
    assert [phase.micro_batch_size for phase in made.phases] == [4, 2, 4]
    scalings = [phase.rope_scaling for phase in made.phases]
    assert scalings == [None, *[RopeScalingConfig(**PHASES["long"]["rope_scaling"])] * 2]  # it stays
    found = [step.lr_ratio for step in steps]
    assert found[1:3] == [1.0, pytest.approx(0.5 + 0.5 * 0.853553, rel=1e-5)]
    assert found[5:8] == [0.5, 0.5, 0.5]  # begins where the phase before has ended
    assert found[8:] == pytest.approx([0.35, 0.2, 0.05])
    assert (made.phases[1].weights, made.phases[1].final_weights) == ({"a": 1.0}, {"a": 1.0, "b": 1.0})


def test_the_batch_grows_with_the_tokens_seen():
    made = plan(12, batch_ramp=[[2, 500], [4, 1500]], warmup_tokens=1024)
    steps = check_that_steps_tile(made)
    # 4 steps of 128 tokens reach 512, then 4 of 256 reach 1536
    assert [step.samples for step in steps] == [2] * 4 + [4] * 4 + [8] * 4
    assert [step.lr_ratio for step in steps[:7]] == [0.125, 0.25, 0.375, 0.5, 0.75, 1.0, 1.0]
    assert made.phases[0].batches == (2, 4, 8)
    by_tokens = plan(tokens=made.tokens, batch_ramp=[[2, 500], [4, 1500]], warmup_tokens=1024)
    assert [by_tokens.step(number) for number in range(12)] == steps


def test_a_ramp_goes_on_in_the_next_phase():
    phases = {"a": {"steps": 4}, "b": {"steps": 2}, "c": {"steps": 1, "global_batch_size": 16}}
    made = plan(batch_ramp=[[4, 5 * 4 * LENGTH]], phases=phases)
    assert [step.samples for step in check_that_steps_tile(made)] == [4] * 4 + [4, 8] + [16]


def test_positions_before_steps():
    made = plan(phases=PHASES)
    assert [made.tokens_before(n) for n in (0, 1, 6, 11)] == [0, 512, 3072, made.tokens]
    assert [made.samples_before(n) for n in (0, 1, 6, 11)] == [0, 8, 48, 48 + 8 + 24]


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"warmup_steps": 21}, "schedule.warmup_steps=21 is longer than the run of 20 steps"),
        ({"warmup_tokens": 10**6}, "schedule.warmup_tokens=1000000 are more than the run's 10240 tokens"),
        (decay(decay_steps=21), "schedule: the decay is longer than the 20 steps that it ends"),
        ({"batch_ramp": [[4, 10**6]]}, "train.global_batch_size would never be reached"),
        (
            {"steps": None, "phases": PHASES | {"last": {"steps": 3, **decay(decay_tokens=10**6)}}},
            "schedule.phases.last: the decay is longer than the 3 steps",
        ),
    ],
)
def test_parts_that_do_not_fit(fields, sentence):
    with pytest.raises(ConfigError, match=sentence.replace("(", r"\(")):
        plan(**({"steps": 20} | fields))


def test_the_table():
    lines = plan(phases=PHASES, warmup_steps=2).table(lr=0.01)
    assert [line.split("  ")[0] for line in lines] == ["phase", "first", "long", "last"]
    assert lines[1].split("  ")[-1].strip() == "plain"
    assert "5.00e-03 to 1.00e-02 to 5.00e-03" in lines[1]
    assert "a 25%, b 75%" in lines[1]
    assert "a 100% to a 50%, b 50%" in lines[2]
    assert lines[3].endswith("YaRN x4")


def test_k2():
    words = ["schedule=k2", "model=k2", "model.rope_scaling=null", "optim.lr=2e-4", "train.sequence_length=4096"]
    config = parse(RunConfig, compose(TRAIN, [*words, "train.global_batch_size=16384"]))
    made = build_plan(config)
    assert {step.tokens for step in map(made.step, (0, 230_000, 235_000, 237_000, 237_900))} == {2**26}  # 67 M
    lr = {name: 2e-4 * made.step(phase.first_step + phase.steps - 1).lr_ratio for name, phase in named(made)}
    assert lr == pytest.approx(
        {"pretraining": 2e-5, "annealing": 8.696e-6, "long_context": 7e-6, "yarn": 7e-6}, rel=1e-4
    )
    assert 2e-4 * made.step(499).lr_ratio == pytest.approx(2e-4)
    constant = [n for n in range(500, 230_000, 10) if made.step(n).lr_ratio == 1]
    assert made.step(constant[-1]).tokens_after == pytest.approx(10e12, rel=1e-3)
    assert [phase.sequence_length for phase in made.phases] == [4096, 4096, 32768, 131072]
    assert [phase.rope_scaling is not None for phase in made.phases] == [False, False, False, True]
    small = build_plan(parse(RunConfig, compose(TRAIN, ["experiment=k2-in-small"])))
    assert [name for name, _ in named(small)] == [name for name, _ in named(made)]


def named(made):
    return [(phase.name, phase) for phase in made.phases]
