"""StoreIndex: which page is in which slot of the cold tier, by chain hash; the LMDB side of a store.

The entry is the publication: it becomes durable after the payload. Entries and deletions gather in memory and are
committed together; an entry that is outdated after a crash names a generation that its slot no longer has.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import lmdb
import numpy as np
from numpy.typing import NDArray

from tiermem.errors import TransferError
from tiermem.index_image import INDEX_FILE, IndexImage
from tiermem.private_files import PrivateDirectory
from tiermem.store_files import index_bytes, open_index
from tiermem.store_names import KEY_BYTES, NO_ROOT, ChainRoot, GoneReason, PageName
from tiermem.store_records import (
    ENTRY_ROW,
    GONE_PAGE,
    LABEL,
    ROOT,
    UNKNOWN,
    Entry,
    Gone,
    number_key,
    pack_label,
    pack_root,
    page_key,
)
from tiermem.store_transfer import Int64s

MAX_ROOTS = MAX_LABELS = 65536
"""In one index. Entries of further ones tell neither; their trailers tell the root."""
MIN_GONE, MAX_GONE = 256, 65536
"""Places in the ring of what is gone: one a slot, within these."""
PART_RECORDS = 64
"""Written at once where the index is full."""
_KEY = slice(1, 1 + KEY_BYTES)
_PARENT = slice(1 + KEY_BYTES + 24, 1 + 2 * KEY_BYTES + 24)
"""Where the hashes are in a row of ENTRY_ROW."""
SECOND_NS = 1_000_000_000
MAX_CODES = 1 << 22
"""Of pairs of a root and a label that are marked in a table."""

Records = Mapping[bytes, bytes | None]
"""What LMDB is to hold, by key; None for what is to be deleted."""


@dataclass(frozen=True, slots=True)
class StoredPages:
    """The index at opening. Arrays of equal length.

    `order` are places in the other ones, as pages may go: least recently used first, leaves before parents.
    `origins` are places in `names`: root and label of each page.
    """

    order: Int64s
    keys: NDArray[np.uint8]  # (n, 32), and
    parents: NDArray[np.uint8]  # (n, 32): columns of wider rows
    slots: Int64s
    positions: Int64s
    last_use_s: Int64s  # seconds since 1970
    origins: NDArray[np.int32]
    names: tuple[tuple[ChainRoot, str], ...]


class StoreIndex:
    """The entries of a store, and what was written last to each slot.

    LMDB's file is in `directory`, and `image` is what it holds.

    `generations` and `checksums` have the number of the last write of every slot, and the checksum over those of
    the layers; whoever writes a slot sets them. Entries that make no sense are deleted at opening, as are those of
    slots from `num_there` on, which were not in the file. A file that is too large, from when the store was, is
    written anew.
    """

    def __init__(
        self,
        directory: PrivateDirectory,
        num_slots: int,
        image: IndexImage,
        num_there: int | None = None,
    ) -> None:
        self.num_slots = num_slots
        self._num_there = num_slots if num_there is None else min(num_there, num_slots)
        self.generations = np.zeros(num_slots, dtype=np.uint64)
        self.checksums = np.zeros(num_slots, dtype=np.uint64)
        self._published = np.zeros(num_slots, dtype=np.bool_)
        self._pending: dict[bytes, bytes | None] = {}
        self._committing: dict[bytes, bytes | None] = {}
        """Records of a commit that has begun and not ended."""
        self._new_slots: set[int] = set()
        self._committing_slots: set[int] = set()
        """Whose entries are among those records."""
        self._uses: dict[bytes, int] = {}
        is_too_large = directory.size_of(INDEX_FILE) > index_bytes(num_slots)
        if is_too_large:
            directory.remove(INDEX_FILE)
            self._pending.update(image.records())
        self._lmdb = open_index(directory, num_slots)
        self._roots = {root.hash: number for number, root in image.roots.items()}
        self._labels = {label: number for number, label in image.labels.items()}
        self._num_gone_places = min(max(num_slots, MIN_GONE), MAX_GONE)
        self._next_gone = image.gone[-1][0] + 1 if image.gone else 0
        self._stored: StoredPages | None = self._adopt(image)
        if is_too_large:
            self._new_slots.update(np.flatnonzero(self._published).tolist())
            with contextlib.suppress(TransferError):  # tried again by the next commit
                self.commit()

    def take_stored(self) -> StoredPages:
        """What was there at opening; given out once, since it is large."""
        stored, self._stored = self._stored, None
        assert stored is not None
        return stored

    # ---- what is published -------------------------------------------------------------------------

    def publish(self, slots: Int64s, names: Sequence[PageName | None]) -> None:
        """Make the named pages in `slots`, whose writes have ended, findable after a restart."""
        now_s = time.time_ns() // SECOND_NS
        for slot, name in zip(slots.tolist(), names, strict=True):
            if name is None:
                continue
            entry = Entry(
                slot=slot,
                position=name.position,
                generation=int(self.generations[slot]),
                checksum=int(self.checksums[slot]),
                parent=name.parent,
                root=self._root_number(name.root),
                label=self._label_number(name.label),
                last_use_s=now_s,
            )
            self._pending[page_key(name.key)] = entry.pack(name.key)
            self._published[slot] = True
            self._new_slots.add(slot)

    def unpublish_keys(self, keys: Iterable[bytes], why: GoneReason) -> None:
        """Delete the entries of `keys`, where there are any."""
        now_ns = time.time_ns()
        with self._lmdb.begin() as txn:
            for key in keys:
                self._uses.pop(key, None)
                entry = self._entry(txn, key)
                if entry is None:
                    continue
                self._delete(txn, page_key(key))
                if entry.slot < self.num_slots:
                    self._published[entry.slot] = False
                self._note_gone(Gone(key, now_ns, why))

    def is_published(self, slots: Int64s) -> NDArray[np.bool_]:
        """Whether there is an entry for what was written to each slot."""
        return self._published[slots]

    def is_durable(self, slots: Int64s) -> NDArray[np.bool_]:
        """Whether that entry would survive a loss of power, and the page with it."""
        waiting = list(self._new_slots | self._committing_slots)
        durable: NDArray[np.bool_] = self._published[slots] & ~np.isin(slots, waiting)
        return durable

    def are_called(self, slots: Int64s, keys: NDArray[np.uint8]) -> NDArray[np.bool_]:
        """Whether the entry of each of `keys`, (slots, 32), names the slot beside it; true where none does.

        The keys are those in the slots' trailers: so an entry that leads to another page's slot is found.
        """
        called = ~self._published[slots]
        with self._lmdb.begin() as txn:
            for i in np.flatnonzero(~called).tolist():
                entry = self._entry(txn, keys[i].tobytes())
                called[i] = entry is not None and entry.slot == slots[i]
        return called

    def note_hits(self, keys: Iterable[bytes]) -> None:
        """The pages of these entries were attached to a sequence; where there are any."""
        for key in keys:
            self._uses[key] = self._uses.get(key, 0) + 1

    # ---- durability --------------------------------------------------------------------------------

    @property
    def num_pending(self) -> int:
        """Records that are not durable yet."""
        return len(self._pending) + len(self._committing) + len(self._uses)

    def commit(self) -> None:
        """Return when every entry and deletion so far is durable. The payload must be durable before.

        Raises
        ------
        TransferError: LMDB refused; what was not written is tried again by the next call.
        """
        records, is_good = self.begin_commit(), False
        try:
            self.write(records)
            is_good = True
        finally:
            self.end_commit(is_good=is_good)

    def begin_commit(self) -> Records:
        """What `write` is to make durable; until `end_commit` it counts as pending.

        Raises
        ------
        TransferError: LMDB cannot be read.
        """
        assert not self._committing
        try:
            with self._lmdb.begin() as txn:
                self._settle_uses(txn)
        except lmdb.Error as error:
            raise TransferError(f"the index of the SSD tier was not read: {error}") from error
        self._committing, self._pending = self._pending, {}
        self._committing_slots, self._new_slots = self._new_slots, set()
        return self._committing

    def write(self, records: Records) -> None:
        """Return when these records are durable; touches nothing else, so that any thread may do it.

        Raises
        ------
        TransferError: LMDB refused.
        """
        if not records:
            return
        try:
            try:
                self._write(records)
            except lmdb.MapFullError:
                self._write_by_parts(records)
        except lmdb.Error as error:
            raise TransferError(f"the index of the SSD tier was not written: {error}") from error

    def end_commit(self, *, is_good: bool) -> None:
        """The commit that began last has ended; what was not written is part of the next one."""
        if not is_good:
            self._pending = {**self._committing, **self._pending}
            self._new_slots |= self._committing_slots
        self._committing, self._committing_slots = {}, set()

    def _write(self, records: Records) -> None:
        with self._lmdb.begin(write=True) as txn:
            for key, value in sorted(records.items()):
                if value is None:
                    txn.delete(key)
                else:
                    txn.put(key, value)

    def _write_by_parts(self, records: Records) -> None:
        """Where the index is full: deletions first, and less at once, so that LMDB uses again what it has freed.

        Labels, and what is said of pages that are gone, are left out.
        """
        kept = [
            (key, value)
            for key, value in records.items()
            if value is None or key[:1] not in (LABEL, GONE_PAGE)
        ]
        items = sorted(kept, key=lambda item: (item[1] is not None, item[0]))
        for start in range(0, len(items), PART_RECORDS):
            self._write(dict(items[start : start + PART_RECORDS]))

    def close(self) -> None:
        """Give the index up; what is not committed is lost."""
        self._lmdb.close()

    # ---- inside ------------------------------------------------------------------------------------

    def _entry(self, txn: lmdb.Transaction, key: bytes) -> Entry | None:
        record = page_key(key)
        waiting = next((r for r in (self._pending, self._committing) if record in r), None)
        value = txn.get(record) if waiting is None else waiting[record]
        return None if value is None else Entry.parse(key, bytes(value))

    def _delete(self, txn: lmdb.Transaction, record: bytes) -> None:
        """Delete a record; one that was never written is forgotten, so that what is pending stays bounded."""
        if record in self._committing or txn.get(record) is not None:
            self._pending[record] = None
        else:
            self._pending.pop(record, None)

    def _settle_uses(self, txn: lmdb.Transaction) -> None:
        """Turn the hits since the last commit into new records."""
        now_s = time.time_ns() // SECOND_NS
        uses, self._uses = self._uses, {}
        for key, hits in uses.items():
            entry = self._entry(txn, key)
            if entry is not None:
                self._pending[page_key(key)] = entry.used(now_s, hits).pack(key)

    def _note_gone(self, gone: Gone) -> None:
        place = self._next_gone % self._num_gone_places
        self._pending[number_key(GONE_PAGE, place)] = gone.pack(place)
        self._next_gone = place + 1

    def _root_number(self, root: ChainRoot) -> int:
        number = self._roots.get(root.hash)
        if number is None and len(self._roots) >= MAX_ROOTS:
            return UNKNOWN
        if number is None:
            number = max(self._roots.values(), default=UNKNOWN) + 1
            self._roots[root.hash] = number
            self._pending[number_key(ROOT, number)] = pack_root(number, root)
        return number

    def _label_number(self, label: str) -> int:
        number = self._labels.get(label, UNKNOWN)
        if number == UNKNOWN and label and len(self._labels) < MAX_LABELS:
            number = max(self._labels.values(), default=UNKNOWN) + 1
            self._labels[label] = number
            self._pending[number_key(LABEL, number)] = pack_label(number, label)
        return number

    def _adopt(self, image: IndexImage) -> StoredPages:
        """Take over what an index said; delete what makes no sense in a store of so many slots."""
        kept = self._is_kept(image.entries["entry"])
        rows = image.entries if kept.all() else image.entries[kept]
        entries = rows["entry"]
        slots, positions = entries["slot"].astype(np.int64), entries["position"].astype(np.int64)
        last_use_s = entries["last_use_s"].astype(np.int64)
        self.generations[slots] = entries["generation"]
        self.checksums[slots] = entries["checksum"]
        self._published[slots] = True
        pairs, origins = _distinct(entries["root"], entries["label"])
        self._delete_strays(image, ~kept, pairs)
        raw = rows.view(np.uint8).reshape(-1, ENTRY_ROW.itemsize)
        return StoredPages(
            order=np.argsort((last_use_s << 31) - positions),
            keys=raw[:, _KEY],
            parents=raw[:, _PARENT],
            slots=slots,
            positions=positions,
            last_use_s=last_use_s,
            origins=origins,
            names=tuple(
                (image.roots.get(root, NO_ROOT), image.labels.get(label, ""))
                for root, label in pairs
            ),
        )

    def _is_kept(self, entries: NDArray[np.void]) -> NDArray[np.bool_]:
        """Which entries have a slot of their own; of several with one slot, that of the last write."""
        kept: NDArray[np.bool_] = (entries["slot"] < self._num_there) & (
            entries["position"] < 2**31
        )
        places = np.flatnonzero(kept)
        slots = entries["slot"][places]
        if np.bincount(slots, minlength=1).max() < 2:
            return kept
        newest_last = places[np.argsort(entries["generation"][places], kind="stable")]
        last = np.full(self.num_slots, -1, dtype=np.int64)
        last[entries["slot"][newest_last]] = newest_last
        kept[places] = last[slots] == places
        return kept

    def _delete_strays(
        self, image: IndexImage, dropped: NDArray[np.bool_], pairs: list[tuple[int, int]]
    ) -> None:
        """Delete what is dropped, and the roots and labels that are not among `pairs`."""
        now_ns = time.time_ns()
        for row in image.entries[dropped]:
            key = row["key"].tobytes()
            self._pending[page_key(key)] = None
            self._note_gone(Gone(key, now_ns, GoneReason.CAP))
        roots, labels = {root for root, _ in pairs}, {label for _, label in pairs}
        unused = [number_key(ROOT, n) for n in image.roots if n not in roots]
        unused += [number_key(LABEL, n) for n in image.labels if n not in labels]
        self._pending.update(dict.fromkeys([*image.strays, *unused]))
        self._roots = {key: n for key, n in self._roots.items() if n in roots}
        self._labels = {label: n for label, n in self._labels.items() if n in labels}


def _distinct(
    roots: NDArray[np.uint32], labels: NDArray[np.uint32]
) -> tuple[list[tuple[int, int]], NDArray[np.int32]]:
    """The pairs of a root's and a label's number that there are, and the place of each page's among them."""
    width = int(labels.max(initial=0)) + 1
    most = int(roots.max(initial=0)) * width + width - 1
    if most >= MAX_CODES:
        numbers = roots.astype(np.uint64) << np.uint64(32) | labels
        unique, inverse = np.unique(numbers, return_inverse=True)
        return [divmod(int(number), 2**32) for number in unique], inverse.astype(np.int32)
    codes = (
        roots.astype(np.int64) * width + labels
    )  # marked: sorting takes longer than all else here
    is_there = np.zeros(most + 1, dtype=np.bool_)
    is_there[codes] = True
    there = np.flatnonzero(is_there)
    places = np.zeros(most + 1, dtype=np.int32)
    places[there] = np.arange(len(there))
    return [divmod(int(code), width) for code in there], places[codes]
