"""A heat map as a picture, for trackers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

CELL = 8  # pixels of a side
# From the smallest value to the largest: dark blue, teal, yellow. What is absent is grey.
COLOURS = np.array([[48, 18, 110], [33, 144, 141], [253, 231, 37]], dtype=np.float64)
ABSENT = 200


def picture(rows: Sequence[Sequence[float]]) -> tuple[NDArray[np.uint8], float, float]:
    """[height, width, 3] pixels, a row of cells for each row, and the smallest and the largest value.

    Args:
        rows: values; NaN, or a shorter row, where there is none.
    """
    width = max(map(len, rows))
    values = np.array([[*row, *[np.nan] * (width - len(row))] for row in rows], dtype=np.float64)
    seen = values[np.isfinite(values)]
    low, high = (float(seen.min()), float(seen.max())) if len(seen) else (np.nan, np.nan)
    place = (values - low) / (high - low) if high > low else np.where(np.isfinite(values), 0.5, np.nan)
    stops = np.linspace(0, 1, len(COLOURS))
    channels = [np.interp(np.nan_to_num(place), stops, COLOURS[:, channel]) for channel in range(3)]
    pixels = np.where(np.isfinite(place)[..., None], np.stack(channels, -1), ABSENT).astype(np.uint8)
    return pixels.repeat(CELL, 0).repeat(CELL, 1), low, high
