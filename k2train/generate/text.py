"""From tokens to text while they come: whole characters, and nothing of what may yet become a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class TextStream:
    """Text of the bytes so far, given out as soon as it is certain.

    Attributes:
        stopped: whether a stop string has come; it and what follows is not given out.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        """Takes the strings that end the text."""
        self.stopped = False
        self._stop = tuple(stop)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""

    def add(self, data: bytes, *, last: bool = False) -> str:
        """The text that has become certain; all that is left if these bytes are the last. Bad bytes become U+FFFD."""
        self._held += self._decoder.decode(data, last)
        found = [place for string in self._stop if (place := self._held.find(string)) >= 0]
        if found:
            self.stopped = True
            certain, self._held = self._held[: min(found)], ""
            return certain
        cut = len(self._held) - (0 if last else self._pending())
        certain, self._held = self._held[:cut], self._held[cut:]
        return certain

    def _pending(self) -> int:
        """Characters at the end that a stop string may begin with."""
        longest = min(max((len(string) for string in self._stop), default=1) - 1, len(self._held))
        return next(
            (n for n in range(longest, 0, -1) if any(string.startswith(self._held[-n:]) for string in self._stop)), 0
        )


def printable(text: str) -> str:
    """The text as a terminal may be given it: control characters, which a young model writes too, become U+FFFD."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
