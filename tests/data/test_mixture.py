"""Quotas follow shares, whatever the shares do, and never run backwards."""

from fractions import Fraction
from time import perf_counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from k2train.data.mixture import BLOCK, Knot, Mixture

WEIGHT = st.one_of(st.just(0.0), st.just(1.0), st.floats(0.001, 10), st.floats(1e-9, 1e-3))


@st.composite
def mixtures(draw, *, most: int = 6):
    sources = draw(st.integers(1, most))
    weights = st.tuples(*[WEIGHT] * sources).filter(any)
    samples = sorted(draw(st.lists(st.integers(0, 12 * BLOCK), max_size=4)))
    return [Knot(sample, draw(weights)) for sample in [0, *samples]]


def due(knots: list[Knot], number: int) -> list[float]:
    """What each source is due, by adding up shares in the middle of each sample: an oracle without the closed form."""
    samples = np.arange(number) + 0.5
    shares = np.array([np.array(knot.weights) / sum(knot.weights) for knot in knots])
    result = np.empty((number, shares.shape[1]))
    for start, stop, before, after in zip(knots, [*knots[1:], None], shares, [*shares[1:], shares[-1]], strict=True):
        inside = samples > start.sample
        length = stop.sample - start.sample if stop else 1
        along = np.clip((samples[inside] - start.sample) / max(1, length), 0, 1)[:, None]
        result[inside] = before + (after - before) * along
    return result.sum(0).tolist()


@settings(deadline=None, max_examples=60)
@given(mixtures())
def test_quotas_never_run_backwards_and_stay_near_what_is_due(knots):
    mixture, before = Mixture(knots), (0,) * len(knots[0].weights)
    for block in range(1, 16):
        quotas = mixture.quotas(block)
        assert sum(quotas) == block * BLOCK
        assert all(now >= then for now, then in zip(quotas, before, strict=True))
        for source, quota in enumerate(quotas):
            assert abs(quota - Fraction(*mixture.due(block * BLOCK, [source]))) <= max(1, mixture.bound)
        before = quotas


@settings(deadline=None, max_examples=40)
@given(mixtures(most=4))
def test_with_up_to_four_sources_each_is_within_one_sample(knots):
    mixture = Mixture(knots)
    assert mixture.bound <= 1
    for block in (1, 7, 1000):
        assert off(mixture, block) <= 1


def off(mixture: Mixture, block: int) -> Fraction:
    """By how much the source that is off the most is off before a block."""
    exact = [Fraction(*mixture.due(block * BLOCK, [source])) for source in range(mixture.sources)]
    return max(abs(quota - due) for quota, due in zip(mixture.quotas(block), exact, strict=True))


@settings(deadline=None, max_examples=20)
@given(st.integers(5, 32), st.integers(0, 2**32), st.lists(st.integers(0, 12 * BLOCK), max_size=3))
def test_sources_of_a_thousandth_and_more_are_within_one_sample_however_many(number, seed, samples):
    rng = np.random.default_rng(seed)
    weights = [0.001 + (1 - 0.001 * number) * rng.dirichlet(np.full(number, 0.3)) for _ in [0, *samples]]
    mixture = Mixture([Knot(at, tuple(w.tolist())) for at, w in zip([0, *sorted(samples)], weights, strict=True)])
    assert all(off(mixture, block) < 1 for block in (1, 5, 13, 1000))


FIBONACCI = (1e-7, 1e-5, 1.01e-5, 2.02e-5, 3.04e-5, 5.07e-5, 8.12e-5, 13.2e-5, 21.4e-5, 34.7e-5, 1.0)
MIXES = {
    "equal": lambda rng, number: np.ones(number),
    "geometric": lambda rng, number: rng.uniform(0.3, 0.9) ** np.arange(number),
    "dirichlet": lambda rng, number: rng.dirichlet(np.full(number, 0.2)) + 1e-12,
    "tiny": lambda rng, number: 10.0 ** rng.uniform(-9, 0, number),
    "fibonacci": lambda rng, number: rng.permutation(FIBONACCI),  # the nearest to what the bound is made of
}


@pytest.mark.parametrize("kind", MIXES)
def test_however_many_sources_none_is_off_by_two(kind):
    """Weights that stay: the bound holds, and is far from being reached."""
    rng, most, worst = np.random.default_rng(4), 0.0, Fraction(0)
    for number in (2, 3, 5, 8, 13, 32):
        mixture = Mixture([Knot(0, tuple(MIXES[kind](rng, number).tolist()))])
        for block in rng.integers(1, 10**5, size=12).tolist():
            found = off(mixture, block)
            assert found <= max(1, mixture.bound)
            worst = max(worst, found)
        most = max(most, mixture.bound)
    assert most < 1.7
    assert worst < 1.1


def test_changing_weights_keep_the_bound_of_a_balanced_tree():
    rng = np.random.default_rng(5)
    for number in (5, 8, 16, 32):
        starts = [0, *sorted(rng.integers(1, 20 * BLOCK, size=3).tolist())]
        kinds = rng.choice(list(MIXES)[:4], size=4)
        knots = [Knot(at, tuple(MIXES[k](rng, number).tolist())) for at, k in zip(starts, kinds, strict=True)]
        mixture = Mixture(knots)
        assert mixture.bound <= (number - 1).bit_length() / 2
        assert all(off(mixture, block) <= max(1, mixture.bound) for block in range(1, 24, 3))


@settings(deadline=None, max_examples=25)
@given(mixtures(), st.integers(0, 13 * BLOCK))
def test_what_is_due_is_the_sum_of_the_shares(knots, number):
    mixture = Mixture(knots)
    for source, expected in enumerate(due(knots, number)):
        above, below = mixture.due(number, [source])
        assert above / below == pytest.approx(expected, abs=1e-4)


@settings(deadline=None, max_examples=25)
@given(mixtures(), st.integers(0, 14))
def test_inside_a_block_each_source_stays_within_their_number(knots, block):
    mixture = Mixture(knots)
    sources, turns = mixture.block(block)
    counts = np.array(mixture.quotas(block))
    number = len(counts)
    for place in range(0, BLOCK, 97):
        numbers = np.bincount(sources[:place], minlength=number) + counts
        exact = [above / below for above, below in (mixture.due(block * BLOCK + place, [s]) for s in range(number))]
        assert np.abs(numbers - exact).max() <= max(number, 1)
        assert mixture.counts(block * BLOCK + place) == tuple(numbers)
    assert np.array_equal(np.bincount(sources, minlength=number), np.subtract(mixture.quotas(block + 1), counts))
    for source in range(number):
        assert np.array_equal(turns[sources == source], np.arange((sources == source).sum()))


def test_a_source_without_weight_gives_nothing():
    mixture = Mixture([Knot(0, (1, 0, 2)), Knot(50_000, (1, 0, 2)), Knot(60_000, (0, 0, 1))])
    for block in (1, 12, 15, 10_000):
        assert mixture.quotas(block)[1] == 0
    assert mixture.quotas(10_000)[0] == mixture.quotas(20_000)[0]


def test_equal_numbers_of_blocks_are_shared_exactly():
    mixture = Mixture([Knot(0, (2, 1, 1))])
    assert mixture.quotas(10) == (20480, 10240, 10240)
    assert mixture.block(3)[0][:8].tolist() == [0, 1, 2, 0, 0, 1, 2, 0]


def test_the_mixture_never_changes():
    """Golden numbers: a change here changes what every old run would have seen."""
    mixture = Mixture([Knot(0, (0.7, 0.2, 0.1, 0.03)), Knot(10**6, (0.1, 0.2, 0.3, 0)), Knot(10**6, (1, 1, 0, 0))])
    assert [mixture.quotas(block) for block in GOLDEN] == list(GOLDEN.values())
    assert mixture.find(10**9) == (0, 499923139)
    many = Mixture([Knot(0, (1, 1e-4, 3e-5, 0.4, 2e-6, 0.03, 1e-5)), Knot(10**7, (0, 1e-4, 3e-5, 0.4, 0, 0.03, 1e-3))])
    assert many.quotas(1000) == GOLDEN_OF_SEVEN


def test_far_samples_are_found_at_once():
    knots = [Knot(0, (5, 1, 3)), Knot(10**8, (5, 1, 3)), Knot(3 * 10**9, (1, 7, 0)), Knot(4 * 10**9, (1, 1, 1))]
    begin = perf_counter()
    for number in range(10**9, 10**9 + 10 * BLOCK, BLOCK):
        Mixture(knots).find(number)
    assert (perf_counter() - begin) / 10 < 0.05


@pytest.mark.parametrize(
    ("knots", "message"),
    [
        ([], "must begin with 0"),
        ([Knot(1, (1.0,))], "must begin with 0"),
        ([Knot(0, (1.0,)), Knot(9, (1.0,)), Knot(8, (1.0,))], "never fall"),
        ([Knot(0, (0.0, 0.0))], "weigh at least one source"),
        ([Knot(0, (2.0, -1.0))], "at least 0"),
    ],
)
def test_weights_that_cannot_be_are_refused(knots, message):
    with pytest.raises(ValueError, match=message):
        Mixture(knots)


GOLDEN = {
    1: (2779, 797, 401, 119),
    2: (5550, 1595, 809, 238),
    244: (423043, 263562, 298256, 14563),
    245: (424899, 265514, 298544, 14563),
    1000000: (2047923139, 2047763754, 298544, 14563),
}
GOLDEN_OF_SEVEN = (2277493, 422, 127, 1689288, 5, 126697, 1968)
