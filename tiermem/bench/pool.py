"""How long until the warm pool is ready, against cudaHostAlloc of the same size?"""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch

from tiermem.bench.huge_pages import huge_bytes
from tiermem.bench.result import GIGA, Ceiling, Result, Subject, measured, not_measured
from tiermem.bench.run import Run, Scale
from tiermem.device.host import host_free_bytes
from tiermem.device.protocol import Memory
from tiermem.errors import InvariantError

NAME = "pool"
SPEED_UP_BUDGET = 3.0
SPARE_BYTES = 2 << 30
"""Left for everybody else."""
CHECK_STRIDE = 4096


def run(bench: Run) -> Iterator[Result]:
    """Every row of the benchmark.

    Raises
    ------
    InvariantError: memory does not hold what was written to it.
    """
    size = bench.pool_bytes
    parameters = {"pool_bytes": size}
    start_up = Subject(NAME, "start-up", parameters, "GB/s")
    speed_up = Subject(
        NAME, "against cudaHostAlloc", parameters, "x", budget=bench.aim(SPEED_UP_BUDGET)
    )
    huge = Subject(NAME, "in huge pages", parameters, "%")
    free = host_free_bytes()
    if size + SPARE_BYTES > free:
        reason = f"needs {size + SPARE_BYTES} bytes of memory, {free} are free"
        yield from (not_measured(subject, reason) for subject in (start_up, speed_up, huge))
        return
    repeats = 3 if bench.scale is Scale.QUICK else 2
    # A virtual machine gets much memory from its host at the first touch only: not what is asked about.
    bench.progress(f"pool: {size >> 20} MiB, touching memory for the first time")
    _start_up(bench, size)
    times, shares = [], []
    for i in range(repeats):
        bench.progress(f"pool: {size >> 20} MiB, {i + 1} of {repeats}")
        seconds, share = _start_up(bench, size)
        times.append(seconds)
        shares.append(share)
    threads = torch.get_num_threads()
    written = bench.ceilings.ram_copy_rate(threads) / 2 / GIGA
    ceiling = Ceiling(f"RAM written while copying, {threads} threads", written)
    yield measured(start_up, [size / seconds / GIGA for seconds in times], ceiling)
    yield measured(huge, shares, Ceiling("all of it", 100.0))
    if not bench.on_gpu:
        yield not_measured(speed_up, "needs a GPU: cudaHostAlloc")
        return
    bench.progress(f"pool: {size >> 20} MiB by cudaHostAlloc")
    driver_s = _by_driver(size)
    reason = f"a ratio has no ceiling; cudaHostAlloc took {driver_s:.3g} s"
    yield measured(speed_up, [driver_s / seconds for seconds in times], reason)


def _start_up(bench: Run, size: int) -> tuple[float, float]:
    """Seconds until the memory can be used, and the percentage of it in huge pages."""
    start_s = time.perf_counter()
    memory = bench.device.allocate_host(size)
    seconds = time.perf_counter() - start_s
    try:
        share = 100 * huge_bytes(memory.address, size) / size
        _check(memory)
    finally:
        memory.free()
    return seconds, share


def _check(memory: Memory) -> None:
    """One byte of every memory page is there and keeps what is written to it."""
    bytes_ = memory.tensor[::CHECK_STRIDE]
    wanted = torch.arange(len(bytes_), dtype=torch.int64).remainder_(251).to(torch.uint8)
    bytes_.copy_(wanted)
    if not torch.equal(bytes_, wanted):
        raise InvariantError("pool: memory does not hold what was written to it")


def _by_driver(size: int) -> float:
    """Seconds of cudaHostAlloc, which torch calls for pinned tensors."""
    start_s = time.perf_counter()
    tensor = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    seconds = time.perf_counter() - start_s
    del tensor
    torch._C._host_emptyCache()
    return seconds
