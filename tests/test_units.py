"""Sizes: what is read, what is refused, and that text made from a size reads back as that size."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiermem.errors import ConfigError
from tiermem.units import (
    MAX_SIZE_BYTES,
    MIN_FRACTION,
    UNIT_BYTES,
    Size,
    SizeKind,
    format_bytes,
    shorten,
)

KiB, MiB, GiB = 2**10, 2**20, 2**30


@pytest.mark.parametrize(
    ("value", "num_bytes"),
    [
        (0, 0),
        ("0", 0),
        ("0GiB", 0),
        (1, 1),
        (4096, 4096),
        ("1B", 1),
        ("8GiB", 8 * GiB),
        ("8 GiB", 8 * GiB),
        (" 8GiB ", 8 * GiB),
        ("1.5GiB", 3 * GiB // 2),
        ("512MB", 512_000_000),
        ("512MiB", 512 * MiB),
        ("0.1KiB", 102),
        ("2TB", 2 * 10**12),
        ("1048576TiB", MAX_SIZE_BYTES),
        (MAX_SIZE_BYTES, MAX_SIZE_BYTES),
    ],
)
def test_explicit_sizes(value: int | str, num_bytes: int) -> None:
    size = Size.parse(value)
    assert (size.kind, size.num_bytes, size.fraction) == (SizeKind.EXPLICIT, num_bytes, 0.0)
    assert size.resolve(free_bytes=1) == num_bytes, (
        "an explicit size does not shrink with what is free"
    )


@pytest.mark.parametrize(
    ("value", "fraction"),
    [(0.5, 0.5), ("50%", 0.5), ("12.5 %", 0.125), (1.0, 1.0), ("100%", 1.0), ("33.3%", 0.333)],
)
def test_shares(value: float | str, fraction: float) -> None:
    size = Size.parse(value)
    assert (size.kind, size.num_bytes, size.fraction) == (SizeKind.FRACTION, 0, fraction)


def test_a_share_resolves_exactly_and_rounds_down() -> None:
    assert Size.parse("30%").resolve(1000) == 300, "0.3 is below 3/10 as a binary float"
    assert Size.parse("30%").resolve(999) == 299
    assert Size.parse(1.0).resolve(2**60 + 1) == 2**60 + 1
    assert Size.parse(0.5).resolve(0) == 0


def test_auto_takes_the_share_it_is_given() -> None:
    size = Size.parse("auto", auto_fraction=0.25)
    assert (size.kind, size.resolve(4000)) == (SizeKind.AUTO, 1000)


def test_a_size_stays_as_it_is() -> None:
    size = Size.parse("auto", auto_fraction=0.25)
    assert Size.parse(size, auto_fraction=0.75) is size


def test_only_an_explicit_zero_is_zero() -> None:
    assert Size.parse("0").is_zero and Size.parse(0).is_zero
    assert not any(Size.parse(value).is_zero for value in (1, "auto", MIN_FRACTION))


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (-1, "0 to 1 EiB"),
        (MAX_SIZE_BYTES + 1, "0 to 1 EiB"),
        ("1048577TiB", "0 to 1 EiB"),
        pytest.param(10**5000, "0 to 1 EiB", id="5001 digits"),
        (True, "bytes as an int"),
        (None, "bytes as an int"),
        ([8], "bytes as an int"),
        ("", "bytes as an int"),
        ("8", "has no unit"),
        ("8gb", "did you mean GB or GiB?"),
        ("8M", "did you mean MB or MiB?"),
        ("8Gb", "did you mean GB or GiB?"),
        ("8 parsecs", "is not one of B, KB"),
        ("-8GiB", "bytes as an int"),
        ("+8GiB", "bytes as an int"),
        ("1e3MiB", "bytes as an int"),
        ("0x10MiB", "bytes as an int"),
        ("1_000MiB", "bytes as an int"),
        ("٣GiB", "bytes as an int"),
        ("8GiB\x00", "bytes as an int"),
        ("9" * 41 + "GiB", "bytes as an int"),
        ("0.5B", "less than one byte"),
        ("AUTO", "bytes as an int"),
        (0.0, "0.000001 to 1.0"),
        (-0.5, "0.000001 to 1.0"),
        (1.0001, "0.000001 to 1.0"),
        (8e9, "0.000001 to 1.0"),
        (1e-7, "0.000001 to 1.0"),
        (math.nan, "0.000001 to 1.0"),
        (math.inf, "0.000001 to 1.0"),
        ("0%", "0.000001 to 1.0"),
        ("101%", "0.000001 to 1.0"),
        ("nan%", "bytes as an int"),
    ],
)
def test_what_is_no_size_is_refused_by_name(value: object, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Size.parse(value, "tiers.gpu")  # type: ignore[arg-type]
    assert str(caught.value).startswith("tiers.gpu=")
    assert says in str(caught.value)
    assert len(str(caught.value)) < 400


explicit_sizes = st.integers(0, MAX_SIZE_BYTES)
fractions = st.floats(MIN_FRACTION, 1.0)


@given(explicit_sizes)
def test_bytes_survive_the_way_through_text(num_bytes: int) -> None:
    size = Size.parse(num_bytes)
    assert Size.parse(str(size)) == size
    assert Size.parse(f"{num_bytes}B") == size


@given(fractions)
def test_shares_survive_the_way_through_text(fraction: float) -> None:
    size = Size.parse(fraction)
    assert Size.parse(str(size)) == size


@given(st.integers(0, 10**6), st.integers(0, 10**6), st.sampled_from(sorted(UNIT_BYTES)))
def test_decimal_text_is_read_exactly(whole: int, millionths: int, unit: str) -> None:
    amount = Fraction(f"{whole}.{millionths:07d}")
    num_bytes = int(amount * UNIT_BYTES[unit])
    text = f"{whole}.{millionths:07d}{unit}"
    if (num_bytes == 0) != (amount == 0) or num_bytes > MAX_SIZE_BYTES:
        with pytest.raises(ConfigError):
            Size.parse(text)
    else:
        assert Size.parse(text).num_bytes == num_bytes


@given(fractions, st.integers(0, MAX_SIZE_BYTES))
def test_a_share_is_never_more_than_what_is_free(fraction: float, free_bytes: int) -> None:
    assert 0 <= Size.parse(fraction).resolve(free_bytes) <= free_bytes


anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.binary()
    | st.complex_numbers(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)
near_misses = st.from_regex(
    r"[-+ ]?[0-9]{0,50}[.,]?[0-9]{0,50} ?[kKmMgGtT]?i?[bB%]?.?", fullmatch=True
)


@given(anything | near_misses)
def test_garbage_raises_nothing_but_config_error(value: object) -> None:
    try:
        size = Size.parse(value)  # type: ignore[arg-type]
    except ConfigError:
        return
    assert Size.parse(str(size)) == size


@given(explicit_sizes)
def test_formatted_bytes_use_the_largest_unit_that_divides(num_bytes: int) -> None:
    text = format_bytes(num_bytes)
    number = text.rstrip("TGMKiB")
    assert int(number) * UNIT_BYTES[text[len(number) :] or "B"] == num_bytes
    assert text.endswith("TiB") or int(number) % 1024 or num_bytes == 0


def test_a_wrong_value_is_shown_short() -> None:
    endless: list[object] = []
    endless.append([10**5000])
    assert shorten("x" * 1000) == repr("x" * 40) + "..."
    assert shorten(endless) == "<list>"
    assert shorten(10**5000) == "<int>"
    assert len(shorten(list(range(1000)))) < 100
