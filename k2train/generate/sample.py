"""Sampling: which token comes next, and texts of many tokens.

Shapes: B texts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from k2train.config import GenerateConfig
from k2train.data import Tokenizer
from k2train.generate.scores import FullPasses, Scores
from k2train.generate.text import TextStream
from k2train.model import Transformer

# Tokens that are looked at before all are sorted.
LIKELY = 1024


@dataclass
class _Text:
    number: int
    ids: list[int]
    stream: TextStream
    generator: torch.Generator
    written: int = 0


def sample_texts(
    scores: Scores, tokenizer: Tokenizer, prompts: Sequence[str], config: GenerateConfig, *, first: int = 0
) -> Iterator[tuple[int, str]]:
    """What is written after each prompt, piece by piece, until the text ends: at its end, a stop string, max_tokens.

    An empty prompt starts a new document. A text follows from its prompt, its number and ``config.seed``, whatever is
    written beside it.

    Args:
        scores: of the model.
        tokenizer: of the model.
        prompts: what the texts begin with.
        config: how to sample; its own prompt is not read.
        first: number of the first text, as of a batch of several.

    Yields:
        The place of a prompt among ``prompts``, and what comes next in its text.

    Raises:
        ValueError: the model's scores are not finite.
    """
    texts = [
        _Text(
            number,
            tokenizer.encode(prompt) or [tokenizer.end_of_text],
            TextStream(config.stop),
            torch.Generator().manual_seed(config.seed + first + number),
        )
        for number, prompt in enumerate(prompts)
    ]
    logits_BV = scores.begin([text.ids for text in texts])
    while True:
        # A vocabulary padded to a round size has scores for ids that are no token.
        logits_BV = logits_BV[:, : tokenizer.vocab_size].cpu()
        going = []
        for row, text in enumerate(texts):
            logits_V = penalise(logits_BV[row], text.ids, penalty=config.repetition_penalty)
            token = _agree(
                next_token(logits_V, temperature=config.temperature, top_p=config.top_p, generator=text.generator)
            )
            ended = token == tokenizer.end_of_text
            text.ids.append(token)
            text.written += 1
            last = ended or text.written == config.max_tokens
            piece = text.stream.add(b"" if ended else tokenizer.decode_bytes([token]), last=last)
            if piece:
                yield text.number, piece
            if not (last or text.stream.stopped):
                going.append(row)
        if not going:
            return
        if len(going) < len(texts):
            texts = [texts[row] for row in going]
            scores.keep(going)
        logits_BV = scores.step([text.ids[-1] for text in texts])


def sample_text(model: Transformer, tokenizer: Tokenizer, config: GenerateConfig, device: torch.device | str) -> str:
    """The prompt and what a model in training writes after it.

    All ranks of an expert-parallel or sharded model must call it together; they agree on every token. The same seed
    gives the same text.
    """
    pieces = [piece for _, piece in sample_texts(FullPasses(model, device), tokenizer, [config.prompt], config)]
    return config.prompt + "".join(pieces)


def penalise(logits_V: Tensor, ids: Sequence[int], *, penalty: float) -> Tensor:
    """Lowers the scores of tokens that have come before (CTRL, arXiv 1909.05858, section 4.1).

    Positive scores are divided by the penalty and negative ones multiplied, as is the custom since.

    Args:
        logits_V: scores.
        ids: the prompt and what was written.
        penalty: 1 changes nothing.
    """
    if penalty == 1:
        return logits_V
    index = torch.tensor(sorted(set(ids)))
    seen = logits_V[index]
    return logits_V.index_copy(0, index, torch.where(seen > 0, seen / penalty, seen * penalty))


def next_token(logits_V: Tensor, *, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """Draws a token; from the likeliest alone at temperature 0.

    Args:
        logits_V: scores on the CPU.
        temperature: divides the scores; above 1 flattens their distribution, below 1 sharpens it.
        top_p: only the fewest tokens that together have at least this probability are drawn from (nucleus sampling,
            arXiv 1904.09751); 1 keeps all.
        generator: the source of randomness; one number is taken from it, none at temperature 0.
    """
    largest = logits_V.max()
    if not torch.isfinite(largest):
        raise ValueError("the model's scores are not finite: it has diverged; train with a lower optim.lr")
    if temperature == 0:
        return int(logits_V.argmax())
    # The largest score is subtracted first, so that a tiny temperature cannot overflow.
    probabilities_V = torch.softmax((logits_V.double() - largest) / temperature, dim=0)
    sorted_V, order_V = probabilities_V.topk(min(LIKELY, len(probabilities_V)))
    cumulative_V = sorted_V.cumsum(0)
    if cumulative_V[-1] < top_p and len(sorted_V) < len(probabilities_V):
        sorted_V, order_V = probabilities_V.sort(descending=True, stable=True)
        cumulative_V = sorted_V.cumsum(0)
    kept = int((cumulative_V - sorted_V < top_p).sum())  # a token stays if those before it do not suffice
    drawn = torch.rand((), generator=generator, dtype=torch.float64) * cumulative_V[kept - 1]
    return int(order_V[min(int((cumulative_V[:kept] <= drawn).sum()), kept - 1)])


def _agree(token: int) -> int:
    """Rank 0's token on all ranks: rounding may differ between them, and one gone astray would hang all."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return token
    chosen = torch.tensor(token if dist.get_rank() == 0 else 0)
    dist.all_reduce(chosen)
    return int(chosen)
