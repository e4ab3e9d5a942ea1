"""From overrides to one plain mapping: the only place that knows Hydra and OmegaConf.

Hydra chooses the files. Values are set here, as their keys are checked first: against the schema, so that a mistyped
one is told the right one, and against each key's type, so that text is taken as it stands without Hydra's quoting.
"""

from __future__ import annotations

import difflib
import json
import typing
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, IntervalSweep, Override, QuotedString, Transformer
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from k2train.cli.commands import Command
from k2train.cli.options import group_options
from k2train.config import ConfigError, find_key, suggest_key
from k2train.paths import RunPaths, config_dir


def compose(command: Command, overrides: Sequence[str], own_dirs: Sequence[Path] = ()) -> dict[str, Any]:
    """The config of a command as nested dicts, all references resolved.

    Args:
        command: says which file to start from and which groups there are.
        overrides: ``group=option`` and ``key=value``.
        own_dirs: folders searched for options after the shipped one.

    Raises:
        ConfigError: all faults of the overrides at once, or the first of the files.
    """
    faults: list[str] = []
    choices: list[str] = []
    values: list[tuple[str, Any]] = []
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals:
            faults.append(_no_value(command, text))
        elif key in command.groups:
            if fault := _check_choice(key, value, own_dirs):
                faults.append(fault)
            choices.append(text)
        elif key[:1] in ("+", "~"):
            faults.append(f"{text}: keys can be set, not added or removed: write key=value without {key[0]!r}")
        elif (hint := find_key(command.schema, key)) is None:
            faults.append(f"unknown key {key}: {_suggest(command, key)}")
        else:
            try:
                values.append((key, _read_value(key, value, hint)))
            except ConfigError as error:
                faults.extend(error.faults)
    if faults:
        raise ConfigError(faults)
    if own_dirs:
        folders = ",".join(json.dumps(f"file://{folder}") for folder in own_dirs)
        choices.append(f"hydra.searchpath=[{folders}]")
    try:
        config = _choose_files(command.primary, choices)
        _set(config, values)
        if config.get("init_from"):
            own_model = any(choice.startswith("model=") for choice in choices)
            _set(config, [(k, v) for k, v in _inherited(config).items() if not (own_model and k == "model")])
            _set(config, values)  # a word wins over what is inherited
        mapping = OmegaConf.to_container(config, resolve=True)
    except yaml.YAMLError as error:
        raise ConfigError([f"a config file is not YAML: {' '.join(str(error).split())}"]) from error
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError([_first_sentence(error)]) from error
    return typing.cast(dict[str, Any], mapping)


@dataclass(frozen=True)
class Span:
    """Numbers to search among."""

    low: float
    high: float
    log: bool  # the logarithm is spread evenly


def swept(word: str, own_dirs: Sequence[Path] = ()) -> list[str] | Span:
    """What an override stands for in a sweep: one for each value that Hydra's grammar reads in it, or a span.

    Args:
        word: as ``optim.lr=0.01,0.02``, ``seed=range(1,4)``, ``model=glob(small*)``, ``optim.lr=interval(0.01,0.1)`` or
            ``optim.lr=tag(log,interval(0.001,0.1))``; a text with a comma is to be quoted.
        own_dirs: folders with options of one's own.

    Raises:
        ConfigError: no option matches a glob.
    """
    key = word.partition("=")[0]
    try:
        override: Override = OverridesParser.create().parse_override(word)
    except HydraException:  # text, or a fault that compose will name
        return [word]
    value: Any = override._value  # value() would take quotes from text that is a word of its own
    if isinstance(value, IntervalSweep):
        assert value.start is not None
        assert value.end is not None
        return Span(value.start, value.end, log="log" in value.tags)
    if isinstance(value, QuotedString):
        return [f"{key}={value.text}"]
    if not override.is_sweep_override():
        return [word]
    if isinstance(value, Glob):
        if not (names := value.filter(options := group_options(key, own_dirs))):
            raise ConfigError([f"{word}: no option matches; the options are {', '.join(options)}"])
        return [f"{key}={name}" for name in names]
    return [f"{key}={_element(element)}" for element in override.sweep_iterator()]


def _element(element: Any) -> str:
    return element.text if isinstance(element, QuotedString) else Transformer.str(element)


def as_yaml(mapping: dict[str, Any]) -> str:
    """What ``--cfg job`` prints; it can be read back as YAML."""
    return OmegaConf.to_yaml(OmegaConf.create(mapping))


def _set(config: DictConfig, values: Iterable[tuple[str, Any]]) -> None:
    for key, value in values:
        OmegaConf.update(config, key, value, force_add=True)


def _inherited(config: DictConfig) -> dict[str, Any]:
    """Model and tokenizer of what a run begins with; of the run itself once it has begun."""
    own = RunPaths(Path(config.runs_dir).expanduser() / config.name).config
    if own.is_file():
        saved = json.loads(own.read_text(encoding="utf-8"))
        return {"model": saved["model"], "data.tokenizer": saved["data"]["tokenizer"]}
    from k2train.cli.trained import inherited

    return inherited(Path(config.init_from).expanduser())


def _choose_files(primary: str, choices: list[str]) -> DictConfig:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # hydra's on its own future
        with hydra.initialize_config_dir(config_dir=str(config_dir()), version_base="1.3"):
            return hydra.compose(primary, overrides=choices)


def _check_choice(group: str, value: str, own_dirs: Sequence[Path]) -> str | None:
    """What is wrong with ``group=value``, if anything."""
    options = group_options(group, own_dirs)
    wanted = value[1:-1].split(",") if value.startswith("[") and value.endswith("]") else [value]
    for option in wanted:
        if option not in options and (group, option) != ("experiment", "null"):
            close = difflib.get_close_matches(option, options, n=1)
            hint = f"did you mean {group}={close[0]}?" if close else f"the options are {', '.join(options)}"
            return f"{group}={option}: there is no such option: {hint}"
    return None


def _read_value(key: str, text: str, hint: Any) -> Any:
    """The value of an override: text keys take it as it stands, the others by Hydra's grammar."""
    kinds = typing.get_args(hint) or (hint,)
    if str in kinds and typing.get_origin(hint) not in (tuple, dict):
        if text == "null" and type(None) in kinds:
            return None
        return text.replace("${", "\\${")  # else OmegaConf takes it for a reference
    try:
        override: Override = OverridesParser.create().parse_override(f"{key}={text}")
    except HydraException as error:
        raise ConfigError([f"{key}={text}: the value cannot be read: {_first_sentence(error)}"]) from error
    if override.is_sweep_override():
        raise ConfigError([f"{key}={text}: give one value; a list is written [a,b], and --multirun makes several runs"])
    value = override.value()
    if typing.get_origin(hint) is dict and not isinstance(value, dict):
        raise ConfigError([f"{key}={text}: {key} holds values by name: write {key}.NAME=VALUE, or deeper keys of NAME"])
    return value


def _no_value(command: Command, word: str) -> str:
    if word in command.groups or find_key(command.schema, word) is not None:
        return f"{word} lacks a value: write {word}=VALUE"
    return f"{word!r} is no override: write key=value, as in {command.common[0][0]}"


def _suggest(command: Command, key: str) -> str:
    if "." not in key and (close := difflib.get_close_matches(key, command.groups, n=1, cutoff=0.7)):
        return f"did you mean {close[0]}?"
    return suggest_key(command.schema, key)


def _first_sentence(error: Exception) -> str:
    lines: Iterable[str] = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__)
