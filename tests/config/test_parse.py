import copy
from dataclasses import dataclass

import pytest

from k2train.cli.commands import TRAIN
from k2train.cli.compose import compose
from k2train.config import ConfigError, RunConfig, parse, to_dict
from k2train.config.schema import rule


@pytest.fixture(scope="module")
def tiny() -> dict:
    return compose(TRAIN, ["experiment=tiny"])


def faults(mapping, **changes) -> tuple[str, ...]:
    mapping = copy.deepcopy(mapping)
    for key, value in changes.items():
        *groups, name = key.split("__")
        place = mapping
        for group in groups:
            place = place[group]
        place[name] = value
    with pytest.raises(ConfigError) as caught:
        parse(RunConfig, mapping)
    return caught.value.faults


def test_there_and_back(tiny):
    config = parse(RunConfig, tiny)
    assert parse(RunConfig, to_dict(config)) == config
    found = to_dict(config)
    given = tiny["data"]["sources"]["stdlib"]  # one of the few groups whose keys need not all be given
    assert found["data"]["sources"].pop("stdlib").items() >= given.items()
    assert found == tiny | {"data": tiny["data"] | {"sources": {}}}


def test_all_faults_are_told_at_once(tiny):
    mapping = copy.deepcopy(tiny)
    del mapping["seed"]
    assert faults(mapping, optim__lrr=1.0, model__hidden_size="big") == (
        "missing key seed",
        "model.hidden_size='big' must be a whole number",
        "unknown key optim.lrr: did you mean 'lr'?",
    )


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("seed", -1, "seed=-1 must be at least 0"),
        ("seed", True, "seed=True must be a whole number"),
        ("seed", 1.0, "seed=1.0 must be a whole number"),
        ("seed", None, "seed=None must be a whole number"),
        ("name", 3, "name=3 must be text"),
        ("optim__lr", float("nan"), "optim.lr=nan must be finite"),
        ("optim__momentum", 1.0, "optim.momentum=1.0 must be below 1"),
        ("optim__eps", 0, "optim.eps=0.0 must be above 0"),
        ("optim__betas", [0.9], "optim.betas=[0.9] must be a list of 2, as in optim.betas=[a,b]"),
        ("optim__betas", [0.9, 2], "optim.betas[1]=2.0 must be below 1"),
        ("optim__nesterov", "yes", "optim.nesterov='yes' must be true or false"),
        ("optim__name", "muonclap", "did you mean 'muonclip'?"),
        ("parallel__zero_stage", 4, "parallel.zero_stage=4 must be at most 3"),
        ("model__qk_rope_head_dim", 7, "model.qk_rope_head_dim=7 must be even"),
        ("model__rope_scaling", {"factor": 2}, "missing key model.rope_scaling.beta_fast"),
        ("model", 3, "model must be a group of keys, not 3"),
        ("data__sources__stdlib__include", "*.py", "data.sources.stdlib.include='*.py' must be a list"),
        ("data__weights", {"stdlib": "much"}, "data.weights.stdlib='much' must be a number"),
        ("data__weights", {"stdlib": [[0, 1], [5]]}, "data.weights.stdlib[1]=[5] must be a list of 2"),
        ("data__weights", {"stdlib": -1}, "data.weights.stdlib=-1.0 must be at least 0"),
    ],
)
def test_a_bad_value_names_key_rule_and_value(tiny, key, value, sentence):
    assert any(sentence in fault for fault in faults(tiny, **{key: value}))


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("name", "a/b", "name='a/b' must be a plain folder name"),
        ("model__num_experts_per_tok", 9, "model.num_experts_per_tok=9 is more than n_routed_experts=8"),
        ("model__kv_lora_rank", None, "model.kv_lora_rank is null but attention=mla needs it"),
        ("model__num_key_value_heads", 2, "model.num_key_value_heads=2 is given but attention=mla does not read it"),
        ("model__qk_nope_head_dim", 0, "model.qk_nope_head_dim=0 but attention=mla needs keys without position"),
        ("model__attention", "gqa", "model.num_key_value_heads is null but attention=gqa needs it"),
        ("model__attention", "gqa", "model.q_lora_rank=48 is given but attention=gqa has no latents"),
        ("model__attention", "gqa", "model.kv_lora_rank=32 is given but attention=gqa has no latents"),
        ("model__n_group", 3, "model.n_routed_experts=8 must be a multiple of n_group=3"),
        ("data__sources__stdlib__kind", "folder", "data.path is missing: the source stdlib of kind folder needs one"),
        ("data__sources__stdlib__path", "/x", "data.sources.stdlib.path='/x' is given but kind=stdlib does not read"),
        ("data__sources", {}, "data.sources is empty"),
        ("data__sources", {"a/b": {"kind": "stdlib"}}, "data.sources.a/b: the name becomes a folder's"),
        ("data__path", "/x", "data.path='/x' is given but no source reads it"),
        ("data__weights", {"other": 1}, "data.weights.other: there is no such source: the sources are stdlib"),
        ("data__weights", {"other": 1}, "data.weights.stdlib is missing: give a weight to each source, or to none"),
        ("data__max_epochs", {"other": 1}, "data.max_epochs.other: there is no such source"),
        ("optim__tau", None, "optim.tau is null but name=muonclip clips at it"),
        ("schedule__tokens", 5, "give exactly one as the length"),
        ("schedule__decay_tokens", 5, "schedule.decay_fraction=0.6 and decay_tokens=5: give one length of the decay"),
        ("schedule__decay_shape", None, "and decay_shape=null: a decay needs all three, and without one all are null"),
        ("schedule__warmup_tokens", 5, "warmup_tokens=5: set one of them to null"),
        ("schedule__batch_ramp", [[4, 9], [8, 9]], "the tokens of its entries must rise"),
        (
            "schedule__batch_ramp",
            [[6, 9]],
            "schedule.batch_ramp, entry 6, must be a multiple of train.micro_batch_size=4",
        ),
        ("schedule__phases", {"a": {"steps": 5}}, "set steps, decay_fraction, decay_shape, final_lr_ratio to null"),
        ("schedule__phases", {"a": {"steps": 5, "tokens": 5}}, "schedule.phases.a.steps=5 and tokens=5: give exactly"),
        ("schedule__phases", {"a": {"steps": 5, "weights": {"x": 0}}}, "add up to 0"),
        ("schedule__phases", {"a": {"steps": 5, "final_weights": {"x": 1}}}, "final_weights is given without weights"),
        ("train__micro_batch_size", 3, "train.global_batch_size=8 must be a multiple of train.micro_batch_size=3"),
        ("parallel__expert_parallel", 3, "parallel.expert_parallel=3 must divide model.n_routed_experts=8"),
        ("train__sequence_length", 8192, "is longer than model.max_position_embeddings=4096"),
    ],
)
def test_keys_that_contradict_each_other(tiny, key, value, sentence):
    assert any(sentence in fault for fault in faults(tiny, **{key: value}))


def test_what_stage_3_cannot_do(tiny):
    mapping = tiny | {"parallel": tiny["parallel"] | {"zero_stage": 3}}
    parse(RunConfig, mapping)
    (fault,) = faults(mapping, train__compile=True)
    assert fault.startswith("train.compile=true but parallel.zero_stage=3 gathers weights between")


def test_other_kinds_of_model_that_contradict_themselves(tiny):
    mapping = copy.deepcopy(tiny)
    mapping["model"] |= {"attention": "gqa", "num_key_value_heads": 2, "q_lora_rank": None, "kv_lora_rank": None}
    mapping["model"]["first_k_dense_replace"] = mapping["model"]["num_hidden_layers"]
    parse(RunConfig, mapping)
    assert faults(mapping, model__num_key_value_heads=3) == (
        "model.num_key_value_heads=3 must divide num_attention_heads=4: as many query heads share each key head",
    )
    (fault,) = faults(mapping, parallel__expert_parallel=2)
    assert fault.startswith("parallel.expert_parallel=2 but no layer has experts")


def test_roles_are_complete_and_no_more(tiny):
    mapping = copy.deepcopy(tiny)
    mapping["optim"]["roles"]["haed"] = mapping["optim"]["roles"].pop("head")
    found = faults(mapping)
    assert [fault.split(":")[0] for fault in found] == [
        "optim.roles.haed is no role of a parameter",
        "optim.roles.head is missing",
    ]


def test_numbers_that_yaml_reads_as_text_or_whole():
    @dataclass(frozen=True, kw_only=True)
    class Config:
        rate: float = rule()

    assert parse(Config, {"rate": "1e-3"}).rate == 0.001
    assert isinstance(parse(Config, {"rate": 1}).rate, float)


@pytest.mark.parametrize(("size", "fits"), [(1, True), (2, True), (3, False), (4, False)])
def test_world_that_does_not_divide_the_batch(tiny, size, fits):
    config = parse(RunConfig, tiny)  # 8 sequences a step, 4 at once
    found = list(config.check_world(size))
    assert fits == (not found)
    assert fits or f"train.global_batch_size=8 does not divide over {size} processes" in found[0]


def test_world_that_does_not_divide_the_experts(tiny):
    config = parse(RunConfig, tiny | {"parallel": tiny["parallel"] | {"expert_parallel": 2}})
    assert "parallel.expert_parallel=2 does not divide the 1 process of this run" in next(iter(config.check_world(1)))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"parallel__sequence_parallel": 3}, "parallel.sequence_parallel=3 must divide model.num_attention_heads=4"),
        (
            {"parallel__sequence_parallel": 4, "train__sequence_length": 62},
            "train.sequence_length=62 must be a multiple of parallel.sequence_parallel=4",
        ),
        (
            {"parallel__sequence_parallel": 2, "inject__allow": True},
            "inject.allow=true spoils whole sequences: set parallel.sequence_parallel=1",
        ),
    ],
)
def test_sequences_that_cannot_be_shared_out(tiny, settings, sentence):
    assert any(sentence in fault for fault in faults(tiny, **settings))


@pytest.mark.parametrize(
    ("size", "sentence"),
    [
        (2, None),
        (3, "parallel.sequence_parallel=2 does not divide the 3 processes of this run"),
        (8, "train.global_batch_size=8 does not divide over 8 processes, 2 to a sequence, with train.micro_batch_size"),
    ],
)
def test_world_that_shares_out_sequences(tiny, size, sentence):
    config = parse(RunConfig, tiny | {"parallel": tiny["parallel"] | {"sequence_parallel": 2}})
    found = list(config.check_world(size))
    assert not found if sentence is None else sentence in found[0]


@pytest.mark.parametrize(
    ("phase", "sentence"),
    [
        ({"sequence_length": 8192}, "a.sequence_length=8192 is longer than model.max_position_embeddings=4096"),
        ({"global_batch_size": 6}, "a.global_batch_size=6 must be a multiple of train.micro_batch_size=4"),
        ({"weights": {"x": 1}}, "schedule.phases.a.weights names x, but data.sources are stdlib"),
        ({"micro_batch_size": 3}, "train.global_batch_size=8 must be a multiple of train.micro_batch_size=3"),
    ],
)
def test_a_phase_that_does_not_fit(tiny, phase, sentence):
    schedule = {"batch_ramp": [], "phases": {"a": {"steps": 5, **phase}}}
    assert any(sentence in fault for fault in faults(tiny, schedule=schedule))


def test_a_key_that_may_be_left_out_is_null(tiny):
    schedule = parse(RunConfig, tiny | {"schedule": {"batch_ramp": [], "phases": {"a": {"steps": 5}}}}).schedule
    assert (schedule.steps, schedule.phases["a"].tokens) == (None, None)
