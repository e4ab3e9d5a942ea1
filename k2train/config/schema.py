"""The knobs of a run: frozen dataclasses, one a config group.

A field's ``metadata`` carries the rule that ``parse`` enforces (see ``rule``); rules that join several fields
are in ``check`` methods, which return sentences naming the key, the rule and the fix. Model fields carry the names of
the released ``config.json`` of Kimi K2, so that what is written here can be compared with it line by line.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, field
from typing import Any

from k2train.config.keys import find_key, suggest_key


def rule(
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    one_of: tuple[str, ...] | None = None,
    even: bool = False,
    default: Any = MISSING,
) -> Any:
    """A field with the values it may take; ``parse`` turns a breach into a sentence that names the key.

    It must be given, unless there is a ``default``.
    """
    bounds = {"at_least": at_least, "above": above, "at_most": at_most, "below": below, "one_of": one_of}
    metadata = {key: value for key, value in bounds.items() if value is not None} | ({"even": True} if even else {})
    return field(metadata=metadata) if default is MISSING else field(default=default, metadata=metadata)


# What a parameter is for; the model says it of each of its own.
ROLES = ("embedding", "head", "attention", "mlp", "expert", "router", "norm")

# What ``resume`` may be besides a path.
RESUME = ("auto", "must", "never")


@dataclass(frozen=True, kw_only=True)
class RopeScalingConfig:
    """YaRN (arXiv 2309.00071) with DeepSeek-V3's names; null in the model config switches it off."""

    factor: float = rule(above=1)
    original_max_position_embeddings: int = rule(at_least=1)
    beta_fast: float = rule(above=0)
    beta_slow: float = rule(above=0)
    mscale: float = rule(at_least=0)
    mscale_all_dim: float = rule(at_least=0)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Architecture of a DeepSeek-V3 / Kimi K2 transformer, in the names of the released ``config.json``.

    ``attention``, and what a layer before ``first_k_dense_replace`` has, make plainer models of it: with gqa and
    ``first_k_dense_replace=num_hidden_layers`` it is Llama.
    """

    # null: the tokenizer's size, rounded up to data.tokenizer.pad_to_multiple
    vocab_size: int | None = rule(at_least=1)
    hidden_size: int = rule(at_least=1)
    num_hidden_layers: int = rule(at_least=1)
    first_k_dense_replace: int = rule(at_least=0)  # num_hidden_layers: no layer has experts
    attention: str = rule(one_of=("mla", "gqa"))  # latent (K2) | grouped queries
    num_attention_heads: int = rule(at_least=1)
    num_key_value_heads: int | None = rule(at_least=1)  # gqa; as many as num_attention_heads: multi-head attention
    q_lora_rank: int | None = rule(at_least=1)  # mla; null: queries are not compressed
    kv_lora_rank: int | None = rule(at_least=1)  # mla
    qk_nope_head_dim: int = rule(at_least=0)
    qk_rope_head_dim: int = rule(at_least=2, even=True)
    v_head_dim: int = rule(at_least=1)
    intermediate_size: int = rule(at_least=1)
    moe_intermediate_size: int = rule(at_least=1)
    n_routed_experts: int = rule(at_least=1)
    num_experts_per_tok: int = rule(at_least=1)
    n_shared_experts: int = rule(at_least=0)
    n_group: int = rule(at_least=1)
    topk_group: int = rule(at_least=1)
    norm_topk_prob: bool = rule()
    routed_scaling_factor: float = rule(above=0)
    max_position_embeddings: int = rule(at_least=1)
    rope_theta: float = rule(above=0)
    rope_scaling: RopeScalingConfig | None = rule()
    rms_norm_eps: float = rule(above=0)
    tie_word_embeddings: bool = rule()
    initializer_scheme: str = rule(one_of=("normal", "depth_scaled"))  # see k2train.model.init
    initializer_range: float = rule(above=0)  # standard deviation of the initial weights
    router_bias_rate: float = rule(at_least=0)  # u in bias += u * sign(mean load - load); DeepSeek-V3: 1e-3
    balance_loss_weight: float = rule(at_least=0)  # alpha of DeepSeek-V3's sequence-wise balance loss (1e-4); 0: off

    @property
    def has_experts(self) -> bool:
        """Whether any layer is a mixture of experts."""
        return self.first_k_dense_replace < self.num_hidden_layers

    def check(self) -> Iterator[str]:
        """Sentences on fields that contradict each other."""
        yield from self._check_attention()
        if self.num_experts_per_tok > self.n_routed_experts:
            yield (
                f"num_experts_per_tok={self.num_experts_per_tok} is more than "
                f"n_routed_experts={self.n_routed_experts}: a token cannot go to more experts than there are; "
                "lower the first or raise the second"
            )
        if self.n_routed_experts % self.n_group:
            yield f"n_routed_experts={self.n_routed_experts} must be a multiple of n_group={self.n_group}"
        elif self.topk_group > self.n_group:
            yield f"topk_group={self.topk_group} must not exceed n_group={self.n_group}"
        elif self.num_experts_per_tok > self.topk_group * (self.n_routed_experts // self.n_group):
            yield (
                f"num_experts_per_tok={self.num_experts_per_tok} exceeds the experts of "
                f"topk_group={self.topk_group} groups"
            )
        elif self.n_group > 1 and self.n_routed_experts // self.n_group < 2:
            yield f"n_group={self.n_group} leaves groups of one expert; a group is scored by its two best experts"

    def _check_attention(self) -> Iterator[str]:
        if self.attention == "mla":
            if self.kv_lora_rank is None:
                yield "kv_lora_rank is null but attention=mla needs it: give the size of the latent (K2: 512)"
            if self.num_key_value_heads is not None:
                yield (
                    f"num_key_value_heads={self.num_key_value_heads} is given but attention=mla does not read it: "
                    "set it to null, or attention=gqa"
                )
            if self.qk_nope_head_dim < 1:
                yield "qk_nope_head_dim=0 but attention=mla needs keys without position: at least 1 (K2: 128)"
            return
        if self.num_key_value_heads is None:
            yield "num_key_value_heads is null but attention=gqa needs it: a divisor of num_attention_heads"
        elif self.num_attention_heads % self.num_key_value_heads:
            yield (
                f"num_key_value_heads={self.num_key_value_heads} must divide "
                f"num_attention_heads={self.num_attention_heads}: as many query heads share each key head"
            )
        for name in ("q_lora_rank", "kv_lora_rank"):
            if getattr(self, name) is not None:
                yield f"{name}={getattr(self, name)} is given but attention=gqa has no latents: set it to null"


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """A byte-level BPE that all sources share."""

    kind: str = rule(one_of=("bpe", "json", "tiktoken", "bytes"))  # trained | tokenizer.json | ranks file | bytes alone
    path: str | None = rule()  # json, tiktoken: the file
    vocab_size: int = rule(at_least=257, at_most=163840)  # bpe: tokens including the 256 bytes and the special tokens
    split: str = rule(one_of=("gpt4", "kimi-k2"))  # bpe, tiktoken: how text is cut before merging
    end_of_text: str = rule()  # the special token that closes a document
    pad_to_multiple: int = rule(at_least=1)  # the model's vocabulary is rounded up to a multiple of this

    def check(self) -> Iterator[str]:
        """Sentences on fields that contradict each other."""
        reads = self.kind in ("json", "tiktoken")
        if reads and not self.path:
            yield f"path is missing: kind={self.kind} needs the file, as in data.tokenizer.path=/home/me/tokenizer.json"
        if not reads and self.path:
            yield f"path={self.path!r} is given but kind={self.kind} reads no file: set kind=json or kind=tiktoken"


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One source of documents; see configs/data/mixture.yaml for what its keys mean."""

    kind: str = rule(one_of=("stdlib", "folder", "jsonl", "parquet", "arrow", "datasets", "megatron", "raw"))
    path: str | None = rule(default=None)  # file or folder; datasets: what load_dataset takes; null: data.path
    include: tuple[str, ...] | None = rule(default=None)  # fnmatch on the path in the folder; null: the kind's endings
    exclude: tuple[str, ...] = rule(default=())
    text: str = rule(default="text")  # a column, or a template of several: "{title}\n{text}"
    origin: str | None = rule(default=None)  # a column that says where a document comes from; null: file and place
    # What is held out as a whole: directory, document or a column. null: a file's directory, a table's row
    group: str | None = rule(default=None)
    min_characters: int | None = rule(default=None, at_least=1)
    max_characters: int | None = rule(default=None, at_least=1)
    match: tuple[str, ...] = rule(default=())  # regular expressions, each of which a document must have a match of
    reject: tuple[str, ...] = rule(default=())  # regular expressions, none of which it may have a match of
    subset: str | None = rule(default=None)  # datasets: its configuration's name
    split: str = rule(default="train")  # datasets
    revision: str | None = rule(default=None)  # datasets: of the hub's repository
    data_files: tuple[str, ...] = rule(default=())  # datasets: local or remote files for path=json, csv, ...
    streaming: bool = rule(default=False)  # datasets: read without a copy in the cache of datasets
    separator: int | None = rule(default=None, at_least=0)  # raw, megatron: the id that stands between documents
    dtype: str = rule(default="uint16", one_of=("uint16", "uint32"))  # raw: of the ids

    def check(self) -> Iterator[str]:
        """Sentences on fields that contradict each other."""
        if self.kind == "raw" and self.separator is None:
            yield "separator is missing: kind=raw needs the id that stands between documents (GPT-2: 50256)"
        for key in ("match", "reject"):
            for pattern in getattr(self, key):
                try:
                    re.compile(pattern)
                except re.error as error:
                    yield f"{key}: {pattern!r} is no regular expression ({error})"


@dataclass(frozen=True, kw_only=True)
class OrderConfig:
    """What training samples are, and in which order they come; see docs/data-order.md."""

    packing: bool = rule()  # whole documents in windows; false: cut wherever a window ends
    group_shards: int | None = rule(at_least=1)  # shards whose windows are mixed with each other; null: all
    skips: tuple[tuple[int, int], ...] = rule(at_least=0)  # first and last of the samples that are left out


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where text comes from, how it is split and encoded, and how its sources are mixed."""

    sources: dict[str, SourceConfig] = rule()
    path: str | None = rule()  # of the sources that give none of their own
    # Relative sampling weights: a number, or pairs [training tokens, weight] with straight lines between them. Without
    # any each source has the weight of its size.
    weights: dict[str, float | tuple[tuple[float, float], ...]] = rule(at_least=0)
    max_epochs: dict[str, float] = rule(above=0)  # how often a source may be seen; one that is not named has no limit
    order: OrderConfig = rule()
    prepared: str | None = rule()  # folder or URL of a data set that prepare has made elsewhere; null: it is made here
    cache_bytes: int | None = rule(at_least=1)  # of the shards behind a URL that are kept here; null: all
    dedup: str = rule(
        one_of=("none", "exact", "near")
    )  # over all sources: keeps the first of equal, or alike, documents
    near_threshold: float = rule(above=0, below=1)  # near: the share of common 5-word sequences (Jaccard), estimated
    held_out: float = rule(above=0, below=1)  # share of each source's bytes kept for validation, by hash of the group
    cache_dir: str | None = rule()  # null: $XDG_CACHE_HOME/k2train
    workers: int | None = rule(at_least=1)  # processes that prepare; null: the cores
    shard_bytes: int = rule(at_least=1)  # of text in a shard, about: what a process holds and writes at a time
    tokenizer: TokenizerConfig = rule()

    def check(self) -> Iterator[str]:
        """Sentences on fields that contradict each other."""
        if self.prepared:
            return
        if self.cache_bytes is not None:
            yield f"cache_bytes={self.cache_bytes} is given but nothing reads it without prepared: set it to null"
        if not self.sources:
            yield "sources is empty: name at least one, or use data=stdlib"
        for name, source in self.sources.items():
            if not name.replace("-", "").replace("_", "").isalnum() or not name.isascii():
                yield f"sources.{name}: the name becomes a folder's: use letters, digits, - and _ alone"
            if source.kind != "stdlib" and not (source.path or self.path):
                yield (
                    f"path is missing: the source {name} of kind {source.kind} needs one, as in "
                    f"data.path=/home/me/code or data.sources.{name}.path=/home/me/code"
                )
            if source.kind == "stdlib" and source.path:
                yield f"sources.{name}.path={source.path!r} is given but kind=stdlib does not read it: remove it"
        if self.path and all(source.path or source.kind == "stdlib" for source in self.sources.values()):
            yield f"path={self.path!r} is given but no source reads it: add data=folder to train on it"
        for key, given in (("weights", self.weights), ("max_epochs", self.max_epochs)):
            for name in sorted(given.keys() - self.sources.keys()):
                yield f"{key}.{name}: there is no such source: the sources are {', '.join(sorted(self.sources))}"
        if self.tokenizer.kind in ("bpe", "bytes"):
            for name, source in self.sources.items():
                if source.kind in ("megatron", "raw"):
                    yield (
                        f"sources.{name}.kind={source.kind} holds ids of a tokenizer that is there already: give it by "
                        "data.tokenizer.kind=json data.tokenizer.path=tokenizer.json"
                    )
        if self.weights:
            for name in sorted(self.sources.keys() - self.weights.keys()):
                yield f"weights.{name} is missing: give a weight to each source, or to none"


@dataclass(frozen=True, kw_only=True)
class RoleConfig:
    """Learning rate and decoupled weight decay of one role of parameters."""

    lr: float = rule(at_least=0)
    weight_decay: float = rule(at_least=0)


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer. Matrices inside the blocks use Muon unless ``name`` is adamw; the rest always uses AdamW."""

    name: str = rule(one_of=("muonclip", "muon", "adamw"))
    lr: float = rule(at_least=0)  # the peak; roles refer to it
    weight_decay: float = rule(at_least=0)
    momentum: float = rule(at_least=0, below=1)
    nesterov: bool = rule()
    newton_schulz_coefficients: str = rule(one_of=("quintic", "polar_express"))  # five steps each
    newton_schulz_dtype: str = rule(one_of=("auto", "fp32", "bf16"))  # auto: bf16 on a GPU, fp32 on a CPU
    exchange_dtype: str = rule(one_of=("fp32", "bf16"))  # in which matrices that straddle ranks travel to be whole
    exchange_buffer_bytes: int = rule(at_least=1)  # that a role's exchange may hold on a rank at a time
    betas: tuple[float, float] = rule(at_least=0, below=1)
    eps: float = rule(above=0)
    tau: float | None = rule(above=0)  # QK-Clip's threshold on the max attention logit; required by muonclip
    alpha: float = rule(at_least=0, at_most=1)  # the query's share of the clip, as an exponent; the key has the rest
    clip_grad_norm: float = rule(at_least=0)  # by the raw global norm; 0: off
    roles: dict[str, RoleConfig] = rule()  # each of ROLES

    def check(self) -> Iterator[str]:
        """Sentences on fields that contradict each other."""
        if self.name == "muonclip" and self.tau is None:
            yield "tau is null but name=muonclip clips at it: set optim.tau=100 (K2's value), or use optim=muon"
        for role in sorted(self.roles.keys() ^ set(ROLES)):
            fault = "is missing" if role in ROLES else "is no role of a parameter"
            yield f"roles.{role} {fault}: the roles are {', '.join(ROLES)}"


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Warm-up, stable, decay (WSD). The length of a run is steps or tokens, never a time."""

    steps: int | None = rule(at_least=1)
    tokens: int | None = rule(at_least=1)
    warmup_steps: int = rule(at_least=0)
    decay_fraction: float = rule(at_least=0, at_most=1)  # share of the run over which lr falls to final_lr_ratio
    decay_shape: str = rule(one_of=("linear", "cosine"))
    final_lr_ratio: float = rule(at_least=0, at_most=1)

    def check(self) -> Iterator[str]:
        """Sentences on fields that contradict each other."""
        if (self.steps is None) == (self.tokens is None):
            yield (
                f"steps={self.steps} and tokens={self.tokens}: give exactly one as the run's length, null as the "
                "other, as in schedule.steps=null schedule.tokens=2000000"
            )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The batch, the machine and the numbers it computes in."""

    global_batch_size: int = rule(at_least=1)  # sequences a step, over all ranks
    micro_batch_size: int = rule(at_least=1)  # sequences a rank computes at once; the rest is accumulated
    sequence_length: int = rule(at_least=2)  # tokens
    document_mask: bool = rule()  # whether attention stays inside a document, in training and validation
    device: str = rule(one_of=("auto", "cpu", "cuda"))
    precision: str = rule(one_of=("auto", "fp32", "bf16"))  # auto: bf16 on a GPU, fp32 on a CPU
    activation_checkpointing: str = rule(one_of=("none", "selective", "full"))  # see k2train.model.recompute
    compile: bool = rule()  # torch.compile, see k2train.model.compile
    threads: int | None = rule(at_least=1)  # CPU threads a process; null: the cores of the node shared out


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the work is split over processes."""

    zero_stage: int = rule(at_least=1, at_most=3)  # 1: optimizer state is shared out; 2: gradients; 3: weights too
    offload_optimizer: bool = rule()  # fp32 masters and momenta in the CPU's memory, not the GPU's
    expert_parallel: int = rule(at_least=1)  # processes that share out the experts; must divide world size and experts


@dataclass(frozen=True, kw_only=True)
class ValidateConfig:
    """Held-out bits per byte."""

    every: int = rule(at_least=0)  # steps; 0: only at the end
    tokens: int = rule(at_least=1)  # of the held-out text, during the run; at the end all of it is read


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When checkpoints are written and how many stay."""

    every: int = rule(at_least=0)  # steps; 0: only at the end
    keep: int = rule(at_least=1)  # of the newest
    keep_every: int | None = rule(at_least=1)  # steps: those of its multiples stay for good; null: none
    keep_hours: float | None = rule(at_least=0)  # those that are younger stay too; null: none
    asynchronous: bool = rule()  # written while training goes on, from a copy of the state in host memory


@dataclass(frozen=True, kw_only=True)
class FaultsConfig:
    """How long a run waits before it gives up."""

    hang_after: float = rule(above=0)  # seconds in which nothing goes on: stacks to logs/, and the process ends


@dataclass(frozen=True, kw_only=True)
class TrackConfig:
    """Where metrics go beside the local metrics.jsonl."""

    wandb: str = rule(one_of=("auto", "off", "offline", "online"))  # auto: online if logged in, else offline
    project: str = rule()
    log_every: int = rule(at_least=1)  # steps


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """How text is sampled."""

    prompt: str = rule()
    max_tokens: int = rule(at_least=1)
    temperature: float = rule(at_least=0)  # 0: always the likeliest token
    top_p: float = rule(above=0, at_most=1)
    seed: int = rule(at_least=0)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """All that decides a run."""

    name: str = rule()  # of the run; everything it writes lies in runs_dir/name
    runs_dir: str = rule()
    seed: int = rule(at_least=0)
    resume: str = rule()  # auto | must | never | the path of a checkpoint, or of a run, to go on from under this name
    allow_changed: tuple[str, ...] = rule()  # keys, or groups, that may differ from the run that is gone on with
    init_from: str | None = rule()  # a checkpoint, or a run, whose weights a new run begins with; null: drawn from seed
    model: ModelConfig = rule()
    data: DataConfig = rule()
    optim: OptimConfig = rule()
    schedule: ScheduleConfig = rule()
    train: TrainConfig = rule()
    parallel: ParallelConfig = rule()
    validate: ValidateConfig = rule()
    checkpoint: CheckpointConfig = rule()
    faults: FaultsConfig = rule()
    track: TrackConfig = rule()
    generate: GenerateConfig = rule()  # the sample of text at the end of the run

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run; a token budget is rounded up to whole steps."""
        if self.schedule.steps is not None:
            return self.schedule.steps
        assert self.schedule.tokens is not None
        return -(-self.schedule.tokens // (self.train.global_batch_size * self.train.sequence_length))

    def check(self) -> Iterator[str]:
        """Sentences on fields of different groups that contradict each other."""
        if not self.name or self.name in (".", "..") or any(c in self.name for c in "/\\\0"):
            yield f"name={self.name!r} must be a plain folder name: it names the run's folder under runs_dir"
        yield from self._check_start()
        if self.train.global_batch_size % self.train.micro_batch_size:
            yield (
                f"train.global_batch_size={self.train.global_batch_size} must be a multiple of "
                f"train.micro_batch_size={self.train.micro_batch_size}"
            )
        if self.model.n_routed_experts % self.parallel.expert_parallel:
            yield (
                f"parallel.expert_parallel={self.parallel.expert_parallel} must divide "
                f"model.n_routed_experts={self.model.n_routed_experts}"
            )
        if self.parallel.expert_parallel > 1 and not self.model.has_experts:
            yield (
                f"parallel.expert_parallel={self.parallel.expert_parallel} but no layer has experts, as "
                f"model.first_k_dense_replace={self.model.first_k_dense_replace} of "
                f"model.num_hidden_layers={self.model.num_hidden_layers}: set parallel.expert_parallel=1"
            )
        if self.parallel.zero_stage == 3 and self.train.compile:
            yield (
                "train.compile=true but parallel.zero_stage=3 gathers weights between the operations that would be "
                "compiled together: set train.compile=false, or parallel.zero_stage=2"
            )
        if self.schedule.warmup_steps > self.steps:
            yield f"schedule.warmup_steps={self.schedule.warmup_steps} is longer than the run of {self.steps} steps"
        if self.train.sequence_length > self.model.max_position_embeddings:
            yield (
                f"train.sequence_length={self.train.sequence_length} is longer than "
                f"model.max_position_embeddings={self.model.max_position_embeddings}"
            )

    def _check_start(self) -> Iterator[str]:
        for key in ("runs_dir", "resume", "init_from"):
            if "://" in (value := getattr(self, key) or ""):
                yield (
                    f"{key}={value!r} is in an object store, where a folder cannot be renamed, and a checkpoint not be "
                    "published whole: give a folder on a disk that all nodes share, and copy from there"
                )
        if self.init_from is not None and self.resume not in RESUME:
            yield (
                f"init_from={self.init_from!r} begins a new run but resume={self.resume!r} goes on with another: "
                "give one of them"
            )
        for key in self.allow_changed:
            if find_key(RunConfig, key) is None:
                yield f"allow_changed={key!r} is no key: {suggest_key(RunConfig, key)}"

    def check_world(self, world_size: int) -> Iterator[str]:
        """Sentences on what this world size cannot run; apart from ``check`` as the config alone does not know it."""
        share = self.train.micro_batch_size * world_size
        if self.train.global_batch_size % share:
            yield (
                f"train.global_batch_size={self.train.global_batch_size} does not divide over {world_size} processes "
                f"with train.micro_batch_size={self.train.micro_batch_size}: it must be a multiple of {share}"
            )
        if world_size % self.parallel.expert_parallel:
            yield (
                f"parallel.expert_parallel={self.parallel.expert_parallel} does not divide the {world_size} "
                f"process{'es' if world_size > 1 else ''} of this run: "
                "start a multiple of it with torchrun --nproc_per_node, or lower it"
            )


@dataclass(frozen=True, kw_only=True)
class WriteConfig:
    """All that decides what ``k2train generate`` writes."""

    run: str = rule()  # the folder of a run; its newest checkpoint speaks
    device: str = rule(one_of=("auto", "cpu", "cuda"))
    generate: GenerateConfig = rule()


@dataclass(frozen=True, kw_only=True)
class CheckConfig:
    """What ``k2train inspect`` and ``k2train verify`` look at."""

    checkpoint: str = rule()  # its folder, or that of a run: the newest one
