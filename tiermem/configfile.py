"""Configuration files: one table of keys and values from strict JSON or TOML."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

from tiermem.errors import ConfigError
from tiermem.units import shorten

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MAX_FILE_BYTES = 2**20
"""Larger files are refused before they are parsed; the shipped ones have a few hundred bytes."""


def read_table(path: str | Path) -> dict[str, object]:
    """The table that a `.json` or `.toml` file holds.

    Raises
    ------
    ConfigError: naming the file, when it cannot be read, has another extension, more than 1 MiB, text that is
        not UTF-8 or not well formed, a key twice, or anything but a table at its top.
    """
    path = Path(path)
    parse = _PARSERS.get(path.suffix.lower())
    if parse is None:
        raise ConfigError(f"{path}: the file's name must end in .json or .toml")
    try:
        text = _read(path).decode("utf-8")
        table = parse(text)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text: {error}") from error
    except ValueError as error:  # what both parsers raise, for numbers of too many digits as well
        raise ConfigError(f"{path}: not well formed: {error}") from error
    except RecursionError:
        raise ConfigError(f"{path}: nested too deeply") from None
    if not isinstance(table, dict):
        raise ConfigError(f"{path}: must hold a table of keys and values, not {shorten(table)}")
    return table


def _read(path: Path) -> bytes:
    """The bytes of a regular file of at most MAX_FILE_BYTES."""
    try:
        if not path.is_file():
            raise ConfigError("no such file" if not path.exists() else "not a regular file")
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the path
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"cannot be read: {error}") from error
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(f"larger than {MAX_FILE_BYTES} bytes")
    return data


def parse_json(text: str) -> object:
    """What strict JSON holds; a number like 1e999 is infinite: who uses it checks its range.

    Raises
    ------
    ConfigError: a key is there twice, or NaN. ValueError: it is not well formed. RecursionError: it is nested too
    deeply.
    """
    return json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    table: dict[str, object] = {}
    for key, value in pairs:
        if key in table:
            raise ConfigError(f"{shorten(key)}: the key is there twice")
        table[key] = value
    return table


def _refuse_constant(text: str) -> object:
    raise ConfigError(f"{text}: must be a finite number")


_PARSERS: dict[str, Callable[[str], object]] = {".json": parse_json, ".toml": tomllib.loads}
