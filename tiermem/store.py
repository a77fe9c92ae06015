"""ColdStore: the directory of the SSD tier, a file of fixed slots and an LMDB index.

Directory (0700, files 0600)::

    header.json     format version and page layout; written once, before anything else (`store_format`)
    lock            held by flock while a process owns the store
    slots           num_slots x (page, padded to 4,096 bytes, + a trailer of 4,096 bytes; `store_format`)
    index/data.mdb  LMDB: chain hash -> slot, generation, checksum, provenance; and roots, labels, and what
                    is gone (`store_records`)

Payload first, index entry after: the entry is the publication. Slots without an entry are free at the next start.
An entry is a hint: whether a slot holds what it says is decided by the generation in the slot's trailer and by
the checksums, whenever it is read. So an entry that is outdated after a crash is a miss, never wrong bytes.
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tiermem import _core
from tiermem.breaker import Breaker, Use
from tiermem.cipher import CIPHER_NAME, Seal
from tiermem.cipher_key import SecretKey
from tiermem.disk_budget import DiskGuard, DiskLimits
from tiermem.disk_rates import DiskOptions, open_engine
from tiermem.errors import ConfigError, DeadlineError, TransferError
from tiermem.guarded_io import GuardedEngine
from tiermem.index_image import INDEX_FILE, read_index
from tiermem.layout import PageLayout
from tiermem.patience import PatientCall
from tiermem.store_files import (
    INDEX_BYTES,
    INDEX_BYTES_PER_SLOT,
    cap_of,
    check_or_write_header,
    claim,
    open_slots,
    slots_within,
)
from tiermem.store_format import (
    TRAILER_BYTES,
    PageName,
    checksum_words,
    keys_in,
    pack_trailers,
    parse_trailers,
)
from tiermem.store_index import StoredPages, StoreIndex
from tiermem.store_names import GoneReason
from tiermem.store_rebuild import INDEX, rebuild_index
from tiermem.store_transfer import Int64s as _Int64s
from tiermem.store_transfer import (
    StoreTransfer,
    parts_of,
    roots_of,
    run,
    tail_addresses,
    tail_rows,
)
from tiermem.vault import Vault

__all__ = ["INDEX_BYTES", "INDEX_BYTES_PER_SLOT", "ColdStore", "StoreTransfer", "StoredPages"]

log = logging.getLogger("tiermem")

REGISTER_BYTES = 1 << 30
"""Of memory registered with io_uring at once: what the kernel takes."""
REGISTER_S = 1.0
"""Registering saves a little of every transfer; a start must not wait for it. 2 GiB of huge pages took 36 ms."""

SYNC_S = 1.0
SYNC_RECORDS = 4096
"""Entries and deletions become durable when the oldest is so many seconds old, or when there are so many."""

ENGINE_KINDS = {
    "auto": _core.EngineKind.AUTO,
    "uring": _core.EngineKind.IO_URING,
    "threads": _core.EngineKind.THREADS,
}


class ColdStore:
    """The SSD tier of one manager. One process owns a store, by flock.

    Parameters
    ----------
    path: a directory of a store, an empty one, or one that does not exist.
    layout: the layout of every page in it.
    cap_bytes: what the directory may take on the disk, index included.
    io_engine: "auto", "uring" or "threads".
    timeout_s: deadline of one wait for reads or writes, seconds.
    options: how the engine moves bytes, as measured on this disk, in place of `io_engine`; without it, and
        where the kernel refuses what was measured, the engine's own choice.
    limits: what is to be left free on the disk, and written to it in a day; none if not given.
    key: encrypts everything that pages hold; a store is made with one or without, and stays so.

    Raises
    ------
    ConfigError: the path is not a store, not writable, owned by another process, written with another layout
        version or key, too small for one page, or the file system lacks the space.
    """

    def __init__(
        self,
        path: str | Path,
        layout: PageLayout,
        cap_bytes: int,
        io_engine: str,
        timeout_s: float,
        options: DiskOptions | None = None,
        limits: DiskLimits | None = None,
        key: SecretKey | None = None,
    ) -> None:
        self.path = Path(path)
        self.layout = layout
        self.timeout_s = timeout_s
        self.slot_stride = layout.slot_bytes + TRAILER_BYTES
        self.num_slots = slots_within(layout, cap_bytes)
        if self.num_slots < 1:
            raise ConfigError(
                f"ssd={cap_bytes}: one page and its index take at least {cap_of(layout, 1)} bytes"
            )
        self._vault = None if key is None else Vault(key, layout)
        self._directory, self._lock = claim(self.path)
        try:
            check_or_write_header(self._directory, layout, key.key_id if key else b"")
            num_there = self._directory.size_of("slots") // self.slot_stride
            self._file = open_slots(self._directory, self.slot_stride * self.num_slots)
            self.breaker = Breaker("SSD")
            engine = _open_engine(ENGINE_KINDS[io_engine], options)
            self._engine = GuardedEngine(engine, self.breaker)
            self._index = self._open_index(num_there)
            self.guard = DiskGuard(
                self._directory, cap_bytes, self.slot_stride, limits or DiskLimits()
            )
        except BaseException:
            os.close(self._lock)
            self._directory.close()
            if self._vault is not None:
                self._vault.close()
            raise
        self._registered: list[tuple[int, int]] = []
        self._layer_sums: dict[int, NDArray[np.uint64]] = {}
        newest = int(self._index.generations.max(initial=0))
        self._next_generation = max(time.time_ns(), newest + 1)
        self._synced_s = time.monotonic()
        self.num_corrupt = 0
        self._is_idle = False
        self._syncing: PatientCall | None = None

    # ---- whole pages -------------------------------------------------------------------------------

    def write(
        self,
        slots: _Int64s,
        addresses: _Int64s,
        names: Sequence[PageName | None],
        sums: NDArray[np.uint64] | None = None,
    ) -> StoreTransfer:
        """Start writing the pages at `addresses` (host memory, slot_bytes each) to `slots`, with trailers.

        `sums` (pages, layers) are the checksums from when the pages were sealed, so that whatever happens to the
        bytes on their way here is found when they are read; without them they are computed of what is there now.
        The memory must stay unchanged until the transfer has ended. Nothing is visible before `publish`.
        """
        tails = mmap.mmap(-1, TRAILER_BYTES * len(slots))
        self.guard.note_written(len(slots) * self.slot_stride)
        transfer = StoreTransfer(self._engine, slots, addresses, tails, self.timeout_s)
        sources = addresses.copy()
        for places in parts_of(slots, self.layout.slot_bytes):
            found = self._sums_at(addresses[places]) if sums is None else sums[places]
            if self._vault is not None:
                try:
                    sources[places] = self._vault.encrypt_pages(
                        transfer, slots[places], addresses[places]
                    )
                except TransferError as error:
                    transfer.refuse(error)
                    break
            self._fill_trailers(tails, places, slots, names, found)
            operations = self._operations(slots, sources, tails, places)
            transfer.start_part(self._engine.submit_write, operations, places)
        return transfer

    def read(self, slots: _Int64s, addresses: _Int64s) -> StoreTransfer:
        """Start reading the pages in `slots` to `addresses`; they are data only after `verify`."""
        tails = mmap.mmap(-1, TRAILER_BYTES * len(slots))

        def check(places: _Int64s) -> NDArray[np.bool_]:
            stored, same, seals = self._parse_tails(slots[places], tail_rows(tails)[places])
            if self._vault is not None:
                same &= self._vault.decrypt_pages(seals, addresses[places])
            transfer.sums[places] = stored
            equal: NDArray[np.bool_] = (stored == self._sums_at(addresses[places])).all(axis=1)
            return same & equal

        transfer = StoreTransfer(self._engine, slots, addresses, tails, self.timeout_s, check)
        transfer.sums = np.zeros((len(slots), self.layout.num_layers), dtype=np.uint64)
        for places in parts_of(slots, self.layout.slot_bytes):
            operations = self._operations(slots, addresses, tails, places)
            transfer.start_part(self._engine.submit_read, operations, places)
        return transfer

    def verify(self, transfer: StoreTransfer) -> NDArray[np.bool_]:
        """Which pages of an ended read are the very bytes that were written there."""
        good = transfer.intact()
        self.num_corrupt += int((~good).sum())
        return good

    # ---- one layer's slices ------------------------------------------------------------------------

    def read_slices(self, slots: _Int64s, layer: int, addresses: _Int64s) -> StoreTransfer:
        """Start reading `layer` of the pages in `slots` to `addresses`; they are data only after `verify`.

        Waits for the trailers of pages whose checksums are not known yet.
        """
        self._load_layer_sums(slots)

        def check(places: _Int64s) -> NDArray[np.bool_]:
            good = np.ones(len(places), dtype=np.bool_)
            if self._vault is not None:
                good = self._vault.decrypt_layer(slots[places], layer, addresses[places])
            sums = _core.checksum_pages(addresses[places], self.layout.layer_bytes, 1)[:, 0]
            stored = [self._layer_sums.get(slot) for slot in slots[places].tolist()]
            same = [row is not None and row[layer] == sums[i] for i, row in enumerate(stored)]
            return good & np.array(same, dtype=np.bool_)

        transfer = StoreTransfer(self._engine, slots, addresses, None, self.timeout_s, check)
        for places in parts_of(slots, self.layout.layer_bytes):
            operations = self._slices(slots, layer, addresses, places)
            transfer.start_part(self._engine.submit_read, operations, places)
        return transfer

    def layer_sums(self, slots: _Int64s, layer: int) -> NDArray[np.uint64]:
        """The checksums that slices of a `read_slices` found good have; (slots,)."""
        return np.array([self._layer_sums[slot][layer] for slot in slots.tolist()], dtype=np.uint64)

    def write_slices(self, slots: _Int64s, layer: int, addresses: _Int64s) -> None:
        """Write one layer of pages that are being filled, and wait."""
        self.guard.note_written(len(slots) * self.layout.layer_bytes)
        transfer = StoreTransfer(self._engine, slots, addresses, None, self.timeout_s)
        sources = addresses.copy()
        for places in parts_of(slots, self.layout.layer_bytes):
            if self._vault is not None:
                sources[places] = self._vault.encrypt_layer(
                    transfer, slots[places], layer, addresses[places]
                )
            operations = self._slices(slots, layer, sources, places)
            transfer.start_part(self._engine.submit_write, operations, places)
        transfer.wait()
        transfer.poll()

    def finish_slices(
        self, slots: _Int64s, names: Sequence[PageName | None], sums: NDArray[np.uint64]
    ) -> None:
        """Write the trailers of pages whose layers have all been written; `sums` is (pages, layers)."""
        self.guard.note_written(len(slots) * TRAILER_BYTES)
        tails = mmap.mmap(-1, TRAILER_BYTES * len(slots))
        self._fill_trailers(tails, np.arange(len(slots)), slots, names, sums)
        offsets = slots * self.slot_stride + self.layout.slot_bytes
        lengths = np.full(len(slots), TRAILER_BYTES, dtype=np.int64)
        submit = self._engine.submit_write
        run(
            self._engine,
            self.timeout_s,
            tails,
            submit,
            self._file,
            offsets,
            tail_addresses(tails),
            lengths,
        )

    # ---- the index ---------------------------------------------------------------------------------

    def publish(self, slots: _Int64s, names: Sequence[PageName | None]) -> None:
        """Make the named pages in `slots`, whose writes have ended, findable after a restart."""
        self._index.publish(slots, names)

    def unpublish_keys(self, keys: Iterable[bytes], why: GoneReason) -> None:
        """Delete the entries of `keys`, where there are any."""
        self._index.unpublish_keys(keys, why)

    def note_hits(self, keys: Iterable[bytes]) -> None:
        """The pages called so were attached to a sequence."""
        self._index.note_hits(keys)

    def is_published(self, slots: _Int64s) -> NDArray[np.bool_]:
        """Whether the index has an entry for what was written to each slot."""
        return self._index.is_published(slots)

    def take_stored(self) -> StoredPages:
        """What the index held when the store was opened; given out once."""
        return self._index.take_stored()

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

    def register_memory(self, address: int, num_bytes: int) -> int:
        """Let the kernel pin memory that pages are often moved from and to once, not for every transfer.

        It must stay mapped until `unregister_memory` or `close`. Returns how many bytes from `address` on it
        is: pages move as well without. Fewer where the kernel or the limit of locked memory refuses, where
        it would take longer than REGISTER_S, and none without io_uring.
        """
        start_s = time.monotonic()
        done = error = 0
        while done < num_bytes and not error and time.monotonic() < start_s + REGISTER_S:
            piece = min(REGISTER_BYTES, num_bytes - done)
            registered, error = self._engine.register_memory(address + done, piece)
            if registered == 0:
                break
            self._registered.append((address + done, registered))
            done += registered
        if error:
            log.info(
                "io_uring: %d of %d bytes of pinned memory registered (%s)",
                done, num_bytes, os.strerror(error),
            )  # fmt: skip
        return done

    def unregister_memory(self) -> None:
        """Undo every `register_memory`, before the memory is given back; nothing may be in flight there."""
        for address, num_bytes in self._registered:
            self._engine.unregister_memory(address, num_bytes)
        self._registered.clear()

    def sync(self) -> None:
        """Return when every page and entry written so far is durable.

        Raises
        ------
        TransferError: the disk or the index refused. DeadlineError: it is not over `timeout_s` from now.
        """
        if self.num_late:
            raise TransferError(errno.EIO, self.breaker.describe())
        call = self._syncing = PatientCall(self._sync_now, "making the SSD tier durable")
        try:
            call.wait(self.timeout_s)
        except DeadlineError as error:
            self._engine.keep_late(call, str(error))
            raise
        self._synced_s = time.monotonic()

    def poll(self) -> None:
        """Make what was published and deleted durable when it is enough or old enough; now and then, a few ms.

        What cannot be made durable now is logged, and tried again.
        """
        if not self.breaker.allows(Use.WRITE):
            return
        since_s = time.monotonic() - self._synced_s
        if since_s < SYNC_S and self._index.num_pending < SYNC_RECORDS:
            return
        if self._index.num_pending == 0:
            self._synced_s = time.monotonic()
            return
        try:
            self.sync()
        except TransferError as error:
            self._synced_s = time.monotonic()
            log.error("%s", error)

    @property
    def num_late(self) -> int:
        """Reads and writes that missed their deadline and still run."""
        self._engine.settle_late()
        return self.breaker.num_late

    def is_probe_due(self) -> bool:
        """Whether the store is switched off and it is time to try it again."""
        self._engine.settle_late()
        return self.breaker.is_probe_due()

    @property
    def io_kind(self) -> str:
        """The I/O engine in use, and whether it goes around the page cache."""
        way = "direct" if self._file.is_direct else "buffered"
        sealed = f", {CIPHER_NAME}" if self._vault is not None else ""
        return f"{self._engine.kind.name.lower()}, {way}{sealed}"

    @property
    def staging_bytes(self) -> int:
        """Memory reserved for what is being encrypted."""
        return 0 if self._vault is None else self._vault.staging_bytes

    @property
    def disk_bytes(self) -> int:
        """What the store's files take on the disk, as `du` counts."""
        return self._directory.disk_bytes()

    def stop(self) -> bool:
        """End reading and writing pages; whether all of it is over, so that its memory may be freed.

        Where something has missed its deadline, it is not waited for again.
        """
        self._is_idle = self._is_idle or self._engine.close(self.timeout_s)
        return self._is_idle

    def close(self) -> None:
        """Make everything durable and give the store up, whatever still runs. Later calls do nothing.

        Raises
        ------
        TransferError: what was written last is not durable; all is given up even so, but files that are in use.
        """
        if self._lock < 0:
            return
        try:
            self.sync()
        finally:
            self.guard.close()
            is_idle = self.stop()
            if self._syncing is None or self._syncing.poll():
                self._index.close()
                if is_idle:
                    self._file.close()
            if self._vault is not None:
                self._vault.close()
            self._directory.close()
            os.close(self._lock)
            self._lock = -1

    # ---- inside ------------------------------------------------------------------------------------

    def _sync_now(self) -> None:
        try:
            self._file.sync()
        except OSError as error:
            raise TransferError(
                error.errno, f"the SSD tier was not synced: {error.strerror}"
            ) from error
        self._index.commit()

    def _open_index(self, num_there: int) -> StoreIndex:
        """The index; of a store that had slots, made again first where it is damaged or gone."""
        directory = self._directory.subdirectory(INDEX)
        try:
            image = read_index(directory)
            lost = "it is gone" if num_there and not directory.check_file(INDEX_FILE) else ""
        finally:
            directory.close()
        if why := image.damage or lost:
            rebuild_index(self._directory, self.layout, self.num_slots, self._read_trailers, why)
        directory = self._directory.subdirectory(INDEX)
        try:
            image = read_index(directory) if why else image
            return StoreIndex(directory, self.num_slots, image, num_there)
        finally:
            directory.close()

    def _fill_trailers(
        self,
        tails: mmap.mmap,
        places: _Int64s,
        slots: _Int64s,
        names: Sequence[PageName | None],
        sums: NDArray[np.uint64],
    ) -> None:
        """Make the trailers of the pages at `places`, whose layers have the checksums `sums`."""
        first = self._next_generation
        self._next_generation += len(places)
        chosen = [names[place] for place in places]
        raw = pack_trailers(self.layout, chosen, first, sums)
        if self._vault is not None:
            self._vault.seal_trailers(raw, slots[places])
        tail_rows(tails)[places] = raw
        self._index.generations[slots[places]] = np.arange(
            first, self._next_generation, dtype=np.uint64
        )
        self._index.checksums[slots[places]] = roots_of(checksum_words(self.layout, raw))
        for slot in slots[places].tolist():
            self._layer_sums.pop(slot, None)

    def _parse_tails(
        self, slots: _Int64s, raw: NDArray[np.uint8]
    ) -> tuple[NDArray[np.uint64], NDArray[np.bool_], list[Seal | None]]:
        """The checksums in trailers read from `slots`, which of them are what was written, and their seals."""
        stored, same = parse_trailers(self.layout, self._index.generations[slots], raw)
        same &= roots_of(stored) == self._index.checksums[slots]
        same &= self._index.are_called(slots, keys_in(raw))
        if self._vault is None:
            return stored, same, []
        stored, seals = self._vault.open_trailers(raw)
        return stored, same & np.array([seal is not None for seal in seals]), seals

    def _load_layer_sums(self, slots: _Int64s) -> None:
        """Read the trailers of the slots whose layers' checksums are not known yet."""
        new = np.array([s for s in slots.tolist() if s not in self._layer_sums], dtype=np.int64)
        if len(new) == 0:
            return
        stored, same, seals = self._parse_tails(new, self._read_trailers(new))
        for i, (slot, sums) in enumerate(zip(new.tolist(), stored.copy(), strict=True)):
            if same[i]:
                self._layer_sums[slot] = sums
                if self._vault is not None:
                    self._vault.know(slot, seals[i])

    def _read_trailers(self, slots: _Int64s) -> NDArray[np.uint8]:
        """The trailers of these slots as they are, (slots, 4096)."""
        tails = mmap.mmap(-1, TRAILER_BYTES * len(slots))
        offsets = slots * self.slot_stride + self.layout.slot_bytes
        lengths = np.full(len(slots), TRAILER_BYTES, dtype=np.int64)
        addresses = tail_addresses(tails)
        submit = self._engine.submit_read
        run(self._engine, self.timeout_s, tails, submit, self._file, offsets, addresses, lengths)
        return tail_rows(tails)

    def _sums_at(self, addresses: _Int64s) -> NDArray[np.uint64]:
        return _core.checksum_pages(addresses, self.layout.layer_bytes, self.layout.num_layers)

    def _operations(
        self, slots: _Int64s, addresses: _Int64s, tails: mmap.mmap, places: _Int64s
    ) -> tuple[_core.BlockFile, _Int64s, _Int64s, _Int64s, _Int64s, int]:
        offsets = slots[places] * self.slot_stride
        lengths = np.full(len(places), self.layout.slot_bytes, dtype=np.int64)
        addresses_of_tails = tail_addresses(tails)[places]
        return self._file, offsets, addresses[places], lengths, addresses_of_tails, TRAILER_BYTES

    def _slices(
        self, slots: _Int64s, layer: int, addresses: _Int64s, places: _Int64s
    ) -> tuple[_core.BlockFile, _Int64s, _Int64s, _Int64s]:
        offsets = slots[places] * self.slot_stride + layer * self.layout.layer_bytes
        lengths = np.full(len(places), self.layout.layer_bytes, dtype=np.int64)
        return self._file, offsets, addresses[places], lengths


def _open_engine(kind: _core.EngineKind, options: DiskOptions | None) -> _core.IoEngine:
    if options is None:
        return _core.IoEngine(kind)
    try:
        return open_engine(options)
    except OSError as error:
        log.warning("%s was measured, but cannot be had now (%s)", options, error)
        return _core.IoEngine(kind)
