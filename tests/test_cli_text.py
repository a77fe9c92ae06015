"""Numbers, tables and text as the command line writes them."""

from __future__ import annotations

import io
import random

import pytest
import torch
from cli_support import tiny_llama
from transformers import AutoTokenizer

from tiermem.cli import human
from tiermem.cli.subject import Subject
from tiermem.cli.table import Align, Table, clip, pairs, printable, text_width
from tiermem.cli.text_stream import TextStream
from tiermem.cli.writer import Writer
from tiermem.data import data_path


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (2**20 - 1, "1.0 MiB"),
        (1288490189, "1.2 GiB"),
        (2**60, "1024.0 PiB"),
    ],
)
def test_sizes_read_well(num_bytes: int, text: str) -> None:
    assert human.size_text(num_bytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-1, "0 ms"),
        (0.34, "340 ms"),
        (0.9996, "1.0 s"),
        (59.94, "59.9 s"),
        (59.96, "1 min 0 s"),
        (200, "3 min 20 s"),
        (3599.6, "1 h 0 min"),
        (7500, "2 h 5 min"),
        (273600, "3 d 4 h"),
    ],
)
def test_durations_read_well(seconds: float, text: str) -> None:
    assert human.duration_text(seconds) == text


def test_rates_and_shares_read_well() -> None:
    assert human.rate_text(0) == "-"
    assert human.rate_text(0.05) == "50.0 MB/s"
    assert human.rate_text(0.123) == "0.12 GB/s"
    assert human.rate_text(123.4) == "123 GB/s"
    assert human.tokens_rate_text(0, 1) == "-"
    assert human.tokens_rate_text(5, 0) == "-"
    assert human.tokens_rate_text(30, 4) == "7.50 tokens/s"
    assert human.share_text(None) == "-"
    assert human.share_text(0.875) == "87.5%"


def test_columns_are_aligned_and_lines_have_no_spaces_at_the_end() -> None:
    table = Table(("tier", "pages", "note"), (("GPU", "5", "x"), ("RAM", "1,234", "")))
    assert table.lines() == ["tier  pages  note", "GPU       5     x", "RAM   1,234"]
    assert pairs([("a", "1"), ("long", "22")]).lines() == ["a     1", "long  22"]
    left = Table(("a", "b"), (("1", "2"),), (Align.RIGHT, Align.LEFT))
    assert left.lines() == ["a  b", "1  2"]
    assert Table((), ()).lines() == []


@pytest.mark.parametrize("width", [1, 5, 20, 33, 80])
def test_no_line_is_wider_than_asked(width: int) -> None:
    rng = random.Random(width)
    characters = "ab 漢字é\u0301🙂"
    rows = tuple(
        tuple("".join(rng.choices(characters, k=rng.randrange(30))) for _ in range(3))
        for _ in range(20)
    )
    lines = Table(("one", "two", "three"), rows).lines(width)
    assert len(lines) == 21
    assert max(map(text_width, lines)) <= width


def test_only_as_much_is_cut_as_must_be() -> None:
    table = Table(("name", "n"), (("a" * 30, "12345"),))
    assert table.lines(30)[1] == "a" * 22 + "…  12345"
    assert table.lines(37)[1] == "a" * 30 + "  12345"


def test_wide_and_combining_characters_count_as_terminals_show_them() -> None:
    assert text_width("漢字") == 4
    assert text_width("e\u0301") == 1
    assert clip("漢字漢字", 5) == "漢字…"
    assert clip("abc", 3) == "abc"
    assert clip("abc", 0) == ""


def test_nothing_a_terminal_obeys_gets_into_a_table() -> None:
    assert printable("a\x1b[2Jb\nc\x07") == "a\ufffd[2Jb c\ufffd"
    assert printable("a\u202eb\x9bc") == "a\ufffdb\ufffdc"
    assert "\x1b" not in Table(("", ""), (("\x1b[31m", "\r\nx"),)).lines()[0]


def test_a_tree_in_a_table_keeps_its_indentation() -> None:
    lines = Table(("tree", "n"), (("a", "1"), ("├ b", "2"), ("  └ c\n", "3"))).lines()
    assert lines == ["tree   n", "a      1", "├ b    2", "  └ c  3"]


def test_a_turned_table_has_a_row_for_each_column() -> None:
    table = Table(("tier", "pages"), (("GPU", "5"), ("RAM", "7")))
    assert table.turned().lines() == ["tier   GPU  RAM", "pages    5    7"]
    assert table.turned().turned() == table
    assert table.width == len("tier  pages")


@pytest.fixture(scope="module")
def decode() -> object:
    tokenizer = AutoTokenizer.from_pretrained(data_path("models/reference"), local_files_only=True)
    return lambda ids: tokenizer.decode(ids, skip_special_tokens=True)


def streamed(decode: object, ids: list[int], before: list[int]) -> list[str]:
    assert callable(decode)
    stream = TextStream(decode, before)
    return [*(stream.put(token) for token in ids), stream.end()]


def test_pieces_of_bytes_never_break_a_character(decode: object) -> None:
    text = "naïve 漢字 🙂 e\u0301 \u0000 end"
    pieces = streamed(decode, list(text.encode()), list("é".encode()))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    # A byte that ends a character gives the character at once.
    assert pieces[:4] == ["n", "a", "", "ï"]


@pytest.mark.parametrize("seed", range(20))
def test_pieces_of_any_bytes_add_up_to_the_text_of_all(decode: object, seed: int) -> None:
    assert callable(decode)
    rng = random.Random(seed)
    ids = [rng.choice((rng.randrange(256), rng.randrange(0x80, 0x100))) for _ in range(60)]
    assert "".join(streamed(decode, ids, [])) == decode(ids)


def test_an_unfinished_character_at_the_end_is_shown_as_such(decode: object) -> None:
    assert streamed(decode, [0x61, 0xE2, 0x82], []) == ["a", "", "", "\ufffd"]
    # One that turns out not to be a character is given as soon as that is certain.
    assert streamed(decode, [0xE2, 0x61], []) == ["", "\ufffda", ""]


def test_special_tokens_are_left_out(decode: object) -> None:
    assert "".join(streamed(decode, [0x61, 257, 0x62], [256])) == "ab"


def test_text_before_decides_how_a_token_is_written() -> None:
    """As in tokenizers that drop the space of a text's first word."""
    words = {1: " once", 2: " upon"}

    def decode(ids: list[int]) -> str:
        return "".join(words[i] for i in ids).removeprefix(" ")

    assert "".join(TextStream(decode, [1]).put(token) for token in (2, 1)) == " upon once"
    assert "".join(TextStream(decode).put(token) for token in (2,)) == "upon"


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "shown"),
    [(Terminal(), "a\u241b[2J\n\tb\ufffdé\n"), (io.StringIO(), "a\x1b[2J\n\tb\x9bé\n")],
)
def test_what_a_model_writes_cannot_drive_a_terminal(stream: io.StringIO, shown: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(data_path("models/reference"), local_files_only=True)
    writer = Writer(stream, Subject("tiny", tiny_llama(), tokenizer, torch.tensor([[0x3E]])))
    tokens = list("a\x1b[2J\n\tb\x9bé".encode())
    for i, token in enumerate(tokens):
        writer.watcher().token(token)
        assert i > 0 or stream.getvalue() == "a"  # shown as it comes
    assert writer.end() == "a\x1b[2J\n\tb\x9bé"
    assert stream.getvalue() == shown
