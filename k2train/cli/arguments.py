"""What is typed after a command: options, and overrides of the config."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from k2train.config import ConfigError

OPTIONS = ("--help", "--cfg", "--config-dir")


@dataclass(frozen=True)
class Arguments:
    """Typed words, sorted."""

    help: bool
    show_config: bool  # --cfg job
    config_dirs: tuple[Path, ...]  # of one's own, searched after the shipped one
    overrides: tuple[str, ...]  # key=value


def read_arguments(words: Sequence[str], switches: Sequence[str] = ()) -> Arguments:
    """Sorts the words after the command.

    Args:
        words: as they were typed.
        switches: keys of the command that ``--KEY`` sets to true.

    Raises:
        ConfigError: an option that is not there, lacks its value or has a wrong one.
    """
    faults: list[str] = []
    overrides: list[str] = []
    folders: list[Path] = []
    wants_help = show_config = False
    rest = list(words)
    while rest:
        option, equals, value = (word := rest.pop(0)).partition("=")
        if word in ("--help", "-h"):
            wants_help = True
        elif option in ("--cfg", "--config-dir"):
            if not equals:
                value = rest.pop(0) if rest else ""
            if option == "--cfg":
                show_config = True
                if value != "job":
                    faults.append(f"--cfg {value}: write `--cfg job`, which prints the composed config")
            elif Path(value).expanduser().is_dir() and value:
                folders.append(Path(value).expanduser().resolve())
            else:
                faults.append(
                    f"--config-dir {value}: it is no folder; give the one that holds experiment/, model/, ..."
                )
        elif word.startswith("--") and word[2:] in switches:
            overrides.append(f"{word[2:]}=true")
        elif word.startswith("-"):
            known = (*OPTIONS, *(f"--{key}" for key in switches))
            close = difflib.get_close_matches(option, known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"the options are {', '.join(known)}"
            faults.append(f"{option} is no option: {hint}")
        else:
            overrides.append(word)
    if faults:
        raise ConfigError(faults)
    return Arguments(wants_help, show_config, tuple(folders), tuple(overrides))
