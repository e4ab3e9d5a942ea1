"""``k2train inspect``: what a checkpoint is."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from k2train.checkpoint import Checkpoint, choose_checkpoint
from k2train.cli.compose import as_yaml
from k2train.config import CheckConfig, RunConfig, parse
from k2train.train.phases import build_plan
from k2train.units import count, duration, memory


def run(config: CheckConfig) -> int:
    """Prints it; returns the exit status."""
    checkpoint = choose_checkpoint(Path(config.checkpoint).expanduser())
    rows = list(describe(checkpoint))
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"{name:<{width}}  {text}" for name, text in rows))
    print(f"\nsettings\n{as_yaml(checkpoint.manifest.state['config'])}", end="")
    return 0


def describe(checkpoint: Checkpoint) -> Iterator[tuple[str, str]]:
    """What of it a person asks first, and the answers."""
    manifest, state = checkpoint.manifest, checkpoint.manifest.state
    config, machine, progress = parse(RunConfig, state["config"]), state["machine"], state["progress"]
    masters = [t for name, t in manifest.tensors.items() if name.endswith("/master")]
    tokens = build_plan(config).tokens_before(manifest.step)
    yield "checkpoint", str(checkpoint.folder)
    yield "size", f"{memory(checkpoint.size)} in {len(manifest.files)} files"
    yield "run", config.name
    yield "step", f"{manifest.step} of {build_plan(config).steps}"
    yield "tokens", f"{count(tokens)} in {duration(progress['elapsed'])} of training"
    yield "skipped steps", str(progress["skipped_steps"])
    yield "parameters", count(sum(math.prod(t.shape) for t in masters))
    yield "model", _model(config)
    yield "optimizer", config.optim.name
    data = state["data"]
    yield "data", f"data set {data['dataset']}, tokenizer {data['tokenizer']}"
    yield "data read", ", ".join(f"{count(tokens)} tokens of {source}" for source, tokens in data["tokens"].items())
    yield (
        "layout",
        (
            f"{machine['processes']} process{'es' if machine['processes'] > 1 else ''}, ZeRO-{machine['zero_stage']}, "
            f"expert parallelism {machine['expert_parallel']}; any other can read it"
        ),
    )
    layout = ("processes", "zero_stage", "expert_parallel")
    yield "written with", ", ".join(f"{name} {value}" for name, value in machine.items() if name not in layout)


def _model(config: RunConfig) -> str:
    model = config.model
    experts = f"{model.n_routed_experts} experts of which {model.num_experts_per_tok} a token"
    return (
        f"{model.num_hidden_layers} layers of width {model.hidden_size}, {model.num_attention_heads} heads "
        f"({model.attention}), {experts if model.has_experts else 'no experts'}"
    )
