"""Next lines and syntax: what is asked, what is right, and what parses."""

import math
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from small_run import TEXTS, random_model

from k2train.cli.commands import TRAIN
from k2train.cli.compose import compose
from k2train.config import GenerateConfig, RunConfig, parse
from k2train.data import Tokenizer
from k2train.data.tokenizer import train_bpe
from k2train.generate import FullPasses, Question, ask, longest_text, next_line_accuracy, parsed_share, valid_syntax


def piece(name, *, indentation="    "):
    body = [f"{name}_{n} = {name}({n})" for n in range(6)]
    return "torn_at_the_start(\n" + "".join(f"{indentation}{line}\n" for line in body) + "torn_at_th"


def test_each_line_is_right_once_and_wrong_three_times():
    names = ["read", "write", "close", "flush", "seek_to", "tell_me"]
    questions = ask([piece(name, indentation=" " * number) for number, name in enumerate(names)])
    assert len(questions) == len(names)
    for number, (name, question) in enumerate(zip(names, questions, strict=True)):
        lines = [f"{' ' * number}{name}_{n} = {name}({n})\n" for n in range(4)]
        assert question.context == "".join(lines[:3])
        assert question.answers[0] == lines[3]
        assert len({answer.strip() for answer in question.answers}) == 4
        assert {len(answer) - len(answer.lstrip(" ")) for answer in question.answers} == {number}
    given = Counter(answer.strip() for question in questions for answer in question.answers)
    assert set(given.values()) == {4}
    assert len(given) == len(names)


def test_what_is_not_asked():
    assert ask([piece("a_name")] * 9) == []  # one line is no choice
    assert ask([f"x\n  \nthe_line_{n}()\n" for n in range(9)]) == []  # nothing stands before it
    assert ask(["", "\n", "no line is whole", "x\n\n\n\n", "x\n)\n]\n}\n"] * 4) == []
    questions = ask(["a\nthe_first_line()\n)\nthe_third_line()\n", *(piece(f"a_{n}") for n in range(4))])
    assert questions[0].answers[0] != "the_first_line()\n"  # without what stands before it
    assert all("torn_at" not in question.context + "".join(question.answers) for question in questions)


def test_the_longest_text_of_a_window():
    tokenizer = Tokenizer(train_bpe(TEXTS, vocab_size=260), engine="tokenizers")
    end = tokenizer.end_of_text
    ids = [end, *tokenizer.encode("short"), end, end, *tokenizer.encode("the longest"), end, *tokenizer.encode("tail")]
    assert longest_text(torch.tensor(ids), tokenizer) == "the longest"
    assert longest_text(torch.tensor([end, end]), tokenizer) == ""


@pytest.fixture(scope="module")
def small():
    tokenizer = Tokenizer(train_bpe(TEXTS * 3, vocab_size=300), engine="tokenizers")
    config = parse(RunConfig, compose(TRAIN, ["experiment=tiny", "model.vocab_size=300"])).model
    return random_model(config, seed=3), tokenizer


def ask_one_by_one(model, tokenizer, questions, *, length):
    """The slow way: each answer by itself, from its logits."""

    def likelihood(context, line):
        ids = (context + line)[-length - 1 :]
        with torch.no_grad():
            likelihoods = F.log_softmax(model.logits(torch.tensor([ids[:-1]]))[0].double(), dim=-1)
        return sum(likelihoods[place, ids[place + 1]].item() for place in range(len(ids) - 1 - len(line), len(ids) - 1))

    right = 0
    for question in questions:
        context, scores = tokenizer.encode(question.context), []
        for answer in question.answers:
            line = tokenizer.encode(answer)
            scores.append(likelihood(context, line) - likelihood([tokenizer.end_of_text], line))
        right += scores.index(max(scores)) == 0
    return right / len(questions)


@pytest.mark.parametrize("length", [200, 40])
def test_the_answer_that_gains_most_from_what_stands_before_it(small, length):
    model, tokenizer = small
    names = [f"{text.split()[0]}{n}" for n, text in enumerate(TEXTS * 6)]
    questions = ask([piece(name * (1 + n % 3), indentation=" " * (n % 5)) for n, name in enumerate(names)])
    assert len(questions) == 12
    expected = ask_one_by_one(model, tokenizer, questions, length=length)
    assert 0 < expected < 1
    model.train()
    for batch_size in (1, 20):
        found = next_line_accuracy(
            model, tokenizer, questions, batch_size=batch_size, length=length, device=torch.device("cpu")
        )
        assert found == expected
    assert model.training
    model.eval()


def test_a_model_that_has_diverged_is_never_right(small):
    _, tokenizer = small

    class Diverged(torch.nn.Module):
        def forward(self, tokens, labels):
            return torch.full(tokens.shape, math.nan), None

    questions = [Question("a\n", ("b\n", "c\n", "d\n", "e\n"))]
    settings = {"batch_size": 4, "length": 8, "device": torch.device("cpu")}
    assert next_line_accuracy(Diverged(), tokenizer, questions, **settings) == 0
    assert math.isnan(next_line_accuracy(Diverged(), tokenizer, [], **settings))

    class NoScores(torch.nn.Module):
        config = SimpleNamespace(max_position_embeddings=8)

        def logits(self, tokens):
            return torch.full((*tokens.shape, 300), math.nan)

    generate = GenerateConfig(prompt="a", max_tokens=4, temperature=1.0, top_p=1.0, seed=0)
    assert math.isnan(valid_syntax(FullPasses(NoScores(), "cpu"), tokenizer, generate, number=2))


def test_samples_of_a_model(small):
    model, tokenizer = small
    generate = GenerateConfig(prompt="x = 1\n", max_tokens=60, temperature=1.0, top_p=1.0, seed=5)
    assert 0 <= valid_syntax(FullPasses(model, "cpu"), tokenizer, generate, number=1) <= 1


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("    return 1\n", 1.0),
        ("    return 1\n\n\nx = 2\ny = [", 1.0),  # the line that is torn does not count
        ("    return 1\nx = (\n", 1 / 2),
        ("    return 1\nx = = 2\ny = 3\nz = 4\n", 1 / 4),  # nothing after what does not parse
        ('    return 1\nx = """\n\n1 2\n"""\n', 1.0),  # but what closes it later
        ("return 1\n", 0.0),
        ("    x = '\\d'\n", 1.0),  # a warning, which nobody sees
        ("    x = '\0'\n", 0.0),
        ("    " + "(" * 5000 + "\n", 0.0),
        ("torn", 0.0),
        ("", 0.0),
    ],
)
def test_the_share_that_parses(text, share, recwarn):
    assert parsed_share("def f():\n", text) == share
    assert not recwarn.list
