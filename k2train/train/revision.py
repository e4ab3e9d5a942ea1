"""Which code a run is trained by."""

from __future__ import annotations

import subprocess
from pathlib import Path

import k2train


def revision() -> dict[str, str]:
    """The version and, in a git checkout, the commit, with ``+changes`` where tracked files differ from it."""
    found, root = {"version": k2train.__version__}, Path(k2train.__file__).parents[1]
    if not (root / ".git").exists():
        return found

    def git(*words: str) -> str:
        command = ["git", "-C", str(root), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        changes = "+changes" if git("status", "--porcelain", "--untracked-files=no") else ""
        return found | {"commit": git("rev-parse", "HEAD") + changes}
    except (OSError, subprocess.SubprocessError):  # no git here, or not ours to read
        return found
