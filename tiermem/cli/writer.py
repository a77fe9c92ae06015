"""Writer: shows text as it is generated, and how far everything else is."""

from __future__ import annotations

from typing import TextIO

from tiermem.cli.loop import Watcher
from tiermem.cli.notes import Progress
from tiermem.cli.subject import Subject
from tiermem.cli.text_stream import TextStream

BEFORE_TOKENS = 4
"""Tokens of the prompt that a tokenizer sees before the first new one, so that spaces come out right."""


class Writer:
    """Writes new tokens to a stream as text, or as ids where there is no tokenizer; None for nowhere."""

    def __init__(self, stream: TextIO | None, subject: Subject) -> None:
        before = subject.ids[0, -BEFORE_TOKENS:].tolist()
        self._text = None if subject.tokenizer is None else TextStream(subject.decode, before)
        self._stream = stream
        self._is_terminal = stream is not None and stream.isatty()
        self._pieces: list[str] = []
        self._started = False

    def watcher(self) -> Watcher:
        """For the run whose tokens are to be written."""

        def prefilled(done: int, total: int, computed: int, seconds: float) -> None:
            Progress.tokens("reading the prompt", done, total, computed, seconds)

        return Watcher(prefilled, self._token)

    def silent_watcher(self, new_tokens: int) -> Watcher:
        """For a run of `new_tokens` that is compared and not shown."""
        done_tokens = 0

        def prefilled(done: int, total: int, computed: int, seconds: float) -> None:
            Progress.tokens(
                "comparing: reading the prompt untiered", done, total, computed, seconds
            )

        def token(_token_id: int) -> None:
            nonlocal done_tokens
            done_tokens += 1
            Progress.show(f"comparing: {done_tokens} of {new_tokens} new tokens")

        return Watcher(prefilled, token)

    def end(self) -> str | None:
        """No more tokens come; the whole text, None where there is no tokenizer."""
        if self._text is not None:
            self._write(self._text.end())
        self._show("\n")
        return None if self._text is None else "".join(self._pieces)

    def _token(self, token_id: int) -> None:
        if not self._started:
            self._started = True
            Progress.clear()
        self._write(f"{token_id} " if self._text is None else self._text.put(token_id))

    def _write(self, piece: str) -> None:
        self._pieces.append(piece)
        self._show(piece)

    def _show(self, piece: str) -> None:
        if self._stream is not None:
            self._stream.write(_harmless(piece) if self._is_terminal else piece)
            self._stream.flush()


def _harmless(text: str) -> str:
    """`text` with control characters shown rather than obeyed: a model may write any byte."""
    return "".join(
        character if character in "\n\t" or character.isprintable() else _picture(character)
        for character in text
    )


def _picture(character: str) -> str:
    """The sign for a control character, such as U+241B for escape."""
    code = ord(character)
    return chr(0x2400 + code) if code < 0x20 else "\N{REPLACEMENT CHARACTER}"
