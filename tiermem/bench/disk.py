"""How near do pages of scattered slots of the cold tier, plain and encrypted, come to raw direct I/O?"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from tiermem._core import IoDirection
from tiermem.bench.disk_ceiling import DiskCeiling
from tiermem.bench.result import GIGA, Ceiling, Parameters, Result, Subject, measured, rates
from tiermem.bench.run import Run, Scale
from tiermem.cipher import CIPHER_NAME
from tiermem.cipher_key import KEY_BYTES, SecretKey
from tiermem.device.protocol import Memory
from tiermem.disk_rates import DiskOptions, measure_disk
from tiermem.errors import ConfigError, CorruptPageError
from tiermem.layout import PageLayout
from tiermem.measure.timing import Work, time_host
from tiermem.store import ColdStore, StoreTransfer

NAME = "disk"
TARGET = 95.0
TIMEOUT_S = 120.0
FULL_SECONDS = 8.0
"""In which ways of reading and writing are compared."""
SPARE_BYTES = 64 << 20
"""Beyond the slots: the index, and something for everybody else on the disk."""
SLOT_EXTRA = 8192
"""Of each slot, set aside for its trailer and its part of the index."""
BATCH_BYTES = 256 << 20
"""In one transfer; several are in flight."""
POISON = 0xA5

# 8 KV heads of 128 elements, 64 tokens a page, fp16: 256 KiB a layer.
FULL_LAYERS = (64, 8)
QUICK_LAYERS = (4,)


def run(bench: Run) -> Iterator[Result]:
    """Every row of the benchmark.

    Raises
    ------
    ConfigError: the disk has no room, or no store can be there; nothing was written then.
    CorruptPageError: what was read back is not what was written.
    """
    total = bench.pick(gpu=2 << 30, cpu=512 << 20, quick_gpu=64 << 20, quick_cpu=16 << 20)
    layouts = FULL_LAYERS if bench.scale is Scale.FULL else QUICK_LAYERS
    _check_room(bench.directory, total, min(layouts))
    memory = bench.device.allocate_host(total)
    try:
        bench.progress("disk: which way of reading and writing suits it")
        options = best_way(bench, total)
        bench.progress("disk: raw direct I/O")
        with (
            own_directory(bench.directory) as path,
            DiskCeiling(path / "raw", memory, bench.scale) as ceiling,
        ):
            for num_layers in layouts:
                layout = PageLayout(num_layers, 8, 128, "float16", 64)
                rows = _StoreRows(bench, layout, memory, ceiling, options)
                yield from rows.rows(path / f"store of {num_layers} layers")
                if num_layers == layouts[0] and find_spec("cryptography") is not None:
                    yield from rows.encrypted().rows(path / "encrypted store")
    finally:
        memory.free()


class _StoreRows:
    """Writes and reads of one page size."""

    def __init__(
        self,
        bench: Run,
        layout: PageLayout,
        memory: Memory,
        ceiling: DiskCeiling,
        options: DiskOptions | None,
    ) -> None:
        self._bench = bench
        self._layout = layout
        self._memory = memory
        self._ceiling = ceiling
        self._options = options
        num_pages = memory.num_bytes // layout.slot_bytes
        self._slots = np.random.default_rng(layout.num_layers).permutation(num_pages)
        self._at = memory.address + np.arange(num_pages, dtype=np.int64) * layout.slot_bytes
        self._repeats = 3
        self._key: SecretKey | None = None

    def encrypted(self) -> _StoreRows:
        """The same with a store that is encrypted."""
        rows = copy(self)
        rows._key = SecretKey(os.urandom(KEY_BYTES))
        return rows

    def rows(self, path: Path) -> Iterator[Result]:
        """A row for writing and one for reading."""
        layout, pages = self._layout, len(self._slots)
        cap_bytes = pages * (layout.slot_bytes + SLOT_EXTRA) + SPARE_BYTES // 2
        store = ColdStore(path, layout, cap_bytes, "auto", TIMEOUT_S, self._options, key=self._key)
        note = str(self._options) if self._options else store.io_kind
        try:
            store.engine.register_memory(self._memory.address, self._memory.num_bytes)
            _fill(self._memory, layout.num_layers)
            self._bench.progress(f"disk: writing pages of {layout.slot_bytes >> 10} KiB")
            # the run before those that count meets extents that were never written
            yield self._row(IoDirection.WRITE, note, lambda: self._write(store))
            self._bench.progress(f"disk: reading pages of {layout.slot_bytes >> 10} KiB")
            result = self._row(IoDirection.READ, note, lambda: self._read(store))
            _check(self._memory, layout.num_layers)
            yield result
        finally:
            store.close()
            shutil.rmtree(path)  # two stores at once are not accounted for

    def _row(self, way: IoDirection, note: str, run: Work) -> Result:
        """Runs in turns with raw loops over another file."""

        def prepare() -> None:
            self._ceiling.turn(way)
            if way is IoDirection.READ:
                self._memory.tensor.fill_(POISON)

        self._ceiling.restart(way)
        samples = time_host(run, self._repeats, prepare=prepare)
        num_bytes = len(self._slots) * self._layout.slot_bytes
        name, rate = self._ceiling.best(way)
        parameters: Parameters = {
            "way": way.name.lower(), "page_bytes": self._layout.slot_bytes, "total_bytes": num_bytes,
        }  # fmt: skip
        aim = self._bench.aim(TARGET)
        if self._key is not None:
            parameters, aim = {**parameters, "cipher": CIPHER_NAME}, None
        subject = Subject(NAME, "pages", parameters, "GB/s", target_percent=aim, note=note)
        return measured(subject, rates(samples, num_bytes), Ceiling(name, rate / GIGA))

    def _write(self, store: ColdStore) -> None:
        for _ in self._transfer(
            lambda part: store.write(self._slots[part], self._at[part], [None] * _size(part))
        ):
            pass

    def _read(self, store: ColdStore) -> None:
        """Read and verify: pages are data only then."""
        for transfer in self._transfer(lambda part: store.read(self._slots[part], self._at[part])):
            good = store.verify(transfer)
            if not good.all():
                raise CorruptPageError(
                    f"disk: {int((~good).sum())} of {len(good)} pages came back damaged"
                )

    def _transfer(self, submit: Callable[[slice], StoreTransfer]) -> Iterator[StoreTransfer]:
        """Submit everything in batches; then each batch once it has ended."""
        pages = len(self._slots)
        step = max(1, BATCH_BYTES // self._layout.slot_bytes)
        parts = [slice(start, min(start + step, pages)) for start in range(0, pages, step)]
        transfers = [submit(part) for part in parts]
        for transfer in transfers:
            while not transfer.poll():
                transfer.wait()
            yield transfer


def best_way(bench: Run, total: int) -> DiskOptions | None:
    """The way that `tiermem calibrate` would choose; None, the engine's own choice, in a quick run."""
    if bench.scale is Scale.QUICK:
        return None
    return measure_disk(bench.directory, num_bytes=total, seconds=FULL_SECONDS).choose()


def _size(part: slice) -> int:
    return int(part.stop) - int(part.start)


def _check_room(directory: Path, total: int, fewest_layers: int) -> None:
    slot_bytes = PageLayout(fewest_layers, 8, 128, "float16", 64).slot_bytes
    store_bytes = total + total // slot_bytes * SLOT_EXTRA
    check_room(directory, total + store_bytes + SPARE_BYTES)  # the store beside the raw file


def check_room(directory: Path, wanted: int) -> None:
    """Refuse a place with fewer free bytes than `wanted`.

    Raises
    ------
    ConfigError: there are fewer, or there is no such place.
    """
    try:
        free = shutil.disk_usage(directory).free
    except OSError as error:
        raise ConfigError(f"{directory}: {error.strerror or error}") from error
    if wanted > free:
        raise ConfigError(
            f"the benchmark writes {wanted} bytes, {free} bytes are free in {directory}: free "
            f"some, or give another --ssd-path"
        )


@contextmanager
def own_directory(base: Path) -> Iterator[Path]:
    """A directory below `base` that is removed with what it holds.

    Raises
    ------
    ConfigError: nothing can be written there.
    """
    try:
        path = Path(tempfile.mkdtemp(prefix="tiermem-bench-", dir=base))
    except OSError as error:
        raise ConfigError(
            f"{base}: nothing can be written there: {error.strerror or error}"
        ) from error
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _fill(memory: Memory, seed: int) -> None:
    words = memory.tensor[: memory.num_bytes // 8 * 8].view(torch.int64)
    torch.arange(seed, seed + len(words), out=words)


def _check(memory: Memory, seed: int) -> None:
    """Every page came back to where it was written from, so the memory is as `_fill` left it."""
    words = memory.tensor[: memory.num_bytes // 8 * 8].view(torch.int64)
    step = BATCH_BYTES // 8
    for start in range(0, len(words), step):
        part = words[start : start + step]
        wrong = part != torch.arange(seed + start, seed + start + len(part))
        if bool(wrong.any()):
            raise CorruptPageError(
                f"disk: {int(wrong.sum())} of {len(part)} words read back differ from those written"
            )
