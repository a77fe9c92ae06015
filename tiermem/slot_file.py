"""SlotFile: the slots of an open store; starts moving pages, layers' slices and trailers to and from them."""

from __future__ import annotations

import mmap
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from tiermem import _core
from tiermem.errors import TransferError
from tiermem.guarded_io import GuardedEngine
from tiermem.layout import PageLayout
from tiermem.store_files import stride_of
from tiermem.store_format import TRAILER_BYTES
from tiermem.store_transfer import CheckPart, Int64s, StoreTransfer
from tiermem.unsynced import UnsyncedSlots


class SlotFile:
    """Pages, slices and trailers go between the slots and host memory; whole pages with their trailers.

    `unsynced` is told of every write.

    Parameters
    ----------
    file: as long as its `num_slots` slots, of pages of `layout`.
    timeout_s: deadline of each transfer, seconds.

    What is started here does not wait for the disk; trailers alone do.
    """

    def __init__(
        self,
        file: _core.BlockFile,
        num_slots: int,
        engine: GuardedEngine,
        layout: PageLayout,
        timeout_s: float,
    ) -> None:
        self.timeout_s = timeout_s
        self.stride = stride_of(layout)
        self.unsynced = UnsyncedSlots(num_slots)
        self._file = file
        self._engine = engine
        self._layout = layout

    @property
    def is_direct(self) -> bool:
        """Whether reads and writes go around the page cache."""
        return self._file.is_direct

    # ---- whole pages, with their trailers ----------------------------------------------------------

    def new_pages(
        self, slots: Int64s, addresses: Int64s, check: CheckPart | None = None
    ) -> StoreTransfer:
        """A transfer of pages between `slots` and `addresses` of which no part was started yet.

        Raises
        ------
        TransferError: there is no memory for their trailers.
        """
        tails = _new_tails(len(slots))
        return StoreTransfer(self._engine, slots, addresses, tails, self.timeout_s, check)

    def new_own_pages(self, slots: Int64s) -> StoreTransfer:
        """As `new_pages`, with memory of its own for the pages too."""
        memory = new_memory(len(slots) * self._layout.slot_bytes, f"{len(slots)} pages")
        base = np.frombuffer(memory, dtype=np.uint8).ctypes.data
        addresses = base + np.arange(len(slots), dtype=np.int64) * self._layout.slot_bytes
        transfer = self.new_pages(slots, addresses)
        transfer.memory = memory
        return transfer

    def read_pages(self, transfer: StoreTransfer, places: Int64s) -> None:
        """Start reading a part of `transfer`, pages and trailers."""
        operations = self._pages(transfer, places, transfer.addresses[places])
        transfer.start_part(self._engine.submit_read, operations, places)

    def write_pages(self, transfer: StoreTransfer, places: Int64s, sources: Int64s) -> None:
        """Start writing a part of `transfer`: the pages from `sources`, and the transfer's trailers."""
        operations = self._pages(transfer, places, sources)
        self.unsynced.note_write(transfer, transfer.slots[places], is_whole=True)
        transfer.start_part(self._engine.submit_write, operations, places)

    def _pages(
        self, transfer: StoreTransfer, places: Int64s, addresses: Int64s
    ) -> tuple[_core.BlockFile, Int64s, Int64s, Int64s, Int64s, int]:
        offsets = transfer.slots[places] * self.stride
        lengths = np.full(len(places), self._layout.slot_bytes, dtype=np.int64)
        tails = _row_addresses(transfer.trailers)[places]
        return self._file, offsets, addresses, lengths, tails, TRAILER_BYTES

    # ---- one layer's slices ------------------------------------------------------------------------

    def new_slices(
        self, slots: Int64s, addresses: Int64s, check: CheckPart | None = None
    ) -> StoreTransfer:
        """A transfer of one layer of the pages in `slots` of which no part was started yet."""
        return StoreTransfer(self._engine, slots, addresses, None, self.timeout_s, check)

    def read_slices(self, transfer: StoreTransfer, places: Int64s, layer: int) -> None:
        """Start reading a part of `transfer`."""
        operations = self._slices(transfer, places, layer, transfer.addresses[places])
        transfer.start_part(self._engine.submit_read, operations, places)

    def write_slices(
        self, transfer: StoreTransfer, places: Int64s, layer: int, sources: Int64s
    ) -> None:
        """Start writing a part of `transfer` from `sources`."""
        operations = self._slices(transfer, places, layer, sources)
        self.unsynced.note_write(transfer, transfer.slots[places], is_whole=False)
        transfer.start_part(self._engine.submit_write, operations, places)

    def _slices(
        self, transfer: StoreTransfer, places: Int64s, layer: int, addresses: Int64s
    ) -> tuple[_core.BlockFile, Int64s, Int64s, Int64s]:
        offsets = transfer.slots[places] * self.stride + layer * self._layout.layer_bytes
        lengths = np.full(len(places), self._layout.layer_bytes, dtype=np.int64)
        return self._file, offsets, addresses, lengths

    # ---- trailers alone ----------------------------------------------------------------------------

    def read_trailers(self, slots: Int64s) -> NDArray[np.uint8]:
        """The trailers of these slots as they are, (slots, 4096); waits for the disk.

        Raises
        ------
        TransferError: they cannot be read. DeadlineError: not in time.
        """
        transfer = self._new_trailers(len(slots))
        self._move_trailers(transfer, slots, self._engine.submit_read)
        return transfer.trailers

    def write_trailers(self, slots: Int64s, raw: NDArray[np.uint8]) -> None:
        """Write the trailers of these slots, (slots, 4096), and wait for the disk.

        Raises
        ------
        TransferError: they cannot be written. DeadlineError: not in time.
        """
        transfer = self._new_trailers(len(slots))
        transfer.trailers[:] = raw
        self.unsynced.note_write(transfer, slots, is_whole=False)
        self._move_trailers(transfer, slots, self._engine.submit_write)

    def _new_trailers(self, count: int) -> StoreTransfer:
        """A transfer of no pages, with memory for trailers: it stays as long as they are on their way."""
        nothing = np.empty(0, dtype=np.int64)
        tails = _new_tails(count)
        return StoreTransfer(self._engine, nothing, nothing, tails, self.timeout_s)

    def _move_trailers(
        self, transfer: StoreTransfer, slots: Int64s, submit: Callable[..., int]
    ) -> None:
        offsets = slots * self.stride + self._layout.slot_bytes
        lengths = np.full(len(slots), TRAILER_BYTES, dtype=np.int64)
        operations = self._file, offsets, _row_addresses(transfer.trailers), lengths
        transfer.start_part(submit, operations, transfer.slots)
        transfer.complete()

    # ---- the file ----------------------------------------------------------------------------------

    def sync(self) -> None:
        """Return when all that was written is durable; raises TransferError where the disk refuses."""
        try:
            self._file.sync()
        except OSError as error:
            raise TransferError(
                error.errno, f"the SSD tier was not synced: {error.strerror}"
            ) from error

    def close(self) -> None:
        """Close the file; nothing may be in flight."""
        self._file.close()


def _row_addresses(rows: NDArray[np.uint8]) -> Int64s:
    """Where each trailer lies."""
    return rows.ctypes.data + np.arange(len(rows), dtype=np.int64) * TRAILER_BYTES


def _new_tails(count: int) -> mmap.mmap:
    return new_memory(TRAILER_BYTES * count, f"{count} trailers of pages")


def new_memory(num_bytes: int, what: str) -> mmap.mmap:
    """Memory of the host for `what`; raises TransferError where there is none."""
    try:
        return mmap.mmap(-1, num_bytes)
    except OSError as error:
        raise TransferError(error.errno, f"no memory for {what}: {error.strerror}") from error
