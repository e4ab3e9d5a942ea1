"""How long a step takes, by a roofline: products at their rate, memory at its, collectives at theirs.

The assumptions, all of which an efficiency of the cluster's file may correct:

- Products run at ``product_efficiency`` of the peak. What is computed again counts as work, not as utilisation.
- What lies between products runs at the speed of memory: every byte that a layer keeps is written once and read once,
  forward, and its gradient likewise; of logits 28 bytes: twice in bf16 and fp32 for the loss, thrice for its gradient.
- Gradients are reduced, and at stage 3 weights gathered, while others are computed, as far as there is time: the longer
  of both counts. Rows travel to their experts while the shared experts are computed, forward and backward.
- A GPU is never idle but where the host takes longer to start a micro-batch's operations than it to carry them out.
- Gathering weights after the update, and Muon's exchange beyond the time of its products, hide behind nothing.
- No rank waits for another: routing is even, data are there, nothing fails. Validation and checkpoints come on top.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from k2train.plan.communication import Traffic
from k2train.plan.count import Work, causal_keys, work
from k2train.plan.exchange import Exchange
from k2train.plan.hardware import Hardware
from k2train.plan.layout import Layout, Step
from k2train.plan.memory import KEPT_LOGITS, kept_of_layer

LOGIT_BYTES = 28  # that pass through memory for each


@dataclass(frozen=True)
class Time:
    """Seconds of a step; the parts that hide behind nothing add up to it."""

    products: float  # of forward and backward passes
    recomputed: float
    memory: float
    expert_traffic: float  # beyond what hides
    sequence_traffic: float
    waiting: float  # for the host to start operations, beyond what all of the above takes
    gradient_traffic: float  # and the weights that stage 3 gathers, beyond what hides
    update: float
    weight_traffic: float
    model_flops: float  # of a rank
    peak: float  # operations a second

    @property
    def parts(self) -> dict[str, float]:
        """What a step consists of."""
        return {
            "products": self.products,
            "computed again": self.recomputed,
            "memory": self.memory,
            "expert all-to-all": self.expert_traffic,
            "sequence all-to-all": self.sequence_traffic,
            "waiting for the host": self.waiting,
            "gradients and gathers beyond that": self.gradient_traffic,
            "update": self.update,
            "weights after it": self.weight_traffic,
        }

    @property
    def step(self) -> float:
        """Seconds."""
        return sum(self.parts.values())

    @property
    def utilisation(self) -> float:
        """Model FLOPs utilisation (PaLM, arXiv 2204.02311, appendix B), with causal attention counted as it is."""
        return self.model_flops / self.peak / self.step


def step_time(layout: Layout, step: Step, found: Sequence[Traffic], exchange: Exchange) -> Time:
    """The time of one step of a phase."""
    hardware, model = Hardware(layout.config.cluster), layout.config.model
    bf16 = layout.bf16
    cost = work(model, keys=causal_keys(step.sequence_length))
    tokens = step.rank_tokens
    sent = {kind: sum(hardware.sending(one) for one in found if one.kind == kind) for kind in {t.kind for t in found}}

    products = hardware.products(tokens * cost.training, bf16=bf16)
    recomputed = hardware.products(tokens * again(layout, step, cost), bf16=bf16)
    moved = _moved(layout, step)
    memory = hardware.reading(tokens * moved)
    moe = model.num_hidden_layers - model.first_k_dense_replace
    shared = 6 * moe * model.n_shared_experts * 3 * model.hidden_size * model.moe_intermediate_size
    experts = max(0.0, sent.get("expert all-to-all", 0.0) - hardware.products(tokens * shared, bf16=bf16))
    sequences = sent.get("sequence all-to-all", 0.0)
    host = step.micro_batches * model.num_hidden_layers * layout.config.cluster.host_seconds
    waiting = max(0.0, host - products - recomputed - memory - experts - sequences)
    during = sent.get("gradient reduce", 0.0)
    after = sent.get("parameter gather", 0.0)
    if layout.zero_stage == 3:
        during, after = during + after, 0.0
    # Only the last micro-batch's backward pass hides a reduction that comes once a step.
    reduced_each = layout.zero_stage > 1
    behind = (products * (1 if layout.zero_stage == 3 else 2 / 3) + recomputed + memory + waiting) / (
        1 if reduced_each else step.micro_batches
    )
    hidden = min(during, behind) if layout.buckets > 1 and not layout.whole_gradients else 0.0
    return Time(
        products=products,
        recomputed=recomputed,
        memory=memory,
        expert_traffic=experts,
        sequence_traffic=sequences,
        waiting=waiting,
        gradient_traffic=during - hidden,
        update=_update(layout, hardware, exchange, sent.get("Muon exchange", 0.0)),
        weight_traffic=after + sent.get("counts", 0.0),
        model_flops=tokens * cost.training,
        peak=hardware.peak(bf16=bf16),
    )


def again(layout: Layout, step: Step, cost: Work) -> float:
    """Operations a token that are no part of forward and backward: what checkpointing, attention and loss repeat.

    full: a forward pass of all layers. selective: the projections of attention but its latents, at most all of them,
    and on a GPU the experts' down-projections (a third of them). Attention's kernels make logits again, half of their
    forward pass; the loss does where it keeps none.
    """
    mode = layout.config.train.activation_checkpointing
    assert layout.config.model.vocab_size is not None
    found = cost.logits / 2
    if mode == "full":
        found += cost.forward - cost.head
    elif mode == "selective":
        found += cost.attention + (cost.experts / 3 if layout.on_gpu else 0)
    if step.tokens * layout.config.model.vocab_size > KEPT_LOGITS[layout.on_gpu]:
        found += cost.head
    return found


def _moved(layout: Layout, step: Step) -> float:
    """Bytes a token that operations between products read and write; see above."""
    model, mode = layout.config.model, layout.config.train.activation_checkpointing
    assert model.vocab_size is not None
    moe = model.num_hidden_layers - model.first_k_dense_replace
    dense = model.num_hidden_layers - moe
    kept = moe * kept_of_layer(layout, step, "none") + dense * kept_of_layer(layout, step, "none", moe=False)
    passes = 4 if mode == "none" else 6  # forward again
    return passes * kept + LOGIT_BYTES * model.vocab_size


def _update(layout: Layout, hardware: Hardware, exchange: Exchange, sending: float) -> float:
    """Newton-Schulz on the busiest rank, or its exchange if that takes longer; and the passes over state in memory.

    Each element of a shard: gradient read, momentum and master read and written, the update written and read twice,
    the new weight written, some 40 bytes.
    """
    bf16 = layout.config.optim.newton_schulz_dtype == "bf16" or (
        layout.config.optim.newton_schulz_dtype == "auto" and layout.on_gpu
    )
    orthogonal = hardware.products(exchange.flops, bf16=bf16)
    return max(orthogonal, sending) + hardware.reading(40 * sum(flat.shard for flat in layout.flats))
