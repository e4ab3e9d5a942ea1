"""From text to token shards, in two passes over it that processes share.

``survey`` reads the text and notes sizes and digests, ``verdicts`` decides what becomes of each document, ``encode``
reads the text again and writes shards; ``pipeline`` joins them, and ``workers`` shares them out.
"""

from k2train.data.preparation.pipeline import Progress, find_prepared, prepare

__all__ = ["Progress", "find_prepared", "prepare"]
