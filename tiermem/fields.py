"""Fields of a configuration: one check per kind of value, each raising ConfigError with key, value, range."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping
from enum import Enum
from pathlib import Path
from typing import TypeVar

from tiermem.errors import ConfigError
from tiermem.units import shorten

E = TypeVar("E", bound=Enum)

_DEVICE = re.compile(r"auto|cpu|cuda(:(0|[1-9][0-9]{0,3}))?")


def refuse(key: str, value: object, wanted: str) -> ConfigError:
    """The error for `key=value`, which must be `wanted`."""
    return ConfigError(f"{key}={shorten(value)}: must be {wanted}")


def check_int(key: str, value: object, low: int, high: int) -> int:
    """`value` as an int from `low` to `high`, both included; a bool is no int."""
    if type(value) is not int or not low <= value <= high:
        raise refuse(key, value, f"an int from {low} to {high}")
    return value


def check_number(key: str, value: object, low: float, high: float) -> float:
    """`value` as a finite float from `low` to `high`, both included; a bool is no number."""
    if type(value) not in (int, float):
        raise refuse(key, value, f"a number from {low:g} to {high:g}")
    assert isinstance(value, (int, float))
    # Compared before it is converted: an int may be too large for a float.
    if not low <= value <= high or not math.isfinite(value):
        raise refuse(key, value, f"a number from {low:g} to {high:g}")
    return float(value)


def check_bool(key: str, value: object) -> bool:
    """`value` as true or false; 0 and 1 are neither."""
    if type(value) is not bool:
        raise refuse(key, value, "true or false")
    return value


def check_text(key: str, value: object, max_length: int) -> str:
    """`value` as text of 1 to `max_length` characters."""
    if not isinstance(value, str) or not 1 <= len(value) <= max_length:
        raise refuse(key, value, f"text of 1 to {max_length} characters")
    return value


def check_enum(key: str, value: object, kind: type[E]) -> E:
    """`value` as a member of `kind`, given as the member or as its text."""
    if isinstance(value, kind):
        return value
    for member in kind:
        if isinstance(value, str) and member.value == value:
            return member
    raise refuse(key, value, "one of " + ", ".join(repr(member.value) for member in kind))


def check_device(key: str, value: object) -> str:
    """`value` as the name of a device; whether it exists is for discovery to find out."""
    if not isinstance(value, str) or not _DEVICE.fullmatch(value):
        raise refuse(key, value, "'auto', 'cpu', 'cuda' or 'cuda:N' with N from 0 to 9999")
    return value


def check_path(key: str, value: object) -> Path:
    """`value` as a path, with a leading ~ expanded; nothing is looked up on disk."""
    if not isinstance(value, (str, Path)) or not str(value).strip() or "\0" in str(value):
        raise refuse(key, value, "the path of a directory, as text")
    try:
        return Path(value).expanduser()
    except RuntimeError:
        raise refuse(key, value, "a path whose ~ names a user of this machine") from None


def check_keys(mapping: Mapping[str, object], known: Iterable[str]) -> None:
    """Refuse the first key of `mapping` that is not `known`, naming the nearest one that is."""
    names = sorted(known)
    for key in mapping:
        if key in names:
            continue
        near = difflib.get_close_matches(str(key), names, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(names)}"
        raise ConfigError(f"{shorten(key)}: unknown key; {hint}")
