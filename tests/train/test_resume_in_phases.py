"""Runs through ramps and phases give the same bits twice, and from wherever they go on: real runs in one process."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch.multiprocessing as mp

from k2train.checkpoint import folder_of, open_checkpoint
from k2train.cli.commands import TRAIN
from k2train.cli.compose import compose
from k2train.comm import close_world, open_world
from k2train.config import RunConfig, parse
from k2train.data import prepare
from k2train.paths import RunPaths
from k2train.train.quiet import import_deepspeed
from k2train.train.trainer import Trainer
from tests.distributed.plain import write_text
from tests.distributed.resume import TIMES, same_state

SETTINGS = [
    "experiment=k2-in-small",
    "schedule.batch_ramp=[[4,1024],[8,2560]]",
    "model.num_hidden_layers=2",
    "model.hidden_size=32",
    "model.q_lora_rank=24",
    "model.kv_lora_rank=16",
    "model.intermediate_size=64",
    "model.moe_intermediate_size=24",
    "model.balance_loss_weight=1e-3",
    "data=folder",
    "data.tokenizer.vocab_size=320",
    "data.workers=1",
    "optim.tau=0.02",
    "optim.clip_grad_norm=0.5",
    "train.micro_batch_size=4",
    "train.threads=2",
    "checkpoint.keep=99",
]
# In the ramp; where a phase ends; in longer sequences.
POINTS = {5: "pretraining", 24: "annealing", 28: "long_context"}
EVERY = 2  # steps a record: some are of steps from before a checkpoint and after it


def run(folder: Path, name: str, **changes: Any) -> tuple[Trainer, list[str]]:
    own = [f"data.path={folder / 'text'}", f"data.cache_dir={folder}", f"runs_dir={folder / 'runs'}", f"name={name}"]
    own += [f"train.deterministic={str(changes.pop('deterministic', False)).lower()}"]
    config = dataclasses.replace(parse(RunConfig, compose(TRAIN, [*SETTINGS, *own])), **changes)
    manifest = prepare(config.data, cache=folder, progress=lambda *_: None)
    paths, said = RunPaths(folder / "runs" / name), []
    paths.checkpoints.mkdir(parents=True, exist_ok=True)
    return Trainer(config, manifest, world=open_world("cpu"), paths=paths, say=said.append), said


def to_the_end(trainer: Trainer, *, save_at: Any = ()) -> dict[int, dict[str, Any]]:
    """The records by step; the last step is saved."""
    records, last = {}, trainer.plan.steps
    while (step := trainer.progress.step) < last:
        trainer.step()
        step += 1
        if step % EVERY == 0 or step == last:
            records[step] = {key: value for key, value in trainer.record().items() if key not in TIMES}
        if step in save_at or step == last:
            trainer.save()
    trainer.saver.wait()
    trainer.engine.destroy()
    return records


def in_one_process(_: int, folder: Path) -> None:
    write_text(folder)
    import_deepspeed("cpu")
    open_world("cpu")

    def end(name: str) -> Any:
        return open_checkpoint(folder_of(folder / "runs" / name / "checkpoints", last))

    alone, _said = run(folder, "alone")
    last = alone.plan.steps
    assert {step: alone.plan.step(step).phase.name for step in POINTS} == POINTS
    assert [alone.plan.step(step).samples for step in (7, 8, 13, 14)] == [4, 8, 8, 16]
    records = to_the_end(alone, save_at=POINTS)
    assert sum(record["clipped_heads"] > 0 for record in records.values()) > 5  # QK-Clip acted
    for step in POINTS:  # and deterministic from there on, which is no other run
        source = folder_of(folder / "runs/alone/checkpoints", step)
        trainer, said = run(folder, f"from-{step}", resume=str(source), deterministic=True)
        assert any(f"resuming from step {step} of {last}" in sentence for sentence in said)
        assert "train.deterministic was False and is now True" in said
        assert to_the_end(trainer) == {number: record for number, record in records.items() if number > step}
        assert same_state(end(f"from-{step}"), end("alone"), generators=True), step
    ended, _said = run(folder, "ended", resume=str(folder_of(folder / "runs/alone/checkpoints", last)))
    assert ended.model.config.rope_scaling == ended.plan.phases[-1].rope_scaling is not None
    ended.engine.destroy()
    for name in ("first", "second"):
        trainer, _said = run(folder, name, deterministic=True)
        assert to_the_end(trainer) == records
        assert same_state(end(name), end("alone"), generators=True)
    close_world()


@pytest.mark.full
def test_the_same_bits_twice_and_from_wherever_a_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")  # two threads that wait for each other leave the cores to others
    mp.spawn(in_one_process, args=(tmp_path,), nprocs=1)
