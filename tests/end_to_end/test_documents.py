"""A run keeps attention inside documents if, and only if, it is told to."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

from k2train.config import RunConfig, parse
from k2train.data import DataPhase, TrainStream, open_dataset
from k2train.model import build_model

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def corpus(runner) -> Path:
    """So short that several share a window."""
    folder = runner.folder / "short-documents"
    folder.mkdir()
    for path in ROOT.glob("k2train/*/*.py"):
        (folder / f"{path.parent.name}-{path.name}").write_text(path.read_text()[:50])
    return folder


@pytest.mark.parametrize("masked", [False, True])
def test_the_losses_of_a_run_are_those_of_its_documents(runner, corpus, masked):
    name = f"documents-{masked}".lower()
    still = ("optim.lr=0", "model.router_bias_rate=0", "schedule.steps=1", "schedule.warmup_steps=0")
    mask = f"train.document_mask={masked}".lower()
    own = (f"data.path={corpus}", f"data.cache_dir={runner.folder / 'short-cache'}")
    run = runner.run(name, mask, *still, *own, "train.precision=fp32", "generate.max_tokens=1")
    assert run.returncode == 0, run.stderr
    training, validation = runner.records(name)

    config = parse(RunConfig, json.loads((runner.runs / name / "config.json").read_text()))
    (manifest,) = (runner.folder / "short-cache").rglob("manifest.json")
    dataset = open_dataset(manifest)
    sizes = dataclasses.replace(config.model, vocab_size=dataset.padded_vocab_size)
    model = build_model(sizes, seed=config.seed).eval()
    stream = TrainStream(dataset, [DataPhase(1, config.train.sequence_length)], seed=config.seed)
    windows = list(zip(*dataset.windows("held_out", sequence_length=config.train.sequence_length), strict=True))

    def mean_loss(tokens, labels, starts):
        with torch.inference_mode():
            loss, _ = model(tokens, labels, starts)
        return float(loss.double().sum() / (labels >= 0).sum())

    for record, key, batch in (
        (training, "loss", stream.batch(range(config.train.global_batch_size))),
        (validation, "validation_loss", [torch.stack(tensors) for tensors in windows]),
    ):
        tokens, labels, starts = batch
        assert starts.max() > 0
        own, other = (mean_loss(tokens, labels, given) for given in ((starts, None) if masked else (None, starts)))
        assert math.isclose(record[key], own, abs_tol=2e-6)
        assert abs(own - other) > 2e-5  # ten times what rounding may do
