"""ColdStore: the directory of the SSD tier, a file of fixed slots and an LMDB index.

Directory (0700, files 0600)::

    header.json   format version and page layout; written once, before anything else
    lock          held by flock while a process owns the store
    slots         num_slots x (page, padded to 4,096 bytes, + a trailer of 4,096 bytes)
    index/        LMDB: chain hash -> slot, generation, position, root checksum, parent's chain hash

Payload first, index entry after: the entry is the publication. An entry is deleted before its slot is written
again. Slots without an entry are free at the next start.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import shutil
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import lmdb
import numpy as np
from numpy.typing import NDArray

from tiermem import _core
from tiermem.errors import ConfigError, TransferError
from tiermem.layout import PageLayout
from tiermem.store_format import (
    KEY_BYTES,
    MAX_HEADER_BYTES,
    TRAILER_BYTES,
    Entry,
    PageName,
    check_header,
    pack_header,
    pack_trailer,
    parse_trailer,
)

_Int64s = NDArray[np.int64]

INDEX_BYTES = 256 * 1024
INDEX_BYTES_PER_SLOT = 512
"""Of the cap, set aside for LMDB: its own pages, and two copies of a B-tree page while it changes."""

ENGINE_KINDS = {
    "auto": _core.EngineKind.AUTO,
    "uring": _core.EngineKind.IO_URING,
    "threads": _core.EngineKind.THREADS,
}


@dataclass(frozen=True, slots=True)
class StoredPages:
    """The index at opening, oldest write first; arrays of equal length."""

    keys: NDArray[np.uint8]  # (n, 32)
    parents: NDArray[np.uint8]  # (n, 32)
    slots: _Int64s
    positions: _Int64s


class ColdStore:
    """The SSD tier of one manager. One process owns a store, by flock.

    Parameters
    ----------
    path: a directory of a store, an empty one, or one that does not exist.
    layout: the layout of every page in it.
    cap_bytes: what the directory may take on the disk, index included.
    io_engine: "auto", "uring" or "threads".
    timeout_s: deadline of one wait for reads or writes, seconds.

    Raises
    ------
    ConfigError: the path is not a store, not writable, owned by another process, written with another layout
        or version, too small for one page, or the file system lacks the space.
    """

    def __init__(
        self, path: str | Path, layout: PageLayout, cap_bytes: int, io_engine: str, timeout_s: float
    ) -> None:
        self.path = Path(path)
        self.layout = layout
        self.timeout_s = timeout_s
        self.slot_stride = layout.slot_bytes + TRAILER_BYTES
        self.num_slots = (cap_bytes - INDEX_BYTES) // (self.slot_stride + INDEX_BYTES_PER_SLOT)
        if self.num_slots < 1:
            least = INDEX_BYTES + self.slot_stride + INDEX_BYTES_PER_SLOT
            raise ConfigError(
                f"ssd={cap_bytes}: one page and its index take at least {least} bytes"
            )
        self._lock = _claim(self.path)
        try:
            _check_or_write_header(self.path, layout)
            self._file = _open_slots(self.path / "slots", self.slot_stride * self.num_slots)
            self._index = _open_index(self.path / "index", self.num_slots)
        except BaseException:
            os.close(self._lock)
            raise
        self._engine = _core.IoEngine(kind=ENGINE_KINDS[io_engine])
        self._generations = np.zeros(self.num_slots, dtype=np.uint64)
        self._roots = np.zeros(self.num_slots, dtype=np.uint64)
        self._published = np.zeros(self.num_slots, dtype=np.bool_)
        self._keys = np.zeros((self.num_slots, KEY_BYTES), dtype=np.uint8)
        self._layer_sums: dict[int, NDArray[np.uint64]] = {}
        self.stored = self._load_index()
        self._next_generation = max(time.time_ns(), int(self._generations.max(initial=0)) + 1)
        self.num_corrupt = 0

    # ---- whole pages -------------------------------------------------------------------------------

    def write(
        self,
        slots: _Int64s,
        addresses: _Int64s,
        names: Sequence[PageName | None],
    ) -> StoreTransfer:
        """Start writing the pages at `addresses` (host memory, slot_bytes each) to `slots`, with trailers.

        The memory must stay unchanged until the transfer has ended. Nothing is visible before `publish`.
        """
        sums = _core.checksum_pages(addresses, self.layout.layer_bytes, self.layout.num_layers)
        tails = self._make_trailers(slots, names, sums)
        ticket = self._engine.submit_write(*self._operations(slots, addresses, tails))
        return StoreTransfer(self._engine, ticket, slots, addresses, tails, self.timeout_s)

    def read(self, slots: _Int64s, addresses: _Int64s) -> StoreTransfer:
        """Start reading the pages in `slots` to `addresses`; they are data only after `verify`."""
        tails = mmap.mmap(-1, TRAILER_BYTES * len(slots))
        ticket = self._engine.submit_read(*self._operations(slots, addresses, tails))
        return StoreTransfer(self._engine, ticket, slots, addresses, tails, self.timeout_s)

    def verify(self, transfer: StoreTransfer) -> NDArray[np.bool_]:
        """Which pages of an ended read are the very bytes that were written there."""
        layout = self.layout
        sums = _core.checksum_pages(transfer.addresses, layout.layer_bytes, layout.num_layers)
        good = np.zeros(len(transfer.slots), dtype=np.bool_)
        for i, slot in enumerate(transfer.slots):
            stored = self._parse_tail(int(slot), transfer.tails, i)
            good[i] = stored is not None and np.array_equal(stored, sums[i])
        self.num_corrupt += int((~good).sum())
        return good

    # ---- one layer's slices ------------------------------------------------------------------------

    def read_slices(self, slots: _Int64s, layer: int, addresses: _Int64s) -> NDArray[np.bool_]:
        """Read `layer` of the pages in `slots` to `addresses` and wait; which of them are intact."""
        self._load_layer_sums(slots)
        offsets = slots * self.slot_stride + layer * self.layout.layer_bytes
        lengths = np.full(len(slots), self.layout.layer_bytes, dtype=np.int64)
        self._run(self._engine.submit_read(self._file, offsets, addresses, lengths))
        sums = _core.checksum_pages(addresses, self.layout.layer_bytes, 1)[:, 0]
        good = np.array(
            [
                (stored := self._layer_sums.get(int(slot))) is not None and stored[layer] == value
                for slot, value in zip(slots, sums, strict=True)
            ],
            dtype=np.bool_,
        )
        self.num_corrupt += int((~good).sum())
        return good

    def write_slices(self, slots: _Int64s, layer: int, addresses: _Int64s) -> NDArray[np.uint64]:
        """Write one layer of pages that are being filled, wait, and return the slices' checksums."""
        offsets = slots * self.slot_stride + layer * self.layout.layer_bytes
        lengths = np.full(len(slots), self.layout.layer_bytes, dtype=np.int64)
        sums = _core.checksum_pages(addresses, self.layout.layer_bytes, 1)[:, 0]
        self._run(self._engine.submit_write(self._file, offsets, addresses, lengths))
        return sums

    def finish_slices(
        self, slots: _Int64s, names: Sequence[PageName | None], sums: NDArray[np.uint64]
    ) -> None:
        """Write the trailers of pages whose layers have all been written; `sums` is (pages, layers)."""
        tails = self._make_trailers(slots, names, sums)
        offsets = slots * self.slot_stride + self.layout.slot_bytes
        lengths = np.full(len(slots), TRAILER_BYTES, dtype=np.int64)
        self._run(self._engine.submit_write(self._file, offsets, _tail_addresses(tails), lengths))

    # ---- the index ---------------------------------------------------------------------------------

    def publish(self, slots: _Int64s, names: Sequence[PageName | None]) -> None:
        """Make the named pages in `slots`, whose writes have ended, findable after a restart."""
        with self._index.begin(write=True) as txn:
            for slot, name in zip(slots, names, strict=True):
                if name is not None:
                    entry = Entry(
                        slot=int(slot),
                        generation=int(self._generations[slot]),
                        position=name.position,
                        root=int(self._roots[slot]),
                        parent=name.parent,
                    )
                    txn.put(name.key, entry.pack())
                    self._published[slot] = True
                    self._keys[slot] = np.frombuffer(name.key, dtype=np.uint8)

    def unpublish(self, slots: _Int64s) -> None:
        """Delete the entries that name what is in `slots`, where there are any."""
        self.unpublish_keys(self._keys[slot].tobytes() for slot in slots if self._published[slot])

    def unpublish_keys(self, keys: Iterable[bytes]) -> None:
        """Delete the entries of `keys`, where there are any, before their slots are written again."""
        with self._index.begin(write=True) as txn:
            for key in keys:
                entry = Entry.parse(key, txn.pop(key) or b"", self.num_slots)
                if entry is not None:
                    self._published[entry.slot] = False

    def is_published(self, slots: _Int64s) -> NDArray[np.bool_]:
        """Whether the index has an entry for what was written to each slot."""
        return self._published[slots]

    def rename(self, slots: _Int64s, names: Sequence[PageName]) -> NDArray[np.bool_]:
        """Name pages that were written without one; which of them were found intact and are published now."""
        self._load_layer_sums(slots)
        good = np.array([int(slot) in self._layer_sums for slot in slots], dtype=np.bool_)
        kept = slots[good]
        if len(kept):
            kept_names = [name for name, ok in zip(names, good, strict=True) if ok]
            sums = np.stack([self._layer_sums[int(slot)] for slot in kept])
            self.finish_slices(kept, kept_names, sums)
            self.publish(kept, kept_names)
        return good

    def sync(self) -> None:
        """Return when every page and entry written so far is durable."""
        self._file.sync()
        self._index.sync(True)

    @property
    def io_kind(self) -> str:
        """The I/O engine in use, and whether it goes around the page cache."""
        return (
            f"{self._engine.kind.name.lower()}, {'direct' if self._file.is_direct else 'buffered'}"
        )

    @property
    def disk_bytes(self) -> int:
        """What the store's files take on the disk, as `du` counts."""
        files = [self.path / "header.json", *(self.path / "index").iterdir()]
        return int(self._file.allocated_bytes) + sum(f.stat().st_blocks * 512 for f in files)

    def close(self) -> None:
        """Make everything durable and give the store up. Nothing may be in flight."""
        if self._lock < 0:
            return
        self.sync()
        self._engine.close(self.timeout_s)
        self._index.close()
        self._file.close()
        os.close(self._lock)
        self._lock = -1

    # ---- inside ------------------------------------------------------------------------------------

    def _load_index(self) -> StoredPages:
        entries: list[tuple[bytes, Entry]] = []
        strays: list[bytes] = []
        taken: set[int] = set()
        with self._index.begin() as txn:
            for key, value in txn.cursor():
                entry = Entry.parse(key, value, self.num_slots)
                if entry is None or entry.slot in taken:
                    strays.append(key)
                    continue
                taken.add(entry.slot)
                entries.append((key, entry))
        with self._index.begin(write=True) as txn:
            for key in strays:
                txn.delete(key)
        entries.sort(key=lambda pair: pair[1].generation)
        slots = np.array([entry.slot for _, entry in entries], dtype=np.int64)
        self._generations[slots] = [entry.generation for _, entry in entries]
        self._roots[slots] = [entry.root for _, entry in entries]
        self._published[slots] = True
        self._keys[slots] = keys = _key_array(key for key, _ in entries)
        return StoredPages(
            keys=keys,
            parents=_key_array(entry.parent for _, entry in entries),
            slots=slots,
            positions=np.array([entry.position for _, entry in entries], dtype=np.int64),
        )

    def _make_trailers(
        self, slots: _Int64s, names: Sequence[PageName | None], sums: NDArray[np.uint64]
    ) -> mmap.mmap:
        tails = mmap.mmap(-1, TRAILER_BYTES * len(slots))
        for i, (slot, name) in enumerate(zip(slots, names, strict=True)):
            self._generations[slot] = self._next_generation
            self._roots[slot] = _root_of(sums[i])
            self._layer_sums.pop(int(slot), None)
            start = i * TRAILER_BYTES
            tails[start : start + TRAILER_BYTES] = pack_trailer(
                self.layout, name, self._next_generation, sums[i]
            )
            self._next_generation += 1
        return tails

    def _parse_tail(self, slot: int, tails: mmap.mmap, i: int) -> NDArray[np.uint64] | None:
        raw = tails[i * TRAILER_BYTES : (i + 1) * TRAILER_BYTES]
        stored = parse_trailer(self.layout, int(self._generations[slot]), raw)
        return stored if stored is not None and _root_of(stored) == self._roots[slot] else None

    def _load_layer_sums(self, slots: _Int64s) -> None:
        """Read the trailers of the slots whose layers' checksums are not known yet."""
        new = np.array([s for s in slots if int(s) not in self._layer_sums], dtype=np.int64)
        if len(new) == 0:
            return
        tails = mmap.mmap(-1, TRAILER_BYTES * len(new))
        offsets = new * self.slot_stride + self.layout.slot_bytes
        lengths = np.full(len(new), TRAILER_BYTES, dtype=np.int64)
        self._run(self._engine.submit_read(self._file, offsets, _tail_addresses(tails), lengths))
        for i, slot in enumerate(new):
            stored = self._parse_tail(int(slot), tails, i)
            if stored is not None:
                self._layer_sums[int(slot)] = stored

    def _operations(
        self, slots: _Int64s, addresses: _Int64s, tails: mmap.mmap
    ) -> tuple[_core.BlockFile, _Int64s, _Int64s, _Int64s, _Int64s, int]:
        offsets = slots * self.slot_stride
        lengths = np.full(len(slots), self.layout.slot_bytes, dtype=np.int64)
        return self._file, offsets, addresses, lengths, _tail_addresses(tails), TRAILER_BYTES

    def _run(self, ticket: int) -> None:
        result = self._engine.wait(ticket, self.timeout_s)
        if not _take(self._engine, ticket, result):
            raise _too_late(self.timeout_s)


class StoreTransfer:
    """Pages being read from or written to the store. Owns the trailers' memory until it has ended."""

    def __init__(
        self,
        engine: _core.IoEngine,
        ticket: int,
        slots: _Int64s,
        addresses: _Int64s,
        tails: mmap.mmap,
        timeout_s: float,
    ) -> None:
        self.slots = slots
        self.addresses = addresses
        self.tails = tails
        self._engine = engine
        self._ticket = ticket
        self._timeout_s = timeout_s
        self._deadline_s = time.monotonic() + timeout_s
        self._ended = False

    def poll(self) -> bool:
        """Whether it has ended; raises TransferError when it failed."""
        if not self._ended:
            self._ended = _take(self._engine, self._ticket, self._engine.poll(self._ticket))
        return self._ended

    def wait(self) -> None:
        """Block until `poll` has an answer; raises TransferError at the deadline."""
        if self._ended:
            return
        left_s = max(0.0, self._deadline_s - time.monotonic())
        if self._engine.wait(self._ticket, left_s).status == _core.IoStatus.PENDING:
            raise _too_late(self._timeout_s)


def _take(engine: _core.IoEngine, ticket: int, result: _core.IoResult) -> bool:
    """Whether `ticket` has ended well; forgets it at its end. Raises TransferError when it failed."""
    if result.status == _core.IoStatus.PENDING:
        return False
    engine.forget(ticket)
    if result.status == _core.IoStatus.FAILED:
        raise TransferError(result.errno, result.message)
    return True


def _too_late(timeout_s: float) -> TransferError:
    return TransferError(f"the SSD tier did not answer within io_timeout_s={timeout_s}")


def _root_of(sums: NDArray[np.uint64]) -> int:
    """One checksum over those of the layers."""
    row = np.ascontiguousarray(sums)
    return int(_core.checksum(row.ctypes.data, row.nbytes))


def _tail_addresses(tails: mmap.mmap) -> _Int64s:
    base = np.frombuffer(tails, dtype=np.uint8).ctypes.data
    return base + np.arange(len(tails) // TRAILER_BYTES, dtype=np.int64) * TRAILER_BYTES


def _key_array(keys: Iterable[bytes]) -> NDArray[np.uint8]:
    return np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(-1, KEY_BYTES)


def _claim(path: Path) -> int:
    """Make the directory where there is none and lock it; the descriptor that holds the lock."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        names = {entry.name for entry in path.iterdir()}
        if names and "header.json" not in names and names != {"lock"}:
            raise ConfigError(
                f"ssd_path={str(path)!r}: neither empty nor a tiermem store (no header.json); "
                f"choose another directory"
            )
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        lock = os.open(path / "lock", flags, 0o600)
    except OSError as error:
        raise ConfigError(f"ssd_path={str(path)!r}: not usable as a store ({error})") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise ConfigError(
            f"ssd_path={str(path)!r}: another process or manager has this store open; "
            f"one owns a store at a time"
        ) from None
    return lock


def _check_or_write_header(path: Path, layout: PageLayout) -> None:
    header = path / "header.json"
    try:
        text = _read_bounded(header)
    except FileNotFoundError:
        new = path / "header.json.new"
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        with os.fdopen(os.open(new, flags, 0o600), "wb") as file:
            file.write(pack_header(layout))
            file.flush()
            os.fsync(file.fileno())
        new.rename(header)
        return
    check_header(str(path), text, layout)


def _read_bounded(path: Path) -> bytes:
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as file:
        return file.read(MAX_HEADER_BYTES)


def _open_slots(path: Path, num_bytes: int) -> _core.BlockFile:
    """The slot file, cut or grown to the cap."""
    try:
        file = _core.BlockFile(path, num_bytes, _core.OpenMode.CREATE)
        if file.size_bytes > num_bytes:
            file.resize(num_bytes)
    except OSError as error:
        free = shutil.disk_usage(path.parent).free
        raise ConfigError(
            f"ssd: {num_bytes} bytes for the slots of {str(path.parent)!r} cannot be had "
            f"({error.strerror}); {free} bytes are free there"
        ) from error
    return file


def _open_index(path: Path, num_slots: int) -> lmdb.Environment:
    """The index. Without LMDB's own sync: `sync` orders payload before entries."""
    path.mkdir(mode=0o700, exist_ok=True)
    try:
        return lmdb.open(
            str(path),
            map_size=INDEX_BYTES + 4 * INDEX_BYTES_PER_SLOT * num_slots,
            mode=0o600,
            sync=False,
            max_readers=16,
        )
    except lmdb.Error as error:
        raise ConfigError(
            f"ssd_path={str(path.parent)!r}: its index is not usable ({error})"
        ) from None
