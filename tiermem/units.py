"""Size: how large a tier shall be, as bytes, text with a unit, a share of what is free, or "auto"."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from decimal import Decimal
from enum import Enum
from fractions import Fraction
from typing import TypeAlias

from tiermem.errors import ConfigError

UNIT_BYTES = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
}
MAX_SIZE_BYTES = 2**60
"""No tier is larger (1 EiB): addresses within a tier stay far from 64 bits."""

MIN_FRACTION = 1e-6
DEFAULT_AUTO_FRACTION = 0.5
MAX_TEXT = 40
"""Characters of a size; also how much of a wrong value a message repeats."""

SIZE_RANGE = (
    "must be bytes as an int, text with a unit such as '8GiB' or '512MB' (0 to 1 EiB), "
    "a share of free memory as '50%' or a float (0.000001 to 1.0), or 'auto'"
)

_BYTES_TEXT = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?([A-Za-z]*)")
_PERCENT_TEXT = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?%")


class SizeKind(Enum):
    """How a size was given, which decides what happens when it does not fit.

    EXPLICIT: an error that tells the free bytes. FRACTION and AUTO: a smaller pool and a warning.
    """

    EXPLICIT = "explicit"
    FRACTION = "fraction"
    AUTO = "auto"


@dataclass(frozen=True, slots=True)
class Size:
    """A size that may depend on what is free; made by `Size.parse`.

    num_bytes: bytes of an EXPLICIT size, else 0.
    fraction: share of the free bytes of a FRACTION or AUTO size, MIN_FRACTION to 1, else 0.
    """

    kind: SizeKind
    num_bytes: int = 0
    fraction: float = 0.0

    @classmethod
    def parse(
        cls, value: SizeLike, key: str = "size", auto_fraction: float = DEFAULT_AUTO_FRACTION
    ) -> Size:
        """Read a size.

        Parameters
        ----------
        value: an int (bytes), text ("8GiB", "1.5 GB", "50%", "auto", "0"), a float from MIN_FRACTION to 1
            (a share of the free bytes), or a Size, which is returned as it is. Fractions of a byte are dropped.
        key: what the value is called in messages.
        auto_fraction: the share that "auto" stands for.

        Raises
        ------
        ConfigError: naming key, value and range, for anything else.
        """
        if isinstance(value, Size):
            return value
        if isinstance(value, str):
            return _parse_text(value, key, auto_fraction)
        if type(value) is int:
            return _explicit(value, value, key)
        if type(value) is float:
            return _share(value, value, key)
        raise _refuse(key, value)

    def resolve(self, free_bytes: int) -> int:
        """Bytes wanted where `free_bytes` are free; an EXPLICIT size may exceed them."""
        if self.kind is SizeKind.EXPLICIT:
            return self.num_bytes
        return int(free_bytes * Fraction(repr(self.fraction)))

    @property
    def is_zero(self) -> bool:
        """True for an explicit 0: the tier is switched off."""
        return self.kind is SizeKind.EXPLICIT and self.num_bytes == 0

    def __str__(self) -> str:
        """Text that `parse` reads back as an equal size."""
        if self.kind is SizeKind.EXPLICIT:
            return format_bytes(self.num_bytes)
        if self.kind is SizeKind.AUTO:
            return "auto"
        return _format_percent(self.fraction)


SizeLike: TypeAlias = "Size | str | int | float"
"""What `Size.parse` takes."""


def format_bytes(num_bytes: int) -> str:
    """`num_bytes` exactly, in the largest binary unit that divides it: 8589934592 is "8GiB"."""
    if num_bytes == 0:
        return "0"
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        count, rest = divmod(num_bytes, UNIT_BYTES[unit])
        if rest == 0:
            return f"{count}{unit}"
    return f"{num_bytes}B"


def _parse_text(text: str, key: str, auto_fraction: float) -> Size:
    stripped = text.strip()
    if stripped == "auto":
        return Size(SizeKind.AUTO, fraction=auto_fraction)
    if len(stripped) > MAX_TEXT:
        raise _refuse(key, text)
    if match := _PERCENT_TEXT.fullmatch(stripped):
        return _share(float(Fraction(match[1]) / 100), text, key)
    match = _BYTES_TEXT.fullmatch(stripped)
    if match is None:
        raise _refuse(key, text)
    amount, unit = Fraction(match[1]), match[2]
    if unit == "" and amount == 0:
        return Size(SizeKind.EXPLICIT)
    if unit not in UNIT_BYTES:
        raise ConfigError(f"{key}={text!r}: {_unit_advice(unit)}")
    num_bytes = int(amount * UNIT_BYTES[unit])
    if num_bytes == 0 and amount > 0:
        raise ConfigError(f"{key}={text!r}: less than one byte; write 0 for none")
    return _explicit(num_bytes, text, key)


def _explicit(num_bytes: int, given: object, key: str) -> Size:
    if not 0 <= num_bytes <= MAX_SIZE_BYTES:
        raise _refuse(key, given)
    return Size(SizeKind.EXPLICIT, num_bytes=num_bytes)


def _share(fraction: float, given: object, key: str) -> Size:
    if not (math.isfinite(fraction) and MIN_FRACTION <= fraction <= 1.0):
        raise _refuse(key, given)
    return Size(SizeKind.FRACTION, fraction=fraction)


def _unit_advice(unit: str) -> str:
    known = ", ".join(UNIT_BYTES)
    if not unit:
        return f"has no unit; must end in one of {known}, or be 'auto'"
    wanted = unit.lower().removesuffix("b").removesuffix("i")
    near = [
        name for name in UNIT_BYTES if name.lower().removesuffix("b").removesuffix("i") == wanted
    ]
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    return f"unit {unit!r} is not one of {known}{hint}"


def _refuse(key: str, value: object) -> ConfigError:
    return ConfigError(f"{key}={shorten(value)}: {SIZE_RANGE}")


def shorten(value: object) -> str:
    """`repr(value)`, cut so that a message stays readable; never fails on huge numbers or deep values."""
    if isinstance(value, (str, bytes)) and len(value) > MAX_TEXT:
        return f"{value[:MAX_TEXT]!r}..."
    try:
        text = repr(value)
    except (
        ValueError,
        RecursionError,
    ):  # an int of more digits than Python prints, a list in itself
        return f"<{type(value).__name__}>"
    return text if len(text) <= 2 * MAX_TEXT else text[: 2 * MAX_TEXT] + "..."


def _format_percent(fraction: float) -> str:
    """`fraction` as the percentage that reads back as the same float."""
    text = f"{Decimal(repr(fraction)) * 100:f}"
    return f"{text.rstrip('0').rstrip('.') if '.' in text else text}%"
