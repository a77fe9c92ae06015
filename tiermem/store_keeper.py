"""StoreKeeper: changes a store that nobody has in use: drops pages, and gives their room back to the file system.

The new index is written beside the old one and takes its place in one step; slots are touched after that. So a
process that is killed leaves the old store or the new one.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import stat
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import lmdb
import numpy as np
from numpy.typing import NDArray

from tiermem.errors import CorruptPageError, TransferError
from tiermem.index_image import INDEX_FILE, IndexImage
from tiermem.slot_scan import Part, SlotScan
from tiermem.store_chains import Int64s
from tiermem.store_content import StoreContent
from tiermem.store_files import claim, index_bytes
from tiermem.store_format import TRAILER_BYTES
from tiermem.store_index import MAX_GONE, MIN_GONE
from tiermem.store_names import GoneReason
from tiermem.store_reader import StoreReader
from tiermem.store_rebuild import NEW_INDEX, rebuild_index
from tiermem.store_records import Gone, page_key
from tiermem.store_usage import strangers

_KEEP_SIZE, _PUNCH_HOLE = 1, 2
"""Of fallocate."""


class StoreKeeper:
    """The store at `path`, owned for as long as this is open. A context that closes.

    reader, image, content: as they were when it was opened.

    Raises
    ------
    ConfigError: no store, or one that a process has in use.
    CorruptPageError: its index is damaged.
    """

    def __init__(self, path: Path) -> None:
        StoreReader(path).close()  # nothing is made where no store is
        self._directory, self._lock = claim(path)
        try:
            self.reader = StoreReader(path)
            self.image: IndexImage = self.reader.image()
        except BaseException:
            self._let_go()
            raise
        self.content = StoreContent.of(self.image)

    def __enter__(self) -> StoreKeeper:
        return self

    def __exit__(self, *_: object) -> None:
        self.reader.close()
        self._let_go()

    def drop(self, reasons: dict[int, GoneReason]) -> None:
        """Write an index without these rows of `content`; each is noted as gone for its reason.

        Records that were damaged, roots and labels of pages that are gone, and room that it does not need, go too.

        Raises
        ------
        TransferError: the index cannot be written; the old one is as it was.
        """
        records = dict(self._kept(reasons))
        try:
            self._write_index(records)
        except (lmdb.Error, OSError) as error:
            raise TransferError(
                f"{self._directory.path}: the index was not written: {error}"
            ) from error

    def wipe_trailers(self, slots: Int64s) -> None:
        """Clear what says which pages these slots hold, so that nobody takes them for these pages again."""
        descriptor = self._directory.open_file("slots", os.O_RDWR)
        try:
            for slot in slots.tolist():
                offset = (slot + 1) * self.reader.slot_stride - TRAILER_BYTES
                if slot < self.reader.num_slots:
                    os.pwrite(descriptor, bytes(TRAILER_BYTES), offset)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def give_back(self, used_slots: Int64s) -> None:
        """Free the room of every slot but these, where the file system can, and what is no part of a store.

        What cannot be freed says no more which page it was, so that an index that is made again does not find it.
        """
        for name in strangers(self._directory):
            self._remove(name)
        stride = self.reader.slot_stride
        used = np.unique(used_slots[used_slots < self.reader.num_slots]).tolist()
        gaps = list(_gaps(used, self.reader.num_slots))
        descriptor = self._directory.open_file("slots", os.O_RDWR)
        try:
            punched = [_punch(descriptor, start * stride, n * stride) for start, n in gaps]
            if not all(punched):  # then at least what is at the end
                os.ftruncate(descriptor, (used[-1] + 1 if used else 1) * stride)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        kept = [gap for gap, is_free in zip(gaps, punched, strict=True) if not is_free]
        end = used[-1] + 1 if used else 1
        left = [np.arange(start, min(start + count, end)) for start, count in kept if start < end]
        if left:
            self.wipe_trailers(np.concatenate(left).astype(np.int64))

    # ---- inside ------------------------------------------------------------------------------------

    def _let_go(self) -> None:
        os.close(self._lock)
        self._directory.close()

    def _kept(self, reasons: dict[int, GoneReason]) -> Iterator[tuple[bytes, bytes]]:
        """Every record of the new index."""
        content = self.content
        keys = {content.key(row) for row in reasons}
        entries = self.image.entries
        dropped = {page_key(key) for key in keys}
        kept = np.ones(len(content), dtype=np.bool_)
        kept[list(reasons)] = False
        roots = set(content.entries["root"][kept].tolist())
        labels = set(content.entries["label"][kept].tolist())
        now_ns = time.time_ns()
        gone = [item for _, item in self.image.gone]
        gone += [Gone(content.key(row), now_ns, why) for row, why in reasons.items()]
        most = min(max(self.reader.num_slots, MIN_GONE), MAX_GONE)
        image = IndexImage(
            entries=entries,
            roots={number: root for number, root in self.image.roots.items() if number in roots},
            labels={n: label for n, label in self.image.labels.items() if n in labels},
            gone=tuple(enumerate(gone[-most:])),
            strays=(),
        )
        return (record for record in image.records() if record[0] not in dropped)

    def _write_index(self, records: dict[bytes, bytes]) -> None:
        num_bytes = sum(len(key) + len(value) + 64 for key, value in records.items())
        self._remove(NEW_INDEX)
        new = self._directory.subdirectory(NEW_INDEX)
        old = self._directory.subdirectory("index")
        try:
            size = max(index_bytes(self.reader.num_slots), 2 * num_bytes + (1 << 20))
            with (
                lmdb.open(new.reach("."), map_size=size, mode=0o600, lock=False) as environment,
                environment.begin(write=True) as transaction,
            ):
                for key, value in sorted(records.items()):
                    transaction.put(key, value, append=True)
            os.fsync(new.descriptor)
            os.replace(INDEX_FILE, INDEX_FILE, src_dir_fd=new.descriptor, dst_dir_fd=old.descriptor)
            os.fsync(old.descriptor)
        finally:
            new.close()
            old.close()
        self._remove(NEW_INDEX)

    def _remove(self, name: str) -> None:
        """There is nothing called `name` any more; a link is removed, not what it names."""
        place = self._directory.descriptor
        with contextlib.suppress(FileNotFoundError):
            info = os.stat(name, dir_fd=place, follow_symlinks=False)
            if stat.S_ISDIR(info.st_mode):
                shutil.rmtree(name, dir_fd=place)
            else:
                self._directory.remove(name)


def rebuild_where_damaged(path: Path) -> str:
    """Make the index of a store that nobody has in use again from the trailers, if it is damaged; what was wrong.

    Raises
    ------
    ConfigError: no store, or one that a process has in use. TransferError: the trailers cannot be read.
    """
    with StoreReader(path) as reader:
        try:
            reader.image()
        except CorruptPageError as error:
            damage = str(error)
        else:
            return ""

        def read_trailers(slots: Int64s) -> NDArray[np.uint8]:
            with SlotScan(reader.slots, reader.layout, Part.TRAILER) as scan:
                tails = [batch.tails.copy() for batch in scan.batches(slots)]
            return np.concatenate(tails)

        directory, lock = claim(path)
        try:
            rebuild_index(directory, reader.layout, reader.num_slots, read_trailers, damage)
        finally:
            os.close(lock)
            directory.close()
    return damage


def _gaps(used: Iterable[int], end: int) -> Iterator[tuple[int, int]]:
    """Runs of slots below `end` that are not in use, as first slot and length; `used` ascends."""
    start = 0
    for slot in used:
        if slot > start:
            yield start, slot - start
        start = slot + 1
    if end > start:
        yield start, end - start


def _punch(descriptor: int, offset: int, num_bytes: int) -> bool:
    """Give a range of a file back to the file system; it reads as zeros then. False where that cannot be."""
    function = ctypes.CDLL(None, use_errno=True).fallocate
    function.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    return bool(function(descriptor, _PUNCH_HOLE | _KEEP_SIZE, offset, num_bytes) == 0)
