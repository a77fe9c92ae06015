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

import contextlib
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tiermem import _core
from tiermem.breaker import Breaker
from tiermem.cipher import CIPHER_NAME
from tiermem.cipher_key import SecretKey
from tiermem.disk_budget import DiskGuard, DiskLimits
from tiermem.disk_rates import DiskOptions
from tiermem.errors import ConfigError, DeadlineError, TransferError
from tiermem.guarded_io import open_guarded
from tiermem.index_image import INDEX_FILE, IndexImage, read_index
from tiermem.layout import PageLayout
from tiermem.patience import PatientCall
from tiermem.private_files import PrivateDirectory
from tiermem.slot_file import SlotFile
from tiermem.slot_trailers import SlotTrailers
from tiermem.store_commits import Commits
from tiermem.store_files import (
    INDEX_BYTES,
    INDEX_BYTES_PER_SLOT,
    cap_of,
    check_or_write_header,
    claim,
    open_slots,
    slots_within,
    stride_of,
)
from tiermem.store_format import TRAILER_BYTES, PageName
from tiermem.store_index import StoredPages, StoreIndex
from tiermem.store_payload import Payload
from tiermem.store_rebuild import INDEX, is_mendable, mend_index, rebuild_index
from tiermem.store_transfer import Int64s, StoreTransfer, parts_of
from tiermem.vault import Vault

__all__ = ["INDEX_BYTES", "INDEX_BYTES_PER_SLOT", "ColdStore", "StoreTransfer", "StoredPages"]

log = logging.getLogger("tiermem")


class ColdStore:
    """The SSD tier of one manager. One process owns a store, by flock.

    `index` says which page is where, and is told what may be found; `payload` which pages a sync that failed has
    lost; `guard` what may be written ahead of need; `breaker` whether the disk is to be used at all; `engine`
    moves the bytes.

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
        self.slot_stride = stride_of(layout)
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
            file = open_slots(self._directory, self.slot_stride * self.num_slots)
            self.breaker = Breaker("SSD")
            self.engine = open_guarded(io_engine, options, self.breaker)
            self._file = SlotFile(file, self.num_slots, self.engine, layout, timeout_s)
            self.index = self._open_index(num_there)
            self.guard = DiskGuard(
                self._directory, cap_bytes, self.slot_stride, limits or DiskLimits()
            )
        except BaseException:
            os.close(self._lock)
            self._directory.close()
            if self._vault is not None:
                self._vault.close()
            raise
        self._trailers = SlotTrailers(layout, self._file, self.index, self._vault)
        self.payload = Payload(
            layout, self._file, self._trailers, self.index, self.guard, self._vault
        )
        self._timeout_s = timeout_s
        self._commits = Commits(self.payload, self.index, self.engine, timeout_s)
        self.num_corrupt = 0
        self._is_idle = False

    # ---- whole pages -------------------------------------------------------------------------------

    def write(
        self,
        slots: Int64s,
        addresses: Int64s,
        names: Sequence[PageName | None],
        sums: NDArray[np.uint64] | None = None,
    ) -> StoreTransfer:
        """Start writing the pages at `addresses` (host memory, slot_bytes each) to `slots`, with trailers.

        `sums` (pages, layers) are the checksums from when the pages were sealed, so that whatever happens to the
        bytes on their way here is found when they are read; without them they are computed of what is there now.
        The memory must stay unchanged until the transfer has ended. Nothing is visible before `index.publish`.
        """
        self.guard.note_written(len(slots) * self.slot_stride)
        transfer = self._file.new_pages(slots, addresses)
        for places in parts_of(slots, self.layout.slot_bytes):
            sources = addresses[places]
            found = self._sums_at(sources) if sums is None else sums[places]
            if self._vault is not None:
                try:
                    sources = self._vault.encrypt_pages(transfer, slots[places], sources)
                except TransferError as error:
                    transfer.refuse(error)
                    break
            chosen = [names[place] for place in places]
            transfer.trailers[places] = self._trailers.make(slots[places], chosen, found)
            self._file.write_pages(transfer, places, sources)
        return transfer

    def read(self, slots: Int64s, addresses: Int64s) -> StoreTransfer:
        """Start reading the pages in `slots` to `addresses`; they are data only after `verify`."""

        def check(places: Int64s) -> NDArray[np.bool_]:
            stored, same, seals = self._trailers.parse(slots[places], transfer.trailers[places])
            if self._vault is not None:
                same &= self._vault.decrypt_pages(seals, addresses[places])
            transfer.sums[places] = stored
            equal: NDArray[np.bool_] = (stored == self._sums_at(addresses[places])).all(axis=1)
            return same & equal

        transfer = self._file.new_pages(slots, addresses, check)
        transfer.sums = np.zeros((len(slots), self.layout.num_layers), dtype=np.uint64)
        for places in parts_of(slots, self.layout.slot_bytes):
            self._file.read_pages(transfer, places)
        return transfer

    def verify(self, transfer: StoreTransfer) -> NDArray[np.bool_]:
        """Which pages of an ended read are the very bytes that were written there."""
        good = transfer.intact()
        self.num_corrupt += int((~good).sum())
        return good

    # ---- one layer's slices ------------------------------------------------------------------------

    def read_slices(self, slots: Int64s, layer: int, addresses: Int64s) -> StoreTransfer:
        """Start reading `layer` of the pages in `slots` to `addresses`; they are data only after `verify`.

        Waits for the trailers of pages whose checksums are not known yet.
        """
        self._trailers.load(slots)

        def check(places: Int64s) -> NDArray[np.bool_]:
            good = np.ones(len(places), dtype=np.bool_)
            if self._vault is not None:
                good = self._vault.decrypt_layer(slots[places], layer, addresses[places])
            sums = _core.checksum_pages(addresses[places], self.layout.layer_bytes, 1)[:, 0]
            stored = [self._trailers.sums.get(slot) for slot in slots[places].tolist()]
            same = [row is not None and row[layer] == sums[i] for i, row in enumerate(stored)]
            return good & np.array(same, dtype=np.bool_)

        transfer = self._file.new_slices(slots, addresses, check)
        for places in parts_of(slots, self.layout.layer_bytes):
            self._file.read_slices(transfer, places, layer)
        return transfer

    def layer_sums(self, slots: Int64s, layer: int) -> NDArray[np.uint64]:
        """The checksums that slices of a `read_slices` found good have; (slots,)."""
        sums = self._trailers.sums
        return np.array([sums[slot][layer] for slot in slots.tolist()], dtype=np.uint64)

    def write_slices(self, slots: Int64s, layer: int, addresses: Int64s) -> None:
        """Write one layer of pages that are being filled, and wait."""
        self.guard.note_written(len(slots) * self.layout.layer_bytes)
        transfer = self._file.new_slices(slots, addresses)
        for places in parts_of(slots, self.layout.layer_bytes):
            sources = addresses[places]
            if self._vault is not None:
                try:
                    sources = self._vault.encrypt_layer(transfer, slots[places], layer, sources)
                except TransferError as error:
                    transfer.refuse(error)
                    break
            self._file.write_slices(transfer, places, layer, sources)
        transfer.complete()

    def finish_slices(
        self, slots: Int64s, names: Sequence[PageName | None], sums: NDArray[np.uint64]
    ) -> None:
        """Write the trailers of pages whose layers have all been written; `sums` is (pages, layers)."""
        self.guard.note_written(len(slots) * TRAILER_BYTES)
        self._file.write_trailers(slots, self._trailers.make(slots, names, sums))

    def rename(self, slots: Int64s, names: Sequence[PageName]) -> NDArray[np.bool_]:
        """Name pages that were written without one; which of them were found intact and are published now.

        Raises
        ------
        TransferError: they cannot be named; they are what they were.
        """
        self._trailers.load(slots)
        sums = self._trailers.sums
        good = np.array([slot in sums for slot in slots.tolist()], dtype=np.bool_)
        kept = slots[good]
        if len(kept):
            kept_names = [name for name, ok in zip(names, good, strict=True) if ok]
            self.guard.note_written(len(kept) * TRAILER_BYTES)
            self._trailers.rewrite(kept, kept_names)
            self.index.publish(kept, kept_names)
        return good

    # ---- durability --------------------------------------------------------------------------------

    def sync(self) -> None:
        """Return when every page and entry written so far is durable.

        Raises
        ------
        TransferError: the disk or the index refused. DeadlineError: it is not over `timeout_s` from now.
        """
        self._commits.sync()

    def poll(self) -> None:
        """Make what was published and deleted durable when it is enough or old enough; now and then, a few ms.

        What cannot be made durable now is logged, and tried again after a pause that grows.
        """
        self._commits.poll()

    # ---- its state ---------------------------------------------------------------------------------

    @property
    def num_late(self) -> int:
        """Reads and writes that missed their deadline and still run."""
        self.engine.settle_late()
        return self.breaker.num_late

    def is_probe_due(self) -> bool:
        """Whether the store is switched off and it is time to try it again."""
        self.engine.settle_late()
        return self.breaker.is_probe_due()

    @property
    def io_kind(self) -> str:
        """The I/O engine in use, and whether it goes around the page cache."""
        way = "direct" if self._file.is_direct else "buffered"
        sealed = f", {CIPHER_NAME}" if self._vault is not None else ""
        return f"{self.engine.kind.name.lower()}, {way}{sealed}"

    @property
    def staging_bytes(self) -> int:
        """Memory reserved for what is being encrypted."""
        return 0 if self._vault is None else self._vault.staging_bytes

    @property
    def disk_bytes(self) -> int:
        """What the store's files take on the disk, as `du` counts."""
        return self._directory.disk_bytes()

    # ---- the end -----------------------------------------------------------------------------------

    def stop(self) -> bool:
        """End reading and writing pages; whether all of it is over, so that its memory may be freed.

        Where something has missed its deadline, it is not waited for again.
        """
        self._is_idle = self._is_idle or self.engine.close(self._timeout_s)
        return self._is_idle

    def close(self) -> None:
        """Make everything durable and give the store up, whatever still runs. Later calls do nothing.

        Raises
        ------
        TransferError: what was written last is not durable. All is given up even so; where something is late, the
        files and the lock when that has ended.
        """
        if self._lock < 0:
            return
        try:
            self.sync()
        finally:
            if self.num_late == 0:  # else it may hang too: what was written last counts as written
                self.guard.close()
            is_idle = self.stop()
            if self._vault is not None:
                self._vault.close()
            self._directory.close()
            lock, self._lock = self._lock, -1
            if is_idle and self._commits.is_idle:
                self._give_up(lock)
            else:
                self._give_up_late(lock)

    # ---- inside ------------------------------------------------------------------------------------

    def _give_up(self, lock: int) -> None:
        self.index.close()
        self._file.close()
        os.close(lock)

    def _give_up_late(self, lock: int) -> None:
        """When what still runs has ended: until then nobody else may write to the slots, nor to the index."""

        def give_up() -> None:
            self._commits.join()
            self.engine.join()
            self._give_up(lock)

        call = PatientCall(give_up, "what is late on the SSD tier")
        if self.num_late == 0:  # an interrupt has come before the deadline
            with contextlib.suppress(DeadlineError):
                call.wait(self._timeout_s)
        if not call.poll():
            log.error("%s stays locked until what is late there has ended", self.path)

    def _open_index(self, num_there: int) -> StoreIndex:
        """The index; of a store that had slots, made again first where it is damaged or gone."""
        directory = self._directory.subdirectory(INDEX)
        try:
            image = read_index(directory)
            lost = "it is gone" if num_there and not directory.check_file(INDEX_FILE) else ""
        finally:
            directory.close()
        if why := image.damage or lost:
            rebuild_index(
                self._directory, self.layout, self.num_slots, self._file.read_trailers, why
            )
        directory = self._directory.subdirectory(INDEX)
        try:
            image = read_index(directory) if why else image
            if is_mendable(image):
                image = self._mended(directory, image)
            return StoreIndex(directory, self.num_slots, image, num_there)
        finally:
            directory.close()

    def _mended(self, directory: PrivateDirectory, image: IndexImage) -> IndexImage:
        """The index once its damaged records were made again; as it is where that cannot be done now."""
        try:
            mend_index(directory, self.num_slots, self.layout, self._file.read_trailers, image)
        except TransferError as error:
            log.warning("%s: damaged records stay lost: %s", self.path, error)
            return image
        return read_index(directory)

    def _sums_at(self, addresses: Int64s) -> NDArray[np.uint64]:
        return _core.checksum_pages(addresses, self.layout.layer_bytes, self.layout.num_layers)
