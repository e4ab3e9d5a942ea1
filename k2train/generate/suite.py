"""What a small model of code can be seen to learn: which line comes next, and code that parses.

*Next line.* The beginning of a piece of held-out text, and four lines that may follow it: the true one, and those of
three other pieces, indented as it is. The model chooses the one that what stands before makes likelier the most: the
greatest log p(line | context) - log p(line | start of a document), the pointwise mutual information of Holtzman et al.
2021 (arXiv 2104.08315, section 3). By likelihood alone a small model chooses what is plain, whatever stands before.
Each line is right once and wrong three times, so that who looks at the lines alone is right in one of four.

*Syntax.* Texts are sampled; of the lines of each, the share that Python's parser takes, from the first line on. A text
that ends in the middle of a statement loses its last lines, so that people's code has less than 1 too.

Shapes: R rows, one for each answer, of T tokens.
"""

from __future__ import annotations

import ast
import itertools
import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence

from k2train.config import GenerateConfig
from k2train.data import Tokenizer
from k2train.data.dataset import IGNORED
from k2train.generate.sample import sample_texts
from k2train.generate.scores import Scores
from k2train.model import Transformer, evaluating

ANSWERS = 4  # to a question
SHORTEST = 8  # characters of an answer, white space apart: a bracket or an else tells nothing


@dataclass(frozen=True)
class Question:
    """Which line comes next?"""

    context: str  # whole lines
    answers: tuple[str, ...]  # lines, of which the first is the true one


def ask(pieces: Iterable[str]) -> list[Question]:
    """A question for each piece of text that has a line to ask for; none of fewer than four.

    Args:
        pieces: of text, which may be torn at both ends.
    """
    found: dict[str, tuple[str, str]] = {}  # by the line without its indentation: what stands before, the indentation
    for piece in pieces:
        lines = piece.split("\n")[1:-1]
        for number in range(len(lines) // 2, len(lines)):
            line = lines[number].lstrip(" \t")
            context = "".join(f"{before}\n" for before in lines[:number])
            if context.strip() and len("".join(line.split())) >= SHORTEST and line not in found:
                found[line] = context, lines[number].removesuffix(line)
                break
    if len(found) < ANSWERS:
        return []
    lines, asked = list(found), []
    for number, (context, indentation) in enumerate(found.values()):
        chosen = ((number + k * len(lines) // ANSWERS) % len(lines) for k in range(ANSWERS))
        asked.append(Question(context, tuple(f"{indentation}{lines[line]}\n" for line in chosen)))
    return asked


def longest_text(tokens_T: torch.Tensor, tokenizer: Tokenizer) -> str:
    """The longest piece of a document among the tokens of a window."""
    parts = itertools.groupby(tokens_T.tolist(), lambda token: token == tokenizer.end_of_text)
    pieces = [list(piece) for is_end, piece in parts if not is_end]
    longest: list[int] = max(pieces, key=len, default=[])
    return tokenizer.decode(longest)


def next_line_accuracy(
    model: Transformer,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    *,
    batch_size: int,
    length: int,
    device: torch.device,
) -> float:
    """The share of the questions whose true answer gains most from its context; NaN without questions.

    All ranks of a sharded model must call it together; each computes all of it.

    Args:
        model: put into eval mode meanwhile.
        tokenizer: of the model.
        questions: from ``ask``.
        batch_size: rows at once, if it is at least four.
        length: T at most; of a longer context the end is read.
        device: of the model.
    """

    def nats(contexts: Iterable[list[int]], answers: Iterable[list[int]]) -> torch.Tensor:
        rows = [_row(context, answer, length) for context, answer in zip(contexts, answers, strict=True)]
        tokens_RT = pad_sequence([tokens for tokens, _ in rows], batch_first=True)
        labels_RT = pad_sequence([labels for _, labels in rows], batch_first=True, padding_value=IGNORED)
        with evaluating(model):
            loss_RT: torch.Tensor = model(tokens_RT.to(device), labels_RT.to(device))[0]
        return loss_RT.double().sum(1).cpu().view(-1, ANSWERS)

    right, at_once = 0, max(1, batch_size // ANSWERS)
    for first in range(0, len(questions), at_once):
        batch = questions[first : first + at_once]
        contexts = [tokenizer.encode(question.context) for question in batch for _ in question.answers]
        answers = [tokenizer.encode(answer) for question in batch for answer in question.answers]
        gained = nats([[tokenizer.end_of_text]] * len(answers), answers) - nats(contexts, answers)
        right += int((gained[:, 0] > gained[:, 1:].amax(1)).sum())  # not where they are not finite
    return right / len(questions) if questions else math.nan


def _row(context: list[int], answer: list[int], length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens, labels) that predict the answer alone.

    Encoded apart, as a line that is not blank begins a token: the splits of the tokenizers end one at a line's end.
    """
    ids = torch.tensor([*context, *answer][-length - 1 :])
    labels = ids[1:].clone()
    labels[: max(0, len(labels) - len(answer))] = IGNORED
    return ids[:-1], labels


def valid_syntax(scores: Scores, tokenizer: Tokenizer, config: GenerateConfig, *, number: int) -> float:
    """The mean ``parsed_share`` of so many samples; NaN for a model that has diverged.

    Args:
        scores: of the model.
        tokenizer: of the model.
        config: how to sample; the seed is that of the first, each further one has one higher by 1.
        number: of samples, at least 1.
    """
    texts = [""] * number
    try:
        for which, piece in sample_texts(scores, tokenizer, [config.prompt] * number, config):
            texts[which] += piece
    except ValueError:  # its scores are not finite
        return math.nan
    return sum(parsed_share(config.prompt, text) for text in texts) / number


def parsed_share(prompt: str, text: str) -> float:
    """Of the whole lines after a prompt that are not blank the share that parses as Python, from the first on."""
    lines = text.split("\n")[:-1]
    written = [bool(line.strip()) for line in lines]
    for taken in range(len(lines), 0, -1):
        if written[taken - 1] and _parses(prompt + "\n".join(lines[:taken]) + "\n"):
            return sum(written[:taken]) / sum(written)
    return 0.0


def _parses(text: str) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of escapes and the like
        try:
            ast.parse(text)
        except (SyntaxError, ValueError, RecursionError, MemoryError):  # the last two of brackets in brackets
            return False
    return True
