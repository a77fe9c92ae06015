"""Notes and progress on stderr: for people who watch; nothing of a command's result."""

from __future__ import annotations

import logging
import shutil
import sys

from tiermem.cli.human import count_text, size_text, tokens_rate_text
from tiermem.cli.table import clip, printable

LARGE_POOL_BYTES = 4 << 30
"""Below this a RAM tier is ready before anybody wonders."""


def note(text: str) -> None:
    """One line that is worth reading, whoever reads stderr."""
    Progress.clear()
    print(f"tiermem: {printable(text)}", file=sys.stderr, flush=True)


class NoteHandler(logging.Handler):
    """Shows log records as notes."""

    def emit(self, record: logging.LogRecord) -> None:
        """Show one record."""
        note(record.getMessage())


class Progress:
    """A line on stderr that says how far something is, where stderr is a terminal; nothing elsewhere."""

    @staticmethod
    def show(text: str) -> None:
        """Replace the line by `text`."""
        if sys.stderr.isatty():
            width = shutil.get_terminal_size().columns
            print(f"\r{clip(text, width - 1)}\x1b[K", end="", file=sys.stderr, flush=True)

    @staticmethod
    def clear() -> None:
        """Take the line away."""
        if sys.stderr.isatty():
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    @classmethod
    def tokens(cls, what: str, done: int, total: int, computed: int, seconds: float) -> None:
        """`done` of `total` tokens, `computed` of them in the last `seconds`."""
        rate = tokens_rate_text(computed, seconds)
        cls.show(f"{what}: {count_text(done)} of {count_text(total)} tokens, {rate}")

    @classmethod
    def pinning(cls, done: int, total: int) -> None:
        """`done` of `total` bytes of the RAM tier are ready; shown for large ones."""
        if total < LARGE_POOL_BYTES:
            return
        cls.show(f"pinning RAM: {size_text(done)} of {size_text(total)}")
        if done == total:
            cls.clear()
