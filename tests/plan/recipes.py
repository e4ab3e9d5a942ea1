"""What each recipe costs, by the plan: the tables of docs/recipes.md.

python -m tests.plan.recipes docs/recipes.md
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from k2train.cli.plan import parts
from k2train.plan.estimate import Estimate, estimate
from k2train.units import count, memory
from tests.plan.published import plan_of

# The command's words, and the machine in words.
RECIPES = {
    "experiment=k2 cluster=h800-2048": "2048 H800",
    "experiment=k2-annealing cluster=h800-2048 phase=annealing": "2048 H800",
    "experiment=k2-32k cluster=h800-2048 phase=long_context": "2048 H800",
    "experiment=k2-128k cluster=h800-2048 phase=yarn": "2048 H800",
    "experiment=moonlight-16b cluster=h100 cluster.nodes=32": "256 H100",
    "experiment=1b cluster=h100": "8 H100",
    "experiment=100m cluster=h100 cluster.devices_per_node=1": "one H100",
    "cluster=cpu": "one CPU thread",
}
MARK = "<!-- table -->\n"


@cache
def planned(words: str) -> Estimate:
    """The plan of ``k2train plan WORDS``."""
    config = plan_of(words)
    return estimate(config, parts(config))


def table() -> Iterator[str]:
    """Lines of Markdown; micro-batch, step and utilisation are the last phase's."""
    yield "| `k2train plan` | machine | split | tokens | memory of a device | a step | utilisation | days | GPU-hours |"
    yield "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |"
    for words, machine in RECIPES.items():
        found = planned(words)
        config = found.layout.config
        last = found.phases[-1]
        yield (
            f"| `{words}` | {machine} | ZeRO-{found.layout.zero_stage}, ep {found.layout.expert_parallel}"
            f"{f', sp {found.layout.sequence_parallel}' if found.layout.sequence_parallel > 1 else ''}, "
            f"micro-batch {last.part.micro_batch} x {last.part.length}, {config.train.activation_checkpointing} "
            f"| {count(found.tokens)} "
            f"| {memory(found.fullest.memory.total)} of {memory(last.memory.capacity)} "
            f"| {last.time.step:.3g} s | {last.time.utilisation:.0%} | {found.seconds / 86400:.3f} "
            f"| {count(found.device_hours)} |"
        )


def main() -> None:
    """Writes the table behind the mark of a document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("document", type=Path)
    document = parser.parse_args().document
    text, mark, _ = document.read_text().partition(MARK)
    assert mark, f"{document} has no line {MARK}"
    document.write_text(text + mark + "\n" + "\n".join(table()) + "\n")


if __name__ == "__main__":
    main()
