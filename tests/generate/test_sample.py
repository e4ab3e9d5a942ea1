from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from k2train.config import GenerateConfig
from k2train.generate import next_token, printable, sample_text

VOCAB, PADDED, WINDOW = 12, 16, 5


class Letters:
    """Token 0 ends a text, token n is the n-th letter."""

    vocab_size, end_of_text = VOCAB, 0

    def encode(self, text):
        return [ord(c) - ord("a") + 1 for c in text]

    def decode(self, ids):
        assert all(0 < i < VOCAB for i in ids)
        return "".join(chr(ord("a") + i - 1) for i in ids)

    def decode_bytes(self, ids):
        return self.decode(ids).encode()


class Successor(torch.nn.Module):
    """Expects the letter after the last one; scores padding ids highest of all."""

    def __init__(self, *, end_after: int = VOCAB - 1, sharpness: float = 50.0):
        super().__init__()
        self.config = SimpleNamespace(max_position_embeddings=WINDOW)
        self.end_after, self.sharpness = end_after, sharpness
        self.seen = []

    def logits(self, tokens_BT):
        assert not self.training
        assert not torch.is_grad_enabled()
        assert tokens_BT.shape[1] <= WINDOW
        self.seen.append(tokens_BT[0].tolist())
        out = torch.zeros(*tokens_BT.shape, PADDED)
        for t, token in enumerate(tokens_BT[0].tolist()):
            out[0, t, 0 if token >= self.end_after else token + 1] = self.sharpness
        out[..., VOCAB:] = 1e4
        return out


def config(**changes):
    return GenerateConfig(**({"prompt": "", "max_tokens": 4, "temperature": 0.0, "top_p": 1.0, "seed": 1} | changes))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_greedy_text_goes_on_from_the_prompt_and_never_uses_padding():
    assert sample_text(Successor(), Letters(), config(prompt="bc"), "cpu") == "bcdefg"


def test_an_empty_prompt_starts_a_document():
    model = Successor()
    assert sample_text(model, Letters(), config(), "cpu") == "abcd"
    assert model.seen[0] == [Letters.end_of_text]


def test_the_end_of_text_ends_it():
    assert sample_text(Successor(end_after=2), Letters(), config(max_tokens=100), "cpu") == "ab"


def test_the_context_is_the_last_window():
    model = Successor()
    sample_text(model, Letters(), config(prompt="abcdefg"), "cpu")
    assert model.seen[0] == [3, 4, 5, 6, 7]
    assert model.seen[1] == [4, 5, 6, 7, 8]


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_comes_back_even_after_an_error(training):
    model = Successor().train(training)
    sample_text(model, Letters(), config(), "cpu")
    assert model.training is training
    model.logits = lambda tokens: torch.full((1, tokens.shape[1], PADDED), float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        sample_text(model, Letters(), config(), "cpu")
    assert model.training is training


def test_the_seed_decides_and_the_global_generator_is_left_alone():
    def text(seed):
        return sample_text(
            Successor(sharpness=0.5), Letters(), config(temperature=1.0, max_tokens=30, seed=seed), "cpu"
        )

    before = torch.get_rng_state()
    texts = [text(seed) for seed in (1, 1, 2, 3)]
    assert torch.equal(torch.get_rng_state(), before)
    assert texts[0] == texts[1]
    assert len(set(texts)) == 3


def test_temperature_zero_takes_the_likeliest():
    assert next_token(torch.tensor([0.1, 3.0, 2.9]), temperature=0, top_p=1.0, generator=generator()) == 1


def test_frequencies_follow_the_softmax():
    logits_V, source = torch.tensor([1.0, 0.0, -1.0, float("-inf")]), generator(3)
    drawn = [next_token(logits_V, temperature=2.0, top_p=1.0, generator=source) for _ in range(4000)]
    counts_V = torch.bincount(torch.tensor(drawn), minlength=4) / 4000
    assert counts_V[3] == 0
    torch.testing.assert_close(counts_V, torch.softmax(logits_V / 2, 0), atol=0.03, rtol=0)


@pytest.mark.parametrize(("top_p", "kept"), [(0.01, {2}), (0.5, {2}), (0.51, {2, 0}), (0.8, {2, 0}), (0.81, {2, 0, 1})])
def test_top_p_keeps_the_fewest_tokens_that_suffice(top_p, kept):
    logits_V, source = torch.tensor([0.3, 0.2, 0.5]).log(), generator(4)
    drawn = {next_token(logits_V, temperature=1.0, top_p=top_p, generator=source) for _ in range(200)}
    assert drawn == kept


def test_a_tiny_temperature_is_no_overflow():
    assert next_token(torch.tensor([500.0, 501.0]), temperature=1e-9, top_p=0.9, generator=generator()) == 1


def _rank(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    # Models that would go astray: rank 1's ends its text at once.
    text = sample_text(Successor(end_after=0 if rank else 9), Letters(), config(max_tokens=6), "cpu")
    (folder / str(rank)).write_text(text)
    dist.destroy_process_group()


def test_ranks_agree_on_every_token(tmp_path):
    mp.spawn(_rank, args=(tmp_path,), nprocs=2)
    assert (tmp_path / "0").read_text() == (tmp_path / "1").read_text() == "abcdef"


def test_control_characters_do_not_reach_the_terminal():
    assert printable("a\tb\n\x1b[31mé\x00\r") == "a\tb\n\ufffd[31mé\ufffd\ufffd"
