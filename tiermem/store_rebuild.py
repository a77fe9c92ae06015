"""A new index for a store whose index is damaged or gone: from the trailers behind its pages, payloads unread."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from tiermem.index_image import INDEX_FILE
from tiermem.layout import PageLayout
from tiermem.private_files import PrivateDirectory
from tiermem.store_files import open_index
from tiermem.store_format import UNNAMED, root_in, sound_trailers
from tiermem.store_names import ChainRoot
from tiermem.store_records import (
    PAGE,
    ROOT,
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
    records = index_records(layout, num_slots, read_trailers)
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
        directory.path, time.monotonic() - start_s, sum(key[:1] == PAGE for key, _ in records),
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


def index_records(
    layout: PageLayout, num_slots: int, read_trailers: ReadTrailers
) -> list[tuple[bytes, bytes]]:
    """The records of an index of every named page that an undamaged trailer tells of, ascending by key."""
    pages: dict[bytes, Entry] = {}
    roots: dict[ChainRoot, int] = {}
    said_s = time.monotonic()
    for start in range(0, num_slots, BATCH_SLOTS):
        slots = np.arange(start, min(start + BATCH_SLOTS, num_slots), dtype=np.int64)
        _add_pages(pages, roots, layout, slots, read_trailers(slots))
        if time.monotonic() > said_s + PROGRESS_S:
            said_s = time.monotonic()
            log.warning("%d of %d trailers read, %d pages", slots[-1] + 1, num_slots, len(pages))
    records = [(page_key(key), entry.pack(key)) for key, entry in pages.items()]
    records += [
        (number_key(ROOT, number), pack_root(number, root)) for root, number in roots.items()
    ]
    return sorted(records)


def _add_pages(
    pages: dict[bytes, Entry],
    roots: dict[ChainRoot, int],
    layout: PageLayout,
    slots: Int64s,
    raw: NDArray[np.uint8],
) -> None:
    """Add the entries of these slots; of two pages of one name the one written last counts."""
    records, sound = sound_trailers(layout, raw)
    sound &= records["key"] != np.void(UNNAMED)
    records, slots = records[sound], slots[sound]
    checksums = roots_of(records["checksums"][:, : layout.num_layers])
    for record, slot, checksum in zip(records, slots.tolist(), checksums.tolist(), strict=True):
        key, generation = record["key"].tobytes(), int(record["generation"])
        if key in pages and pages[key].generation > generation:
            continue
        number = roots.setdefault(root_in(record), len(roots) + 1)
        position = min(int(record["position"]), 2**31 - 1)
        when_s = min(generation // 10**9, 2**32 - 1)
        parent = record["parent"].tobytes()
        pages[key] = Entry(slot, position, generation, checksum, parent, number, last_use_s=when_s)


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
