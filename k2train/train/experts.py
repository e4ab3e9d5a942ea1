"""The one class that DeepSpeed wants for expert layers, made here so that the model need not know DeepSpeed.

The engine recognises experts by ``isinstance(module, AutoEPMoELayer)`` and then reduces their gradients over the
expert-data group alone. Ours takes the class for its name and the hook that binds groups; construction and forward
are MoE's own. These are internals of DeepSpeed, tested against the minor version that pyproject.toml pins.
"""

from __future__ import annotations

from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.utils import groups

from k2train.comm import World
from k2train.model import ExpertParallel, MoE, Transformer


class DeepSpeedMoE(MoE, AutoEPMoELayer):  # type: ignore[misc]  # DeepSpeed has no types
    """A mixture-of-experts layer in DeepSpeed's eyes; ``MoE`` in all else, as it comes first."""


def expert_groups(world: World, *, size: int) -> ExpertParallel:
    """Makes the process groups of expert parallelism: ``size`` consecutive ranks hold one copy of all experts.

    DeepSpeed keeps them under ``ep_size_N`` and uses the same ones for its gradient reduction.
    """
    name = group_name(size)
    if name not in groups._get_expert_parallel_group_dict():
        groups._create_expert_and_data_parallel(size)
    return ExpertParallel(groups._get_expert_parallel_group(name), size, world.rank % size)


def group_name(size: int) -> str:
    """DeepSpeed's name for the groups of expert parallelism ``size``."""
    return f"ep_size_{size}"


def mark_experts(model: Transformer, expert_parallel: ExpertParallel) -> None:
    """Sets on each expert layer and parameter what DeepSpeed's engine and ZeRO read; before any is partitioned."""
    name = group_name(expert_parallel.size)
    for _, moe in model.moe_layers():
        local = moe.experts.w1.shape[0]
        _set(
            moe,
            num_experts=local * expert_parallel.size,
            num_local_experts=local,
            ep_size=expert_parallel.size,
            ep_rank=expert_parallel.rank,
            ep_group_name=name,
            ep_group=None,
            tp_group=None,
            folding_group_handles=None,
            expert_placement_descriptor=None,
            combine_impl=None,
            comm_backend="comm",
        )
        data_parallel = groups._get_expert_data_parallel_group(name)
        for parameter in moe.experts.parameters():
            _set(
                parameter,
                allreduce=False,
                group_name=name,
                ds_zero_placement_family="autoep_expert",
                ds_zero_partition_group_name=name,
                ds_zero_partition_process_group=data_parallel,
            )


def _set(target: object, **attributes: object) -> None:
    for key, value in attributes.items():
        setattr(target, key, value)
