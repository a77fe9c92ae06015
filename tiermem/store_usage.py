"""StoreUsage: what the directory of a store takes on the disk, and for what."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass

from tiermem.disk_budget import BUDGET_FILE
from tiermem.index_image import INDEX_FILE
from tiermem.private_files import PrivateDirectory
from tiermem.store_content import StoreContent
from tiermem.store_files import cap_of
from tiermem.store_reader import StoreReader

BLOCK_BYTES = 512
MAX_DEPTH = 4
OWN_NAMES = {"header.json", "lock", "slots", "index", BUDGET_FILE}
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class StoreUsage:
    """Bytes on the disk by what they are for, as `du` counts: blocks, not lengths.

    pages: slots that the index names. free: slots that it does not. index: LMDB's file. set_aside: what is in
    the directory besides, such as an index that was found damaged. others: header, lock, write
    budget, directories. cap: what the store was made for, index included. file_system_free: for this user.
    """

    pages: int
    free: int
    index: int
    set_aside: int
    others: int
    cap: int
    file_system_free: int
    file_system_total: int

    @property
    def total(self) -> int:
        """What `du -s` says of the directory."""
        return self.pages + self.free + self.index + self.set_aside + self.others

    @classmethod
    def of(cls, reader: StoreReader, content: StoreContent) -> StoreUsage:
        """The usage of a store with this content, now."""
        place = reader.directory.descriptor
        found = dict(_blocks(place, "", MAX_DEPTH))
        slots = found.get("slots", 0)
        pages = min(slots, len(set(content.slots.tolist())) * reader.slot_stride)
        index = found.get(f"index/{INDEX_FILE}", 0)
        aside = sum(size for name, size in found.items() if _is_foreign(name))
        system = os.fstatvfs(place)
        return cls(
            pages=pages,
            free=slots - pages,
            index=index,
            set_aside=aside,
            others=sum(found.values()) - slots - index - aside,
            cap=cap_of(reader.layout, reader.num_slots),
            file_system_free=system.f_bavail * system.f_frsize,
            file_system_total=system.f_blocks * system.f_frsize,
        )


def strangers(directory: PrivateDirectory) -> tuple[str, ...]:
    """What lies in the directory of a store and is no part of it: what was set aside, and left behind."""
    return tuple(name for name in directory.names() if name not in OWN_NAMES)


def _is_foreign(name: str) -> bool:
    """Whether this is nothing that a store needs."""
    top, _, rest = name.partition("/")
    return bool(name) and (
        top not in OWN_NAMES or (top == "index" and rest not in ("", INDEX_FILE))
    )


def _blocks(descriptor: int, name: str, depth: int) -> Iterator[tuple[str, int]]:
    """Each file and directory below an open one, itself included as `name`, with its bytes on the disk."""
    yield name, os.fstat(descriptor).st_blocks * BLOCK_BYTES
    with os.scandir(descriptor) as entries:
        names = sorted(entry.name for entry in entries)
    for inner in names:
        path = f"{name}/{inner}" if name else inner
        with contextlib.suppress(FileNotFoundError):  # gone since it was listed
            info = os.stat(inner, dir_fd=descriptor, follow_symlinks=False)
            if not stat.S_ISDIR(info.st_mode) or depth == 0:
                yield path, info.st_blocks * BLOCK_BYTES
                continue
            below = os.open(inner, _DIRECTORY, dir_fd=descriptor)
            try:
                yield from _blocks(below, path, depth - 1)
            finally:
                os.close(below)
