"""IndexPages: an index's B-tree pages (LMDB 0.9's file) read as bytes, each looked at before it is believed.

Nothing is mapped, locked or written, so that a damaged file cannot bring the process down and a process that has
the index open is not disturbed. LMDB never changes a page that its newest or last but one state uses, and writes
one of two meta pages last: what was read is one state of the index if no more than one came after it.

A page is 4,096 bytes: number 8, unused 2, flags 2, end of the table of nodes 2, start of the nodes 2, the table. A
node is two numbers of 2 bytes (its value's length; in a branch with the flags the page it leads to), flags 2, the
key's length 2, key, value.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from operator import lt

from tiermem.errors import CorruptPageError

PAGE_BYTES = 4096
NUM_METAS = 2
NO_PAGE_NUMBER = 2**64 - 1
MAX_DEPTH = 32
MAX_KEY_BYTES = 511

_MAGIC, _VERSION = 0xBEEFC0DE, 1
_BRANCH, _LEAF, _OVERFLOW, _META, _DIRTY = 1, 2, 4, 8, 16
_BIG = 1
_PAGE = struct.Struct("<QHHHH")
_NODE = struct.Struct("<HHHH")
_DB = struct.Struct("<IHHQQQQQ")
_META_HEAD = struct.Struct("<IIQQ")
_META_TAIL = struct.Struct("<QQ")
_BIG_HEAD = struct.Struct("<QHHI")
_NUMBER = struct.Struct("<Q")


Record = tuple[bytes, bytes]
"""Key and value."""


@dataclass(frozen=True, slots=True)
class Tree:
    """One B-tree, as a meta page describes it."""

    depth: int
    num_branches: int
    num_leaves: int
    num_overflows: int
    num_records: int
    root: int


@dataclass(frozen=True, slots=True)
class Meta:
    """One state of the index: which transaction made it, its trees, and the last page of the file in use."""

    transaction: int
    free: Tree
    main: Tree
    last_page: int


@dataclass(slots=True)
class _Walk:
    """What one walk through a tree has met."""

    tree: Tree
    pages: set[int]
    num_branches: int = 0
    num_leaves: int = 0
    num_overflows: int = 0
    num_records: int = 0
    last_key: bytes = b""
    step: int = 1  # of the keys' bytes: -1 where keys are numbers, little-endian


class IndexPages:
    """The file of an index, open as `descriptor`, which stays the caller's; `name` is for errors."""

    def __init__(self, descriptor: int, name: str) -> None:
        self._descriptor, self._name = descriptor, name

    def meta(self) -> Meta:
        """The newest state.

        Raises
        ------
        CorruptPageError: the two meta pages are not those of two states one after the other.
        """
        found = [self._meta(number) for number in range(NUM_METAS)]
        sound = sorted((meta for meta in found if meta is not None), key=lambda m: m.transaction)
        if len(sound) < NUM_METAS or sound[1].transaction - sound[0].transaction > 1:
            raise self._damage("its two meta pages do not follow each other")
        return sound[1]

    def records(self, meta: Meta) -> Iterator[Record]:
        """Every key and value of a state, ascending by key.

        Raises
        ------
        CorruptPageError: a page is not what the pages that lead to it say, or records are missing.
        """
        for leaf in self._leaves(meta, _Walk(meta.main, set())):
            yield from leaf

    def check(self, meta: Meta) -> None:
        """Raise CorruptPageError unless each page of the file is used once: by a tree, or as a free one."""
        walk = _Walk(meta.main, set())
        for _ in self._leaves(meta, walk):
            pass
        frees = _Walk(meta.free, walk.pages, step=-1)
        numbers: list[int] = []
        for leaf in self._leaves(meta, frees):
            for key, value in leaf:
                numbers += self._free_pages(key, value)
        free = set(numbers)
        if len(free) != len(numbers) or free & frees.pages:
            raise self._damage("its list of free pages names one twice, or one that is in use")
        if len(free) + len(frees.pages) != meta.last_page + 1 - NUM_METAS:
            raise self._damage("pages of it are neither in use nor free")

    def _leaves(self, meta: Meta, walk: _Walk) -> Iterator[list[Record]]:
        """The records of each leaf of a tree."""
        if walk.tree.root != NO_PAGE_NUMBER:
            yield from self._below(meta, walk, walk.tree.root, 1, b"", None)
        counts = (walk.num_branches, walk.num_leaves, walk.num_overflows, walk.num_records)
        tree = walk.tree
        said = (tree.num_branches, tree.num_leaves, tree.num_overflows, tree.num_records)
        if counts != said:
            raise self._damage(
                f"it has {counts[3]} records on {counts[1]} pages, its meta page says {said[3]} on {said[1]}"
            )

    def _below(
        self, meta: Meta, walk: _Walk, number: int, depth: int, low: bytes, high: bytes | None
    ) -> Iterator[list[Record]]:
        """The leaves at page `number` and below it: keys from `low` up to but without `high`."""
        raw = self._page(meta, walk, number)
        _, _, flags, lower, upper = _PAGE.unpack_from(raw)
        is_leaf = depth == walk.tree.depth
        if (flags & ~_DIRTY) != (_LEAF if is_leaf else _BRANCH):
            raise self._damage(f"page {number} is no {'leaf' if is_leaf else 'branch'}")
        if not _PAGE.size <= lower <= upper <= PAGE_BYTES or lower % 2:
            raise self._damage(f"page {number} has impossible bounds")
        places = struct.unpack_from(f"<{(lower - _PAGE.size) // 2}H", raw, _PAGE.size)
        if not places or min(places) < upper or max(places) > PAGE_BYTES - _NODE.size:
            raise self._damage(f"page {number} has impossible records")
        if is_leaf:
            walk.num_leaves += 1
            yield self._leaf(meta, walk, number, raw, places, low, high)
            return
        walk.num_branches += 1
        for child, first, end in self._children(walk, number, raw, places, low, high):
            yield from self._below(meta, walk, child, depth + 1, first, end)

    def _children(
        self, walk: _Walk, number: int, raw: bytes, places: tuple[int, ...],
        low: bytes, high: bytes | None,
    ) -> list[tuple[int, bytes, bytes | None]]:  # fmt: skip
        """The pages below a branch, each with the keys that may be there."""
        keys: list[bytes] = [low]
        pages = []
        for i, place in enumerate(places):
            length, more, most, key_bytes = _NODE.unpack_from(raw, place)
            start = place + _NODE.size
            if start + key_bytes > PAGE_BYTES:
                raise self._damage(f"page {number} has impossible records")
            pages.append(length | more << 16 | most << 32)
            if i:
                keys.append(raw[start : start + key_bytes][:: walk.step])
        if any(one >= other for one, other in pairwise(keys)) or (
            high is not None and keys[-1] >= high
        ):
            raise self._damage(f"page {number} has keys out of order")
        ends: list[bytes | None] = [*keys[1:], high]
        return list(zip(pages, keys, ends, strict=True))

    def _leaf(
        self, meta: Meta, walk: _Walk, number: int, raw: bytes, places: tuple[int, ...],
        low: bytes, high: bytes | None,
    ) -> list[Record]:  # fmt: skip
        """The records of a leaf."""
        records = []
        unpack = _NODE.unpack_from
        for place in places:
            less, more, flags, key_bytes = unpack(raw, place)
            start = place + 8
            end = start + key_bytes
            after = end + (_NUMBER.size if flags == _BIG else less | more << 16)
            if flags > _BIG or not 1 <= key_bytes <= MAX_KEY_BYTES or after > PAGE_BYTES:
                raise self._damage(f"page {number} has impossible records")
            value = raw[end:after]
            if flags == _BIG:
                value = self._overflow(meta, walk, _NUMBER.unpack(value)[0], less | more << 16)
            records.append((raw[start:end], value))
        keys = [key[:: walk.step] for key, _ in records]
        in_order = all(map(lt, keys, keys[1:])) and (
            not walk.num_records or keys[0] > walk.last_key
        )
        if not in_order or keys[0] < low or (high is not None and keys[-1] >= high):
            raise self._damage(f"page {number} has keys out of order")
        walk.last_key = keys[-1]
        walk.num_records += len(records)
        return records

    def _overflow(self, meta: Meta, walk: _Walk, first: int, length: int) -> bytes:
        """The value of `length` bytes on the pages from `first` on."""
        num_pages = -(-(length + _PAGE.size) // PAGE_BYTES)
        raw = self._page(meta, walk, first)
        _, _, flags, pages = _BIG_HEAD.unpack_from(raw)
        if (flags & ~_DIRTY) != _OVERFLOW or pages != num_pages:
            raise self._damage(f"page {first} does not continue a record")
        others = range(first + 1, first + num_pages)
        if first + num_pages - 1 > meta.last_page or walk.pages.intersection(others):
            raise self._damage(
                f"the record on page {first} ends beyond the file, or on another's page"
            )
        walk.pages.update(others)
        walk.num_overflows += num_pages
        whole = os.pread(self._descriptor, num_pages * PAGE_BYTES, first * PAGE_BYTES)
        return whole[_PAGE.size : _PAGE.size + length]

    def _page(self, meta: Meta, walk: _Walk, number: int) -> bytes:
        """A page that nothing else led to."""
        if not NUM_METAS <= number <= meta.last_page or number in walk.pages:
            raise self._damage(f"page {number} is used twice, or beyond the end")
        walk.pages.add(number)
        raw = os.pread(self._descriptor, PAGE_BYTES, number * PAGE_BYTES)
        if len(raw) != PAGE_BYTES or _PAGE.unpack_from(raw)[0] != number:
            raise self._damage(f"page {number} is another one, or missing")
        return raw

    def _free_pages(self, key: bytes, value: bytes) -> list[int]:
        """The numbers in one record of the list of free pages."""
        count = _NUMBER.unpack_from(value)[0] if len(value) >= _NUMBER.size else -1
        if len(key) != _NUMBER.size or len(value) != _NUMBER.size * (1 + count):
            raise self._damage("its list of free pages makes no sense")
        return list(struct.unpack_from(f"<{count}Q", value, _NUMBER.size))

    def _meta(self, number: int) -> Meta | None:
        raw = os.pread(self._descriptor, PAGE_BYTES, number * PAGE_BYTES)
        if len(raw) != PAGE_BYTES:
            return None
        page, _, flags, _, _ = _PAGE.unpack_from(raw)
        magic, version, _, map_bytes = _META_HEAD.unpack_from(raw, _PAGE.size)
        start = _PAGE.size + _META_HEAD.size
        free, main = (_DB.unpack_from(raw, start + i * _DB.size) for i in range(2))
        last_page, transaction = _META_TAIL.unpack_from(raw, start + 2 * _DB.size)
        is_meta = page == number and flags == _META and (magic, version) == (_MAGIC, _VERSION)
        if (
            not is_meta
            or free[0] != PAGE_BYTES
            or transaction & 1 != (number if transaction else 0)
        ):
            return None
        is_possible = (
            max(free[2], main[2]) <= MAX_DEPTH and 1 <= last_page < map_bytes // PAGE_BYTES
        )
        if not is_possible:
            return None
        return Meta(transaction, Tree(*free[2:]), Tree(*main[2:]), last_page)

    def _damage(self, what: str) -> CorruptPageError:
        return CorruptPageError(f"{self._name}: {what}")
