"""``k2train import``: a model in Hugging Face's format as a run that others begin with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from k2train.cli.commands import TRAIN
from k2train.cli.compose import compose
from k2train.comm import close_world, open_world
from k2train.config import ImportConfig, RunConfig, parse
from k2train.export import ExportError, ReleasedFolder, released_tokenizer, write_start
from k2train.paths import RunPaths


def run(config: ImportConfig) -> int:
    """Writes the checkpoint and says how to go on; returns the exit status."""
    try:
        start(config)
    finally:
        close_world()
    return 0


def start(config: ImportConfig) -> Path:
    """The checkpoint.

    Raises:
        ExportError: the folder holds no model of k2train's architectures, or not all of it, or there is such a run.
        CheckpointError: it cannot be written.
    """
    world = open_world("cpu")
    path = Path(config.folder).expanduser().resolve()
    usual = parse(RunConfig, compose(TRAIN, []))
    released = ReleasedFolder(path, defaults=usual.model)
    definition, tokenizer, end_of_text = released_tokenizer(path, released.settings)
    name = config.name or path.name
    root = Path(config.runs_dir).expanduser() / name
    if root.exists():
        raise ExportError(f"{root} is there already: give the run another name, as in name=base")
    settings = replace(
        usual.data.tokenizer,
        kind="json",
        path=str(RunPaths(root).tokenizer.resolve()),
        end_of_text=end_of_text,
    )
    context = released.config.max_position_embeddings
    trained = replace(
        usual,
        name=name,
        runs_dir=config.runs_dir,
        model=released.config,
        data=replace(usual.data, tokenizer=settings),
        train=replace(usual.train, sequence_length=min(usual.train.sequence_length, context)),
    )
    checkpoint = write_start(released, definition, config=trained, world=world)
    kinds = " and ".join(sorted(released.dtypes))
    print(f"wrote {checkpoint} from {path}: weights in {kinds}, {tokenizer.vocab_size} tokens in the vocabulary")
    for sentence in released.left_out:
        print(sentence)
    print(f"to train on from it: k2train train init_from={root} name=NAME")
    return checkpoint
