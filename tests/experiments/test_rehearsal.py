"""One process in the part of a rank: it holds what the plan says, owns its share, and refuses what a launch would."""

import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from k2train.cli import main
from k2train.cli.commands import TRAIN
from k2train.cli.compose import compose
from k2train.config import DataConfig, RunConfig, parse
from k2train.data import DataPhase, build_stream, open_dataset, prepare
from k2train.experiments.stand_in import stand_in
from k2train.train.phases import build_plan
from tests.plan.recipes import RECIPES

ROOT = Path(__file__).parents[2]
MEMORY = 4_000_000_000  # bytes that a rehearsal of any size may take
SIZES = ("weights", "fp32 masters", "momenta")


def rehearse(*words: str) -> subprocess.CompletedProcess:
    """In a process of its own, as DeepSpeed keeps its groups, which is refused more memory than ``MEMORY``."""
    return subprocess.run(
        [sys.executable, "-m", "k2train", "rehearse", *words],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'optim'}"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY)),
        capture_output=True,
        text=True,
    )


def check(said: str) -> None:
    """Components held by the rank as planned, to the three digits that are shown."""
    for name in SIZES:
        here, planned = re.search(rf"  {name} +([\d.]+) .iB +([\d.]+) .iB\n", said).groups()
        assert float(here) == pytest.approx(float(planned), rel=0.02), said


SPLIT = ("cluster=cpu", "cluster.devices_per_node=8", "parallel.expert_parallel=4", "train.micro_batch_size=1")


def test_a_rank_of_eight():
    result = rehearse("experiment=tiny", *SPLIT, "rank=6")
    assert result.returncode == 0, result.stdout + result.stderr
    check(result.stdout)
    assert "rank 6 of 8" in result.stdout
    assert "experts 4 to 5 of each layer's 8" in result.stdout  # the third of four parts
    assert "1 micro-batches, 1 of stdlib; the first is sample 6," in result.stdout
    assert '"stage": 1' in result.stdout


@pytest.mark.full
@pytest.mark.parametrize(
    "words",
    [
        ("parallel.zero_stage=2", "train.precision=bf16"),
        ("parallel.zero_stage=3", "train.precision=bf16"),
        ("parallel.zero_stage=2", "parallel.offload_optimizer=true"),
        ("parallel.sequence_parallel=2", "train.precision=bf16"),
        ("optim=adamw", "parallel.zero_stage=3"),
        (
            "experiment=k2-in-small",
            "schedule.phases.long_context.global_batch_size=8",
            "schedule.phases.yarn.global_batch_size=8",
            "parallel.zero_stage=2",
        ),
    ],
    ids=" ".join,
)
def test_each_split_holds_what_is_planned(words):
    result = rehearse("experiment=tiny", *SPLIT, *words, "rank=5")  # the last experiment counts
    assert result.returncode == 0, result.stdout + result.stderr
    check(result.stdout)


@pytest.mark.full
@pytest.mark.parametrize("words", RECIPES)
def test_a_recipe(words):
    kept = [word for word in words.split() if not word.startswith("phase=")]
    result = rehearse(*kept)
    assert result.returncode == 0, result.stdout + result.stderr
    check(result.stdout)


@pytest.mark.full
def test_kimi_k2_on_half_the_gpus():
    result = rehearse("experiment=k2", "cluster=h800", "cluster.nodes=128", "rank=777")
    assert result.returncode == 0, result.stdout + result.stderr
    check(result.stdout)
    assert "rank 777 of 1,024" in result.stdout
    assert "experts 216 to 239" in result.stdout  # 777 is the tenth of sixteen


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["parallel.expert_parallel=3"], "parallel.expert_parallel=3 must divide model.n_routed_experts=8"),
        (["cluster.devices_per_node=6", "parallel.expert_parallel=4"], "does not divide the 6 processes of this run"),
        (["cluster.devices_per_node=3"], "train.global_batch_size=8 does not divide over 3 processes"),
        (["cluster.devices_per_node=2", "parallel.sequence_parallel=4"], "parallel.sequence_parallel=4 does not"),
        (["rank=8"], "rank=8 is none of the 1 of the cluster"),
        (["schedule.warmup_steps=99"], "schedule.warmup_steps=99 is longer than the run"),
    ],
)
def test_what_a_launch_would_find_out(words, sentence, capsys):
    assert main(["rehearse", "experiment=tiny", "cluster=cpu", "train.micro_batch_size=1", *words]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert "Traceback" not in error


@pytest.mark.full
def test_data_that_is_there_is_walked_as_it_is(tmp_path):
    own = ["data=folder", f"data.path={ROOT / 'k2train' / 'doctor'}", "data.tokenizer.vocab_size=300"]
    manifest = prepare(parse(DataConfig, compose(TRAIN, own)["data"]), cache=tmp_path, progress=lambda *args: None)
    there = ["data=prepared", f"data.prepared={manifest.parent}"]
    result = rehearse("experiment=tiny", *there, *SPLIT, "rank=1")
    assert result.returncode == 0, result.stdout + result.stderr
    config = parse(RunConfig, compose(TRAIN, ["experiment=tiny", *there]))
    phases = build_plan(config).data_phases()
    stream = build_stream(open_dataset(manifest), config.data, phases, seed=config.seed, boundaries=False)
    assert "Samples that this rank reads, of the data\n" in result.stdout
    assert f"1 of folder; the first is sample 9, window {stream.samples.find(9).window}\n" in result.stdout
    refused = rehearse("experiment=tiny", *there, *SPLIT, "model.vocab_size=256")
    assert refused.returncode == 1
    assert refused.stderr.startswith("k2train: error: model.vocab_size=256 is less than the")


def test_data_that_stands_in_feeds_the_whole_run_once():
    config = parse(DataConfig, compose(TRAIN, ["data=stdlib"])["data"])
    data = stand_in(config, tokens=100 * 64)
    assert data.tokens("train") == 100 * 64 + 1
    stream = build_stream(data, config, [DataPhase(100, 64, None, None)], seed=0, boundaries=False)
    assert sorted(stream.samples.find(number).window for number in range(100)) == list(range(100))
    assert not stream.notes
