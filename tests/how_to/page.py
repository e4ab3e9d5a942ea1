"""A page of docs/how-to, taken apart and followed to the letter.

    ```sh       is run by bash, which stops at the first command that fails
    ```sh fails must end with a status other than 0
    ```text     is what the block of commands before it printed
    ```python   (yaml, json) is a file, named at the end of the line above: "Save this as `loop.py`:"
    ```console  is not run: it needs a cluster, or hours

In a text block `...` stands for anything: alone for any lines, in a line for any part of it. White space does not
count. Of numbers, times and speeds may be any, as they are the machine's, and intervals after ± too. Whole numbers must
be the page's. All others must be so to a tenth: text, vocabulary and losses vary with Python's library, on which pages
train, and losses with the rounding of the machine.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
LANGUAGES = {"sh", "text", "console", "python", "yaml", "json"}
BLOCK = re.compile(r"(?:^(?!```)(.+)\n\n?)?^```(\w*)( fails)?\n((?:.*\n)*?)^```$", re.MULTILINE)
NAMED = re.compile(r"`([\w./-]+)`:$")

INTERVAL = r"± ?[\d.]+"
SPEED = r"\d[\d,.]*[kMGT]?(?: tokens/s| a second|[KMGT]iB/s)"
TIME = r"(?:\d+d ?)?(?:\d+h ?)?(?:\d+m)?\d[\d.]* ?m?s\b"
NUMBER = r"\d+(?:,\d{3})*(?:\.\d+)?(?:e[+-]\d+)?[kMBT]?\b"
SCALES = {"k": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


@dataclass
class Block:
    """What stands between two fences."""

    language: str
    fails: bool
    text: str
    file: str | None  # that it is to be saved as
    line: int  # of the page


def blocks(page: str) -> list[Block]:
    """The blocks of a page, in order."""
    found = []
    for match in BLOCK.finditer(page):
        above, language, fails, text = match.groups()
        named = NAMED.search(above or "")
        line = page.count("\n", 0, match.start(2)) + 1
        found.append(Block(language, fails is not None, text, named[1] if named else None, line))
    return found


def follow(page: str, folder: Path, environment: dict[str, str]) -> None:
    """Does what a page says, in a folder, and compares what comes with what it shows."""
    said = None  # by the commands before, until it has been compared
    for block in blocks(page):
        where = f"line {block.line}"
        assert block.language in LANGUAGES, f"{where}: a block must say what it is: {sorted(LANGUAGES)}"
        if block.language == "sh":
            status, said = run(block.text, folder, environment)
            assert (status != 0) == block.fails, f"{where}: exit status {status}\n{said}"
        elif block.language == "text":
            assert said is not None, f"{where}: no commands stand before this output"
            assert shows(block.text, said), f"{where}: the page shows\n{block.text}\nand what came is\n{said}"
            said = None
        elif block.language != "console":
            assert block.file, f"{where}: the line above must end with the name of the file, as in `loop.py`:"
            (folder / block.file).parent.mkdir(parents=True, exist_ok=True)
            (folder / block.file).write_text(block.text, encoding="utf-8")


def run(commands: str, folder: Path, environment: dict[str, str]) -> tuple[int, str]:
    """Exit status and both outputs in one, as on a terminal; nothing that bash has started outlives it."""
    shell = ["bash", "-e", "-o", "pipefail", "-c", commands]
    both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(shell, cwd=folder, env=environment, text=True, start_new_session=True, **both) as process:
        try:
            said, _ = process.communicate(timeout=1800)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, said


def environment(home: Path) -> dict[str, str]:
    """That of a person who has activated .venv, with a home and caches of their own."""
    own = {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'optim'}",
        "OMP_NUM_THREADS": "1",
        "HOME": str(home),
        "XDG_CACHE_HOME": str(home / ".cache"),
    }
    return {**os.environ, **own}


def shows(page: str, came: str) -> bool:
    """Whether the output on a page is the one that came, but for what may differ."""
    return lines_agree(trimmed(page), trimmed(came))


def trimmed(text: str) -> list[str]:
    return [" ".join(line.split()) for line in text.strip().splitlines()]


def lines_agree(page: list[str], came: list[str]) -> bool:
    if not page:
        return not came
    if page[0] == "...":
        return any(lines_agree(page[1:], came[skipped:]) for skipped in range(len(came) + 1))
    return bool(came) and line_agrees(page[0], came[0]) and lines_agree(page[1:], came[1:])


def line_agrees(page: str, came: str) -> bool:
    pattern, numbers = "", []
    for part in re.split(rf"(\.\.\.|{INTERVAL}|{SPEED}|{TIME}|{NUMBER})", page):
        anything = next((kind for kind in (INTERVAL, SPEED, TIME) if re.fullmatch(kind, part)), None)
        if part == "...":
            pattern += ".*"
        elif anything:
            pattern += anything
        elif re.fullmatch(NUMBER, part):
            pattern += f"({NUMBER})"
            numbers.append(part)
        else:
            pattern += re.escape(part)
    match = re.fullmatch(pattern, came)
    return match is not None and all(map(number_agrees, numbers, match.groups()))


def number_agrees(page: str, came: str) -> bool:
    if page.isdecimal():
        return page == came
    return math.isclose(value(page), value(came), rel_tol=0.1, abs_tol=1e-5)


def value(number: str) -> float:
    scale = SCALES.get(number[-1], 1.0)
    return scale * float(number.rstrip("kMBT").replace(",", ""))
