"""Reads beside the link: what both did is counted over the same time, and is what was asked for."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from tiermem.device.cpu import CpuDevice
from tiermem.device.protocol import Addresses, Direction
from tiermem.errors import InvariantError
from tiermem.measure.beside_link import MARGIN, BesideLink, HostWork, beside_link
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
    """Every read of the host's gives it the time for `pieces` copies; the first `early` end while it is filled."""

    def __init__(self, pieces: int, early: int = 1) -> None:
        self.pieces, self.early, self.reads, self.queued = pieces, early, [0], 0

    def record(self) -> ClockedEvent:
        self.queued += 1
        due = self.reads[0] + max(0, -(-(self.queued - self.early) // self.pieces))
        return ClockedEvent(self.reads, due)

    def synchronize(self) -> None:
        self.queued = 0


class ClockedDevice:
    """A device whose copies end while the host reads."""

    def __init__(self, pieces: int, early: int) -> None:
        self.stream = ClockedStream(pieces, early)
        self.copied: list[tuple[int, int, int]] = []

    def new_stream(self) -> ClockedStream:
        return self.stream

    def copy(
        self, direction: Direction, dst: Addresses, src: Addresses, num_bytes: int, stream: object
    ) -> None:
        assert direction is Direction.HOST_TO_DEVICE
        assert stream is self.stream
        self.copied.append((int(dst[0]), int(src[0]), num_bytes))


HALF = 8 << 20


def beside(
    pieces: int, work_rate: float, link_rate: float, early: int = 1
) -> tuple[BesideLink, ClockedDevice]:
    """What is found where each pass over 8 MiB gives the link the time for `pieces` copies of 4 MiB."""
    device: Any = ClockedDevice(pieces, early)
    memory = CpuDevice()
    hot, host = memory.allocate(4 << 20), memory.allocate_host(2 * HALF)

    def read() -> None:
        device.stream.reads[0] += 1

    found = beside_link(device, hot, host, HostWork(read, HALF, work_rate), link_rate, 3)
    for dst, src, num_bytes in device.copied:
        assert num_bytes == 4 << 20
        assert hot.address <= dst <= hot.address + hot.num_bytes - num_bytes
        assert host.address <= src <= host.address + HALF - num_bytes
    memory.close()
    return found, device


def test_both_rates_are_of_the_same_time() -> None:
    # in the time of any number of passes over 8 MiB twice as many copies of 4 MiB arrive
    found, _ = beside(2, HALF / 0.05, 16e9)
    assert found.link == pytest.approx(found.ram)
    assert found.total == pytest.approx(2 * found.ram)
    assert found.ram_share == pytest.approx(0.5)


@pytest.mark.parametrize("early", [1, 2, 50, 600])
def test_copies_that_ended_before_the_work_began_do_not_count(early: int) -> None:
    found, _ = beside(2, HALF / 0.05, 16e9, early)
    assert found.link == pytest.approx(found.ram)


@pytest.mark.parametrize(("pass_s", "passes"), [(0.05, 2), (0.03, 4), (0.5, 1)])
def test_as_much_is_done_as_takes_its_time(pass_s: float, passes: int) -> None:
    _, device = beside(2, HALF / pass_s, 4e9)
    assert device.stream.reads == [1 + 3 * passes]  # once before, then three repeats


def test_more_copies_are_queued_where_they_end_too_soon() -> None:
    queued = int(MARGIN * 0.1 * 1e9 / (4 << 20)) + 2
    found, device = beside(40, HALF / 0.05, 1e9)  # 80 in the time of two passes
    assert queued - 1 < 80 < 2 * queued - 1
    assert found.link == pytest.approx(20 * found.ram)
    assert len(device.copied) == 3 * (queued + 2 * queued)
    with pytest.raises(InvariantError, match="copies ended before"):
        beside(10**6, HALF / 0.05, 1e9)


def test_a_cpu_device_has_no_link_beside_it() -> None:
    device = CpuDevice()
    effort = Effort(hot_bytes=1 << 20, host_bytes=1 << 20, repeats=1)
    with Ceilings(device, effort) as ceilings:
        with pytest.raises(ValueError, match="beside the host"):
            ceilings.ram_beside_link(1)
        with pytest.raises(ValueError, match="beside the host"):
            ceilings.attend_beside_link("float16", 1)
    device.close()


@pytest.mark.gpu
@pytest.mark.parametrize("work", ["ram", "attend"])
def test_bytes_cross_the_link_while_the_cpu_reads(work: str) -> None:
    """How fast depends on what else runs; that both ran does not."""
    from tiermem.device.discovery import open_device

    device, _ = open_device("cuda")
    effort = Effort(hot_bytes=1 << 30, host_bytes=1 << 30, repeats=3)
    with Ceilings(device, effort) as ceilings:
        ceilings.link_rate(Direction.HOST_TO_DEVICE)  # known by now, so that it copies no more
        ceilings._hot.tensor.zero_()
        measure = (
            partial(ceilings.ram_beside_link, 2)
            if work == "ram"
            else partial(ceilings.attend_beside_link, "float16", 2)
        )
        found = measure()
        assert found.link > 0
        assert found.ram > 0
        assert measure() is found
        copied = ceilings._hot.tensor[: 1 << 24]
        assert bool((copied == PATTERN).all())
    device.close()
