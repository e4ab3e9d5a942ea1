"""Parts of a person's own: optimizers, sources and hooks that the config names by the dotted path of their class.

A name with a dot in it (``optim.name``, ``data.sources.NAME.kind``, ``train.hooks.NAME.kind``) is looked up here and
nowhere else. The ``options`` beside it are what its constructor is given; they are held against its signature.
docs/how-to/own-parts.md has one part of each kind.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from k2train.config.parse import ConfigError, nearest

_packages: set[str] = set()  # of persons' own code; torch.optim.NAdam is nobody's


@dataclass(frozen=True)
class OwnPart:
    """A class that was found, and what it is to be given."""

    key: str  # that names it, as optim.name
    cls: type
    options: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Module and qualified name."""
        return f"{self.cls.__module__}.{self.cls.__qualname__}"

    @property
    def identity(self) -> str:
        """What tells one version of it from another: its name, and a hash of the file that it is written in."""
        file = getattr(sys.modules[self.cls.__module__], "__file__", None)
        digest = hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16] if file else "none"
        return f"{self.name}, file {digest}"

    def make(self, *args: Any, **given: Any) -> Any:
        """Constructs it from what k2train gives and the options.

        Raises:
            ConfigError: its constructor raises; with the file and line of the person's own code.
        """
        try:
            return self.cls(*args, **given, **self.options)
        except Exception as error:  # of the person's code: any there is
            raise ConfigError([f"{self.key}={self.name} cannot be constructed: {explain(error)}"]) from error


def own_part(
    key: str, path: str, options: Mapping[str, Any] | None, *, base: type, args: int = 0, given: Sequence[str] = ()
) -> OwnPart:
    """Finds the class at a dotted path, and holds the options against its constructor.

    Args:
        key: of the config that names it.
        path: ``package.module.Class``; the folder in which the command was started is searched, too.
        options: for its constructor.
        base: what it must be a subclass of, or a protocol that it must follow.
        args: how many positional arguments k2train gives to the constructor.
        given: names of the keyword arguments that k2train gives to it.

    Raises:
        ConfigError: there is none, its module fails, it is of another kind, or the options are not the constructor's.
    """
    cls = _find(key, path)
    if not (isinstance(cls, type) and issubclass(cls, base)):
        raise ConfigError(
            [f"{key}={path} is no {base.__module__}.{base.__qualname__}: docs/how-to/own-parts.md shows one"]
        )
    part = OwnPart(key, cls, dict(options or {}))
    if faults := _faults(part, args, given):
        raise ConfigError(faults)
    return part


def explain(error: BaseException) -> str:
    """An error of a person's own code as a clause: its kind, what it says, and where in that code it comes from."""
    text = (error.msg if isinstance(error, SyntaxError) else str(error)).strip()
    return f"{type(error).__name__}{f': {text.splitlines()[0]}' if text else ''}{own_place(error)}"


def own_place(error: BaseException) -> str:
    """`` (FILE, line N)`` of the innermost line of an own part that an error went through; empty if there is none."""
    if isinstance(error, SyntaxError) and error.filename:
        return f" ({error.filename}, line {error.lineno})"
    place = ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        if str(frame.f_globals.get("__name__")).partition(".")[0] in _packages:
            place = f" ({frame.f_code.co_filename}, line {line})"
    return place


def _find(key: str, path: str) -> Any:
    module, _, name = path.rpartition(".")
    _packages.update({module.partition(".")[0]} - {"torch"})
    if "" not in sys.path and os.getcwd() not in sys.path:  # a console script does not look there
        sys.path.append(os.getcwd())
    try:
        found = importlib.import_module(module)
    except Exception as error:  # whatever the module does when it is imported
        if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}."):
            remedy = f"start k2train in the folder that holds {error.name}, or put that into PYTHONPATH"
            raise ConfigError([f"{key}={path}: there is no module {error.name}: {remedy}"]) from error
        raise ConfigError([f"{key}={path}: {module} cannot be imported: {explain(error)}"]) from error
    if not hasattr(found, name):
        classes = [name for name, value in vars(found).items() if isinstance(value, type)]
        known = nearest(name, classes) if classes else "it has no class"
        file = getattr(found, "__file__", None) or "no file"
        raise ConfigError([f"{key}={path}: {module} ({file}) has no {name}: {known}"])
    return getattr(found, name)


def _faults(part: OwnPart, args: int, given: Sequence[str]) -> list[str]:
    """What of the options, or of what k2train gives, the constructor does not take, and what it lacks."""
    group = f"{part.key.rpartition('.')[0]}.options"
    parameters = list(inspect.signature(part.cls).parameters.values())
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    named = {p.name: p for p in parameters[args:] if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    faults = [
        f"{part.key}={part.name} takes no {name}: its constructor must, as k2train gives it"
        for name in given
        if name not in named and not takes_any
    ]
    own = [name for name in named if name not in given]
    for option in part.options:
        if option in given:
            faults.append(f"{group}.{option}: {option} is a key beside options: give it there")
        elif option not in named and not takes_any:
            known = nearest(option, own) if own else f"{part.name} takes no options"
            faults.append(f"unknown key {group}.{option}: {known}")
    lacking = [name for name in own if named[name].default is inspect.Parameter.empty and name not in part.options]
    return faults + [f"missing key {group}.{name}, which {part.name} needs" for name in lacking]
