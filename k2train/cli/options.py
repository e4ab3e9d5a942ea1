"""Which options a config group has: the files in its folder."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from k2train.paths import config_dir


def group_options(group: str, own_dirs: Iterable[Path]) -> list[str]:
    """Names of the files in the folder ``group`` of the shipped configs and of one's own."""
    return sorted({path.stem for root in (config_dir(), *own_dirs) for path in (root / group).glob("*.yaml")})
