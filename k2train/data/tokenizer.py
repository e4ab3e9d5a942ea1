"""A byte-level BPE: trained with ``tokenizers``, encoded by the fastest engine that gives the same ids.

The file ``tokenizer.json`` is the tokenizer, in Hugging Face's format. ``tiktoken`` with the same merges encodes about
five times faster. Its rule differs in principle (it merges any pair whose result is a token, lowest id first), so its
ids are compared with those of ``tokenizers`` before it is used; see ``choose_engine``.

Ids: special tokens first, then the 256 bytes, then the merges in the order they were learned. Text is always text: a
document that spells ``<|end_of_text|>`` is encoded as those characters.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

import numpy as np
import tiktoken
import tokenizers
from numpy.typing import NDArray

END_OF_TEXT = "<|end_of_text|>"
ENGINES = ("tiktoken", "tokenizers")

# Splits text before merging, as GPT-4's tokenizer does (cl100k_base): contractions, words with one leading character
# (a space, a dot, an underscore), numbers of up to three digits, punctuation, line ends, other white space. The last
# blank of an indentation goes with the word behind it.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_bpe(texts: Iterable[str], *, vocab_size: int) -> str:
    """Trains a byte-level BPE and returns its ``tokenizer.json``.

    Args:
        texts: documents; their order does not matter to the result.
        vocab_size: tokens, including the 256 bytes and the special token. Text with few repeated pairs ends with less.
    """
    if vocab_size < 257:
        raise ValueError(f"vocab_size={vocab_size} must be at least 257: 256 bytes and {END_OF_TEXT}; raise it")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(SPLIT_PATTERN), "isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    text: str = tokenizer.to_str(pretty=True)
    return text


def choose_engine(definition: str, sample: Iterable[str]) -> str:
    """``tiktoken`` if it gives the ids of ``tokenizers`` on every text of the sample, else ``tokenizers``."""
    fast, reference = (Tokenizer(definition, engine=engine) for engine in ENGINES)
    return ENGINES[0] if all(fast.encode(text) == reference.encode(text) for text in sample) else ENGINES[1]


class Tokenizer:
    """Text to ids and back. Decoding the ids of a text gives exactly that text."""

    def __init__(self, definition: str, *, engine: str) -> None:
        """Reads a ``tokenizer.json`` as ``train_bpe`` makes it.

        Args:
            definition: the file's content.
            engine: one of ``ENGINES``.
        """
        parsed = json.loads(definition)
        alphabet = _bytes_of_characters()
        specials = {token["content"]: token["id"] for token in parsed["added_tokens"]}
        ranks = {
            bytes(alphabet[character] for character in token): rank
            for token, rank in parsed["model"]["vocab"].items()
            if token not in specials
        }
        self.end_of_text: int = specials[END_OF_TEXT]
        self.vocab_size = len(ranks) + len(specials)
        self._token_bytes = [b""] * self.vocab_size
        for token_bytes, rank in (ranks | {text.encode(): rank for text, rank in specials.items()}).items():
            self._token_bytes[rank] = token_bytes
        self._reference = tokenizers.Tokenizer.from_str(definition)
        self._reference.encode_special_tokens = True  # text that looks like a special token stays text
        self._fast: tiktoken.Encoding | None = None
        if engine == "tiktoken":
            pattern = parsed["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
            self._fast = tiktoken.Encoding("k2train", pat_str=pattern, mergeable_ranks=ranks, special_tokens=specials)
        elif engine not in ENGINES:
            raise ValueError(f"engine={engine!r} is unknown: it must be one of {', '.join(ENGINES)}")

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
