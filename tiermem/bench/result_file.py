"""ResultFile: results of one run as JSON lines, written at once and read strictly."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tiermem.bench.result import Result, line_of
from tiermem.errors import ConfigError

MAX_FILE_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class SavedResult:
    """A result with the environment and the commit of the run it comes from."""

    result: Result
    environment: Mapping[str, object]
    commit: str

    @property
    def machine(self) -> str:
        """GPU and CPU in a few words."""
        gpu, cpu = self.environment.get("gpu"), self.environment.get("cpu")
        return f"{gpu}, {cpu}" if gpu else str(cpu)

    def to_json(self) -> dict[str, object]:
        """One line of a result file."""
        return {
            **self.result.to_json(),
            "commit": self.commit,
            "environment": dict(self.environment),
        }


def check_writable(path: Path) -> None:
    """Refuse a place where no result file can be, before anything is measured.

    Raises
    ------
    ConfigError: `path` is there and no regular file, or its directory is missing or not writable.
    """
    if path.exists() and not path.is_file():
        raise ConfigError(f"--save {path}: is there and is no regular file")
    if not path.parent.is_dir():
        raise ConfigError(f"--save {path}: there is no directory {path.parent}")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise ConfigError(f"--save {path}: the directory {path.parent} is not writable")


def write_results(path: Path, results: Sequence[SavedResult]) -> None:
    """Write all lines, or leave what was there as it was.

    Raises
    ------
    OSError: it cannot be written.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.writelines(line_of(result.to_json()) + "\n" for result in results)
        mask = os.umask(0)
        os.umask(mask)
        Path(name).chmod(0o666 & ~mask)
        Path(name).replace(path)
    except BaseException:
        with suppress(OSError):
            Path(name).unlink()
        raise


def read_results(path: Path) -> list[SavedResult]:
    """The results of a file.

    Raises
    ------
    ConfigError: it cannot be read, or a line is no result; names file and line.
    """
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ConfigError(f"{path}: more than {MAX_FILE_BYTES} bytes are no results")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text: {error}") from error
    lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not lines:
        raise ConfigError(f"{path}: has no results")
    return [_read_line(f"{path}, line {number}", line) for number, line in lines]


def _read_line(where: str, line: str) -> SavedResult:
    try:
        document = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: not JSON: {error}") from error
    if not isinstance(document, dict) or not isinstance(document.get("environment"), dict):
        raise ConfigError(f"{where}: no result of a benchmark")
    try:
        result = Result.parse(document)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    return SavedResult(result, document["environment"], str(document.get("commit", "unknown")))
