"""What is there to be seen of a step when its update has been decided on: the contents of an incident's folder."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from k2train.train.phases import Step

if TYPE_CHECKING:
    from k2train.train.trainer import Trainer


def evidence(trainer: Trainer, step: Step) -> dict[str, Any]:
    """Of the step that was just taken, by the name of a file, fit for JSON; called by all ranks together.

    ``curves``: what the monitor holds the step against, the newest last. ``attention``: the largest logit of each head
    by layer. ``experts``: tokens that each expert of a layer got. ``documents``: those of the largest losses.
    """
    stepper, clip = trainer.stepper, trainer.clip
    logits_LH = clip.max_logits.tolist()
    found: dict[str, Any] = {
        "curves": trainer.monitor.history(),
        "attention": {
            name: [logit if math.isfinite(logit) else None for logit in row[: len(layer.max_logits)]]
            for (name, layer), row in zip(clip.layers, logits_LH, strict=True)
        },
    }
    if stepper.loads_LE is not None:
        names = [name for name, _ in trainer.model.moe_layers()]
        found["experts"] = dict(zip(names, stepper.loads_LE.tolist(), strict=True))
    told = stepper.documents.told(trainer.feed.parts(step), trainer.stream, trainer.dataset.tokenizer)
    return found | {"documents": told}


def as_text(record: Mapping[str, Any], found: Mapping[str, Any]) -> Iterator[str]:
    """Lines for a person: the sentence, and the documents with their text."""
    incident = record["incident"]
    yield f"step {record['step']:,}: {incident['sentence']} ({incident['action']})"
    yield ""
    yield "loss    tokens  document"
    for row in found["documents"]:
        loss = "-" if row["loss"] is None else f"{row['loss']:.3f}"
        yield f"{loss:<7} {row['tokens']:<7} {row['name']}, {row['origin']} (sample {row['sample']}, {row['shard']})"
    for row in found["documents"]:
        if "text" in row:
            yield ""
            yield f"--- {row['name']}, {row['origin']}"
            yield row["text"]
