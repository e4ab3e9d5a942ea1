"""TensorBoard, all of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from k2train.train.heat import picture

if TYPE_CHECKING:
    from k2train.train.track import Start

FOLDER = "tensorboard"


class TensorBoard:
    """Writes TensorBoard's event files to ``tensorboard`` in the run's folder."""

    name = "tensorboard"

    def open(self, start: Start, say: Callable[[str], None]) -> None:
        """See ``Backend``. Each start of a run has a file; TensorBoard joins them."""
        try:
            from torch.utils.tensorboard import SummaryWriter  # here, as it takes a second to import
        except ImportError as error:
            raise RuntimeError("it is not installed: pip install 'k2train[tensorboard]'") from error
        folder = start.folder / FOLDER
        self._writer = SummaryWriter(folder)
        self._writer.add_text("config", f"```json\n{json.dumps(start.config, indent=2)}\n```")
        say(f"tensorboard: to look at it, tensorboard --logdir {folder}")

    def numbers(self, values: Mapping[str, float], *, step: int, tokens: int) -> None:
        """See ``Backend``."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, tokens if name.startswith("by_tokens/") else step)

    def heat_map(self, name: str, rows: Sequence[Sequence[float]], *, step: int, tokens: int) -> None:
        """See ``Backend``."""
        pixels, low, high = picture(rows)
        self._writer.add_image(name, pixels, step, dataformats="HWC")
        self._writer.add_scalars(f"{name}_range", {"smallest": low, "largest": high}, step)

    def incident(self, record: Mapping[str, Any]) -> None:
        """See ``Backend``."""
        found = record["incident"]
        self._writer.add_text("incidents", f"{found['action']}: {found['sentence']}", record["step"])

    def close(self, *, failed: bool) -> None:
        """See ``Backend``."""
        self._writer.close()
