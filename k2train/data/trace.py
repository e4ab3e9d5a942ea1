"""From a sample back to its documents, in words."""

from __future__ import annotations

from collections.abc import Iterator

from k2train.data.stream import Trace
from k2train.data.tokenizer import Tokenizer


def describe_trace(trace: Trace, tokenizer: Tokenizer) -> Iterator[tuple[str, str]]:
    """(heading, text) of the sample, and of each document or piece of one in it."""
    yield f"sample {trace.number}: source {trace.source}, epoch {trace.epoch}, window {trace.window}", ""
    at = 0
    for span in trace.spans:
        ids = trace.tokens[at : at + span.stop - span.start].tolist()
        at += len(ids)
        text = tokenizer.decode([token for token in ids if token != tokenizer.end_of_text])
        ended = " and ends" if ids[-1] == tokenizer.end_of_text else ""
        dropped = ", dropped" if span.document in trace.dropped else ""
        where = f"document {trace.source}/{span.document}{dropped}, in {span.shard}"
        heading = f"{span.origin}: tokens {span.start} to {span.stop}{ended} ({where})"
        yield heading, text
