"""What others' trainings took, beside what a plan says of them: a table of docs/plan.md."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from k2train.cli.commands import PLAN
from k2train.cli.compose import compose
from k2train.config import PlanConfig, parse
from k2train.plan.estimate import Part, with_vocabulary
from k2train.plan.search import search
from k2train.units import count

TRILLION = 1e12
NEMO = "https://github.com/NVIDIA-NeMo"
AUTOMODEL = f"{NEMO}/Automodel/blob/36044ad3d139363fb6c73c24af2e7c6b65ec52f6/docs/performance-summary.mdx"
BRIDGE = (
    f"{NEMO}/Megatron-Bridge/blob/067f987df03b8355b03192d88d70f1709fedf51a/examples/model_verification_cards/"
    "moonlight-16b-a3b/card.yaml"
)
OLMO_CORE = (
    "https://github.com/allenai/OLMo-core/blob/fa6c5014c9f6e9ee789da2d9c20d5126fee8df0d/src/scripts/official/OLMo3/"
    "README.md"
)

DEEPSEEK_V3 = (
    "model=k2 model.num_attention_heads=128 model.first_k_dense_replace=3 model.n_routed_experts=256 model.n_group=8 "
    "model.topk_group=4 model.vocab_size=129280 model.rope_scaling=null"
)
DEEPSEEK_V2 = (
    "model=k2 model.hidden_size=5120 model.num_hidden_layers=60 model.num_attention_heads=128 model.vocab_size=102400 "
    "model.intermediate_size=12288 model.moe_intermediate_size=1536 model.n_routed_experts=160 model.n_group=8 "
    "model.topk_group=3 model.num_experts_per_tok=6 model.n_shared_experts=2 model.rope_scaling=null"
)
DOTS = (  # its config.json at huggingface.co/rednote-hilab/dots.llm1.base
    "model=small-gqa model.hidden_size=4096 model.num_hidden_layers=62 model.num_attention_heads=32 "
    "model.num_key_value_heads=32 model.qk_rope_head_dim=128 model.v_head_dim=128 model.vocab_size=152064 "
    "model.intermediate_size=10944 model.moe_intermediate_size=1408 model.n_routed_experts=128 "
    "model.num_experts_per_tok=6 model.n_shared_experts=2 model.max_position_embeddings=32768"
)


def llama(*, width: int, layers: int, heads: int, groups: int, feed_forward: int, vocabulary: int) -> str:
    """The plan's words for a dense model with heads of 128."""
    return (
        f"model=small-dense model.hidden_size={width} model.num_hidden_layers={layers} "
        f"model.first_k_dense_replace={layers} model.num_attention_heads={heads} model.num_key_value_heads={groups} "
        f"model.qk_rope_head_dim=128 model.v_head_dim=128 model.intermediate_size={feed_forward} "
        f"model.vocab_size={vocabulary} model.max_position_embeddings=8192"
    )


LLAMA_2_7B = llama(width=4096, layers=32, heads=32, groups=32, feed_forward=11008, vocabulary=32000)
LLAMA_2_70B = llama(width=8192, layers=80, heads=64, groups=8, feed_forward=28672, vocabulary=32000)
LLAMA_3_8B = llama(width=4096, layers=32, heads=32, groups=8, feed_forward=14336, vocabulary=128256)
LLAMA_3_70B = llama(width=8192, layers=80, heads=64, groups=8, feed_forward=28672, vocabulary=128256)
LLAMA_3_405B = llama(width=16384, layers=126, heads=128, groups=8, feed_forward=53248, vocabulary=128256)
OLMO_3_7B = llama(width=4096, layers=32, heads=32, groups=32, feed_forward=11008, vocabulary=100352)
OLMO_3_32B = llama(width=5120, layers=64, heads=40, groups=8, feed_forward=27648, vocabulary=100352)


@dataclasses.dataclass(frozen=True)
class Published:
    """A training that others have reported."""

    name: str
    source: str
    machine: str  # the plan's words
    model: str  # the plan's words
    tokens: float
    batch: int  # sequences
    length: int  # tokens
    hours: float | None  # of GPUs; None: not published


def at(rate: float) -> float:
    """GPU-hours of a trillion tokens at so many tokens a second of a GPU."""
    return TRILLION / rate / 3600


PUBLISHED = (
    Published(
        "DeepSeek-V3, pre-training",
        "arXiv 2412.19437, table 1: 2,664 K H800 hours (2,788 K with 32K, 128K and post-training); FP8",
        "cluster=h800-2048",
        DEEPSEEK_V3,
        14.8e12,
        16384,
        4096,
        2.664e6,
    ),
    Published(
        "DeepSeek-V2",
        "arXiv 2405.04434, section 3.2.3: 172.8 K H800 hours for a trillion tokens; 8.1 trillion",
        "cluster=h800 cluster.nodes=128",
        DEEPSEEK_V2,
        8.1e12,
        8192,
        4096,
        8.1 * 172.8e3,
    ),
    Published(
        "dots.llm1",
        "arXiv 2506.05767, [as quoted](https://aiportalx.com/rednote/dots.llm1): 1,456 K hours, 11.2 trillion tokens; "
        "H800 and their number assumed",
        "cluster=h800 cluster.nodes=64",
        DOTS,
        11.2e12,
        1024,
        8192,
        1.456e6,
    ),
    Published(
        "Llama-2-7B",
        "arXiv 2307.09288, table 2: 184,320 A100 hours, 2 trillion tokens; number of GPUs assumed",
        "cluster=a100 cluster.nodes=64",
        LLAMA_2_7B,
        2e12,
        1024,
        4096,
        184320,
    ),
    Published(
        "Llama-2-70B",
        "the same table: 1,720,320 A100 hours; up to 2,000 GPUs",
        "cluster=a100 cluster.nodes=128",
        LLAMA_2_70B,
        2e12,
        1024,
        4096,
        1720320,
    ),
    Published(
        "Llama-3.1-8B",
        "its model card: 1.46 M H100 hours; 15 trillion tokens; number of GPUs assumed",
        "cluster=h100 cluster.nodes=64",
        LLAMA_3_8B,
        15e12,
        1024,
        8192,
        1.46e6,
    ),
    Published(
        "Llama-3-70B",
        "its model card, as quoted at aiportalx.com: 6.4 M H100 hours; 15 trillion tokens; number of GPUs assumed",
        "cluster=h100 cluster.nodes=256",
        LLAMA_3_70B,
        15e12,
        2048,
        8192,
        6.4e6,
    ),
    Published(
        "Llama-3.1-405B",
        "its model card: 30.84 M H100 hours; arXiv 2407.21783, table 4: 16,384 GPUs, 16 M tokens a step",
        "cluster=h100 cluster.nodes=2048",
        LLAMA_3_405B,
        15.6e12,
        2048,
        8192,
        30.84e6,
    ),
    Published(
        "OLMo-3-7B",
        "its report, [as quoted](https://engineered.at/articles/minipost-olmo-3-training-cost): 234 K H100 hours with "
        f"restarts; [512 GPUs]({OLMO_CORE}); planned without its sliding windows",
        "cluster=h100 cluster.nodes=64",
        OLMO_3_7B,
        5.93e12,
        512,
        8192,
        234e3,
    ),
    Published(
        "OLMo-3-32B",
        "the same: 1.05 M H100 hours; 1,024 GPUs",
        "cluster=h100 cluster.nodes=128",
        OLMO_3_32B,
        5.5e12,
        1024,
        8192,
        1.05e6,
    ),
    Published(
        "DeepSeek-V3 by AutoModel",
        f"[its performance summary]({AUTOMODEL}): 865 tokens/s of each of 1,024 H100; experts balanced by force",
        "cluster=h100 cluster.nodes=128",
        DEEPSEEK_V3,
        TRILLION,
        8192,
        4096,
        at(865),
    ),
    Published(
        "Kimi K2 by AutoModel",
        "the same: 924 tokens/s of each of 256 H100; experts balanced by force, pipelines of 8",
        "cluster=h100 cluster.nodes=32",
        "model=k2 model.rope_scaling=null",
        TRILLION,
        512,
        4096,
        at(924),
    ),
    Published(
        "Moonlight by Megatron Bridge",
        f"[its verification card]({BRIDGE}): 22,528 tokens/s of each of 16 H100",
        "cluster=h100 cluster.nodes=2",
        "model=moonlight-16b",
        TRILLION,
        1024,
        4096,
        at(22528),
    ),
    Published(
        "Kimi K2, at 4K",
        "arXiv 2507.20534",
        "cluster=h800-2048",
        "model=k2 model.rope_scaling=null",
        15.5e12,
        16384,
        4096,
        None,
    ),
    Published(
        "Moonlight-16B-A3B",
        "arXiv 2502.16982",
        "cluster=h100 cluster.nodes=32",
        "model=moonlight-16b",
        5.7e12,
        4096,
        8192,
        None,
    ),
)


def plan_of(words: str) -> PlanConfig:
    """The config of ``k2train plan WORDS``."""
    return with_vocabulary(parse(PlanConfig, compose(PLAN, words.split())))


def published() -> Iterator[str]:
    """GPU-hours of others' trainings beside the fastest split that ``--search`` finds."""
    yield "| training | published | planned, GPU-hours | planned over published | utilisation | split |"
    yield "| --- | --- | ---: | ---: | ---: | --- |"
    for one in PUBLISHED:
        config = plan_of(f"{one.machine} {one.model} train.micro_batch_size=1")
        steps = round(one.tokens / (one.batch * one.length))
        found = search(config, [Part("training", steps, one.batch, 1, one.length)])
        if not found.fitting:
            yield f"| {one.name} | {one.source} | does not fit | | | on {config.cluster.devices} |"
            continue
        candidate, best = found.fitting[0]
        ratio = f"{best.device_hours / one.hours:.2f}" if one.hours else "not published"
        yield (
            f"| {one.name}: {count(best.parameters)} | {one.source} | {count(best.device_hours)} | {ratio} "
            f"| {best.utilisation:.0%} | ZeRO-{candidate.zero_stage}, ep {candidate.expert_parallel}, micro-batch "
            f"{candidate.micro_batch_size}, {candidate.activation_checkpointing} on {best.layout.ranks} |"
        )
