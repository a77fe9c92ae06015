"""TextStream: text out of token ids that come one by one, never a broken character."""

from __future__ import annotations

from collections.abc import Callable, Sequence

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer makes of bytes that are no whole character yet, or never will be."""


class TextStream:
    """Turns token ids into pieces of text that add up to the text of all of them.

    A token may be part of a character: what decodes to an unfinished character at the end is held back until
    the next token shows whether it is one. Tokens before are decoded along, because some tokenizers write a
    token differently at the start of a text.

    Parameters
    ----------
    decode: gives the text of token ids, without special tokens.
    before: ids of tokens that come before, such as the last of a prompt; their text is not given.
    """

    def __init__(self, decode: Callable[[list[int]], str], before: Sequence[int] = ()) -> None:
        self._decode = decode
        self._before = list(before)
        self._pending: list[int] = []
        self._given_chars = 0

    def put(self, token_id: int) -> str:
        """The text that is certain now and was not before `token_id`."""
        self._pending.append(token_id)
        text = self._pending_text()
        if text.endswith(UNFINISHED):
            return self._give(text.removesuffix(UNFINISHED))
        piece = self._give(text)
        self._before, self._pending, self._given_chars = self._pending, [], 0
        return piece

    def end(self) -> str:
        """What is left when no more tokens come."""
        piece = self._give(self._pending_text())
        self._before, self._pending, self._given_chars = [], [], 0
        return piece

    def _give(self, text: str) -> str:
        """The part of `text` that was not given yet."""
        piece = text[self._given_chars :]
        self._given_chars += len(piece)
        return piece

    def _pending_text(self) -> str:
        before = self._decode(self._before)
        return self._decode(self._before + self._pending)[len(before) :]
