"""Build: sizes from the configuration, memory from the device, parts put together."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import cast

import psutil

from tiermem import _core
from tiermem.attention.backend import AttentionBackend, backend_for
from tiermem.attention.cpus import cpus_beside_gpu, usable_cpus
from tiermem.attention.host import HostBackend
from tiermem.attention.pool_view import TORCH_DTYPES, PoolView, ProductMath
from tiermem.attention.queued import QueuedAttention
from tiermem.calibration import Calibration
from tiermem.cipher_key import find_key
from tiermem.config import AttentionMath, DebugMode, TierConfig, VerifyRam
from tiermem.core import Core
from tiermem.device.protocol import Device, DeviceKind, Memory, Progress
from tiermem.disk_budget import DiskLimits
from tiermem.disk_rates import DiskOptions
from tiermem.errors import ConfigError
from tiermem.fields import check_enum
from tiermem.hand_over import HandOver
from tiermem.inflight import InFlight
from tiermem.layout import PageLayout
from tiermem.lease import Leases
from tiermem.limits import share_at_start, split_rates
from tiermem.mover import Mover
from tiermem.page_sums import PageSums
from tiermem.poison import Poison, PoisonedTable, PoolSlots, StoreSlots
from tiermem.pools import Ids, SlotPool, Tier
from tiermem.prefix import Prefixes
from tiermem.ram_attention import (
    DirectAttention,
    FixedShare,
    RamAttention,
    RamPolicy,
    warm_view,
)
from tiermem.ram_balance import RamBalance
from tiermem.room import Room, Watermarks
from tiermem.store import ColdStore
from tiermem.store_files import cap_of, num_slots_there
from tiermem.streaming import NUM_HALVES, Ring
from tiermem.units import Size, SizeKind, format_bytes

log = logging.getLogger("tiermem")

MATH = {AttentionMath.AUTO: ProductMath.STORED, AttentionMath.FLOAT32: ProductMath.FLOAT32}
KEEP_WITHIN = 0.2
"""A store whose size was not given in bytes keeps the one it has, if that is as near to what it would get now."""
ATTENDED_A_LAYER = {VerifyRam.SAMPLE: 1, VerifyRam.ALWAYS: None}
"""Pages that are attended in RAM and compared with their checksums; None: all."""
DEBUG_VARIABLE = "TIERMEM_DEBUG"
SHRINK = 0.9
"""A pool whose size was not given in bytes is tried again at this share of it when memory is refused."""


def build_core(
    layout: PageLayout,
    config: TierConfig,
    model_id: str,
    shard: tuple[int, int],
    device: Device,
    store: ColdStore | None,
    seal_idle: Callable[[], bool],
    open_pages: Callable[[], Ids],
    progress: Progress | None = None,
    made: Calibration | None = None,
) -> Core:
    """Allocate the pools and staging and put the parts of a manager together.

    `progress` is told how much of the RAM tier is ready. `made` is what was measured on this machine.

    Raises
    ------
    ConfigError: an explicit size does not fit, or no page does; everything allocated here is given back.
    """
    _check_threads(config.cpu_threads)
    device.copy_timeout_s = config.copy_timeout_s
    backend = _backend(layout, config, device)
    with contextlib.ExitStack() as undo:
        hot_pool, ring_bytes = _hot_pool(layout, config, device)
        undo.callback(hot_pool.free)
        pools = {Tier.GPU: hot_pool}
        warm_pool = _warm_pool(layout, config, device, progress)
        if warm_pool is not None:
            undo.callback(warm_pool.free)
            pools[Tier.RAM] = warm_pool
        slots = {
            Tier.GPU: hot_pool.num_slots,
            Tier.RAM: warm_pool.num_slots if warm_pool else 0,
            Tier.SSD: store.num_slots if store else 0,
        }
        table = _core.PageTable(*slots.values())
        poison = _poison(config, device, pools, store)
        if poison is not None:
            table = cast("_core.PageTable", PoisonedTable(table, poison))
        prefixes = Prefixes(layout, model_id, shard, table, store)
        in_flight = InFlight()
        sums = PageSums(device, layout, table, pools, ATTENDED_A_LAYER[config.verify_ram])
        mover = Mover(
            device, layout, table, in_flight, pools, store, prefixes, config.staging_pages, sums
        )
        undo.callback(mover.free)
        if poison is not None:
            mover.watch(poison)
        chunk_pages = ring_bytes // layout.layer_bytes // NUM_HALVES
        ring = Ring(device, layout, table, pools, store, mover, chunk_pages)
        undo.pop_all()
    if store is not None:
        # Staging first: everything between GPU and SSD goes through it.
        warm = [warm_pool.memory] if warm_pool is not None else []
        for memory in [*mover.staging, *ring.staging, *warm]:
            store.engine.register_memory(memory.address, memory.num_bytes)
    hot = PoolView(
        hot_pool.memory.tensor.view(TORCH_DTYPES[layout.dtype]),
        layout,
        layout.slot_bytes // layout.item_bytes,
        hot_pool.num_slots,
    )
    marks = {tier: _watermarks(config, count) for tier, count in slots.items()}
    ram = _ram_attention(layout, config, device, warm_pool, backend, made)
    leases = Leases(table, prefixes)
    guard = store.guard if store else None
    room = Room(table, in_flight, mover, prefixes, leases, marks, seal_idle, open_pages, guard)
    return Core(
        layout,
        device,
        backend,
        table,
        in_flight,
        pools,
        hot,
        prefixes,
        leases,
        mover,
        room,
        ring,
        ram,
    )


def _poison(
    config: TierConfig, device: Device, pools: dict[Tier, SlotPool], store: ColdStore | None
) -> Poison | None:
    """What looks after free memory, where configuration or environment ask for it."""
    mode = config.debug
    if wanted := os.environ.get(DEBUG_VARIABLE):
        mode = check_enum(DEBUG_VARIABLE, wanted, DebugMode)
    if mode is DebugMode.OFF:
        return None
    poison = Poison()
    for tier, pool in pools.items():
        poison.watch(tier.name, PoolSlots(pool, device))
    if store is not None:
        poison.watch(Tier.SSD.name, StoreSlots(store))
    return poison


def open_store(
    layout: PageLayout, config: TierConfig, options: DiskOptions | None = None
) -> ColdStore | None:
    """The SSD tier, or None where the configuration has none; `options` as the disk was measured.

    Raises
    ------
    ConfigError: the size or the path cannot be used.
    """
    if config.ssd_path is None or config.ssd.is_zero:
        return None
    usage = shutil.disk_usage(_existing(config.ssd_path))
    budget = config.ssd_write_budget
    floor = config.free_floor_bytes(usage.total)
    return ColdStore(
        config.ssd_path,
        layout,
        _cap_bytes(layout, config, usage.free, floor),
        config.io_engine.value,
        config.io_timeout_s,
        options,
        DiskLimits(floor, None if budget is None else budget.num_bytes),
        find_key(config.ssd_key_file),
    )


def _cap_bytes(layout: PageLayout, config: TierConfig, free: int, floor: int) -> int:
    """What the store may take where `free` bytes are free, besides what it has.

    The floor stops growth: a store that is there already stays as large as it is, or is to be. A share of what is
    free is not followed to the byte, so that restarts do not cut off pages.
    """
    assert config.ssd_path is not None
    have = cap_of(layout, num_slots_there(config.ssd_path, layout))
    wanted = config.ssd.resolve(free + have)
    most = max(have, free + have - floor)
    if config.ssd.kind is SizeKind.EXPLICIT:
        if wanted > most:
            raise ConfigError(
                f"ssd={config.ssd}: {format_bytes(wanted)} wanted, {free + have} bytes are free for "
                f"{str(config.ssd_path)!r}, of which ssd_free_floor={config.ssd_free_floor} leaves {floor}"
            )
        return wanted
    if abs(wanted - have) <= KEEP_WITHIN * have:
        return have
    return min(wanted, most)


def _backend(layout: PageLayout, config: TierConfig, device: Device) -> AttentionBackend:
    math = MATH[config.attention_math]
    try:
        return backend_for(
            device.torch_device, device.compute_capability, layout.dtype, math, config.cpu_threads
        )
    except ValueError as error:
        raise ConfigError(f"device={config.device!r}: {error}") from error


def _check_threads(threads: int | None) -> None:
    if threads is not None and threads > usable_cpus():
        raise ConfigError(
            f"cpu_threads={threads}: must be 1 to {usable_cpus()}, the CPUs that this process may use"
        )


def _ram_attention(
    layout: PageLayout,
    config: TierConfig,
    device: Device,
    pool: SlotPool | None,
    backend: AttentionBackend,
    made: Calibration | None,
) -> RamAttention | None:
    on_cpu = device.kind is DeviceKind.CPU
    threads = config.cpu_threads or cpus_beside_gpu()
    share, rates = config.cpu_share, split_rates(made, layout.dtype, threads)
    if share is None:
        share = 1.0 if on_cpu else share_at_start(rates)
    if pool is None or share == 0:
        return None
    policy: RamPolicy = FixedShare(share)
    if on_cpu:  # nothing is gained by copying pages, whatever the number of rows
        policy = FixedShare(share, None)
    elif config.cpu_share is None and rates is not None:
        policy = RamBalance(rates)
    view = warm_view(layout, pool)
    if on_cpu and isinstance(backend, HostBackend):
        return DirectAttention(view, backend, policy)
    return HandOver(device, view, QueuedAttention(threads, deadline_s=config.io_timeout_s), policy)


def _hot_pool(layout: PageLayout, config: TierConfig, device: Device) -> tuple[SlotPool, int]:
    """The hot tier, and the bytes of the ring beside it."""
    info = device.memory_info()
    wanted = config.gpu.resolve(info.free_bytes)
    ring_bytes = config.ring_bytes(layout, wanted)
    if config.gpu_limit is not None:
        limit = config.gpu_limit.num_bytes - ring_bytes
        if wanted > limit and config.gpu.kind is SizeKind.EXPLICIT:
            raise ConfigError(
                f"gpu={config.gpu}: with {ring_bytes} bytes of staging it exceeds "
                f"gpu_limit={config.gpu_limit}"
            )
        wanted = min(wanted, limit)

    def allocate(num_bytes: int) -> Memory:
        memory = device.allocate(num_bytes)
        try:  # a pool beside which the ring has no room is too large
            device.allocate(ring_bytes).free()
        except ConfigError:
            memory.free()
            raise
        return memory

    return _pool("gpu", config.gpu, wanted, layout, allocate), ring_bytes


def _warm_pool(
    layout: PageLayout, config: TierConfig, device: Device, progress: Progress | None
) -> SlotPool | None:
    if config.ram.is_zero:
        return None
    free = psutil.virtual_memory().available
    wanted = config.ram.resolve(free)
    if wanted > free:
        raise ConfigError(
            f"ram={config.ram}: {format_bytes(wanted)} wanted, {free} bytes of memory are free"
        )
    allocate = partial(device.allocate_host, progress=progress)
    return _pool("ram", config.ram, wanted, layout, allocate)


def _pool(
    key: str, size: Size, wanted: int, layout: PageLayout, allocate: Callable[[int], Memory]
) -> SlotPool:
    """A pool of `wanted` bytes; a smaller one, with a warning, if need be and the size was not explicit."""
    tried = wanted
    while True:
        num_slots = tried // layout.slot_bytes
        if num_slots < 1:
            raise ConfigError(
                f"{key}={size}: {tried} bytes hold no page of {layout.slot_bytes} bytes; "
                f"must be at least {format_bytes(layout.slot_bytes)}"
            )
        try:
            memory = allocate(num_slots * layout.slot_bytes)
        except ConfigError as error:
            if size.kind is SizeKind.EXPLICIT:
                raise ConfigError(f"{key}={size}: {error}") from error
            tried = int(tried * SHRINK)
            continue
        if tried < wanted:
            log.warning("%s=%s: %d bytes were refused, the pool has %d", key, size, wanted, tried)
        return SlotPool(memory, layout.slot_bytes, num_slots)


def _watermarks(config: TierConfig, slots: int) -> Watermarks:
    return Watermarks(int(config.low_watermark * slots), int(config.high_watermark * slots))


def _existing(path: Path) -> Path:
    """`path`, or the nearest directory above it that exists."""
    while not path.exists():
        path = path.absolute().parent
    return path
