"""Claims about sizes and ages in words and in numbers."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadstone.units import UNITS, format_age, format_size, format_spread, parse_age, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("20GB", 20_000_000_000),
        ("16GiB", 2**34),
        (" 1.5 gb ", 1_500_000_000),
        (".5MiB", 2**19),
        ("1.KB", 1000),
        ("7b", 7),
        (12, 12),
    ],
)
def test_sizes_are_read_as_bytes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("20 bananas", "'bananas' is not a unit"),
        ("20", "write one like 20GB"),
        ("", "write one like 20GB"),
        ("GB", "write one like 20GB"),
        ("1e3GB", "is not a"),
        ("1 2GB", "write one like 20GB"),
        ("٣GB", "write one like 20GB"),
        ("-1GB", "above zero"),
        (" -1GB", "above zero"),
        ("0GB", "above zero"),
        ("0.1B", "above zero"),
        (0, "above zero"),
        (-5, "above zero"),
        (True, "is not a size"),
    ],
)
def test_what_is_no_size_is_refused_with_the_reason(text: str | int, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        parse_size(text)


@settings(deadline=None)
@given(st.integers(1, 2**50), st.sampled_from(["b", "kb", "mb", "kib"]), st.booleans(), st.integers(0, 2))
def test_a_whole_number_of_units_is_exact(number: int, unit: str, shout: bool, spaces: int) -> None:
    """Case and a space between do not matter. Numbers stay where a double is exact."""
    number %= 2**53 // UNITS[unit]
    text = f"{number + 1}{' ' * spaces}{unit.upper() if shout else unit}"
    assert parse_size(text) == (number + 1) * UNITS[unit]


@settings(deadline=None)
@given(st.text("0123456789.-+ eEgkibGKIB٣é", max_size=12))
def test_any_text_is_a_size_above_zero_or_a_value_error(text: str) -> None:
    try:
        size = parse_size(text)
    except ValueError:
        return
    assert size > 0


@settings(deadline=None)
@given(st.integers(1, 10**15 - 10**13))
def test_a_formatted_size_reads_back_within_its_three_digits(size: int) -> None:
    assert parse_size(format_size(size)) == pytest.approx(size, rel=0.005)


@settings(deadline=None)
@given(st.integers(0, 10**18), st.integers(0, 10**18))
def test_a_larger_size_is_never_shown_as_a_smaller_one(one: int, other: int) -> None:
    def shown(size: int) -> float:
        number, unit = format_size(size).split()
        return float(number) * UNITS[unit.lower()]

    small, large = sorted((one, other))
    assert shown(small) <= shown(large) * (1 + 1e-9)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 KB"),
        (4_430_000_000, "4.43 GB"),
        (20 * 10**9, "20 GB"),
        (-2000, "-2 KB"),
    ],
)
def test_sizes_are_shown_with_three_digits(size: int, text: str) -> None:
    assert format_size(size) == text


@pytest.mark.parametrize(
    ("low", "high", "text"),
    [
        (5_000_000_000, 5_200_000_000, "5.1 ± 0.1 GB"),
        (5_400_000_000, 5_480_000_000, "5.44 ± 0.04 GB"),
        (520_000_000, 560_000_000, "540 ± 20 MB"),
        (7_000_000, 7_000_000, "7 MB"),
    ],
)
def test_a_spread_has_one_digit_of_doubt(low: int, high: int, text: str) -> None:
    assert format_spread(low, high) == text


@settings(deadline=None)
@given(st.integers(0, 10**13), st.integers(0, 10**13))
def test_a_spread_has_both_ends_in_it(one: int, other: int) -> None:
    """And is at most three times as wide as they are apart."""
    low, high = sorted((one, other))
    found = re.fullmatch(r"([0-9.]+) ± ([0-9.]+) (\w+)", format_spread(low, high))
    if found is None:
        assert high - low <= 1
        return
    middle, spread = (float(number) * UNITS[found[3].lower()] for number in found.groups()[:2])
    doubt = 1e-9 * high
    assert middle - spread <= low + doubt
    assert high - doubt <= middle + spread
    assert spread <= 1.5 * (high - low) + doubt


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30d", 30 * 86_400), ("12h", 43_200), ("2w", 14 * 86_400), ("45min", 2700), ("90s", 90), (" 1.5 D ", 129_600)],
)
def test_ages_are_read_as_seconds(text: str, seconds: float) -> None:
    assert parse_age(text) == seconds


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("6m", "'m' is not a unit of age"),  # minutes to one, months to another
        ("30", "write one like 30d"),
        ("", "write one like 30d"),
        ("-3d", "write one like 30d"),
        ("0d", "above zero"),
    ],
)
def test_ages_that_cannot_be_meant_are_refused_with_the_reason(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        parse_age(text)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-5, "just now"), (59, "just now"), (60, "1 minute ago"), (7199, "1 hour ago"), (3 * 86_400, "3 days ago"),
        (29 * 86_400, "29 days ago"), (65 * 86_400, "2 months ago"), (800 * 86_400, "2 years ago"),
    ],
)  # fmt: skip
def test_ages_are_told_in_words(seconds: float, text: str) -> None:
    assert format_age(seconds) == text
