"""From a sample back to its documents, in words."""

from __future__ import annotations

from collections.abc import Iterator

from k2train.data.dataset import Span
from k2train.data.stream import Trace
from k2train.data.tokenizer import Tokenizer


def pieces(trace: Trace, tokenizer: Tokenizer) -> Iterator[tuple[Span, str]]:
    """Each document of the sample, or piece of one, with its text."""
    for span, ids in _cut(trace):
        yield span, tokenizer.decode([token for token in ids if token != tokenizer.end_of_text])


def describe_trace(trace: Trace, tokenizer: Tokenizer) -> Iterator[tuple[str, str]]:
    """(heading, text) of the sample, and of each document or piece of one in it."""
    yield f"sample {trace.number}: source {trace.source}, epoch {trace.epoch}, window {trace.window}", ""
    for (span, text), (_, ids) in zip(pieces(trace, tokenizer), _cut(trace), strict=True):
        ended = " and ends" if ids[-1] == tokenizer.end_of_text else ""
        dropped = ", dropped" if span.document in trace.dropped else ""
        where = f"document {trace.source}/{span.document}{dropped}, in {span.shard}"
        heading = f"{span.origin}: tokens {span.start} to {span.stop}{ended} ({where})"
        yield heading, text


def _cut(trace: Trace) -> Iterator[tuple[Span, list[int]]]:
    at = 0
    for span in trace.spans:
        length = span.stop - span.start
        yield span, trace.tokens[at : at + length].tolist()
        at += length
