"""Batches of copies whose bytes show any mix-up, for every device and method."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tiermem.device import Device, Direction, Memory, Stream

Offsets = NDArray[np.int64]
TOTAL = 6 << 20
MAX_PIECES = 500
MAX_SLOTS = 20_000
POISON = 0xA5


class Layout(Enum):
    """Where the pieces of a batch lie."""

    SCATTERED = "scattered on both sides"
    RUNS = "runs of neighbours in host memory"
    STRIDED = "at one distance in host memory"
    UNALIGNED = "at odd addresses"
    TOGETHER = "neighbours on both sides"


LAYOUTS = list(Layout)
SIZES = [1, 15, 4096, 16 << 10, (64 << 10) - 16, 300_000]


def check_bytes(device: Device, size: int, layout: Layout, directions: Sequence[Direction]) -> None:
    """Copy pieces of `size` bytes in each direction, and check every byte of the memory written to."""
    rng = np.random.default_rng(size)
    stream = device.new_stream()
    total = max(TOTAL, 4 * size)
    hot, other, host = device.allocate(total), device.allocate(total), device.allocate_host(total)
    for direction in directions:
        dst, src = {
            Direction.HOST_TO_DEVICE: (hot, host),
            Direction.DEVICE_TO_HOST: (host, hot),
            Direction.DEVICE_TO_DEVICE: (other, hot),
        }[direction]
        host_side, other_side = _offsets(rng, size, layout, total)
        pair = (
            (host_side, other_side) if direction is Direction.DEVICE_TO_HOST
            else (other_side, host_side)
        )  # fmt: skip
        data = _fill(src, rng)
        _poison(dst)
        _check(device, direction, (dst, src), pair, size, stream, data)
    for memory in (hot, other, host):
        memory.free()


def _check(
    device: Device,
    direction: Direction,
    memories: tuple[Memory, Memory],
    offsets: tuple[Offsets, Offsets],
    size: int,
    stream: Stream,
    data: NDArray[np.uint8],
) -> None:
    dst, src = memories
    wanted = np.full(dst.num_bytes, POISON, dtype=np.uint8)
    for to, at in zip(*offsets, strict=True):
        wanted[to : to + size] = data[at : at + size]
    device.copy(direction, dst.address + offsets[0], src.address + offsets[1], size, stream)
    stream.record().wait()
    got = dst.tensor.cpu().numpy()
    assert np.array_equal(got, wanted), (direction, size, np.flatnonzero(got != wanted)[:4])


def _offsets(
    rng: np.random.Generator, size: int, layout: Layout, total: int
) -> tuple[Offsets, Offsets]:
    """Offsets of the pieces on the host's side and on the other."""
    step = size + (1 if layout is Layout.UNALIGNED else 0)
    count = min(MAX_PIECES, total // step - 1)
    slots = min(total // step - 1, MAX_SLOTS)
    other = rng.permutation(slots)[:count]
    if layout is Layout.TOGETHER:
        host = other = np.arange(count)
    elif layout is Layout.RUNS:
        runs = rng.permutation(slots // 16)[: max(1, count // 16)] if slots >= 16 else np.zeros(1)
        host = (runs[:, None] * 16 + np.arange(min(16, slots))).ravel()
    elif layout is Layout.STRIDED:
        host = np.arange(0, slots, 2)[:count]
    else:
        host = rng.permutation(slots)[:count]
    count = min(len(host), len(other))
    shift = 1 if layout is Layout.UNALIGNED else 0
    order: Any = rng.permutation(count) if layout is Layout.TOGETHER else slice(count)
    return (
        (host[:count][order] * step).astype(np.int64) + shift,
        (other[:count][order] * step).astype(np.int64),
    )


def _fill(memory: Memory, rng: np.random.Generator) -> NDArray[np.uint8]:
    data = rng.integers(0, 256, memory.num_bytes, dtype=np.uint8)
    memory.tensor.copy_(torch.from_numpy(data))
    _settle(memory)
    return data


def _poison(memory: Memory) -> None:
    memory.tensor.fill_(POISON)
    _settle(memory)


def _settle(memory: Memory) -> None:
    if memory.tensor.is_cuda:
        torch.cuda.synchronize(memory.tensor.device)
