"""Sampling: one full forward pass a token over the last window of context, so that it is the trained model itself
that speaks, with no second implementation of attention to keep right.

Shapes: T tokens, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from k2train.config import GenerateConfig
from k2train.data import Tokenizer
from k2train.model import Transformer


def sample_text(model: Transformer, tokenizer: Tokenizer, config: GenerateConfig, device: torch.device | str) -> str:
    """The prompt and what the model writes after it, until it ends the text or ``config.max_tokens`` are written.

    An empty prompt starts a new document. All ranks of an expert-parallel model must call it together, as each of them
    holds a part of the experts; they agree on every token. The same seed gives the same text.
    """
    ids = tokenizer.encode(config.prompt) or [tokenizer.end_of_text]
    begin, window = len(ids), model.config.max_position_embeddings
    generator = torch.Generator().manual_seed(config.seed)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():  # not inference_mode: what ZeRO-3 gathers in it could not be trained with afterwards
            while len(ids) - begin < config.max_tokens:
                tokens_BT = torch.tensor([ids[-window:]], device=device)
                # A vocabulary padded to a round size has scores for ids that are no token.
                logits_V = model.logits(tokens_BT)[0, -1, : tokenizer.vocab_size].cpu()
                token = _agree(
                    next_token(logits_V, temperature=config.temperature, top_p=config.top_p, generator=generator)
                )
                if token == tokenizer.end_of_text:
                    break
                ids.append(token)
    finally:
        model.train(was_training)
    return config.prompt + tokenizer.decode(ids[begin:])


def next_token(logits_V: Tensor, *, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """Draws a token; from the likeliest alone at temperature 0.

    Args:
        logits_V: scores on the CPU.
        temperature: divides the scores; above 1 flattens their distribution, below 1 sharpens it.
        top_p: only the fewest tokens that together have at least this probability are drawn from (nucleus sampling,
            arXiv 1904.09751); 1 keeps all.
        generator: the source of randomness; one number is taken from it, none at temperature 0.
    """
    if not torch.isfinite(logits_V).any() or logits_V.isnan().any():
        raise ValueError("the model's scores are not finite: it has diverged; train with a lower optim.lr")
    if temperature == 0:
        return int(logits_V.argmax())
    # The largest score is subtracted first, so that a tiny temperature cannot overflow.
    probabilities_V = torch.softmax((logits_V.double() - logits_V.max()) / temperature, dim=0)
    sorted_V, order_V = probabilities_V.sort(descending=True, stable=True)
    cumulative_V = sorted_V.cumsum(0)
    kept = int((cumulative_V - sorted_V < top_p).sum())  # a token stays if those before it do not suffice
    drawn = torch.rand((), generator=generator, dtype=torch.float64) * cumulative_V[kept - 1]
    return int(order_V[min(int((cumulative_V[:kept] <= drawn).sum()), kept - 1)])


def printable(text: str) -> str:
    """The text as a terminal may be given it: control characters, which a young model writes too, become U+FFFD."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def _agree(token: int) -> int:
    """Rank 0's token on all ranks: rounding may differ between them, and one gone astray would hang all."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return token
    chosen = torch.tensor(token if dist.get_rank() == 0 else 0)
    dist.all_reduce(chosen)
    return int(chosen)
