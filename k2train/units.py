"""How numbers are written for people, the same on the terminal, in tables and in logs."""

from __future__ import annotations

import math


def count(value: float) -> str:
    """Three digits and a letter: 950, 12.3k, 1.23M, 15.5T."""
    if not math.isfinite(value):
        return "-"
    if abs(value) < 999.5:
        return f"{value:.0f}" if float(value).is_integer() or abs(value) >= 100 else f"{value:.3g}"
    for letter in "kMBT":
        value /= 1000
        if abs(value) < 999.5 or letter == "T":
            break
    digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{digits}f}{letter}"


def duration(seconds: float) -> str:
    """The two largest units: 8.1s, 42s, 12m34s, 3h05m, 2d04h."""
    if not math.isfinite(seconds):
        return "-"
    if seconds < 9.95:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02}s"
    minutes = round(seconds / 60)
    if minutes < 24 * 60:
        return f"{minutes // 60}h{minutes % 60:02}m"
    hours = round(seconds / 3600)
    return f"{hours // 24}d{hours % 24:02}h"


def memory(size: float) -> str:
    """Bytes in binary units: 512 B, 36.0 MiB, 2.10 GiB."""
    if size < 1024:
        return f"{size:.0f} B"
    for unit in ("KiB", "MiB", "GiB", "TiB"):
        size /= 1024
        if size < 1000 or unit == "TiB":
            break
    return f"{size:.3g} {unit}" if size < 99.95 else f"{size:.0f} {unit}"
