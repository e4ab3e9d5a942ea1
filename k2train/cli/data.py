"""``k2train data``: what is in the data, and what a run has read of it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from k2train.config import RunConfig, parse
from k2train.paths import RunPaths, cache_dir


def main(words: Sequence[str]) -> int:
    """Runs a subcommand and returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="k2train data", description="What a run has read. See also `k2train data show --help`."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    trace = commands.add_parser("trace", help="the documents and the text of every sample of a step")
    trace.add_argument("run", type=Path, help="the folder of the run")
    trace.add_argument("--step", type=int, required=True, help="as metrics.jsonl counts them: the first is 1")
    trace.add_argument("--rank", type=int, help="only the samples that this process computed")
    trace.add_argument("--processes", type=int, help="of the run; what its newest checkpoint says if it is not given")
    _trace(parser.parse_args(words))
    return 0


def _trace(arguments: argparse.Namespace) -> None:
    from k2train.data import DataError, build_stream, open_dataset, prepare
    from k2train.data.trace import describe_trace
    from k2train.generate import printable
    from k2train.train.phases import build_plan
    from k2train.train.rewind import read_rewinds

    paths = RunPaths(arguments.run)
    if not paths.config.is_file():
        raise DataError(f"{arguments.run} is no run: it has no {paths.config.name}; give the folder of one")
    config = parse(RunConfig, json.loads(paths.config.read_text(encoding="utf-8")))
    plan = build_plan(config)
    if not 1 <= arguments.step <= plan.steps:
        raise DataError(f"--step {arguments.step}: the run {config.name} has the steps 1 to {plan.steps}")
    step = plan.step(arguments.step - 1)
    numbers = list(range(step.first_sample, step.first_sample + step.samples))
    if arguments.rank is not None:
        processes = arguments.processes or _processes(paths)
        if not 0 <= arguments.rank < processes:
            raise DataError(f"--rank {arguments.rank}: the run had {processes} processes, 0 to {processes - 1}")
        numbers = [n for part in step.micro_batches(rank=arguments.rank, processes=processes) for n in part]
    manifest = prepare(config.data, cache=cache_dir(config.data.cache_dir), progress=lambda *_: None)
    dataset = open_dataset(manifest)
    rewound = [rewind.left_out for rewind in read_rewinds(paths.rewinds)]
    stream = build_stream(dataset, config.data, plan.data_phases(), seed=config.seed, boundaries=False, rewound=rewound)
    for number in numbers:
        for heading, text in describe_trace(stream.trace(number), dataset.tokenizer):
            print(heading if not text else f"--- {heading}\n{printable(text)}")


def _processes(paths: RunPaths) -> int:
    """How many the run had, as its newest checkpoint says."""
    from k2train.data import DataError

    found = sorted(paths.checkpoints.glob("step-*/manifest.json"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise DataError(f"{paths.checkpoints} has no checkpoint that says how many processes there were: --processes N")
    return int(json.loads(found[-1].read_text(encoding="utf-8"))["state"]["machine"]["processes"])
