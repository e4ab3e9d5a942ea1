"""The command line: from words to a typed config to what lower floors do with it.

Help is printed, and every fault of a config found, before torch or anything else that takes long is imported.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import os
import signal
import sys
from collections.abc import Sequence

import k2train
from k2train.cli.arguments import Arguments, read_arguments
from k2train.cli.commands import COMMANDS, TOOLS, TRAIN, Command
from k2train.cli.help import INSTALL, command_help, general_help
from k2train.config import ConfigError, parse
from k2train.paths import explain_oserror
from k2train.status import FAILED, INTERRUPTED, OK, USAGE, is_refusal, of_signal

# Threads of torch that wait for each other look this often before they sleep. At libgomp's own number each wait on a
# busy machine lasts a time slice: of two runs at once on two cores each took 2.6 times as long as with this number.
# On an idle machine it costs about 5 %, where 500 costs a quarter.
SPINS = "2000"


def main(words: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        words: what was typed after ``k2train``; None takes it from ``sys.argv``.

    Returns:
        The exit status; see ``k2train.status``.
    """
    first, *rest = list(sys.argv[1:] if words is None else words) or ["--help"]
    if first in ("--help", "-h", "help"):
        print(general_help(installed=_installed()))
        return OK
    if first == "--version":
        print(f"k2train {k2train.__version__}")
        return OK
    if rest and f"{first} {rest[0]}" in COMMANDS:  # one of two words
        first = f"{first} {rest.pop(0)}"
    if first not in (*COMMANDS, *TOOLS):
        close = difflib.get_close_matches(first, (*COMMANDS, *TOOLS), n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"the commands are {', '.join((*COMMANDS, *TOOLS))}"
        return _refuse([f"{first!r} is no command: {hint}"], USAGE)
    try:
        if first in TOOLS:
            return _run_tool(first, rest)
        if first == TRAIN.name and {"--multirun", "-m"} & set(rest):
            return _run_tool("multirun", rest)
        return _run(COMMANDS[first], read_arguments(rest, COMMANDS[first].switches))
    except ConfigError as error:
        return _refuse(error.faults, USAGE)
    except ValueError as error:
        if not is_refusal(error):
            raise
        return _refuse([str(error)], FAILED)
    except BrokenPipeError:  # who reads our output has had enough, as head has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it ends
        return of_signal(signal.SIGPIPE)
    except OSError as error:
        return _refuse([explain_oserror(error)], FAILED)
    except KeyboardInterrupt:
        return _refuse(["stopped; the same command goes on from where it was"], INTERRUPTED)


def _run_tool(name: str, words: Sequence[str]) -> int:
    if not _installed():
        return _refuse([f"the packages that train are not installed: {INSTALL}"], USAGE)
    return int(importlib.import_module(f"k2train.cli.{name}").main(words))


def _run(command: Command, arguments: Arguments) -> int:
    if arguments.help:
        print(command_help(command, arguments.config_dirs))
        return OK
    if not _installed():
        return _refuse([f"the packages that train are not installed: {INSTALL}"], USAGE)
    from k2train.cli.compose import as_yaml, compose

    overrides = [
        f"{command.argument}={word}" if command.argument and "=" not in word else word for word in arguments.overrides
    ]
    mapping = compose(command, overrides, arguments.config_dirs)
    if arguments.show_config and _speaks():
        print(as_yaml(mapping), end="")
    config: object = parse(command.schema, mapping)
    if arguments.show_config:
        return OK
    if sys.platform == "win32":
        return _refuse([f"k2train {command.name} needs Linux: on Windows start it inside WSL 2"], USAGE)
    os.environ.setdefault("GOMP_SPINCOUNT", SPINS)  # read when torch is loaded
    return int(importlib.import_module(command.module).run(config))


def _installed() -> bool:
    """Whether the extra ``train`` is there; MuonClip alone does without."""
    return all(importlib.util.find_spec(name) is not None for name in ("hydra", "deepspeed"))


def _speaks() -> bool:
    """Whether this is the process that talks to the person, among those that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def _refuse(faults: Sequence[str], status: int) -> int:
    """Tells the person, once however many processes there are, and returns ``status``."""
    if _speaks():
        print("\n".join(f"k2train: error: {fault}" for fault in faults), file=sys.stderr)
    return status
