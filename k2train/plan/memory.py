"""What a device holds, by component, in bytes.

State that stays (weights, gradients, masters, momenta) follows DeepSpeed 0.19's source and is held against real runs in
tests/plan; activations follow the code of ``k2train.model``, tensor by tensor that autograd keeps.

Shapes: D model, H heads, d and V dims of a query and a value head, E experts, K experts a token, I intermediate, N
tokens of a micro-batch, T of a sequence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from k2train.config import ModelConfig
from k2train.plan.exchange import Exchange
from k2train.plan.layout import LIVE_PARAMETERS, REDUCE_BUCKET, Flat, Layout, Step

# As in k2train.model.loss and block_attention: elements of a chunk of logits, and those kept at most, on CPU and GPU.
CHUNK_LOGITS, KEPT_LOGITS = {False: 2**20, True: 2**27}, {False: 2**24, True: 2**31}
KEPT_PROBABILITIES, ROWS = 2**24, 128
FP32 = 4


@dataclass(frozen=True)
class Memory:
    """Of one device. What is needed in forward and backward passes, and in the update, is not needed at one time."""

    state: Mapping[str, float]  # stays through the run
    passes: Mapping[str, float]
    update: Mapping[str, float]
    reserved: float
    capacity: float
    fragmentation_share: float
    host: Mapping[str, float] = field(default_factory=dict)  # of a process, with offload

    @property
    def work(self) -> Mapping[str, float]:
        """Of passes and update what needs more."""
        return max(self.passes, self.update, key=lambda found: sum(found.values()))

    @property
    def working(self) -> float:
        """Bytes of it."""
        return sum(self.work.values())

    @property
    def components(self) -> dict[str, float]:
        """What adds up to the total."""
        return {**self.state, **self.work, "fragmentation": self.fragmentation, "reserved": self.reserved}

    @property
    def fragmentation(self) -> float:
        """Allowed for."""
        return self.fragmentation_share * self.working

    @property
    def total(self) -> float:
        """At most."""
        return sum(self.components.values())

    @property
    def fits(self) -> bool:
        """Whether the device has it."""
        return self.total <= self.capacity


def memory(layout: Layout, step: Step, exchange: Exchange) -> Memory:
    """What a device holds in a phase.

    Args:
        layout: of the run.
        step: of the phase.
        exchange: of Muon.
    """
    cluster = layout.config.cluster
    shard = FP32 * sum(flat.shard for flat in layout.flats)
    state: dict[str, float] = {"weights": _weights(layout), "gradients": _gradients(layout)}
    host: dict[str, float] = {}
    place = state
    if layout.config.parallel.offload_optimizer:
        place, host["gradients of the update"] = host, shard
    place["fp32 masters"], place["momenta"] = shard, _momenta(layout)
    return Memory(
        state,
        _passes(layout, step),
        _update(layout, exchange),
        cluster.reserved_bytes,
        cluster.memory_bytes,
        cluster.fragmentation,
        host,
    )


def _weights(layout: Layout) -> float:
    """What the model computes with. Stage 3: a rank's part of each, and vectors whole beside their parts."""
    if layout.zero_stage < 3:
        return layout.weight_bytes * sum(flat.padded for flat in layout.flats)
    whole = sum(p.elements for p in layout.local if layout.persists(p))
    return layout.weight_bytes * (whole + sum(flat.shard for flat in layout.flats))


def _gradients(layout: Layout) -> float:
    """When all micro-batches are done: sums in fp32 (``grad_accum_dtype``), whole or a rank's part of them.

    ``BF16_Optimizer`` has all of them in fp32, and beside them those of the last micro-batch. Where weights are fp32
    too, stages 1 and 2 keep every parameter whole of which a rank has a part; otherwise they keep the part alone, as
    stage 3 does.
    """
    if layout.whole_gradients:
        return (FP32 + layout.weight_bytes) * sum(flat.padded for flat in layout.flats)
    if layout.bf16 or layout.zero_stage == 3:
        return FP32 * sum(flat.shard for flat in layout.flats)
    return 0.0 if layout.config.parallel.offload_optimizer else sum(FP32 * _touched(flat) for flat in layout.flats)


def _touched(flat: Flat) -> float:
    """Elements of the parameters of which a rank has a part, in the mean over ranks."""
    sizes = {p.name: p.elements for p in flat.parameters}
    return sum(sizes[piece.name] for pieces in flat.pieces() for piece in pieces) / flat.ranks


def _momenta(layout: Layout) -> float:
    """One number a weight of Muon's, two of AdamW's (``muonclip.optimizer``), in fp32; of one's own as of AdamW's."""
    muon = layout.config.optim.muon_roles
    return FP32 * sum(flat.shard * (1 if flat.role in muon else 2) for flat in layout.flats)


def _passes(layout: Layout, step: Step) -> dict[str, float]:
    model, mode = layout.config.model, layout.config.train.activation_checkpointing
    moe = model.num_hidden_layers - model.first_k_dense_replace
    dense = model.num_hidden_layers - moe
    kept = (
        step.tokens * (dense * kept_of_layer(layout, step, mode, moe=False) + moe * kept_of_layer(layout, step, mode))
        + FP32 * step.tokens
    )
    # The backward pass of one layer: all that it keeps is there again, and a gradient of each.
    whole = kept_of_layer(layout, step, "none", moe=moe > 0)
    found = {"activations": kept, "backward pass of a layer": step.tokens * whole}
    found |= {"logits and loss": _loss(layout, step), "gradient buckets": _buckets(layout)}
    if layout.zero_stage == 1 and step.micro_batches > 1 and not layout.whole_gradients:
        found["gradients until they are reduced"] = FP32 * sum(p.elements for p in layout.local)
    experts = sum(p.elements for p in layout.local if p.role == "expert") // max(1, moe)
    if not layout.whole_gradients:  # whose sums are there anyway
        found["gradients of a layer's experts"] = layout.weight_bytes * experts
    if layout.zero_stage == 3:
        largest = max(experts, *(p.elements for p in layout.local))  # the experts of a layer are needed together
        alive = min(sum(p.elements for p in layout.local), LIVE_PARAMETERS + largest)
        found["gathered weights"] = layout.weight_bytes * alive
    return found


def kept_of_layer(layout: Layout, step: Step, mode: str, *, moe: bool = True) -> float:
    """Bytes a token that a layer keeps for its backward pass.

    Args:
        layout: of the run.
        step: of the phase.
        mode: of ``train.activation_checkpointing``; see docs/activation-memory.md.
        moe: whether the layer has experts.
    """
    model, a = layout.config.model, layout.weight_bytes
    D = model.hidden_size
    if mode == "full":
        return a * D
    found = a * (D + _attention(layout, step, mode)) + 3 * FP32  # the input of the first norm; inverses of norms
    found += a * 2 * D  # the input of the second norm, and what it makes, which router and feed-forward share
    silu = 2 if mode == "none" else 0  # silu(gate), and its product with up
    if not moe:
        return found + a * (2 + silu) * model.intermediate_size
    found += _routing(model) + a * (2 + silu) * model.n_shared_experts * model.moe_intermediate_size
    rows, inner, spread = model.num_experts_per_tok, model.moe_intermediate_size, layout.expert_parallel > 1
    if layout.on_gpu:  # grouped products of sorted rows; "selective" makes the last of them again
        found += a * rows * (D + (2 + silu) * inner + (D if mode == "none" else 0))
    else:  # a loop over experts keeps gate and up alone, and its input where that came from elsewhere
        found += a * rows * (2 * inner + (D if spread else 0))
    return found + (a * rows * D if spread else 0)  # what came back


def _attention(layout: Layout, step: Step, mode: str) -> float:
    """Elements a token that attention keeps: inputs of its products, and what its kernel needs."""
    model = layout.config.model
    D, H, V = model.hidden_size, model.num_attention_heads, model.v_head_dim
    d = model.qk_nope_head_dim + model.qk_rope_head_dim
    latents = 0
    if model.attention == "mla":
        latents = (model.q_lora_rank or 0) + (model.kv_lora_rank or 0) + model.qk_rope_head_dim
    out = H * V
    if mode == "selective":
        return latents + out
    made = D  # the normed input
    if model.attention == "mla":
        made += (model.q_lora_rank or 0) + (model.kv_lora_rank or 0)  # normed latents
    kernel = H * (2 * d + V) + out
    if layout.on_gpu:
        kernel += out + FP32 * H // layout.weight_bytes  # by head and by token; the log-sum-exp
    elif step.sequences * H * step.sequence_length**2 // 2 <= KEPT_PROBABILITIES:
        kernel += H * (step.sequence_length + min(ROWS, step.sequence_length)) // 2  # of blocks of rows
    return latents + made + kernel


def _routing(model: ModelConfig) -> float:
    """Bytes a token: scores in fp32, chosen experts and their order in int64, weights before and after the scale."""
    return FP32 * model.n_routed_experts + model.num_experts_per_tok * (3 * 8 + 4 * FP32)


def _loss(layout: Layout, step: Step) -> float:
    """Logits (``k2train.model.loss``): chunks, those that are kept, and the gradients of head and embedding."""
    model, a = layout.config.model, layout.weight_bytes
    assert model.vocab_size is not None
    everything = step.tokens * model.vocab_size
    kept = everything if everything <= KEPT_LOGITS[layout.on_gpu] else 0
    chunk = min(everything, max(CHUNK_LOGITS[layout.on_gpu], model.vocab_size))
    head = model.vocab_size * model.hidden_size
    return a * (kept + step.tokens * model.hidden_size) + (2 * FP32 + a) * chunk + (FP32 + a) * head


def _buckets(layout: Layout) -> float:
    """Where gradients are put side by side to be reduced; DeepSpeed allocates them whole, however small the model.

    ``BF16_Optimizer`` flattens as many anew, in fp32, and casts them to the dtype of the weights.
    """
    local = sum(p.elements for p in layout.local)
    if layout.whole_gradients:
        return (FP32 + layout.weight_bytes) * min(REDUCE_BUCKET, local)
    size = REDUCE_BUCKET if layout.on_gpu else min(REDUCE_BUCKET, local)  # a CPU gives pages when they are written to
    return layout.buckets * layout.weight_bytes * size


def _update(layout: Layout, exchange: Exchange) -> dict[str, float]:
    """The update itself, in fp32, of all roles at once or one after the other; gradients cast for it; the exchange.

    Newton-Schulz has three matrices at a time beside its input: X, X X^T and the next X.
    """
    shards = [flat.shard for flat in layout.flats]
    at_once = sum(shards) if layout.whole_gradients else max(shards)
    # The others flatten a group's gradients once more for the optimizer.
    copies = 1 if layout.whole_gradients else 2
    muon = layout.config.optim.muon_roles
    matrices = [p.shape[-2] * p.shape[-1] for p in layout.local if p.role in muon]
    return {
        "updates": FP32 * copies * at_once,
        "Muon exchange and matrices": exchange.buffers + 3 * FP32 * max(matrices, default=0),
    }
