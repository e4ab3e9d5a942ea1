"""metrics.jsonl: one JSON object a line, the record that pictures and comparisons of runs are made from."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from k2train.paths import atomic_write


class MetricsFile:
    """Appends records to a file; each line is on its way to disk when ``write`` returns."""

    def __init__(self, path: Path, *, resume_at: int) -> None:
        """Opens the file, keeping the records of steps up to ``resume_at`` and dropping later and torn ones."""
        kept = [line for line in _lines(path) if json.loads(line)["step"] <= resume_at]
        atomic_write(path, "".join(f"{line}\n" for line in kept))
        self._file = open(path, "a", buffering=1, encoding="utf-8")  # noqa: SIM115  (open as long as the run)

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends a record; numbers that are not finite become null, which JSON has no word for."""
        plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        self._file.write(json.dumps(plain) + "\n")

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def _lines(path: Path) -> list[str]:
    """The whole lines of the file; a run that was killed may have torn the last one."""
    if not path.exists():
        return []
    whole = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            json.loads(line)
        except json.JSONDecodeError:
            continue
        whole.append(line)
    return whole
