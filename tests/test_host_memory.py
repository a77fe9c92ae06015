"""Host memory: backed from the start, refused in time, and gone after its last view."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from tiermem.device import cgroup, host
from tiermem.device.host import HUGE_PAGE_BYTES, HostMemory, host_free_bytes, host_total_bytes
from tiermem.errors import ClosedError, ConfigError

MIB = 1 << 20


def resident_bytes() -> int:
    return int(psutil.Process().memory_info().rss)


def test_memory_is_resident_at_once_and_returned_on_free() -> None:
    before = resident_bytes()
    memory = HostMemory(64 * MIB)
    assert resident_bytes() - before > 60 * MIB
    memory.free()
    assert resident_bytes() - before < 8 * MIB


def test_a_view_that_outlives_its_memory_reads_no_other_allocation() -> None:
    memory = HostMemory(4096, fill=7)
    view = memory.tensor
    memory.free()
    others = [HostMemory(4096, fill=1) for _ in range(20)]
    assert (view == 7).all()
    assert (others[0].tensor == 1).all()


def test_large_memory_starts_at_a_huge_page() -> None:
    for num_bytes in (HUGE_PAGE_BYTES, HUGE_PAGE_BYTES + 1, 5 * HUGE_PAGE_BYTES - 1):
        assert HostMemory(num_bytes).address % HUGE_PAGE_BYTES == 0


def test_on_free_runs_once_while_the_bytes_are_there() -> None:
    seen = []
    memory = HostMemory(4096, fill=3, on_free=lambda m: seen.append(int(m.tensor[0])))
    memory.free()
    memory.free()
    assert seen == [3]
    with pytest.raises(ClosedError):
        _ = memory.tensor


def test_a_failing_on_free_keeps_the_memory() -> None:
    def refuse(memory: HostMemory) -> None:
        raise RuntimeError("in use")

    memory = HostMemory(4096, fill=3, on_free=refuse)
    with pytest.raises(RuntimeError):
        memory.free()
    assert int(memory.tensor[0]) == 3


def test_more_than_there_is_is_refused_before_it_is_touched() -> None:
    num_bytes = host_total_bytes() * 2
    with pytest.raises(ConfigError, match=rf"{num_bytes} bytes of host memory: \d+ bytes are free"):
        HostMemory(num_bytes)


def test_a_mapping_the_system_refuses_is_a_config_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "host_free_bytes", lambda: 1 << 62)
    with pytest.raises(ConfigError, match=f"{1 << 60} bytes"):
        HostMemory(1 << 60)


FILES = {
    1: {
        "memory.limit_in_bytes": "1000000",
        "memory.usage_in_bytes": "400000",
        "memory.stat": "cache 5\ntotal_inactive_file 100000\n",
    },
    2: {
        "memory.max": "1000000",
        "memory.current": "400000",
        "memory.stat": "anon 5\ninactive_file 100000\n",
    },
}
GROUPS = {1: "9:cpu:/\n4:rdma,memory:/a/b/c\n0::/\n", 2: "4:cpu:/x\n0::/a/b/c\n"}


@pytest.mark.parametrize("group", ["", "a", "a/b", "a/b/c"])
@pytest.mark.parametrize("version", [1, 2])
def test_the_limits_of_a_cgroup_and_of_those_above_it_count(
    version: int, group: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    top = tmp_path / ("memory" if version == 1 else "")
    (top / "a/b/c").mkdir(parents=True)
    for name, text in FILES[version].items():
        (top / group / name).write_text(text)
    (tmp_path / "groups").write_text(GROUPS[version])
    monkeypatch.setattr(cgroup, "_MOUNT", tmp_path)
    monkeypatch.setattr(cgroup, "_GROUPS", tmp_path / "groups")
    assert host_total_bytes() == 1_000_000
    assert host_free_bytes() == 700_000


def test_a_group_that_cannot_be_seen_leaves_those_above_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a container that sees only its own part of the tree, at the mount."""
    for name, text in FILES[2].items():
        (tmp_path / name).write_text(text)
    (tmp_path / "groups").write_text("0::/somewhere/else\n")
    monkeypatch.setattr(cgroup, "_MOUNT", tmp_path)
    for groups in (tmp_path / "groups", tmp_path / "missing"):
        monkeypatch.setattr(cgroup, "_GROUPS", groups)
        assert host_free_bytes() == 700_000


def test_without_a_cgroups_limit_the_system_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "memory.max").write_text("max\n")
    monkeypatch.setattr(cgroup, "_MOUNT", tmp_path)
    assert host_total_bytes() == psutil.virtual_memory().total
    assert 0 < host_free_bytes() <= host_total_bytes()


@pytest.mark.parametrize(("num_bytes", "flags"), [(4096, {"dc"}), (16 * MIB, {"dc", "hg"})])
def test_a_fork_does_not_copy_it_and_large_memory_asks_for_huge_pages(
    num_bytes: int, flags: set[str]
) -> None:
    memory = HostMemory(num_bytes)
    assert flags <= _kernel_flags(memory.address)


def _kernel_flags(address: int) -> set[str]:
    """What the kernel notes about the mapping at `address`: dc is not copied on fork, hg huge pages."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if not words[0].endswith(":"):
            start, end = (int(part, 16) for part in words[0].split("-"))
            inside = start <= address < end
        elif inside and words[0] == "VmFlags:":
            return set(words[1:])
    return set()
