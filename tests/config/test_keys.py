import pytest

from k2train.config import RunConfig, find_key, key_types, suggest_key


def test_keys_go_through_options_and_named_members():
    keys = key_types(RunConfig)
    assert keys["seed"] is int
    assert keys["model.rope_scaling.factor"] is float
    assert keys["optim.roles.*.lr"] is float
    assert find_key(RunConfig, "optim.roles.head.lr") is float
    assert find_key(RunConfig, "optim.roles.head.lrr") is None
    assert find_key(RunConfig, "seed.more") is None


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("optim.lrr", "optim.lr"),
        ("lr", "optim.lr"),
        ("modle.hidden_size", "model.hidden_size"),
        ("model.hidden_sise", "model.hidden_size"),
        ("sequence_lenght", "train.sequence_length"),
        ("sed", "seed"),
    ],
)
def test_the_key_that_was_meant_is_named(typed, meant):
    assert suggest_key(RunConfig, typed) == f"did you mean {meant}?"


def test_nothing_is_suggested_for_nonsense():
    assert suggest_key(RunConfig, "qqqq").startswith("the keys begin with name, runs_dir")


@pytest.mark.parametrize(
    "key", ["parallel.pipeline_parallel", "parallel.tensor_parallel_size", "parallel.tp", "pp_size"]
)
def test_what_k2train_leaves_to_others_is_said_so(key):
    assert "no pipeline and no tensor parallelism" in suggest_key(RunConfig, key)
