"""How long a training step takes, and how much memory, beside transformers' DeepseekV3ForCausalLM.

    python benchmarks/model_step.py --model base --vocabulary 8192 --batch 4 --length 512 --threads 1
    python benchmarks/model_step.py --model base --vocabulary 8192 --batch 4 --length 512 --memory
    python benchmarks/model_step.py --model moonlight-16b model.num_hidden_layers=3 --length 4096 --device cuda

Both models have the same weights and read the same tokens, new ones in each round: the forward pass, the loss, the
backward pass and a step of torch's fused AdamW. transformers runs with its fastest settings for a CPU, sdpa attention
and grouped_mm experts. In a round each makes one step, in random order; printed are medians, the ratio of the times
in a round, and the share of the FLOP/s that square matrix products reach.

With --memory each runs alone in a process of its own, and the peak of its resident memory is compared, from before the
weights are made; with --device cuda, of the memory that torch had allocated on the GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
from measure import BFLOAT16, gemm_peak, interleaved, interval, machine

from k2train.cli.commands import TRAIN
from k2train.cli.compose import compose
from k2train.config import ModelConfig, RunConfig, parse
from k2train.model import Transformer, build_model, compile_parts

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
OURS, THEIRS = "k2train", "transformers"
Step = Callable[[int], object]


def model_config(name: str, *overrides: str, vocabulary: int = 4096) -> ModelConfig:
    """Of ``configs/model``; where the tokenizer would decide the size of the vocabulary, it is ``vocabulary``."""
    config = parse(RunConfig, compose(TRAIN, [f"model={name}", *overrides])).model
    return config if config.vocab_size else dataclasses.replace(config, vocab_size=vocabulary)


def transformers_model(config: ModelConfig, dtype: torch.dtype, *, device: str = "cpu") -> Any:
    """The same architecture in transformers."""
    import transformers

    transformers.logging.set_verbosity_error()
    own = ("rope_theta", "rope_scaling", "num_key_value_heads")
    known = transformers.DeepseekV3Config().to_dict()
    same = {k: v for k, v in dataclasses.asdict(config).items() if k in known and k not in own}
    theirs = transformers.DeepseekV3Config(
        **same,
        num_key_value_heads=config.num_attention_heads,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        attn_implementation="sdpa",
        experts_implementation="grouped_mm",
        use_cache=False,
    )
    with torch.device(device):
        return transformers.DeepseekV3ForCausalLM(theirs).to(dtype).train()


@torch.no_grad()
def copy_weights(ours: Transformer, theirs: Any) -> None:
    """Ours into theirs, which holds gate and up projections of the experts as one."""
    tensors = ours.state_dict()
    state = {}
    for name, tensor in tensors.items():
        if name.endswith("experts.w3"):
            continue
        if name.endswith("experts.w1"):
            name, tensor = f"{name[:-2]}gate_up_proj", torch.cat((tensor, tensors[f"{name[:-1]}3"]), 1)
        name = name.replace("experts.w2", "experts.down_proj")
        state[name if name.startswith("lm_head") else f"model.{name}"] = tensor
    theirs.load_state_dict(state)


def tokens(config: ModelConfig, *, batch: int, length: int, number: int) -> torch.Tensor:
    """[B, T], others for each number."""
    assert config.vocab_size is not None
    return torch.randint(config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(number))


def our_step(
    model: Transformer, *, batch: int, length: int, reduce_gradients: Callable[[], None] = lambda: None
) -> Step:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step(number: int) -> float:
        tokens_BT = tokens(model.config, batch=batch, length=length, number=number).to(model.head_weight.device)
        labels_BT = torch.nn.functional.pad(tokens_BT[:, 1:], (0, 1), value=-100)
        loss_BT, _ = model(tokens_BT, labels_BT)
        loss = loss_BT.sum() / (batch * (length - 1))
        loss.backward()
        reduce_gradients()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def their_step(model: Any, config: ModelConfig, *, batch: int, length: int) -> Step:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step(number: int) -> float:
        tokens_BT = tokens(config, batch=batch, length=length, number=number).to(model.device)
        loss = model(input_ids=tokens_BT, labels=tokens_BT).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def flops(config: ModelConfig, *, batch: int, length: int) -> float:
    """Of one step: three times the forward pass's products; attention counts the visible half of its pairs."""
    model = build_model(config, seed=0, device="meta")
    share = {"expert": config.num_experts_per_tok / config.n_routed_experts, "embedding": 0, "norm": 0}
    roles = model.parameter_roles()
    weights = sum(p.numel() * share.get(roles[name], 1) for name, p in model.named_parameters())
    heads = config.num_attention_heads * (config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim)
    return 3 * batch * length * (2 * weights + config.num_hidden_layers * heads * length)


def our_model(
    config: ModelConfig, dtype: torch.dtype, *, device: str, checkpointing: str, compiled: bool
) -> Transformer:
    model = build_model(config, seed=0, dtype=dtype, device=device).train()
    model.checkpoint_activations(checkpointing)
    if compiled:
        compile_parts(model)
    return model


def time_steps(
    ours: Transformer, config: ModelConfig, dtype: torch.dtype, *, device: str, batch: int, length: int, rounds: int
) -> None:
    """Prints a table."""
    theirs = transformers_model(config, dtype, device=device)
    copy_weights(ours, theirs)
    steps = {
        OURS: our_step(ours, batch=batch, length=length),
        THEIRS: their_step(theirs, config, batch=batch, length=length),
    }
    first = {name: step(0) for name, step in steps.items()}
    print(f"The loss of the first step: {first[OURS]:.6f} and {first[THEIRS]:.6f}.\n")
    seconds = interleaved(steps, rounds=rounds)
    peak, work = gemm_peak(dtype, device=device), flops(config, batch=batch, length=length)
    print("| | ms a step | tokens/s | share of the GEMM peak |\n| --- | ---: | ---: | ---: |")
    for name, found in seconds.items():
        median = statistics.median(found)
        print(f"| {name} | {1e3 * median:.0f} | {batch * length / median:.0f} | {work / median / peak:.0%} |")
    ratio, low, high = interval([b / a for a, b in zip(seconds[OURS], seconds[THEIRS], strict=True)])
    print(f"\nk2train is {ratio:.2f} times as fast ({low:.2f} to {high:.2f}); peak {peak / 1e9:.0f} GFLOP/s.")


def peak_memory(
    ours: Callable[[], Transformer] | None, config: ModelConfig, dtype: torch.dtype, *, device: str, **sizes: int
) -> int:
    """Bytes that four steps of ``ours``, or else of transformers' model, need beyond what the imports took."""
    import transformers.models.deepseek_v3.modeling_deepseek_v3  # noqa: F401

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if ours:
        step = our_step(ours(), **sizes)
    else:
        step = their_step(transformers_model(config, dtype, device=device), config, **sizes)
    for number in range(4):
        step(number)
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def main() -> None:
    """Prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="base", help="of configs/model")
    parser.add_argument("--vocabulary", type=int, default=4096, help="of models whose tokenizer would decide it")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, help="bf16 where the device has its products, else fp32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--checkpointing", choices=("none", "selective", "full"), default="none", help="k2train's")
    parser.add_argument("--compile", action="store_true", help="k2train's parts by torch.compile")
    parser.add_argument("--memory", action="store_true", help="compare peak memory instead of time")
    parser.add_argument("--memory-of", choices=(OURS, THEIRS), help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="model.key=value", help="of the model's config")
    arguments = parser.parse_intermixed_args()
    torch.set_num_threads(arguments.threads)
    config = model_config(arguments.model, *arguments.overrides, vocabulary=arguments.vocabulary)
    device = arguments.device
    dtype_name = arguments.dtype or ("bf16" if BFLOAT16 or device == "cuda" else "fp32")
    dtype = DTYPES[dtype_name]
    if device == "cuda":
        torch.cuda.init()
    sizes = {"batch": arguments.batch, "length": arguments.length}

    def ours() -> Transformer:
        own = {"checkpointing": arguments.checkpointing, "compiled": arguments.compile}
        return our_model(config, dtype, device=device, **own)

    if arguments.memory_of:
        print(peak_memory(ours if arguments.memory_of == OURS else None, config, dtype, device=device, **sizes))
        return
    parameters = sum(p.numel() for p in build_model(config, seed=0, device="meta").parameters())
    name = " ".join([arguments.model, *arguments.overrides])
    settings = f"checkpointing {arguments.checkpointing}{', compiled' if arguments.compile else ''}"
    print(f"{machine('transformers')}\n\n{name} ({parameters / 1e6:.1f} M parameters), {dtype_name}, ")
    print(f"batch {arguments.batch}, T {arguments.length}, {settings}.")
    if arguments.memory:
        found = {}
        for name in (OURS, THEIRS):
            command = [sys.executable, *sys.argv, "--memory-of", name]
            found[name] = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            print(f"{name}: {found[name] / 2**20:.0f} MiB")
        print(f"k2train needs {found[OURS] / found[THEIRS]:.2f} of the memory.")
    else:
        time_steps(ours(), config, dtype, device=device, **sizes, rounds=arguments.rounds)


if __name__ == "__main__":
    main()
