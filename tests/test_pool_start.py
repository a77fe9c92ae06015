"""How a large RAM tier starts: its progress reaches the caller and, on a terminal, the one who waits."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

from tiermem import ConfigError, PageLayout, TierConfig, TierManager
from tiermem.cli.notes import LARGE_POOL_BYTES, Progress
from tiermem.device import host
from tiermem.device.cpu import CpuDevice
from tiermem.device.host import HostMemory

KIB = 1 << 10
LAYOUT = PageLayout(num_layers=2, num_kv_heads=2, head_dim=16, dtype="float16", page_tokens=16)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_manager_tells_how_much_of_its_ram_tier_is_ready(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "PIECE_BYTES", 64 * KIB)
    seen: list[tuple[int, int]] = []
    config = TierConfig(gpu="64KiB", ram="256KiB", ssd="0", device="cpu")
    with TierManager(LAYOUT, config, progress=lambda *numbers: seen.append(numbers)):
        pass
    assert [done for done, _ in seen] == [64 * KIB, 128 * KIB, 192 * KIB, 256 * KIB]
    assert {total for _, total in seen} == {256 * KIB}


def test_an_error_of_the_progress_gives_everything_back() -> None:
    def refuse(done: int, total: int) -> None:
        raise KeyboardInterrupt

    device = CpuDevice()
    config = TierConfig(gpu="64KiB", ram="256KiB", ssd="0", device="cpu")
    with pytest.raises(KeyboardInterrupt):
        TierManager(LAYOUT, config, device=device, progress=refuse)
    assert not device._memories


def test_pieces_are_reported_when_they_are_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "PIECE_BYTES", 1 << 20)
    pieces: list[tuple[int, int]] = []

    def check(address: int, num_bytes: int) -> None:
        pieces.append((address, num_bytes))

    memory = HostMemory((5 << 20) + 3, fill=9, on_piece=check)
    starts = range(memory.address, memory.address + memory.num_bytes, 1 << 20)
    assert pieces == [(start, 1 << 20) for start in starts[:5]] + [(starts[5], 3)]
    assert (memory.tensor == 9).all()


def test_memory_beyond_the_machine_is_refused_with_both_numbers() -> None:
    wanted = host.host_total_bytes() * 2
    with pytest.raises(ConfigError, match=rf"{wanted} bytes of host memory: \d+ bytes are free"):
        CpuDevice().allocate_host(wanted)


def test_a_large_pool_shows_a_line_on_a_terminal_and_takes_it_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    Progress.pinning(1 << 30, LARGE_POOL_BYTES)
    assert "pinning RAM: 1.0 GiB of 4.0 GiB" in terminal.getvalue()
    Progress.pinning(LARGE_POOL_BYTES, LARGE_POOL_BYTES)
    assert terminal.getvalue().endswith("\r\x1b[K")


@pytest.mark.parametrize(("total", "stream"), [(1 << 30, Terminal()), (1 << 40, io.StringIO())])
def test_small_pools_and_files_see_nothing(
    monkeypatch: pytest.MonkeyPatch, total: int, stream: io.StringIO
) -> None:
    monkeypatch.setattr(sys, "stderr", stream)
    Progress.pinning(total // 2, total)
    Progress.pinning(total, total)
    assert stream.getvalue() == ""
