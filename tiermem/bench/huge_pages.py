"""HugePages: how much of a range of this process's memory Linux keeps in huge pages."""

from __future__ import annotations

import re
from pathlib import Path

SMAPS = Path("/proc/self/smaps")
_HEAD = re.compile(r"([0-9a-f]+)-([0-9a-f]+) ")
_KINDS = ("AnonHugePages:", "ShmemPmdMapped:", "Private_Hugetlb:", "Shared_Hugetlb:")


def huge_bytes(address: int, num_bytes: int) -> int:
    """Bytes in huge pages of the mappings that overlap the range, at most `num_bytes`.

    Raises
    ------
    OSError: /proc cannot be read.
    """
    found, inside = 0, False
    for line in SMAPS.read_text(encoding="ascii", errors="replace").splitlines():
        head = _HEAD.match(line)
        if head is not None:
            start, end = int(head[1], 16), int(head[2], 16)
            inside = start < address + num_bytes and address < end
        elif inside and line.startswith(_KINDS):
            found += int(line.split()[1]) * 1024
    return min(found, num_bytes)
