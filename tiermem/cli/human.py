"""Numbers as people read them."""

from __future__ import annotations

_SIZE_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
NOTHING = "-"
"""What stands where there is no number."""


def size_text(num_bytes: int) -> str:
    """Bytes with one decimal in the unit that suits: 1288490189 is "1.2 GiB"."""
    value = float(num_bytes)
    for unit in _SIZE_UNITS:
        if value < 1023.95 or unit == _SIZE_UNITS[-1]:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError("the last unit takes everything")


def count_text(count: int) -> str:
    """A count with thousands apart: "16,384"."""
    return f"{count:,}"


def rate_text(gb_per_s: float) -> str:
    """10^9 bytes a second with three digits, in MB/s below 0.1; NOTHING for 0."""
    if gb_per_s <= 0:
        return NOTHING
    if gb_per_s < 0.1:
        return f"{_three_digits(1000 * gb_per_s)} MB/s"
    return f"{_three_digits(gb_per_s)} GB/s"


def tokens_rate_text(tokens: int, seconds: float) -> str:
    """Tokens a second with three digits; NOTHING where there is no rate."""
    if tokens <= 0 or seconds <= 0:
        return NOTHING
    return f"{_three_digits(tokens / seconds)} tokens/s"


def flops_text(flops: float) -> str:
    """Operations a second with three digits."""
    return f"{flops / 1e12:.3g} TFLOP/s" if flops >= 1e12 else f"{flops / 1e9:.3g} GFLOP/s"


def time_text(seconds: float) -> str:
    """A time with three digits, in the unit that suits from microseconds to seconds."""
    if seconds >= 0.9995:
        return f"{_three_digits(seconds)} s"
    return f"{seconds * 1e6:.3g} µs" if seconds < 1e-3 else f"{seconds * 1e3:.3g} ms"


def share_text(share: float | None) -> str:
    """A share of 1 in percent; NOTHING for None."""
    return NOTHING if share is None else f"{100 * share:.1f}%"


def duration_text(seconds: float) -> str:
    """A time in its two largest units: "340 ms", "2.1 s", "3 min 20 s", "2 h 5 min", "3 d 4 h"."""
    seconds = max(seconds, 0.0)
    if seconds < 0.9995:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for large, small, in_large, in_small in (("d", "h", 86400, 3600), ("h", "min", 3600, 60)):
        if whole >= in_large:
            return f"{whole // in_large} {large} {whole % in_large // in_small} {small}"
    return f"{whole // 60} min {whole % 60} s"


def _three_digits(value: float) -> str:
    if value >= 99.95:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"
