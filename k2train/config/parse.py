"""From a plain mapping to ``RunConfig``: strict keys, strict types, sentences that say what is wrong and what to do."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from k2train.config.rules import is_own

T = TypeVar("T")


class ConfigError(ValueError):
    """One or more faults of a config, a sentence each."""

    def __init__(self, faults: Sequence[str]) -> None:
        self.faults = tuple(faults)
        super().__init__("\n".join(faults))


def parse(cls: type[T], mapping: Mapping[str, Any]) -> T:
    """Builds ``cls`` (a config dataclass) from nested mappings.

    Args:
        cls: RunConfig or one of its parts.
        mapping: every field, no others; lists for tuples, ints where floats are asked for.

    Returns:
        The frozen config.

    Raises:
        ConfigError: with all faults at once: unknown keys (and the nearest right one), missing keys, wrong types,
            values against a field's rule, fields that contradict each other.
    """
    faults: list[str] = []
    value = _dataclass(cls, mapping, "", faults)
    if faults:
        raise ConfigError(faults)
    return typing.cast(T, value)


def to_dict(config: Any) -> dict[str, Any]:
    """The inverse of ``parse``: plain dicts, lists and scalars, fit for JSON."""
    result = _plain(config)
    assert isinstance(result, dict)
    return result


def nearest(key: str, known: Sequence[str]) -> str:
    """``, did you mean 'x'?`` for the known key most like ``key``, else the list of known keys."""
    if close := difflib.get_close_matches(key, known, n=1, cutoff=0.5):
        return f"did you mean {close[0]!r}?"
    return f"known keys: {', '.join(sorted(known))}"


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value


def _dataclass(cls: type, value: Any, path: str, faults: list[str]) -> Any:
    if not isinstance(value, Mapping):
        faults.append(f"{path or 'the config'} must be a group of keys, not {value!r}")
        return None
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    before = len(faults)
    for key in value:
        if key not in fields:
            faults.append(f"unknown key {_join(path, str(key))}: {nearest(str(key), list(fields))}")
    arguments = {}
    for name, described in fields.items():
        if name in value:
            arguments[name] = _value(hints[name], value[name], described.metadata, _join(path, name), faults)
        elif described.default is dataclasses.MISSING:
            faults.append(f"missing key {_join(path, name)}")
    if len(faults) > before:
        return None
    result = cls(**arguments)
    if hasattr(result, "check"):
        faults.extend(f"{path}.{sentence}" if path else sentence for sentence in result.check())
    return result


def _value(hint: Any, value: Any, rules: Mapping[str, Any], path: str, faults: list[str]) -> Any:
    if dataclasses.is_dataclass(hint):
        return _dataclass(typing.cast(type, hint), value, path, faults)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return None if value is None else _value(_member(args, value), value, rules, path, faults)
    if origin is tuple:
        if (
            isinstance(value, str)
            or not isinstance(value, Sequence)
            or (args[-1] is not ... and len(value) != len(args))
        ):
            length = "" if args[-1] is ... else f" of {len(args)}"
            faults.append(f"{path}={value!r} must be a list{length}, as in {path}=[a,b]")
            return None
        kinds = [args[0]] * len(value) if args[-1] is ... else args
        return tuple(
            _value(k, v, rules, f"{path}[{i}]", faults) for i, (k, v) in enumerate(zip(kinds, value, strict=True))
        )
    if origin is dict:
        if value == []:  # no members either; configs of before train.hooks had names hold it
            value = {}
        if not isinstance(value, Mapping):
            faults.append(f"{path}={value!r} must be a group of keys")
            return None
        return {str(key): _value(args[1], item, rules, _join(path, str(key)), faults) for key, item in value.items()}
    if hint is Any:
        return value
    return _scalar(hint, value, rules, path, faults)


def _member(hints: Sequence[Any], value: Any) -> Any:
    """The member of a union that the value is meant for: a list if it is one, else the first that is none."""
    real = [hint for hint in hints if hint is not type(None)]
    listed = isinstance(value, Sequence) and not isinstance(value, str)
    return next((hint for hint in real if (typing.get_origin(hint) is tuple) == listed), real[0])


def _scalar(kind: Any, value: Any, rules: Mapping[str, Any], path: str, faults: list[str]) -> Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if kind is float and isinstance(value, str):  # YAML 1.1 reads 1e-3 as text
        with contextlib.suppress(ValueError):
            value = float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
        faults.append(f"{path}={value!r} must be {names[kind]}")
        return None
    if kind is float and not math.isfinite(value):
        faults.append(f"{path}={value!r} must be finite")
    breaches: dict[str, Callable[[float], bool]] = {
        "at_least": lambda bound: value < bound,
        "above": lambda bound: value <= bound,
        "at_most": lambda bound: value > bound,
        "below": lambda bound: value >= bound,
    }
    for name, breached in breaches.items():
        if name in rules and breached(rules[name]):
            faults.append(f"{path}={value!r} must be {name.replace('_', ' ')} {rules[name]}")
    words, own = rules.get("one_of", ()), rules.get("own", False)
    if (words or own) and value not in words and not (own and is_own(value)):
        choices = f"one of {', '.join(words)}" if words else ""
        if own:
            choices += f"{', or ' if words else ''}the dotted path of a class of your own, as my_parts.Mine"
        close = difflib.get_close_matches(str(value), words, n=1)
        faults.append(f"{path}={value!r} must be {choices}" + (f"; did you mean {close[0]!r}?" if close else ""))
    if rules.get("even") and value % 2:
        faults.append(f"{path}={value!r} must be even")
    return value


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
