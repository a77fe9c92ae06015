"""HugePages: counts what Linux tells of the mappings of a range."""

from __future__ import annotations

from pathlib import Path

import pytest

from tiermem.bench import huge_pages
from tiermem.bench.huge_pages import huge_bytes

SMAPS = """\
10000-20000 rw-p 00000000 00:00 0
Size:                 64 kB
AnonHugePages:        32 kB
20000-30000 rw-p 00000000 00:00 0
AnonHugePages:        64 kB
VmFlags: rd wr hg
30000-40000 rw-s 00000000 00:01 2   /a file
ShmemPmdMapped:       16 kB
Private_Hugetlb:       8 kB
"""


@pytest.mark.parametrize(
    ("address", "num_bytes", "wanted"),
    [
        (0x10000, 0x10000, 32 << 10),
        (0x10000, 0x20000, 96 << 10),
        (0x1FFFF, 2, 2),  # never more than the range has
        (0x30000, 0x10000, 24 << 10),
        (0x40000, 0x10000, 0),
        (0x0, 0x10000, 0),
    ],
)
def test_mappings_that_overlap_the_range_count(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, address: int, num_bytes: int, wanted: int
) -> None:
    path = tmp_path / "smaps"
    path.write_text(SMAPS)
    monkeypatch.setattr(huge_pages, "SMAPS", path)
    assert huge_bytes(address, num_bytes) == wanted
