"""Reads beside the link: what both did is counted over the same time, and is what was asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tiermem.device.cpu import CpuDevice
from tiermem.device.protocol import Addresses, Direction
from tiermem.errors import InvariantError
from tiermem.measure.beside_link import MOST_TRIES, BesideLink, beside_link
from tiermem.measure.ceilings import PATTERN, Ceilings, Effort


class ClockedEvent:
    """Done when so many reads were made."""

    def __init__(self, reads: list[int], due: int) -> None:
        self._reads, self._due = reads, due

    def done(self) -> bool:
        return self._reads[0] >= self._due

    def wait(self) -> None:
        """It counts from the first one on."""


class ClockedStream:
    """Every read of the host's gives it the time for `pieces` copies."""

    def __init__(self, pieces: int) -> None:
        self.pieces, self.reads, self.queued = pieces, [0], 0

    def record(self) -> ClockedEvent:
        self.queued += 1
        due = self.reads[0] + -(-(self.queued - 1) // self.pieces)
        return ClockedEvent(self.reads, due)

    def synchronize(self) -> None:
        self.queued = 0


class ClockedDevice:
    """A device whose copies end while the host reads."""

    def __init__(self, pieces: int) -> None:
        self.stream = ClockedStream(pieces)
        self.copied: list[tuple[int, int, int]] = []

    def new_stream(self) -> ClockedStream:
        return self.stream

    def copy(
        self, direction: Direction, dst: Addresses, src: Addresses, num_bytes: int, stream: object
    ) -> None:
        assert direction is Direction.HOST_TO_DEVICE
        assert stream is self.stream
        self.copied.append((int(dst[0]), int(src[0]), num_bytes))


def beside(pieces: int, alone: BesideLink) -> tuple[BesideLink, ClockedDevice, list[int]]:
    """What is found where each pass gives the link the time for `pieces` copies; and the bytes of each read."""
    device: Any = ClockedDevice(pieces)
    memory = CpuDevice()
    hot, host = memory.allocate(4 << 20), memory.allocate_host(16 << 20)
    sizes: list[int] = []

    def read(data: torch.Tensor) -> None:
        assert data.data_ptr() == host.address + (8 << 20)
        sizes.append(data.numel())
        device.stream.reads[0] += 1

    found = beside_link(device, hot, host, read, alone, 3)
    for dst, src, num_bytes in device.copied:
        assert hot.address <= dst <= hot.address + hot.num_bytes - num_bytes
        assert host.address <= src <= host.address + (8 << 20) - num_bytes
    memory.close()
    return found, device, sizes


def test_both_rates_are_of_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tiermem.measure.beside_link.READ_BYTES", 32 << 20)
    found, device, sizes = beside(2, BesideLink(8e9, 16e9))
    assert set(sizes) == {8 << 20}
    assert {num_bytes for _, _, num_bytes in device.copied} == {4 << 20}
    # in the time of 4 passes over 8 MiB, 8 copies of 4 MiB arrive
    assert found.link == pytest.approx(found.ram)
    assert found.total == pytest.approx(2 * found.ram)
    assert found.ram_share == pytest.approx(0.5)


def test_more_copies_are_queued_where_they_end_too_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tiermem.measure.beside_link.READ_BYTES", 32 << 20)
    found, _, _ = beside(3, BesideLink(64e9, 16e9))
    assert found.link == pytest.approx(1.5 * found.ram)
    with pytest.raises(InvariantError, match="copies ended before"):
        beside(10**6, BesideLink(8e9, 16e9))
    assert MOST_TRIES > 1


def test_a_cpu_device_has_no_link_beside_it() -> None:
    device = CpuDevice()
    effort = Effort(hot_bytes=1 << 20, host_bytes=1 << 20, repeats=1)
    with Ceilings(device, effort) as ceilings, pytest.raises(ValueError, match="beside the host"):
        ceilings.ram_beside_link(1)
    device.close()


@pytest.mark.gpu
def test_bytes_cross_the_link_while_the_cpu_reads() -> None:
    """How fast depends on what else runs; that both ran does not."""
    from tiermem.device.discovery import open_device

    device, _ = open_device("cuda")
    effort = Effort(hot_bytes=1 << 30, host_bytes=1 << 30, repeats=3)
    with Ceilings(device, effort) as ceilings:
        ceilings.ram_read_rate(2)
        ceilings.link_rate(Direction.HOST_TO_DEVICE)  # known by now, so that it copies no more
        ceilings._hot.tensor.zero_()
        found = ceilings.ram_beside_link(2)
        assert found.link > 0
        assert found.ram > 0
        assert ceilings.ram_beside_link(2) is found
        copied = ceilings._hot.tensor[: 1 << 24]
        assert bool((copied == PATTERN).all())
    device.close()
