"""A byte-level BPE: trained or read by ``tokenizers``, encoded by the fastest engine that gives the same ids.

The file ``tokenizer.json`` is the tokenizer, in Hugging Face's format. ``tiktoken`` with the same merges encodes about
five times faster. Its rule differs in principle (it merges any pair whose result is a token, lowest id first), so its
ids are compared with those of ``tokenizers`` before it is used; see ``choose_engine``.

Ids of one that is trained: the special token first, then the 256 bytes, then the merges in the order they were learned.
Text is always text: a document that spells ``<|end_of_text|>`` is encoded as those characters.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import tiktoken
import tokenizers
from numpy.typing import NDArray

from k2train.config import TokenizerConfig
from k2train.data.errors import DataError, os_errors_explained

END_OF_TEXT = "<|end_of_text|>"
ENGINES = ("tiktoken", "tokenizers")

# How text is split before merging.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = (rf"[{first}\p{{Lm}}\p{{Lo}}\p{{M}}&&[^\p{{Han}}]]" for first in (r"\p{Lu}\p{Lt}", r"\p{Ll}"))
SPLITS = {
    # As GPT-4's tokenizer does (cl100k_base): contractions, words with one leading character (a space, a dot, an
    # underscore), numbers of up to three digits, punctuation, line ends, other white space. The last blank of an
    # indentation goes with the word behind it.
    "gpt4": rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{_REST}",
    # As Kimi K2's does (tokenization_kimi.py of its release): Chinese characters by themselves, words that also end
    # where a capital letter follows a small one, with their contraction.
    "kimi-k2": (
        rf"[\p{{Han}}]+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?"
        rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?|{_REST}"
    ),
}
# GPT-2's, which the pre-tokenizer ByteLevel has built in.
_GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def define(config: TokenizerConfig, texts: Iterable[str]) -> str:
    """The ``tokenizer.json`` that the config asks for.

    Args:
        config: of the tokenizer.
        texts: to train on, where it is trained.

    Raises:
        DataError: the file that it names cannot be used.
    """
    if config.kind == "bytes":
        return train_bpe([], vocab_size=257, end_of_text=config.end_of_text, split=config.split)
    if config.kind == "bpe":
        return train_bpe(texts, vocab_size=config.vocab_size, end_of_text=config.end_of_text, split=config.split)
    assert config.path  # by TokenizerConfig.check
    path = Path(config.path).expanduser()
    with os_errors_explained(path):
        data = path.read_bytes()
        if config.kind == "json":
            definition = data.decode("utf-8", "replace")
        else:
            definition = from_ranks(path, data, split=config.split, end_of_text=config.end_of_text)
    try:
        Tokenizer(definition, engine="tokenizers", end_of_text=config.end_of_text)
    except (ValueError, KeyError, TypeError, IndexError) as error:
        reason = str(error) if isinstance(error, DataError) else f"it is no byte-level BPE tokenizer.json: {error!r}"
        raise DataError(f"{path}: {reason}") from error
    return definition


def train_bpe(texts: Iterable[str], *, vocab_size: int, end_of_text: str = END_OF_TEXT, split: str = "gpt4") -> str:
    """Trains a byte-level BPE and returns its ``tokenizer.json``.

    Args:
        texts: documents; their order does not matter to the result.
        vocab_size: tokens, including the 256 bytes and the special token. Text with few repeated pairs ends with less.
        end_of_text: the special token.
        split: one of ``SPLITS``.
    """
    if vocab_size < 257:
        raise ValueError(f"vocab_size={vocab_size} must be at least 257: 256 bytes and {end_of_text}; raise it")
    tokenizer = _byte_level(tokenizers.models.BPE(), split)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[end_of_text],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    text: str = tokenizer.to_str(pretty=True)
    return text


def from_ranks(path: Path, data: bytes, *, split: str, end_of_text: str) -> str:
    """The ``tokenizer.json`` of a tiktoken file: a line for each token, its bytes in base64 and its rank.

    Special tokens are those of the ``tokenizer_config.json`` beside it (``added_tokens_decoder``), as Kimi K2's release
    has it; without one, ``end_of_text`` alone, with the first free id.
    """
    try:
        pairs = [line.split() for line in data.splitlines() if line.strip()]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    except ValueError as error:
        raise DataError(f"{path} is no tiktoken file, which has lines of base64 and rank: {error}") from error
    specials = {end_of_text: max(ranks.values(), default=-1) + 1}
    beside = path.with_name("tokenizer_config.json")
    if beside.is_file():
        added = json.loads(beside.read_text(encoding="utf-8")).get("added_tokens_decoder", {})
        specials = {entry["content"]: int(number) for number, entry in added.items()}
    spelled = {byte: character for character, byte in _bytes_of_characters().items()}
    names = {token: "".join(spelled[byte] for byte in token) for token in ranks}
    # tiktoken merges whatever gives the token of the lowest rank: each way to make a token is a merge of that rank.
    merges = [
        (names[token[:cut]], names[token[cut:]])
        for token in sorted(ranks, key=ranks.__getitem__)
        for cut in range(1, len(token))
        if token[:cut] in ranks and token[cut:] in ranks
    ]
    vocabulary = {names[token]: rank for token, rank in ranks.items()}
    model = tokenizers.models.BPE(vocabulary, merges, ignore_merges=True)
    definition = json.loads(_byte_level(model, split).to_str())
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    by_id = sorted(specials.items(), key=lambda item: item[1])
    definition["added_tokens"] = [{"id": number, "content": content, **flags} for content, number in by_id]
    return json.dumps(definition, ensure_ascii=False)


def _byte_level(model: tokenizers.models.BPE, split: str) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(SPLITS[split]), "isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return tokenizer


def choose_engine(definition: str, sample: Iterable[str], *, end_of_text: str = END_OF_TEXT) -> Tokenizer:
    """With ``tiktoken`` if it gives the ids of ``tokenizers`` on every text of the sample, else with ``tokenizers``."""
    parsed = orjson.loads(definition)
    if _split_of(parsed) and not parsed["normalizer"] and all(t["special"] for t in parsed["added_tokens"]):
        fast = Tokenizer(definition, engine="tiktoken", end_of_text=end_of_text)
        if all(np.array_equal(fast.encode_array(text), fast.reference_ids(text)) for text in sample):
            return fast
    return Tokenizer(definition, engine="tokenizers", end_of_text=end_of_text)


def _split_of(parsed: dict[str, Any]) -> str | None:
    """The one pattern by which a ``tokenizer.json`` splits text; None if it does so in another way."""
    match parsed["pre_tokenizer"]:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}:
            return _GPT2_SPLIT
        case {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        }:
            return pattern
    return None


class Tokenizer:
    """Text to ids and back. Decoding the ids of a text gives exactly that text."""

    def __init__(self, definition: str, *, engine: str, end_of_text: str = END_OF_TEXT) -> None:
        """Reads a ``tokenizer.json`` of a byte-level BPE.

        Args:
            definition: the file's content.
            engine: one of ``ENGINES``.
            end_of_text: the special token that closes a document.

        Raises:
            DataError: it is of another kind, or has no such token.
        """
        parsed = orjson.loads(definition)
        if parsed["model"].get("type", "BPE") != "BPE" or (parsed.get("decoder") or {}).get("type") != "ByteLevel":
            raise DataError(
                "its model is no byte-level BPE, the one kind that k2train reads: give another tokenizer.json"
            )
        alphabet = _bytes_of_characters()
        specials = {token["content"]: token["id"] for token in parsed["added_tokens"]}
        if end_of_text not in specials:
            raise DataError(
                f"the tokenizer has no special token {end_of_text!r}: set data.tokenizer.end_of_text to one of "
                f"{', '.join(map(repr, list(specials)[:20])) or 'its special tokens, of which it has none'}"
            )
        ranks = {
            bytes(map(alphabet.__getitem__, token)): rank
            for token, rank in parsed["model"]["vocab"].items()
            if token not in specials
        }
        self.end_of_text: int = specials[end_of_text]
        self.vocab_size = 1 + max(*ranks.values(), *specials.values())
        self._token_bytes = [b""] * self.vocab_size
        for token_bytes, rank in (ranks | {text.encode(): rank for text, rank in specials.items()}).items():
            self._token_bytes[rank] = token_bytes
        self.engine = engine
        self._definition = definition
        self._fast: tiktoken.Encoding | None = None
        if engine == "tiktoken":
            pattern = _split_of(parsed)
            assert pattern is not None  # by choose_engine
            self._fast = tiktoken.Encoding("k2train", pat_str=pattern, mergeable_ranks=ranks, special_tokens=specials)
        elif engine not in ENGINES:
            raise ValueError(f"engine={engine!r} is unknown: it must be one of {', '.join(ENGINES)}")

    @cached_property
    def _reference(self) -> tokenizers.Tokenizer:
        reference = tokenizers.Tokenizer.from_str(self._definition)
        reference.encode_special_tokens = True  # text that looks like a special token stays text
        return reference

    @cached_property
    def _lengths(self) -> NDArray[np.int64]:
        return np.array([len(token) for token in self._token_bytes], dtype=np.int64)

    def bytes_of(self, ids: NDArray[np.uint32]) -> int:
        """How many bytes the ids stand for."""
        return int(self._lengths[ids].sum())

    def encode(self, text: str) -> list[int]:
        """The ids of the text, without ``end_of_text``."""
        return [int(token) for token in self.encode_array(text)]

    def encode_array(self, text: str) -> NDArray[np.uint32]:
        """``encode`` into an array, without a Python list on the way."""
        if self._fast is not None:
            try:
                return np.asarray(self._fast.encode_to_numpy(text, disallowed_special=()), dtype=np.uint32)
            except ValueError:
                pass  # its regex engine gives up on white space by the hundred thousand; the reference does not
        return self.reference_ids(text)

    def reference_ids(self, text: str) -> NDArray[np.uint32]:
        """``encode_array`` by ``tokenizers``, whatever the engine."""
        return np.asarray(self._reference.encode(text, add_special_tokens=False).ids, dtype=np.uint32)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes that the ids stand for; a special token stands for its name."""
        wanted = list(ids)
        for token in wanted:
            if not 0 <= token < self.vocab_size:
                raise ValueError(
                    f"token {token} is none of the tokenizer's {self.vocab_size}: a model with a padded vocabulary has "
                    "more; leave those out when sampling"
                )
        return b"".join([self._token_bytes[token] for token in wanted])

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids; bytes that are no UTF-8 become U+FFFD, as a sample may stop inside a character."""
        return self.decode_bytes(ids).decode("utf-8", "replace")


def _bytes_of_characters() -> dict[str, int]:
    """GPT-2's map from the printable characters of a byte-level vocabulary to the bytes they stand for."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
