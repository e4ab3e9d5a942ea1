"""What the plan says of a run, without one."""

import dataclasses
import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from functools import cache
from pathlib import Path

import pytest

from k2train.cli import main
from k2train.cli.commands import PLAN
from k2train.cli.compose import compose
from k2train.cli.plan import parts
from k2train.config import ConfigError, PlanConfig, parse
from k2train.plan.communication import Traffic, by_kind
from k2train.plan.estimate import Estimate, Part, estimate, with_vocabulary
from k2train.plan.exchange import muon_exchange
from k2train.plan.hardware import Hardware
from k2train.plan.layout import build_layout
from k2train.plan.picture import picture
from k2train.plan.search import configured, search

PRETRAINING = Part("pretraining", 10, 16384, 1, 4096)
K2 = ["model=k2", "cluster=h800-2048", "parallel.zero_stage=2", "parallel.expert_parallel=128"]


@cache
def config_of(*words: str) -> PlanConfig:
    return with_vocabulary(parse(PlanConfig, compose(PLAN, list(words))))


def planned(*words: str) -> Estimate:
    config = config_of(*words)
    return estimate(config, parts(config))


def bounded(*words: str) -> Estimate:
    """K2's pre-training, with a bound in the place of Muon's exchange, which takes longest to plan."""
    config = config_of(*K2, *words)
    return estimate(config, [PRETRAINING], exchange=muon_exchange(build_layout(config), exact=False))


def test_a_page_says_what_a_run_takes(capsys):
    assert main(["plan", "experiment=tiny", "cluster=cpu"]) == 0
    page = capsys.readouterr().out
    for words in ("parameters", "Memory of a device", "Given to collectives", "Time of a step", "device-hours"):
        assert words in page


def test_json_adds_up(capsys):
    assert main(["plan", "experiment=k2-in-small", "--json", "--search", "cluster=cpu"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [phase["name"] for phase in found["phases"]] == ["pretraining", "annealing", "long_context", "yarn"]
    assert sum(phase["tokens"] for phase in found["phases"]) == found["tokens"]
    for phase in found["phases"]:
        held = phase["memory"]
        working = max(sum(held["passes"].values()), sum(held["update"].values()))
        assert held["total"] == pytest.approx(
            sum(held["state"].values()) + working + held["fragmentation"] + held["reserved"]
        )
        assert sum(phase["step_parts"].values()) == pytest.approx(phase["step_seconds"])
    assert found["search"]["fitting"]


def test_the_keys_of_json_are_those_that_are_promised(capsys):
    """Programs rely on docs/plan.md: change it and the changelog with this test."""
    assert main(["plan", "experiment=tiny", "cluster=cpu", "--json", "--search"]) == 0
    found = json.loads(capsys.readouterr().out)
    (phase,), searched = found["phases"], found["search"]
    page = (Path(__file__).parents[2] / "docs" / "plan.md").read_text()
    for level in (found, phase, phase["memory"], searched, searched["fitting"][0]):
        assert f"`{', '.join(level)}`" in page


def test_a_run_that_does_not_fit_is_told_so(capsys):
    assert main(["plan", "experiment=tiny", "cluster=cpu", "cluster.memory_bytes=5.1e8"]) == 1
    assert "does not fit" in capsys.readouterr().out


def test_a_plan_needs_no_torch():
    code = (
        "import sys; from k2train.cli import main; main(['plan', 'model=k2', 'cluster=h800-2048', "
        "'parallel.zero_stage=3', 'train.global_batch_size=2048', 'train.micro_batch_size=1', "
        "'model.rope_scaling=null']); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_the_picture_is_a_picture():
    found = ET.fromstring(picture(planned("experiment=tiny", "cluster=cpu")))
    words = [element.text for element in found.iter() if element.tag.endswith("text")]
    assert "fp32 masters" in words
    assert any(word.startswith("A step") for word in words if word)


def test_what_does_not_divide_is_refused(capsys):
    assert main(["plan", "experiment=tiny", "cluster.nodes=3"]) == 2
    assert "does not divide over 24 devices" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"expert_parallel=8 does not divide the 4 devices"):
        planned("experiment=tiny", "cluster=cpu", "cluster.devices_per_node=4", "parallel.expert_parallel=8")


def test_a_device_of_another_kind_is_refused(capsys):
    assert main(["plan", "experiment=tiny", "train.device=cpu"]) == 2
    assert "train.device=cpu but cluster.device=cuda" in capsys.readouterr().err


def test_the_vocabulary_follows_the_tokenizer():
    assert config_of("data.tokenizer.vocab_size=5000").model.vocab_size == 5056
    with pytest.raises(ConfigError, match=r"model\.vocab_size=163840"):
        config_of("data.tokenizer.kind=json", "data.tokenizer.path=tokenizer.json")


def test_what_each_stage_shares_out():
    """ZeRO (arXiv 1910.02054, section 5): state at stage 1, gradients at 2, weights at 3."""
    state = {stage: bounded(f"parallel.zero_stage={stage}").phases[0].memory.state for stage in (1, 2, 3)}
    assert state[1]["fp32 masters"] == state[2]["fp32 masters"] == pytest.approx(state[3]["fp32 masters"], rel=0.01)
    assert state[2]["gradients"] < state[1]["gradients"] / 10
    assert state[3]["weights"] < state[2]["weights"] / 10
    assert state[1]["weights"] == state[2]["weights"]


def test_newton_schulz_has_matrices_where_muon_has():
    matrices = {name: bounded(f"optim={name}").phases[0].memory.update for name in ("muonclip", "adamw")}
    assert matrices["muonclip"]["Muon exchange and matrices"] > 0
    assert matrices["adamw"]["Muon exchange and matrices"] == 0


def test_experts_are_shared_out():
    few, many = (bounded(f"parallel.expert_parallel={ep}") for ep in (64, 128))
    sizes = [sum(p.elements for p in found.layout.local if p.role == "expert") for found in (few, many)]
    assert sizes[0] == 2 * sizes[1]
    assert by_kind(list(few.phases[0].traffic))["expert all-to-all"] == pytest.approx(
        by_kind(list(many.phases[0].traffic))["expert all-to-all"]
    )


@pytest.mark.parametrize("stage", [1, 2])
def test_a_bound_on_the_exchange_is_one(stage):
    layout = build_layout(config_of(*K2, f"parallel.zero_stage={stage}"))
    exact, bound = (muon_exchange(layout, exact=exact) for exact in (True, False))
    assert exact.mean <= bound.mean
    assert bound.flops <= exact.flops < 1.1 * bound.flops


def test_collectives_take_as_long_as_rings_do():
    hardware = Hardware(config_of("cluster.nodes=2", "cluster.latency=0", "cluster.network_efficiency=1").cluster)
    size = 1e9

    def seconds(operation: str, ranks: int, stride: int = 1) -> float:
        return hardware.sending(Traffic("", operation, size, 1, ranks, stride))

    assert seconds("all_gather", 8) == pytest.approx(7 / 8 * size / 450e9)
    assert seconds("all_reduce", 8) == pytest.approx(2 * seconds("reduce_scatter", 8))
    assert seconds("all_gather", 16) == pytest.approx(15 / 16 * size / 400e9)  # all eight cards of a node
    assert seconds("all_gather", 2, stride=8) == pytest.approx(size / 2 / 50e9)  # one card
    assert seconds("all_to_all", 16) == pytest.approx(size / 2 / 50e9)


def test_a_search_ranks_what_fits_and_says_why_the_rest_does_not():
    config = config_of(*K2)
    found = search(config, [PRETRAINING])
    assert found.tried == len(found.fitting) + sum(reason.ways for reason in found.reasons.values())
    assert [one.seconds for _, one in found.fitting] == sorted(one.seconds for _, one in found.fitting)
    assert "ZeRO-1, experts over 1: most of it gradients" in found.reasons
    assert all(reason.least > config.cluster.memory_bytes for reason in found.reasons.values())
    candidate, best = found.fitting[0]
    own = dataclasses.replace(PRETRAINING, micro_batch=candidate.micro_batch_size)
    again = estimate(configured(config, candidate), [own])
    assert again.fits
    assert again.seconds == pytest.approx(best.seconds, rel=0.02)


def test_a_search_helps_where_the_run_cannot_be_split_as_it_says(capsys):
    words = ["plan", "experiment=tiny", "cluster.devices_per_node=8", "--search"]  # micro-batches of 4, a batch of 8
    assert main(words) == 2
    said = capsys.readouterr()
    assert "it must be a multiple of 32" in said.err
    assert "train.micro_batch_size=1" in said.out
    assert main([*words, "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["search"]["fitting"]
    assert main([*words, "cluster.devices_per_node=7"]) == 2  # which no micro-batch makes possible
    said = capsys.readouterr()
    assert not said.out
    assert "it must be a multiple of 28" in said.err


@pytest.mark.parametrize(
    ("nodes", "batch"), [(12, 16416), (192, 18432), (1, 14)], ids=["96 devices", "1536 devices", "7 devices"]
)
def test_a_search_on_an_odd_number_of_devices(nodes, batch):
    each = 7 if nodes == 1 else 8
    config = config_of("model=moonlight-16b", f"cluster.nodes={nodes}", f"cluster.devices_per_node={each}")
    found = search(config, [Part("training", 10, batch, 1, 4096)])
    assert found.tried == len(found.fitting) + sum(reason.ways for reason in found.reasons.values()) > 0
    for candidate, one in found.fitting:
        assert one.layout.ranks % candidate.expert_parallel == 64 % candidate.expert_parallel == 0
        assert batch * candidate.sequence_parallel % (one.layout.ranks * candidate.micro_batch_size) == 0


@pytest.mark.parametrize("option", ["small-dense", "small-gqa"])
def test_a_search_for_a_plainer_model(option):
    config = config_of(f"model={option}", "cluster.nodes=2")
    found = search(config, [Part("training", 10, 64, 1, 256)])
    degrees = {candidate.expert_parallel for candidate, _ in found.fitting}
    assert degrees == ({1} if option == "small-dense" else {1, 2, 4, 8, 16})


def test_a_search_that_finds_nothing_names_what_is_closest(capsys):
    assert main(["plan", "experiment=tiny", "cluster=cpu", "cluster.memory_bytes=5e8", "--search"]) == 1
    assert "the closest" in capsys.readouterr().out


def test_a_phase_can_be_planned_alone(capsys):
    words = ("experiment=k2-in-small", "cluster=cpu")
    whole, (alone,) = planned(*words), planned(*words, "phase=yarn").phases
    assert alone == whole.phases[-1]
    assert main(["plan", *words, "phase=yarm"]) == 2
    assert "phase=yarm is none of the run's" in capsys.readouterr().err
