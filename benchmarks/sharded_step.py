"""What the optimizer adds to a training step under ZeRO on two processes, beside DeepSpeed's own Muon.

    python benchmarks/sharded_step.py --model small --stage 2

Every contestant is an engine of DeepSpeed's around the same model, in float32, with gradient clipping: two processes,
one thread each, over gloo. In a round each takes a step on the same new tokens, in random order. What a step with plain
SGD takes in that round is subtracted: the rest is what the optimizer adds, communication for it included (DeepSpeed
reduces gradients of matrices that straddle ranks in another way for its Muon). Printed is the median over rounds of
that part over DeepSpeed's, and the order statistics that hold it with 95 % confidence: by the clock on the wall, from
one barrier to the next, so that waiting counts, and by the processor time of the busier process, which other work on
the machine disturbs less.

Both make five steps of Newton-Schulz in float32 with the quintic's coefficients; DeepSpeed's would take bfloat16 or
float16 on a machine that has them. torch.compile is off. MuonClip's step has QK-Clip in it. As DeepSpeed's Muon it has
two groups, its own and AdamW's; "by role" it has one for each of the seven roles, as in k2train.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import deepspeed
import deepspeed.runtime.zero.muon.original_muon as deepspeed_muon
import muonclip.orthogonalize
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from measure import interleaved, interval, machine
from model_step import model_config
from muonclip import MuonClip, QKClip, split_parameters

from k2train.config import MUON_ROLES, ModelConfig
from k2train.model import build_model
from k2train.train.quiet import import_deepspeed
from k2train.train.zero import shards

FLOOR = "SGD"
PAIRS = {
    "MuonClip": "DeepSpeed's Muon, standard",
    "MuonClip, Gram": "DeepSpeed's Muon, Gram",
    "MuonClip, by role": "DeepSpeed's Muon, standard",
}
Step = Callable[[int], object]


def engine_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer | None, settings: dict[str, Any]) -> Any:
    """DeepSpeed's engine, with a client's optimizer or that of its own JSON."""
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    return engine


def contestants(config: ModelConfig, settings: dict[str, Any]) -> dict[str, Any]:
    """An engine each, around models with the same weights."""
    found: dict[str, Any] = {}

    def model() -> torch.nn.Module:
        return build_model(config, seed=0)

    plain = model()
    found[FLOOR] = engine_of(plain, torch.optim.SGD(plain.parameters(), lr=1e-3), settings)
    for method in ("standard", "gram"):
        params = {"lr": 1e-3, "weight_decay": 0.1, "momentum": 0.95, "ns_method": method, "torch_adam": True}
        name = f"DeepSpeed's Muon, {'Gram' if method == 'gram' else method}"
        found[name] = engine_of(model(), None, settings | {"optimizer": {"type": "Muon", "params": params}})
    for name, by_role, gram in (
        ("MuonClip", False, False),
        ("MuonClip, Gram", False, True),
        ("MuonClip, by role", True, False),
    ):
        own = model()
        roles = own.parameter_roles()
        algorithms = {role: "muon" if role in MUON_ROLES else "adamw" for role in roles.values()}
        kinds = roles if by_role else {parameter: algorithms[role] for parameter, role in roles.items()}
        groups = split_parameters(own.named_parameters(), kinds)
        for group in groups:
            group["algorithm"] = algorithms.get(group["role"], group["role"])
        clip = QKClip(own.attention_layers(), tau=100.0)
        optimizer = MuonClip(groups, lr=1e-3, newton_schulz_gram=gram, qk_clip=clip)
        engine = found[name] = engine_of(own, optimizer, settings)
        names = {parameter: name for name, parameter in own.named_parameters()}
        optimizer.shard({shard.flat: shard.layout for shard in shards(engine.optimizer, names)})
    return found


def counting(function: Callable[..., torch.Tensor], counts: list[int]) -> Callable[..., torch.Tensor]:
    """The same function, which adds the matrices it is given to the last of the counts."""

    def counted(matrices: torch.Tensor, *args: object, **settings: object) -> torch.Tensor:
        counts[-1] += matrices.shape[:-2].numel()
        return function(matrices, *args, **settings)

    return counted


def stepping(
    engine: Any, config: ModelConfig, length: int, *, wall: list[float], matrices: list[int], counts: list[int]
) -> Step:
    """A training step, whose seconds on the wall are kept, and the matrices that were orthogonalised in it."""
    clip = getattr(engine.optimizer.optimizer, "qk_clip", None)

    def step(number: int) -> None:
        generator = torch.Generator().manual_seed(2 * number + dist.get_rank())
        tokens = torch.randint(config.vocab_size, (1, length + 1), generator=generator)
        dist.barrier()
        begin = time.perf_counter()
        loss, _ = engine(tokens[:, :-1], tokens[:, 1:])
        engine.backward(loss.mean())
        if clip is not None:
            clip.gather()
        engine.step()
        if clip is not None:
            clip.reset()
        dist.barrier()
        wall.append(time.perf_counter() - begin)
        matrices.append(counts.pop())
        counts.append(0)

    return step


def worker(rank: int, store: str, config: ModelConfig, arguments: argparse.Namespace) -> None:
    """One of the two processes; the first prints."""
    torch.set_num_threads(1)
    torch._dynamo.config.disable = True
    deepspeed_muon.ns_compute_dtype = lambda method="gram": torch.float32
    import_deepspeed("cpu")
    os.environ["LOCAL_RANK"] = str(rank)  # DeepSpeed wants to know
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    deepspeed.utils.logger.setLevel("ERROR")
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": arguments.stage, "reduce_scatter": True, "contiguous_gradients": True},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    counts = [0]
    for module, name in (
        (deepspeed_muon, "zeropower_via_newtonschulz5"),
        (deepspeed_muon, "zeropower_via_gram_newtonschulz"),
        (muonclip.orthogonalize, "newton_schulz"),
    ):
        setattr(module, name, counting(getattr(module, name), counts))
    engines = contestants(config, settings)
    wall: dict[str, list[float]] = {name: [] for name in engines}
    matrices: dict[str, list[int]] = {name: [] for name in engines}
    steps = {
        name: stepping(engine, config, arguments.length, wall=wall[name], matrices=matrices[name], counts=counts)
        for name, engine in engines.items()
    }
    processor = interleaved(steps, rounds=arguments.rounds)
    busier, all_matrices = (torch.tensor([values[n] for n in steps]) for values in (processor, matrices))
    dist.all_reduce(busier, op=dist.ReduceOp.MAX)
    dist.all_reduce(all_matrices)
    if rank == 0:
        for name, found in zip(steps, all_matrices.tolist(), strict=True):
            print(f"{name}: {' or '.join(map(str, sorted(set(found))))} matrices orthogonalised in a step, on both.")
        report(
            {"wall": {n: w[1:] for n, w in wall.items()}, "processor": dict(zip(steps, busier.tolist(), strict=True))}
        )
    dist.destroy_process_group()


def report(seconds: dict[str, dict[str, list[float]]]) -> None:
    """Prints a Markdown table."""
    print("\n| optimizer | clock | ms a step | of it the optimizer | over DeepSpeed's | interval |")
    print("| --- | --- | ---: | ---: | ---: | ---: |")
    for clock, by_name in seconds.items():
        floor = by_name[FLOOR]
        added = {name: [a - b for a, b in zip(found, floor, strict=True)] for name, found in by_name.items()}
        for name, found in by_name.items():
            cells = [
                name,
                clock,
                f"{1e3 * statistics.median(found):.0f}",
                f"{1e3 * statistics.median(added[name]):.0f}",
            ]
            if name in PAIRS:
                ratios = [a / b for a, b in zip(added[name], added[PAIRS[name]], strict=True)]
                median, low, high = interval(ratios)
                cells += [f"{median:.2f}", f"{low:.2f} to {high:.2f}"]
            else:
                cells += ["", ""]
            print(f"| {' | '.join(cells)} |")


def main() -> None:
    """Starts both processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="small")
    parser.add_argument("--stage", type=int, choices=[1, 2], default=2)
    parser.add_argument("--length", type=int, default=128, help="tokens of a process and step")
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(machine("deepspeed"))
    print(f"\n{arguments.model}, ZeRO {arguments.stage}, {arguments.length} tokens, {arguments.rounds} rounds.\n")
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(worker, (f"{folder}/store", model_config(arguments.model), arguments), nprocs=2)


if __name__ == "__main__":
    main()
