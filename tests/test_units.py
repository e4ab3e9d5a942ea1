import pytest

from k2train.units import count, duration, memory


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (7, "7"),
        (0.25, "0.25"),
        (999, "999"),
        (999.6, "1.00k"),
        (12_345, "12.3k"),
        (999_600, "1.00M"),
        (1_234_567, "1.23M"),
        (123_456_789, "123M"),
        (1_026_408_209_408, "1.03T"),
        (15.5e15, "15500T"),
        (float("nan"), "-"),
        (float("inf"), "-"),
    ],
)
def test_count(value, text):
    assert count(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0s"),
        (8.12, "8.1s"),
        (9.96, "10s"),
        (59.4, "59s"),
        (59.6, "1m00s"),
        (754, "12m34s"),
        (3599.7, "1h00m"),
        (11_100, "3h05m"),
        (86_399, "1d00h"),
        (187_000, "2d04h"),
        (float("inf"), "-"),
    ],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (12, "12 B"),
        (36 * 2**20, "36 MiB"),
        (2.1 * 2**30, "2.1 GiB"),
        (1020 * 2**20, "0.996 GiB"),
        (300 * 2**30, "300 GiB"),
    ],
)
def test_memory(size, text):
    assert memory(size) == text
