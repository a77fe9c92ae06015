"""Screen: where text goes that is drawn again and again."""

from __future__ import annotations

import shutil
from types import TracebackType
from typing import TextIO

from tiermem.cli.table import clip

_ENTER = "\x1b[?1049h\x1b[?25l"  # the alternate screen, no cursor
_LEAVE = "\x1b[?25h\x1b[?1049l"
_HOME = "\x1b[H"
_END_LINE = "\x1b[K"
_CLEAR_BELOW = "\x1b[J"


class Screen:
    """Draws lines over those before where the stream is a terminal, else one block after another.

    A context: the terminal is as it was afterwards, with what was drawn last left on it.
    """

    def __init__(self, stream: TextIO, in_place: bool) -> None:
        self._stream = stream
        self._in_place = in_place and stream.isatty()
        self._last: list[str] = []

    def __enter__(self) -> Screen:
        if self._in_place:
            self._write(_ENTER)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._in_place:
            self._write(_LEAVE + "".join(f"{line}\n" for line in self._last))

    @property
    def width(self) -> int | None:
        """Columns of the terminal; None where lines may be as long as they like."""
        return terminal_width(self._stream)

    def draw(self, lines: list[str]) -> None:
        """Show `lines` instead of what was shown before; those that do not fit the height are left out."""
        if not self._in_place:
            self._write("".join(f"{line}\n" for line in [*([""] if self._last else []), *lines]))
            self._last = lines
            return
        size = shutil.get_terminal_size()
        self._last = [clip(line, size.columns) for line in lines]
        shown = self._last[: size.lines]
        if len(self._last) > size.lines:
            shown[-1] = clip(f"... {len(self._last) - size.lines + 1} more lines", size.columns)
        self._write(_HOME + "\n".join(line + _END_LINE for line in shown) + _CLEAR_BELOW)

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


def terminal_width(stream: TextIO) -> int | None:
    """Columns of the terminal behind `stream`; None where there is none."""
    return shutil.get_terminal_size().columns if stream.isatty() else None
