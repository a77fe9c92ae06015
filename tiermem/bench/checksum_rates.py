"""Checksum rates: how fast sums are computed, against reading the same bytes and nothing else."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from tiermem import _core
from tiermem.bench.checksum_steps import size_of
from tiermem.bench.checksum_turns import Row, Turns, Unit, take_turns
from tiermem.bench.result import Result
from tiermem.bench.run import Run
from tiermem.device.protocol import Addresses, Device, Memory
from tiermem.errors import InvariantError
from tiermem.layout import PageLayout
from tiermem.measure.timing import Work, time_device, time_host
from tiermem.page_sums import SUM_BYTES

PASSES = 4
"""A timed run of the GPU goes over all of it so often, back to back, so that its start does not count."""


def rows(bench: Run) -> Iterator[Result]:
    """The kernel over hot memory, and the CPU's function over host memory.

    Raises
    ------
    ConfigError: no room for the buffers. InvariantError: a sum is wrong, or a wrong one was not found.
    """
    layout = size_of(bench).layout
    hot = bench.pick(gpu=2 << 30, cpu=256 << 20, quick_gpu=256 << 20, quick_cpu=8 << 20)
    kernel = _row("kernel on the GPU", layout, hot, "a kernel that only reads")
    if bench.on_gpu:
        bench.settle()
        bench.progress("checksums: the kernel")
        yield kernel.measured(bench, _kernel(bench, layout, kernel.num_bytes))
    else:
        yield kernel.skipped(bench, "needs a GPU")
    host = bench.pick(gpu=1 << 30, cpu=256 << 20, quick_gpu=128 << 20, quick_cpu=8 << 20)
    function = _row("function on the CPU, one thread", layout, host, "a loop that only reads")
    bench.progress("checksums: the function on the CPU")
    yield function.measured(bench, _function(bench, layout, function.num_bytes))


def _row(name: str, layout: PageLayout, total: int, without: str) -> Row:
    num_bytes = total // layout.page_bytes * layout.page_bytes
    parameters = {"slice_bytes": layout.layer_bytes, "total_bytes": num_bytes}
    return Row(name, parameters, Unit.RATE, None, num_bytes, without)


def _kernel(bench: Run, layout: PageLayout, num_bytes: int) -> Turns:
    """Comparisons of every slice with its sum."""
    from tiermem.attention.kernels.read import fold

    device = bench.device
    hot = device.allocate(num_bytes)
    try:
        hot.tensor.random_(0, 256)
        pages = _pages(hot, layout)
        sums = device.allocate_host(len(pages) * layout.num_layers * SUM_BYTES)
        try:
            stride = layout.num_layers * SUM_BYTES
            at = sums.address + np.arange(len(pages), dtype=np.int64) * stride
            slices = device.slices(pages, at, layout.layer_bytes)
            every, stream = range(layout.num_layers), device.compute_stream()
            device.sum_slices(slices, every, stream)
            turns = take_turns(
                lambda: _seconds(device, lambda: device.verify_slices(slices, every, stream)),
                lambda: _seconds(device, lambda: fold(hot.tensor)),
                2 * bench.repeats,
            )
            _check_kernel(hot, sums, layout)
            if slices.marked().any():
                raise InvariantError("checksums: the kernel found pages that are not damaged")
            hot.tensor[num_bytes // 2] ^= 4
            device.verify_slices(slices, every, stream)
            stream.synchronize()
            wrong = int((slices.marked() != 0).sum())
            if wrong != 1:
                raise InvariantError(f"checksums: of one damaged page the kernel found {wrong}")
        finally:
            sums.free()
    finally:
        hot.free()
    return turns


def _seconds(device: Device, work: Work) -> float:
    def run() -> None:
        for _ in range(PASSES):
            work()

    return time_device(device, run, 1, warmups=0).times_s[0] / PASSES


def _check_kernel(hot: Memory, sums: Memory, layout: PageLayout) -> None:
    """The kernel's sums of the last page are those of the CPU."""
    page = hot.tensor[-layout.page_bytes :].cpu()
    wanted = _core.checksum_slices(page.data_ptr(), layout.layer_bytes, layout.num_layers)
    found = sums.tensor.numpy().view(np.uint64)[-layout.num_layers :]
    if not np.array_equal(found, wanted):
        raise InvariantError("checksums: the kernel's sums are not those of the CPU")


def _function(bench: Run, layout: PageLayout, num_bytes: int) -> Turns:
    """Sums of every slice by the calling thread."""
    memory = bench.device.allocate_host(num_bytes)
    try:
        words = memory.tensor.view(torch.int64)
        torch.arange(len(words), out=words)
        pages = _pages(memory, layout)
        reader = _core.MemoryReader(1)
        turns = take_turns(
            lambda: _host_seconds(
                lambda: _core.checksum_slices(
                    memory.address, layout.layer_bytes, len(pages) * layout.num_layers
                )
            ),
            lambda: _host_seconds(lambda: reader.sum(memory.address, num_bytes)),
            2 * bench.repeats,
        )
        fast, plain = (
            _core.checksum(int(pages[-1]), layout.layer_bytes, path)
            for path in (_core.ChecksumPath.AUTO, _core.ChecksumPath.PORTABLE)
        )
        if fast != plain:
            raise InvariantError("checksums: the CPU's instructions give different sums")
    finally:
        memory.free()
    return turns


def _host_seconds(work: Work) -> float:
    return time_host(work, 1, warmups=0).times_s[0]


def _pages(memory: Memory, layout: PageLayout) -> Addresses:
    """Where the pages start that fill `memory`."""
    count = memory.num_bytes // layout.page_bytes
    return memory.address + np.arange(count, dtype=np.int64) * layout.page_bytes
