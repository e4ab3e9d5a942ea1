"""What one process gives, which every layout is held against: a plain loop, and the corpus and settings of all runs.

No DeepSpeed, no shards, no micro-batches: the model, MuonClip and torch's gradient clipping.
"""

from __future__ import annotations

import dataclasses
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from k2train.cli.commands import TRAIN
from k2train.cli.compose import compose
from k2train.comm import World
from k2train.config import RunConfig, parse
from k2train.data import DataPhase, TrainStream, open_dataset, prepare
from k2train.generate import sample_text
from k2train.model import SequenceParallel, Transformer, build_model, update_bias
from k2train.model.float32 import counts
from k2train.train.engine import build_clip, build_optimizer
from k2train.train.validate import held_out_loss
from tests.distributed.observed import Observer, flat

STEPS, HALF = 10, 5
# Gradient clipping and QK-Clip both act, and the learning rate is high: what differs would show.
SETTINGS = [
    "model=nano",
    "model.num_hidden_layers=2",
    "model.hidden_size=32",
    "model.q_lora_rank=24",
    "model.kv_lora_rank=16",
    "model.intermediate_size=64",
    "model.moe_intermediate_size=24",
    "model.balance_loss_weight=1e-3",
    "data=folder",
    "data.tokenizer.vocab_size=320",
    "optim.lr=0.01",
    "optim.tau=0.02",
    "optim.clip_grad_norm=0.5",
    "schedule=constant",
    f"schedule.steps={STEPS + 1}",
    "schedule.warmup_steps=0",
    "track.telemetry_every=1",
    "track.spectrum_every=1",
    "train.global_batch_size=8",
    "train.sequence_length=24",
    "train.document_mask=true",
    "train.device=cpu",
    "train.threads=1",
    "validate.tokens=200",
    "generate.prompt=the",
    "generate.max_tokens=3",
    "generate.temperature=0",
]


@dataclass(frozen=True)
class Layout:
    """How a run is cut."""

    processes: int
    expert_parallel: int = 1
    zero_stage: int = 1
    precision: str = "fp32"
    accumulation: int = 1  # micro-batches a step on each process
    overlap: bool = False
    offload: bool = False
    recompute: str = "none"  # of train.activation_checkpointing
    sequence_parallel: int = 1
    own: str | None = None  # optimizer, by its dotted path
    sub_group_size: int | None = None  # elements, stage 3; DeepSpeed's own is a billion, which makes one of each group


@dataclass(frozen=True)
class Truth:
    """What one process gives."""

    start: dict[str, Tensor]
    weights: dict[str, Tensor]
    losses: list[float]
    telemetry: list[dict[str, float]]  # of each step, numbers by path
    held_out: float
    experts: Tensor  # [steps, layers, tokens of the batch, K], sorted
    sample: str


class Routes:
    """The experts that each token is sent to, in training."""

    def __init__(self, model: Transformer) -> None:
        self.chosen: list[Tensor] = []
        for _, moe in model.moe_layers():
            moe.gate.register_forward_hook(self._note)

    def _note(self, gate: torch.nn.Module, inputs: Any, output: Any) -> None:
        if counts(gate):  # not when it is computed again
            self.chosen.append(output[0].sort(-1).values)


def plain_loop(folder: Path) -> Truth:
    """The plain loop, in fp32."""
    config = config_of(folder, Layout(1))
    dataset = open_dataset(prepared(folder))
    model_config = dataclasses.replace(config.model, vocab_size=dataset.padded_vocab_size)
    model = build_model(model_config, seed=config.seed)
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    clip = build_clip(config.optim, model)
    optimizer = build_optimizer(config.optim, model, clip, expert_group="", device=torch.device("cpu"))
    stream = TrainStream(dataset, [DataPhase(1, config.train.sequence_length)], seed=config.seed)
    routes, losses, telemetry, held_out = Routes(model), [], [], 0.0
    batch = config.train.global_batch_size
    for step in range(STEPS):
        if step == HALF:
            held_out = loss_on_held_out(model, dataset, config)
        tokens_BT, labels_BT, starts_BT = stream.batch(range(step * batch, (step + 1) * batch))
        loss_BT, balance = model(tokens_BT, labels_BT, starts_BT)
        (loss_BT.mean() + balance).backward()
        observer = Observer(model, optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip_grad_norm)
        optimizer.step()
        telemetry.append(flat(observer.after({name: moe.gate.loads for name, moe in model.moe_layers()})))
        optimizer.zero_grad()
        for _, moe in model.moe_layers():
            bias, loads = moe.gate.e_score_correction_bias, moe.gate.loads
            bias.copy_(update_bias(bias, loads, rate=config.model.router_bias_rate))
            loads.zero_()
        losses.append(loss_BT.mean().item())
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    experts = torch.stack(routes.chosen).view(STEPS, len(model.moe_layers()), -1, config.model.num_experts_per_tok)
    sample = sample_text(model, dataset.tokenizer, config.generate, "cpu")
    return Truth(start, weights, losses, telemetry, held_out, experts, sample)


def loss_on_held_out(
    model: Transformer, dataset: Any, config: RunConfig, sequence_parallel: SequenceParallel | None = None
) -> float:
    """Nats a token, read by all processes together."""
    windows = dataset.windows("held_out", sequence_length=config.train.sequence_length)[:6]
    bytes_of_token = torch.ones(dataset.padded_vocab_size, dtype=torch.int64)
    world = World(0, 1, 0, 1, torch.device("cpu"))
    if dist.is_initialized():
        world = dataclasses.replace(world, rank=dist.get_rank(), size=dist.get_world_size())
    return held_out_loss(
        model,
        windows,
        bytes_of_token=bytes_of_token,
        batch_size=2,
        document_mask=True,
        world=world,
        sequence_parallel=sequence_parallel,
    ).per_token


def save_truth(found: Truth, folder: Path) -> None:
    """For the processes that compare with it."""
    tensors = {f"start/{name}": value for name, value in found.start.items()}
    tensors |= {f"weights/{name}": value for name, value in found.weights.items()}
    save_file(tensors | {"experts": found.experts}, folder / "truth.safetensors")
    numbers = {name: getattr(found, name) for name in ("losses", "telemetry", "held_out", "sample")}
    (folder / "truth.json").write_text(json.dumps(numbers))


def load_truth(folder: Path) -> Truth:
    """The inverse of ``save_truth``."""
    tensors = load_file(folder / "truth.safetensors")
    start, weights = (
        {name.partition("/")[2]: value for name, value in tensors.items() if name.startswith(kind)}
        for kind in ("start/", "weights/")
    )
    numbers = json.loads((folder / "truth.json").read_text())
    return Truth(start, weights, experts=tensors["experts"], **numbers)


def config_of(folder: Path, layout: Layout) -> RunConfig:
    """Of a run whose corpus and results lie in ``folder``."""
    micro_batch = 8 * layout.sequence_parallel // (layout.processes * layout.accumulation)
    own = [f"data.path={folder / 'text'}", f"data.cache_dir={folder / 'cache'}", f"runs_dir={folder / 'runs'}"]
    own += [f"train.micro_batch_size={micro_batch}", f"train.precision={layout.precision}"]
    own += [f"parallel.zero_stage={layout.zero_stage}", f"parallel.expert_parallel={layout.expert_parallel}"]
    own += [f"parallel.offload_optimizer={str(layout.offload).lower()}"]
    own += [f"parallel.sequence_parallel={layout.sequence_parallel}"]
    own += [f"train.activation_checkpointing={layout.recompute}"]
    own += ["optim=own", f"optim.name={layout.own}", "optim.lr=1e-3"] if layout.own else []
    own += ["optim.tau=null"] if layout.own else []
    config = parse(RunConfig, compose(TRAIN, [*SETTINGS, *own]))
    assert not [*config.check_world(layout.processes)]
    return config


def prepared(folder: Path) -> Path:
    """The manifest of the tokenized corpus."""
    return prepare(config_of(folder, Layout(1)).data, cache=folder / "cache", progress=lambda *_: None)


def write_text(folder: Path) -> None:
    """A corpus of its own: results must not change with the sources, or with the machine."""
    generator = random.Random(0)
    syllables = [a + b for a in "bdfgklmnprst" for b in "aeiou"]
    words = ["".join(generator.choices(syllables, k=generator.randint(1, 3))) for _ in range(300)]
    for number in range(160):
        path = folder / "text" / f"part{number % 8}" / f"{number}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(" ".join(generator.choices(words, weights=range(1, 301), k=60)) + "\n")
