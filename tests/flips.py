"""Flip bits of a store one at a time, and see that each is found: `python tests/flips.py 10000`.

A bit of the slot file that belongs to a page or its trailer must be found by `check_pages`; one of the index must
be found too, or change nothing of what the index says; one of the header must have the store refused.
"""

from __future__ import annotations

import random
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from store_cases import make_store

from tiermem.errors import ConfigError, CorruptPageError
from tiermem.slot_scan import Part
from tiermem.store_check import check_pages
from tiermem.store_content import StoreContent
from tiermem.store_format import TRAILER, TRAILER_BYTES
from tiermem.store_reader import StoreReader

PARTS = ("payload", *(name for name in TRAILER.names or ()), "index", "header.json")


@dataclass(frozen=True, slots=True)
class Flip:
    """One bit of one file, and what it belongs to."""

    part: str
    file: Path
    byte: int
    bit: int

    def apply(self) -> None:
        """Flip the bit; a second time, it is as it was."""
        with self.file.open("r+b") as file:
            file.seek(self.byte)
            value = file.read(1)[0]
            file.seek(self.byte)
            file.write(bytes([value ^ 1 << self.bit]))


class Flips:
    """Random flips in the store at `path`."""

    def __init__(self, path: Path, seed: int) -> None:
        self._path, self._random = path, random.Random(seed)
        with StoreReader(path) as reader:
            self.content = reader.content()
            self._layout, self._stride = reader.layout, reader.slot_stride

    def next(self, part: str) -> Flip:
        """A bit of `part`."""
        files = {
            "index": self._path / "index" / "data.mdb",
            "header.json": self._path / "header.json",
        }
        bit = self._random.randrange(8)
        if part in files:
            return Flip(part, files[part], self._random.randrange(files[part].stat().st_size), bit)
        start = int(self._random.choice(self.content.slots)) * self._stride
        if part == "payload":
            byte = start + self._random.randrange(self._layout.page_bytes)
        else:
            assert TRAILER.fields is not None
            kind, offset = TRAILER.fields[part][:2]
            tail = start + self._stride - TRAILER_BYTES
            byte = tail + offset + self._random.randrange(kind.itemsize)
        return Flip(part, self._path / "slots", byte, bit)

    def outcome(self, flip: Flip) -> str:
        """What becomes of one flip: "found", "harmless" or "missed"."""
        flip.apply()
        try:
            return self._outcome(flip)
        finally:
            flip.apply()

    def _outcome(self, flip: Flip) -> str:
        try:
            with StoreReader(self._path) as reader:
                content = reader.content()
                if content.strays:
                    return "found"
                if check_pages(reader, content, content.rows(), Part.WHOLE).damaged:
                    return "found"
        except (ConfigError, CorruptPageError):
            return "found"
        unused = flip.part == "index" and same_content(content, self.content)
        return "harmless" if unused else "missed"


def same_content(one: StoreContent, other: StoreContent) -> bool:
    """Whether two readings of an index say the same."""
    return (
        one.keys.tobytes() == other.keys.tobytes()
        and one.entries.tobytes() == other.entries.tobytes()
        and (one.roots, one.labels, one.gone) == (other.roots, other.labels, other.gone)
    )


def count_flips(path: Path, num_flips: int, seed: int) -> Counter[tuple[str, str]]:
    """How many flips of each part had each outcome; every other one is of payload, the rest spread evenly."""
    flips = Flips(path, seed)
    fields = PARTS[1:]
    every = [fields[i // 2 % len(fields)] if i % 2 else "payload" for i in range(num_flips)]
    return Counter((part, flips.outcome(flips.next(part))) for part in every)


def main() -> int:
    """Flip as many bits as the command line says, and print a table."""
    num_flips = int(sys.argv[1])
    with tempfile.TemporaryDirectory() as directory:
        counts = count_flips(make_store(Path(directory) / "store"), num_flips, seed=1)
    for part in PARTS:
        told = ", ".join(f"{counts[part, what]} {what}" for what in ("found", "harmless", "missed"))
        sys.stdout.write(f"{part:<12} {told}\n")
    missed = sum(count for (_, what), count in counts.items() if what == "missed")
    sys.stdout.write(f"{num_flips} flips, {missed} missed\n")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
