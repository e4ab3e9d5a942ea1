"""What ``--help`` prints; nothing heavy is imported for it."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path

from k2train.cli.commands import COMMANDS, TOOLS, Command
from k2train.cli.options import group_options
from k2train.paths import config_dir

INSTALL = "pip install 'k2train[train]'"

GROUPS = {
    "model": "architecture and size",
    "data": "the text",
    "optim": "the optimizer",
    "schedule": "length of the run, and the learning rate over it",
    "parallel": "how the work is split over processes",
    "track": "where metrics go beside metrics.jsonl",
    "experiment": "settings of several groups that belong together",
    "cluster": "the machine that a run is planned for",
}


def general_help(*, installed: bool) -> str:
    """``k2train --help``.

    Args:
        installed: whether the extra ``train`` is there.
    """
    lines = [
        "k2train: pretrain language models from scratch the way Kimi K2 was trained",
        "",
        "  k2train COMMAND [key=value ...]",
        "",
        *_table([*((name, command.summary) for name, command in COMMANDS.items()), *TOOLS.items()]),
        "",
        "  k2train COMMAND --help   explains a command, its config groups and the overrides people need most",
        "  k2train --version        prints the version",
        "",
        "Exit status: 0 done; 1 failed, and the message says why; 2 asked for wrongly; 75 stopped by SIGUSR1, start me",
        "again; 124 nothing went on for too long; 128 + N stopped by signal N (130: Ctrl-C). What is saved then, and",
        "what torchrun and SLURM make of it, is in docs/faults.md.",
        "",
        "k2train is made for Linux, with or without NVIDIA GPUs. On macOS it is untested and uses the CPU alone; on",
        "Windows start it inside WSL 2. The optimizer (`from muonclip import MuonClip`) needs torch and no more.",
    ]
    if not installed:
        lines += ["", f"Here only MuonClip is installed. For the commands: {INSTALL}"]
    return "\n".join(lines)


def command_help(command: Command, own_dirs: Sequence[Path]) -> str:
    """``k2train COMMAND --help``.

    Args:
        command: the one to explain.
        own_dirs: folders with configs of one's own, whose options are listed too.
    """
    argument = f"{command.argument.upper()} " if command.argument else ""
    switches = "".join(f"[--{key}] " for key in command.switches)
    lines = [
        f"k2train {command.name}: {command.summary}",
        "",
        f"  k2train {command.name} {argument}[key=value ...] {switches}[--cfg job] [--config-dir DIR]",
        "",
        command.explanation,
    ]
    if command.groups:
        lines += ["", "Config groups, each chosen by group=option:"]
        lines += _table(
            (group, f"{GROUPS[group]}: {', '.join(group_options(group, own_dirs))}") for group in command.groups
        )
    lines += ["", "Overrides people need most:"]
    lines += _table(command.common)
    lines += [
        "",
        "Options:",
        *_table(
            [
                *((f"--{key}", f"the same as {key}=true") for key in command.switches),
                ("--cfg job", "print the composed config, every key of it, and stop"),
                ("--config-dir DIR", "look for options in DIR too: DIR/experiment/mine.yaml is experiment=mine"),
            ]
        ),
        "",
        f"Every key can be overridden; all of them, with units, are in {config_dir()}.",
    ]
    return "\n".join(lines)


def _table(rows: Iterable[tuple[str, str]]) -> list[str]:
    rows = list(rows)
    width = max(len(left) for left, _ in rows)
    result = []
    for left, right in rows:
        first, *more = textwrap.wrap(right, 117 - width) or [""]
        result += [f"  {left:<{width}}  {first}", *(f"  {'':<{width}}  {line}" for line in more)]
    return result
