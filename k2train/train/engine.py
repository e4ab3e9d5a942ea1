"""Model and optimizer under DeepSpeed: the JSON that it wants is made from the typed config, not from a second file."""

from __future__ import annotations

import os
from typing import Any

import deepspeed
import torch
from muonclip import POLAR_EXPRESS, QUINTIC, MuonClip, QKClip, split_parameters

from k2train.comm import World
from k2train.config import OptimConfig, RunConfig
from k2train.model import Transformer
from k2train.train.own_optimizer import AnyOptimizer, OwnOptimizer, find_optimizer

COEFFICIENTS = {"quintic": QUINTIC, "polar_express": POLAR_EXPRESS}
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def start_deepspeed(world: World) -> None:
    """Lets DeepSpeed find the process group of the run; before anything else of it is used."""
    os.environ.setdefault("LOCAL_RANK", str(world.local_rank))  # it insists on it, even alone
    deepspeed.init_distributed(auto_mpi_discovery=False)


def choose_precision(precision: str, device: torch.device) -> str:
    """fp32 or bf16; ``auto`` is bf16 on a GPU and fp32 on a CPU, where small models train faster in it."""
    return precision if precision != "auto" else "bf16" if device.type == "cuda" else "fp32"


def build_clip(config: OptimConfig, model: Transformer) -> QKClip:
    """QK-Clip over all attention layers; without a clip in the config it measures the logits all the same."""
    layers = model.attention_layers()
    tau = config.tau if config.tau is not None else float("inf")
    for _, layer in layers:
        layer.exact_above = min(layer.exact_above, tau)
    return QKClip(
        layers,
        tau=tau,
        alpha=config.alpha,
        observe_only=config.name != "muonclip",
    )


def build_optimizer(
    config: OptimConfig, model: Transformer, clip: QKClip, *, expert_group: str, device: torch.device
) -> AnyOptimizer:
    """The optimizer over all parameters, a group a role.

    Args:
        config: which algorithm, learning rates and decay by role.
        model: its parameters and roles.
        clip: of ``build_clip``.
        expert_group: DeepSpeed's name of the expert groups, which it wants on the group of expert parameters.
        device: decides the precision of Newton-Schulz if the config leaves it open.

    Raises:
        ConfigError: a person's own optimizer cannot be found, or does not do; see ``find_optimizer``.
    """
    groups = split_parameters(model.named_parameters(), model.parameter_roles())
    for group in groups:
        role = group["role"]
        group["algorithm"] = "own" if config.own else "muon" if role in config.muon_roles else "adamw"
        group["lr"] = group["peak_lr"] = config.roles[role].lr
        group["weight_decay"] = config.roles[role].weight_decay
        if role == "expert":
            group |= {"moe": True, "name": expert_group}
    if config.own:
        return OwnOptimizer(groups, find_optimizer(config), lr=config.lr, weight_decay=config.weight_decay)
    bf16 = config.newton_schulz_dtype == "bf16" or (config.newton_schulz_dtype == "auto" and device.type == "cuda")
    return MuonClip(
        groups,
        lr=config.lr,
        weight_decay=config.weight_decay,
        momentum=config.momentum,
        nesterov=config.nesterov,
        newton_schulz_coefficients=COEFFICIENTS[config.newton_schulz_coefficients],
        newton_schulz_dtype=torch.bfloat16 if bf16 else torch.float32,
        exchange_dtype=PRECISIONS[config.exchange_dtype],
        exchange_buffer_bytes=config.exchange_buffer_bytes,
        betas=config.betas,
        eps=config.eps,
        qk_clip=clip,
    )


def build_engine(
    config: RunConfig, model: Transformer, optimizer: AnyOptimizer, *, world: World, precision: str
) -> deepspeed.DeepSpeedEngine:
    """Wraps both in DeepSpeed's ZeRO engine."""
    if config.parallel.zero_stage == 3:  # the head is read in the whole model's forward pass, not in a module's own
        deepspeed.zero.register_external_parameter(model, model.head_weight)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=deepspeed_config(config, world=world, precision=precision)
    )
    return engine


def deepspeed_config(config: RunConfig, *, world: World, precision: str) -> dict[str, Any]:
    """What DeepSpeed reads; every value follows from the typed config."""
    sharing: dict[str, Any] = {
        "stage": config.parallel.zero_stage,
        "reduce_scatter": True,  # needed with experts
        "contiguous_gradients": True,  # needed with experts at stage 2
        "overlap_comm": world.device.type == "cuda",
        # Stage 3: vectors stay whole everywhere, as gathering one would cost more than it takes up.
        "stage3_param_persistence_threshold": config.model.hidden_size,
        "memory_efficient_linear": False,  # it would replace torch's own linear function, for everyone
    }
    if config.parallel.offload_optimizer:
        sharing["offload_optimizer"] = {"device": "cpu", "pin_memory": world.device.type == "cuda"}
    settings: dict[str, Any] = {
        "train_batch_size": config.train.global_batch_size * config.parallel.sequence_parallel,  # see Stepper
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "gradient_clipping": config.optim.clip_grad_norm,
        "zero_optimization": sharing,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # offload knows DeepSpeed's own CPU optimizers alone otherwise
        "data_types": {"grad_accum_dtype": "fp32"},  # else it follows the weights: bf16 sums lose small gradients
        "steps_per_print": 10**9,
    }
    if precision == "bf16":
        settings["bf16"] = {"enabled": True, "check_grad_overflow": True}
    return settings
