"""The knobs of a run: frozen dataclasses, one a config group.

A field's ``metadata`` carries the rule that ``parse`` enforces (see ``k2train.config.rules``); rules that join several
fields are in ``check`` methods, which return sentences naming the key, the rule and the fix. Model fields carry the
names of the released ``config.json`` of Kimi K2, so that what is written here can be compared with it line by line.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from k2train.config.data import DataConfig
from k2train.config.keys import find_key, suggest_key
from k2train.config.monitor import InjectConfig, MonitorConfig
from k2train.config.rules import is_own, rule
from k2train.config.schedule import RopeScalingConfig, ScheduleConfig

# What a parameter is for; the model says it of each of its own.
ROLES = ("embedding", "head", "attention", "mlp", "expert", "router", "norm")
# Hidden matrices; all other roles (embedding, head, norm) always use AdamW. MuonClip: arXiv 2507.20534, section 2.1.
MUON_ROLES = ("attention", "mlp", "expert", "router")

# What ``resume`` may be besides a path.
RESUME = ("auto", "must", "never")


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
class RoleConfig:
    """Learning rate and decoupled weight decay of one role of parameters."""

    lr: float = rule(at_least=0)
    weight_decay: float = rule(at_least=0)


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer. With muonclip and muon, matrices inside the blocks use Muon, and the rest AdamW.

    One of a person's own gets ``lr``, ``weight_decay`` and its ``options``, and reads no other number here.
    """

    name: str = rule(one_of=("muonclip", "muon", "adamw"), own=True)
    options: dict[str, Any] | None = rule(default=None)  # of one's own, for its constructor
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

    @property
    def own(self) -> bool:
        """Whether it is a person's own."""
        return is_own(self.name)

    @property
    def muon_roles(self) -> tuple[str, ...]:
        """The roles whose parameters use Muon."""
        return MUON_ROLES if self.name in ("muonclip", "muon") else ()

    def check(self) -> Iterator[str]:
        """Sentences on fields that contradict each other."""
        if self.name == "muonclip" and self.tau is None:
            yield "tau is null but name=muonclip clips at it: set optim.tau=100 (K2's value), or use optim=muon"
        if self.own and self.tau is not None:
            yield f"tau={self.tau} is given but name={self.name} clips no logits: set tau to null, or use optim=own"
        if self.options and not self.own:
            yield f"options is given but name={self.name} is not your own and has keys for all: see configs/optim"
        for role in sorted(self.roles.keys() ^ set(ROLES)):
            fault = "is missing" if role in ROLES else "is no role of a parameter"
            yield f"roles.{role} {fault}: the roles are {', '.join(ROLES)}"


@dataclass(frozen=True, kw_only=True)
class HookConfig:
    """A hook of a person's own; see ``k2train.train.hooks``."""

    kind: str = rule(own=True)
    options: dict[str, Any] | None = rule(default=None)  # for its constructor


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
    deterministic: bool = rule()  # see k2train.train.deterministic
    hooks: dict[str, HookConfig] = rule()  # by any name


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the work is split over processes."""

    zero_stage: int = rule(at_least=1, at_most=3)  # 1: optimizer state is shared out; 2: gradients; 3: weights too
    offload_optimizer: bool = rule()  # fp32 masters and momenta in the CPU's memory, not the GPU's
    expert_parallel: int = rule(at_least=1)  # processes that share out the experts; must divide world size and experts
    # Processes that share out each sequence; must divide world size, heads and every sequence length. Older checkpoints
    # do not have it.
    sequence_parallel: int = rule(at_least=1, default=1)


@dataclass(frozen=True, kw_only=True)
class ValidateConfig:
    """Held-out bits per byte."""

    every: int = rule(at_least=0)  # steps; 0: only at the end
    tokens: int = rule(at_least=1)  # of each set, during the run; at the end all of it is read
    data: dict[str, str] = rule()  # sets that were prepared apart: by name a folder or URL, as data.prepared
    questions: int = rule(at_least=0, default=0)  # which line comes next, of the run's held-out text; 0: none
    samples: int = rule(at_least=0, default=0)  # texts, of which is told how much parses as Python; 0: none

    def check(self) -> Iterator[str]:
        """Sentences on names that metrics cannot have."""
        for name in self.data:
            if not name.replace("-", "").replace("_", "").isalnum() or not name.isascii():
                yield f"data.{name}: the name becomes a metric's: use letters, digits, - and _ alone"


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
    save_within: float = rule(at_least=0)  # seconds that the last save is tried for, as on a full disk


@dataclass(frozen=True, kw_only=True)
class TrackConfig:
    """Where metrics go beside the local metrics.jsonl."""

    wandb: str = rule(one_of=("auto", "off", "offline", "online"))  # auto: online if logged in, else offline
    project: str = rule()
    group: str | None = rule()  # of runs that belong together, such as those of a sweep
    tensorboard: bool = rule()  # whether TensorBoard's files are written, too
    log_every: int = rule(at_least=1)  # steps
    telemetry_every: int = rule(at_least=0)  # records between two with telemetry (docs/metrics.md); 0: none
    spectrum_every: int = rule(at_least=0)  # steps between two with the weights' SVD entropy; 0: none


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """How text is sampled."""

    prompt: str = rule()
    max_tokens: int = rule(at_least=1)
    temperature: float = rule(at_least=0)  # 0: always the likeliest token
    top_p: float = rule(above=0, at_most=1)
    repetition_penalty: float = rule(above=0, default=1.0)  # of tokens that have come before; 1: none
    stop: tuple[str, ...] = rule(default=())  # strings that end the text
    seed: int = rule(at_least=0)

    def check(self) -> Iterator[str]:
        """Sentences on fields that contradict each other."""
        if "" in self.stop:
            yield "stop holds an empty string, which would end every text at once: remove it"


@dataclass(frozen=True, kw_only=True)
class SampleConfig(GenerateConfig):
    """Text that a run writes: at its end, and on the way."""

    every: int = rule(at_least=0)  # steps; 0: only at the end


@dataclass(frozen=True, kw_only=True)
class ProfileConfig:
    """Where the time and the memory of single steps go."""

    steps: tuple[int, ...] = rule(at_least=1)  # as metrics.jsonl counts them


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
    monitor: MonitorConfig = rule()
    inject: InjectConfig = rule()
    track: TrackConfig = rule()
    generate: SampleConfig = rule()
    profile: ProfileConfig = rule()

    def batches(self) -> list[tuple[str, int, int]]:
        """Every kind of step: the key that says it, sequences over all ranks, sequences of a micro-batch."""
        found, usual = [], self.train.global_batch_size
        for name, phase in self.schedule.parts().items():
            micro = phase.micro_batch_size or self.train.micro_batch_size
            if (size := phase.global_batch_size) is not None:
                found.append((f"schedule.phases.{name}.global_batch_size={size}", size, micro))
                continue
            found.append((f"train.global_batch_size={usual}", usual, micro))
            found += [(f"schedule.batch_ramp, entry {size},", size, micro) for size, _ in self.schedule.batch_ramp]
        return list(dict.fromkeys(found))

    def check(self) -> Iterator[str]:
        """Sentences on fields of different groups that contradict each other."""
        if not self.name or self.name in (".", "..") or any(c in self.name for c in "/\\\0"):
            yield f"name={self.name!r} must be a plain folder name: it names the run's folder under runs_dir"
        yield from self._check_start()
        for key, size, micro in self.batches():
            if size % micro:
                yield f"{key} must be a multiple of train.micro_batch_size={micro}"
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
        yield from self._check_sequence_parallel()
        for name, phase in self.schedule.phases.items():
            yield from self._check_length(phase.sequence_length or 0, key=f"schedule.phases.{name}.sequence_length")
            for key in ("weights", "final_weights"):
                if (given := getattr(phase, key)) is not None and given.keys() != self.data.sources.keys():
                    yield (
                        f"schedule.phases.{name}.{key} names {', '.join(given)}, but data.sources are "
                        f"{', '.join(self.data.sources)}: give a weight to each source"
                    )
        if self.monitor.action == "rewind" and not self.checkpoint.every:
            yield "monitor.action=rewind goes back to checkpoints: set checkpoint.every, or monitor.action=skip"
        yield from self._check_length(self.train.sequence_length, key="train.sequence_length")

    def _check_length(self, length: int, *, key: str) -> Iterator[str]:
        if length > self.model.max_position_embeddings:
            limit = self.model.max_position_embeddings
            yield f"{key}={length} is longer than model.max_position_embeddings={limit}"

    def _check_sequence_parallel(self) -> Iterator[str]:
        size = self.parallel.sequence_parallel
        key = f"parallel.sequence_parallel={size}"
        if self.model.num_attention_heads % size:
            yield (
                f"{key} must divide model.num_attention_heads={self.model.num_attention_heads}: each process attends "
                "with its share of the heads"
            )
        lengths = {"train.sequence_length": self.train.sequence_length}
        for name, phase in self.schedule.phases.items():
            if phase.sequence_length is not None:
                lengths[f"schedule.phases.{name}.sequence_length"] = phase.sequence_length
        for name, length in lengths.items():
            if length % size:
                yield f"{name}={length} must be a multiple of {key}: each process has an equal part of a sequence"
        if size > 1 and self.inject.allow:
            yield f"{key} but inject.allow=true spoils whole sequences: set parallel.sequence_parallel=1"

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
        for name in ("expert_parallel", "sequence_parallel"):
            if world_size % (parallel := getattr(self.parallel, name)):
                yield (
                    f"parallel.{name}={parallel} does not divide the {world_size} "
                    f"process{'es' if world_size > 1 else ''} of this run: "
                    "start a multiple of it with torchrun --nproc_per_node, or lower it"
                )
        sharing = self.parallel.sequence_parallel
        if world_size % sharing:
            return
        over = f"{world_size} processes" + (f", {sharing} to a sequence," if sharing > 1 else "")
        for key, size, micro in self.batches():
            if size % (whole := micro * world_size // sharing):
                yield (
                    f"{key} does not divide over {over} with train.micro_batch_size={micro}: it must be a multiple of "
                    f"{whole}"
                )


@dataclass(frozen=True, kw_only=True)
class WriteConfig:
    """All that decides what ``k2train generate`` writes."""

    run: str = rule()  # the folder of a run, whose newest checkpoint speaks, of a checkpoint, or of an export
    prompts: str | None = rule()  # a file of them; null: generate.prompt alone
    batch_size: int = rule(at_least=1)  # prompts of the file at once
    precision: str = rule(one_of=("auto", "fp32", "bf16"))  # auto: bf16 on a GPU, fp32 on a CPU
    device: str = rule(one_of=("auto", "cpu", "cuda"))
    generate: GenerateConfig = rule()


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """All that decides what ``k2train evaluate`` reads and tells."""

    run: str = rule()  # the folder of a run, whose newest checkpoint is taken, of a checkpoint, or of an export
    data: str | None = rule()  # folder or URL of a prepared data set; null: what the run was validated on
    split: str = rule(one_of=("held_out", "train"))
    tokens: int | None = rule(at_least=1)  # of each source, evenly spread; null: all
    sequence_length: int | None = rule(at_least=2)  # tokens; null: as the run was validated
    batch_size: int = rule(at_least=1)  # sequences at once
    questions: int = rule(at_least=0)  # which line comes next; 0: none
    samples: int = rule(at_least=0)  # texts, of which is told how much parses as Python; 0: none
    generate: GenerateConfig = rule()  # how they are sampled
    tasks: str | None = rule()  # a folder for the text and the questions as tasks of lm-evaluation-harness; null: none
    json: bool = rule()  # print JSON
    precision: str = rule(one_of=("auto", "fp32", "bf16"))  # auto: bf16 on a GPU, fp32 on a CPU
    device: str = rule(one_of=("auto", "cpu", "cuda"))


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """All that decides what ``k2train export`` writes."""

    checkpoint: str = rule()  # its folder, or that of a run: the newest one
    folder: str | None = rule()  # to write; null: in the run's
    dtype: str = rule(one_of=("bf16", "fp32"))  # of the weights
    shard_bytes: int = rule(at_least=1)  # of weights in a file
    tokenizer: str | None = rule()  # the file; null: the run's
    compare: str = rule(one_of=("auto", "always", "never"))  # with transformers


@dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """What ``k2train import`` reads and writes."""

    folder: str = rule()  # a model in Hugging Face's format
    name: str | None = rule()  # of the run; null: the folder's
    runs_dir: str = rule()


@dataclass(frozen=True, kw_only=True)
class CheckConfig:
    """What ``k2train inspect`` and ``k2train verify`` look at."""

    checkpoint: str = rule()  # its folder, or that of a run: the newest one
