"""Where a run begins, what may have changed since, and what becomes of saves that fail: real runs in one process."""

import dataclasses
import json
import pickle
import random
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.multiprocessing as mp

from k2train.checkpoint import CheckpointError, SaveError, folder_of, open_checkpoint, steps
from k2train.comm import close_world, open_world
from k2train.config import RunConfig
from k2train.paths import RunPaths
from k2train.train.errors import RunError
from k2train.train.quiet import import_deepspeed
from k2train.train.saving import Saver
from k2train.train.trainer import Trainer
from tests.distributed.plain import Layout, config_of, prepared, write_text

FOLDER = Path()  # of all runs, set in the process that makes them


def run(name: str, *, group: str | None = None, **changes: Any) -> tuple[Trainer, list[str]]:
    """A run as it is started, and what it says."""
    config: RunConfig = dataclasses.replace(config_of(FOLDER, Layout(1)), name=name)
    if group:
        changes = {group: dataclasses.replace(getattr(config, group), **changes)}
    return begin(dataclasses.replace(config, **changes))


def begin(config: RunConfig) -> tuple[Trainer, list[str]]:
    paths, said = RunPaths(FOLDER / "runs" / config.name), []
    paths.checkpoints.mkdir(parents=True, exist_ok=True)
    return Trainer(config, prepared(FOLDER), world=open_world("cpu"), paths=paths, say=said.append), said


def train(trainer: Trainer, steps: int, *, save: bool = True) -> list[float]:
    losses = [trainer.record()["loss"] for _ in range(steps) if trainer.step()]
    if save:
        trainer.saver.save()
        trainer.saver.wait()
    return losses


def masters(trainer: Trainer) -> list[torch.Tensor]:
    return [shard.flat.detach().clone() for shard in trainer.state.held]


class Counter:
    """A hook with a state of its own."""

    def __init__(self) -> None:
        self.count = 0

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


def where_a_run_begins() -> None:
    with pytest.raises(RunError, match=r"resume=must, but .*/runs/a/checkpoints holds no checkpoint"):
        run("a", resume="must")
    trainer, said = run("a")
    assert not any("resuming" in sentence for sentence in said)
    train(trainer, 2)
    ended, numbers = masters(trainer), [random.random(), torch.rand(()).item()]
    expected = train(trainer, 2, save=False)

    random.seed(1)
    again, said = run("a", resume="must")
    assert any("resuming from step 2" in sentence for sentence in said)
    assert all(map(torch.equal, masters(again), ended))
    assert [random.random(), torch.rand(()).item()] == numbers  # the generators too
    assert train(again, 2, save=False) == expected
    with pytest.raises(RunError, match=r"resume=never, but .*holds checkpoints: take another name"):
        run("a", resume="never")

    # Under another name from there, and from then on from its own.
    source = folder_of(FOLDER / "runs/a/checkpoints", 2)
    for path in (source, FOLDER / "runs/a"):
        shutil.rmtree(FOLDER / "runs/b", ignore_errors=True)
        fork, said = run("b", resume=str(path))
        assert any(f"resuming from step 2 of 11 ({source})" in sentence for sentence in said)
    assert train(fork, 2) == expected
    fork, said = run("b", resume=str(source))
    assert any("resuming from step 4" in sentence for sentence in said)

    # Its weights and nothing else; the momenta and the step are those of a new run.
    new, said = run("c", init_from=str(FOLDER / "runs/a"))
    assert any(f"beginning with the weights of step 2 of {source}" in sentence for sentence in said)
    assert new.progress.step == 0
    assert all(map(torch.equal, masters(new), ended))
    assert not any(t.any() for flat, _ in new.optimizer.tensors() for t in new.optimizer.state[flat].values())
    biases = [moe.gate.e_score_correction_bias for _, moe in new.model.moe_layers()]
    assert any(bias.any() for bias in biases)
    train(new, 1)
    new, said = run("c", init_from=str(FOLDER / "runs/a"))
    assert any("resuming from step 1" in sentence for sentence in said)


def what_may_have_changed() -> None:
    trainer, said = run("a", group="train", micro_batch_size=4)
    assert "train.micro_batch_size was 8 and is now 4" in said
    assert any(sentence.startswith("micro_batch_size was 8 and is now 4: expect losses") for sentence in said)
    with pytest.raises(RunError, match=r"optim.lr was 0.01 and is now 0.02.*allow_changed=\[optim.lr\]"):
        run("a", group="optim", lr=0.02)
    config = dataclasses.replace(trainer.config, allow_changed=("optim",))
    trainer, said = begin(dataclasses.replace(config, optim=dataclasses.replace(config.optim, lr=0.02)))
    assert "optim.lr was 0.01 and is now 0.02" in said
    wider = dataclasses.replace(config.model, moe_intermediate_size=32)
    with pytest.raises(CheckpointError, match=r"another model: layers.1.mlp.experts.w1 is .* there and .* here"):
        begin(dataclasses.replace(config, allow_changed=("model",), model=wider))

    # Another text, and another tokenizer.
    path = folder_of(FOLDER / "runs/a/checkpoints", 2)
    checkpoint = open_checkpoint(path)
    for key, sentence in (
        ("dataset", r"on the data set of another.*allow_changed=\[data\]"),
        ("tokenizer", "with the tokenizer of another"),
    ):
        changed = json.loads(json.dumps(dict(checkpoint.manifest.state)))
        changed["data"][key] = "of another"
        other = dataclasses.replace(checkpoint.manifest, state=changed)
        (path / "manifest.json").write_text(other.to_json())
        with pytest.raises(RunError, match=sentence):
            run("a")
        if key == "dataset":
            run("a", allow_changed=("data",))
        else:
            with pytest.raises(RunError, match=sentence):
                run("d", init_from=str(path))
        (path / "manifest.json").write_text(checkpoint.manifest.to_json())

    # A hook that has learnt to keep more since.
    older = json.loads(json.dumps(dict(checkpoint.manifest.state)))
    del older["hooks"]["drift"]["starved"]
    (path / "manifest.json").write_text(dataclasses.replace(checkpoint.manifest, state=older).to_json())
    with pytest.raises(CheckpointError, match=r"a state of 'drift' .* does not read \(KeyError\('starved'\)\)"):
        run("a")
    (path / "manifest.json").write_text(checkpoint.manifest.to_json())
    run("a")


def a_damaged_checkpoint_is_set_aside() -> None:
    trainer, _ = run("a")
    train(trainer, 1)
    newest = folder_of(trainer.saver.folder, 3)
    (newest / "rank-00000.safetensors").write_bytes(b"torn")
    trainer, said = run("a")
    assert f"passing over {newest}: rank-00000.safetensors has 4 bytes instead of" in "\n".join(said)
    assert any("set aside as" in sentence for sentence in said)
    assert trainer.progress.step == 2
    assert steps(trainer.saver.folder) == [2]
    assert not any("passing over" in sentence for sentence in run("a")[1])


def saving_beside_training_changes_nothing() -> None:
    found = {}
    for asynchronous in (True, False):
        trainer, _ = run(f"asynchronous-{asynchronous}", group="checkpoint", asynchronous=asynchronous, keep=9)
        trainer.state.hooks = {"counter": (hook := Counter())}
        trainer.saver._published = (published := []).append
        for count in range(3):
            hook.count = count
            train(trainer, 1, save=False)
            trainer.saver.save(best=count == 1)
            assert trainer.saver._background.busy == asynchronous
            assert published == list(range(1, count + (1 if asynchronous else 2)))  # as soon as it is, and told once
        trainer.saver.wait()
        trainer.saver.check()
        assert published == [1, 2, 3]
        found[asynchronous] = trainer.saver.folder
        hook.count = 99
        trainer.state.load(open_checkpoint(folder_of(trainer.saver.folder, 2)), same_world=True, seed=0)
        assert hook.count == 1
        assert (trainer.saver.folder / "best").read_text() == "step-00000002\n"
        (trainer.saver.folder / "best").unlink()
        for step in (2, 4):  # of which there is none
            trainer.saver.mark_best(step)
        assert (trainer.saver.folder / "best").read_text() == "step-00000002\n"
    for step in (1, 2, 3):
        names = {f"rank-{0:05d}.safetensors", "segments.safetensors"}
        a, b = (folder_of(folder, step) for folder in found.values())
        assert names | {"manifest.json"} == {path.name for path in a.iterdir()}
        assert all((a / name).read_bytes() == (b / name).read_bytes() for name in names)


def a_save_that_fails_is_raised_at_the_next_step_and_may_be_tried_again() -> None:
    trainer, _ = run("full")
    train(trainer, 1, save=False)
    with mock.patch("k2train.checkpoint.publish.write_intervals", side_effect=OSError(28, "No space", "/disk")):
        trainer.saver.save()
        while not trainer.saver._background.done:
            pass
    with pytest.raises(SaveError, match="step 1 was not saved: /disk: the disk is full"):
        trainer.saver.check()
    trainer.saver.check()  # once
    trainer.saver._published = (published := []).append
    train(trainer, 1)
    assert steps(trainer.saver.folder) == published == [2]


def nothing_is_unpickled() -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a pickle is opened")

    patches = [mock.patch.object(pickle, name, refuse) for name in ("load", "loads", "Unpickler")]
    patches.append(mock.patch.object(torch, "load", refuse))
    for patch in patches:
        patch.start()
    try:
        _, said = run("a")
    finally:
        mock.patch.stopall()
    assert any("resuming" in sentence for sentence in said)


def in_one_process(_: int, folder: Path) -> None:
    global FOLDER
    FOLDER = folder
    write_text(folder)
    import_deepspeed("cpu")
    open_world("cpu")
    where_a_run_begins()
    what_may_have_changed()
    nothing_is_unpickled()
    a_damaged_checkpoint_is_set_aside()
    saving_beside_training_changes_nothing()
    a_save_that_fails_is_raised_at_the_next_step_and_may_be_tried_again()
    close_world()


def test_saving_and_going_on(tmp_path):
    mp.spawn(in_one_process, args=(tmp_path,), nprocs=1)


def test_the_package_that_reads_checkpoints_knows_no_pickle():
    import k2train.checkpoint as package

    for path in Path(package.__file__).parent.glob("*.py"):
        text = path.read_text()
        assert not any(word in text for word in ("pickle", "torch.load", "torch.save", "eval(", "exec("))
    assert "pickle" not in Path(Saver.__init__.__code__.co_filename).read_text()
