"""A new index for a store whose index is damaged or gone, and new records for damaged ones.

Both from the trailers behind its pages; payloads are not read.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import lmdb
import numpy as np
from numpy.typing import NDArray

from tiermem.errors import TransferError
from tiermem.index_image import INDEX_FILE, IndexImage
from tiermem.layout import PageLayout
from tiermem.private_files import PrivateDirectory
from tiermem.store_files import open_index
from tiermem.store_format import UNNAMED, root_in, sound_trailers
from tiermem.store_names import KEY_BYTES, ChainRoot
from tiermem.store_records import (
    ROOT,
    UNKNOWN,
    Entry,
    number_key,
    pack_root,
    page_key,
)
from tiermem.store_transfer import Int64s, roots_of

log = logging.getLogger("tiermem")

ReadTrailers = Callable[[Int64s], NDArray[np.uint8]]
"""The trailers of these slots, (slots, 4096)."""

INDEX, NEW_INDEX, DAMAGED_INDEX = "index", "index.new", "index.damaged"
PAGE_RECORD_KEY_BYTES = 1 + KEY_BYTES
BATCH_SLOTS = 4096
"""Trailers read at once: 16 MiB."""
PROGRESS_S = 5.0
KEPT_BYTES = 16 * 1024
"""Of a damaged index, for whoever wants to know what happened."""


def rebuild_index(
    directory: PrivateDirectory,
    layout: PageLayout,
    num_slots: int,
    read_trailers: ReadTrailers,
    why: str,
) -> None:
    """Make the index of the store in `directory` from the trailers.

    What there was is set aside as `index.damaged`, of its file the beginning alone: it must not take the room of
    the new one, which takes its place when it is whole and durable. Labels, hits and what is gone are not in
    trailers.

    Raises
    ------
    TransferError: the trailers cannot be read; the index is as it was.
    """
    start_s = time.monotonic()
    log.warning(
        "%s: its index is damaged (%s) and is made again from %d trailers",
        directory.path, why, num_slots,
    )  # fmt: skip
    found = pages_in(layout, np.arange(num_slots, dtype=np.int64), read_trailers)
    records = sorted(index_records(found, {}))
    if INDEX in directory.names():
        remove_directory(directory, DAMAGED_INDEX)
        rename(directory, INDEX, DAMAGED_INDEX)
        _keep_beginning(directory)
    remove_directory(directory, NEW_INDEX)
    new = directory.subdirectory(NEW_INDEX)
    try:
        write_index(new, num_slots, records)
    finally:
        new.close()
    rename(directory, NEW_INDEX, INDEX)
    os.fsync(directory.descriptor)
    log.warning(
        "%s: its index was made again in %.1f s: %d pages",
        directory.path, time.monotonic() - start_s, len(found),
    )  # fmt: skip


def _keep_beginning(directory: PrivateDirectory) -> None:
    damaged = directory.subdirectory(DAMAGED_INDEX)
    try:
        descriptor = damaged.open_file(INDEX_FILE, os.O_RDWR)
    except FileNotFoundError:
        return
    finally:
        damaged.close()
    try:
        os.ftruncate(descriptor, min(os.fstat(descriptor).st_size, KEPT_BYTES))
    finally:
        os.close(descriptor)


def is_mendable(image: IndexImage) -> bool:
    """Whether a damaged record may be a page's."""
    return any(len(key) == PAGE_RECORD_KEY_BYTES for key in image.strays)


def mend_index(
    directory: PrivateDirectory,
    num_slots: int,
    layout: PageLayout,
    read_trailers: ReadTrailers,
    image: IndexImage,
) -> None:
    """Put new records of pages in the place of damaged ones in the index in `directory`, which holds `image`.

    Only the trailers of slots that no sound record names are read. Pages that a sound record names, or says are
    gone, are passed over. Labels and hits of the others are lost.

    Raises
    ------
    TransferError: the trailers cannot be read, or the index not be written; it is as it was.
    """
    slots = image.entries["entry"]["slot"]
    is_free = np.ones(num_slots, dtype=np.bool_)
    is_free[slots[slots < num_slots]] = False
    log.warning(
        "%s: %d damaged records in its index are made again from %d trailers",
        directory.path, len(image.strays), is_free.sum(),
    )  # fmt: skip
    found = pages_in(layout, np.flatnonzero(is_free), read_trailers)
    for key in image.entries["key"]:
        found.pop(key.tobytes(), None)
    for _, gone in image.gone:
        if gone.key in found and found[gone.key].entry.generation <= gone.when_ns:
            del found[gone.key]
    numbers = {root.hash: number for number, root in image.roots.items()}
    records = dict(index_records(found, numbers))
    environment = open_index(directory, num_slots)
    try:
        with environment.begin(write=True) as transaction:
            for key in image.strays:
                transaction.delete(key)
            for key in sorted(records):
                transaction.put(key, records[key])
    except lmdb.Error as error:
        raise TransferError(f"{directory.path}: the index was not mended: {error}") from error
    finally:
        environment.close()
    log.warning("%s: %d pages were found again", directory.path, len(found))


@dataclass(frozen=True, slots=True)
class FoundPage:
    """A page that a trailer tells of; the root's number is not in its entry yet."""

    entry: Entry
    root: ChainRoot


def pages_in(
    layout: PageLayout, slots: Int64s, read_trailers: ReadTrailers
) -> dict[bytes, FoundPage]:
    """By key, every named page that an undamaged trailer of one of `slots` tells of."""
    pages: dict[bytes, FoundPage] = {}
    said_s = time.monotonic()
    for start in range(0, len(slots), BATCH_SLOTS):
        some = slots[start : start + BATCH_SLOTS]
        _add_pages(pages, layout, some, read_trailers(some))
        if time.monotonic() > said_s + PROGRESS_S:
            said_s = time.monotonic()
            log.warning(
                "%d of %d trailers read, %d pages", start + len(some), len(slots), len(pages)
            )
    return pages


def _add_pages(
    pages: dict[bytes, FoundPage], layout: PageLayout, slots: Int64s, raw: NDArray[np.uint8]
) -> None:
    """Add the pages of these slots; of two of one name the one written last counts."""
    records, sound = sound_trailers(layout, raw)
    sound &= records["key"] != np.void(UNNAMED)
    records, slots = records[sound], slots[sound]
    checksums = roots_of(records["checksums"][:, : layout.num_layers])
    for record, slot, checksum in zip(records, slots.tolist(), checksums.tolist(), strict=True):
        key, generation = record["key"].tobytes(), int(record["generation"])
        if key in pages and pages[key].entry.generation > generation:
            continue
        position = min(int(record["position"]), 2**31 - 1)
        when_s = min(generation // 10**9, 2**32 - 1)
        parent = record["parent"].tobytes()
        entry = Entry(slot, position, generation, checksum, parent, UNKNOWN, last_use_s=when_s)
        pages[key] = FoundPage(entry, root_in(record))


def index_records(
    pages: dict[bytes, FoundPage], numbers: dict[bytes, int]
) -> Iterator[tuple[bytes, bytes]]:
    """The records of these pages; and of their roots, but for those that have numbers, by hash."""
    numbers = dict(numbers)
    for key, page in pages.items():
        number = numbers.get(page.root.hash)
        if number is None:
            number = numbers[page.root.hash] = max(numbers.values(), default=UNKNOWN) + 1
            yield number_key(ROOT, number), pack_root(number, page.root)
        yield page_key(key), replace(page.entry, root=number).pack(key)


def write_index(
    directory: PrivateDirectory, num_slots: int, records: list[tuple[bytes, bytes]]
) -> None:
    """Make an index of `records`, ascending by key, in an empty directory; durable on return."""
    environment = open_index(directory, num_slots)
    try:
        with environment.begin(write=True) as transaction:
            for key, value in records:
                transaction.put(key, value, append=True)
    finally:
        environment.close()
    os.fsync(directory.descriptor)


def remove_directory(directory: PrivateDirectory, name: str) -> None:
    """There is no directory `name` in `directory` any more, nor what an index keeps in it."""
    if name not in directory.names():
        return
    inner = directory.subdirectory(name)
    try:
        for file in (INDEX_FILE, "lock.mdb"):
            inner.remove(file)
    finally:
        inner.close()
    os.rmdir(name, dir_fd=directory.descriptor)


def rename(directory: PrivateDirectory, old: str, new: str) -> None:
    """Give an entry of `directory` another name."""
    os.rename(old, new, src_dir_fd=directory.descriptor, dst_dir_fd=directory.descriptor)
