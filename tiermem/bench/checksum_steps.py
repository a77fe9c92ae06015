"""Checksum steps: what comparing costs decode steps and copies of a manager."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from tiermem.attention.pool_view import TORCH_DTYPES
from tiermem.bench.checksum_turns import Row, Timed, Turns, Unit, take_turns
from tiermem.bench.result import Result
from tiermem.bench.run import Run, Scale
from tiermem.config import TierConfig
from tiermem.errors import ConfigError, InvariantError
from tiermem.graphs import CapturedDecode
from tiermem.layout import PageLayout
from tiermem.manager import TierManager
from tiermem.pools import Tier
from tiermem.sequence import Sequence
from tiermem.step import Step

STREAMED_PERCENT = 2.0
COPY_PERCENT = 2.0
RESIDENT_PERCENT = 1.0
FILL_PAGES = 16
"""Stored by one step."""


@dataclass(frozen=True, slots=True)
class Size:
    """The tiers of a manager, and the contexts that are decoded and copied there, in pages."""

    layout: PageLayout
    q_heads: int
    hot: int
    warm: int
    streamed: int
    copied: int
    resident: int


# 60 layers of 8 KV heads: pages of 30 MiB, a hot tier of 8 GiB.
ON_GPU = Size(PageLayout(60, 8, 128, "float16", 128), 64, 273, 580, 512, 192, 128)
QUICK_ON_GPU = Size(PageLayout(8, 8, 128, "float16", 128), 64, 64, 136, 120, 44, 30)
ON_CPU = Size(PageLayout(4, 8, 128, "float16", 64), 32, 64, 136, 120, 44, 8)
QUICK_ON_CPU = Size(PageLayout(2, 2, 64, "float32", 32), 4, 32, 68, 60, 22, 15)


def rows(bench: Run) -> Iterator[Result]:
    """A streamed decode step, copies of whole pages from RAM, and a resident decode step.

    Raises
    ------
    InvariantError: a comparison found what is not there, or did not find what is; or steps moved other bytes
        than they were to.
    """
    size = size_of(bench)
    layout = size.layout
    streamed = Row(
        "streamed decode step",
        {"context": size.streamed * layout.page_tokens, **_shape(size)},
        Unit.MILLISECONDS,
        STREAMED_PERCENT,
    )
    copied = Row(
        "pages from RAM to the hot tier",
        {"pages": size.copied, **_shape(size)},
        Unit.RATE,
        COPY_PERCENT,
        size.copied * layout.page_bytes,
    )
    resident = Row(
        "resident decode step",
        {"context": size.resident * layout.page_tokens, **_shape(size)},
        Unit.MICROSECONDS,
        RESIDENT_PERCENT,
    )
    bench.progress("checksums: tiers")
    slot, on = layout.slot_bytes, str(bench.device.torch_device)
    config = TierConfig(gpu=size.hot * slot, ram=size.warm * slot, ssd=0, device=on, cpu_share=0.0)
    try:
        manager = TierManager(layout, config, "bench")
    except ConfigError as error:
        yield from (row.skipped(bench, str(error)) for row in (streamed, copied, resident))
        return
    with manager:
        field = _Field(bench, manager, size)
        yield streamed.measured(bench, field.streamed(), "attention alone")
        yield copied.measured(bench, field.copied())
        yield resident.measured(bench, field.resident(), "attention alone, each page summed once")


def size_of(bench: Run) -> Size:
    """What is measured on this device at this scale."""
    if bench.scale is Scale.QUICK:
        return QUICK_ON_GPU if bench.on_gpu else QUICK_ON_CPU
    return ON_GPU if bench.on_gpu else ON_CPU


class _Field:
    """One manager, and its sequences of random K and V."""

    def __init__(self, bench: Run, manager: TierManager, size: Size) -> None:
        self._bench = bench
        self._manager = manager
        self._core = manager._core
        self._size = size
        self._pairs = 2 * bench.repeats
        self._random = torch.Generator(manager.torch_device).manual_seed(0)
        self._row = self._rows(1, size.layout.num_kv_heads)
        self._q = self._rows(1, size.q_heads)

    def streamed(self) -> Turns:
        """Steps of a context of which about half lies in RAM alone."""
        sequence = self._filled(self._size.streamed)
        self._bench.progress("checksums: streamed decode steps")

        def step() -> float:
            start_s = time.perf_counter()
            with self._manager.step([sequence]) as running:
                self._decode(running, self._row, self._q)
            self._synchronize()
            return time.perf_counter() - start_s

        turns = self._in_turns(step)
        if not self._streamed_bytes():
            raise InvariantError("checksums: steps larger than the hot tier streamed nothing")
        self._close(sequence)
        return turns

    def copied(self) -> Turns:
        """Promotions of all pages of a suspended sequence in one batch, until they may be used."""
        sequence = self._filled(self._size.copied)
        self._bench.progress("checksums: pages from RAM to the hot tier")

        def promote() -> float:
            sequence.suspend()
            self._synchronize()
            start_s = time.perf_counter()
            count = sequence.prefetch()
            self._core.in_flight.drain()
            elapsed_s = time.perf_counter() - start_s
            if count != self._size.copied:
                raise InvariantError(
                    f"checksums: {count} of {self._size.copied} pages were promoted"
                )
            return elapsed_s

        turns = self._in_turns(promote)
        self._check_comparison(sequence)
        self._close(sequence)
        return turns

    def resident(self) -> Turns:
        """Steps that fill one page, from its first token to the one that seals it: seconds a step."""
        sequence = self._filled(self._size.resident)
        count = self._size.layout.page_tokens
        decode = CapturedDecode(self._manager, self._decode)
        self._bench.progress("checksums: resident decode steps")

        def fill_page() -> float:
            self._synchronize()
            start_s = time.perf_counter()
            for _ in range(count):
                decode.run([sequence], self._row, self._q)
            self._synchronize()
            elapsed_s = time.perf_counter() - start_s
            self._core.in_flight.drain()
            sequence.rollback(count)  # so that all of them attend over the same tokens
            return elapsed_s / count

        turns = self._in_turns(fill_page)
        if self._streamed_bytes():
            raise InvariantError("checksums: steps within the hot tier streamed pages")
        self._close(sequence)
        return turns

    # ---- inside ------------------------------------------------------------------------------------

    def _in_turns(self, run: Timed) -> Turns:
        """With comparing and without. What is sealed without has no sums: it must not stay."""

        def without() -> float:
            self._core.mover.sums.verifies = False
            try:
                return run()
            finally:
                self._core.mover.sums.verifies = True

        turns = take_turns(run, without, self._pairs)
        found = self._manager.stats().corrupt_pages
        if found:
            raise InvariantError(f"checksums: {found} pages of those that were timed are damaged")
        return turns

    def _check_comparison(self, sequence: Sequence) -> None:
        """A page with another sum is found, and that one alone."""
        core, ids = self._core, sequence.pages
        sums = core.mover.sums
        slots = {tier: core.table.slots(ids, tier) for tier in (Tier.GPU, Tier.RAM)}
        right = sums.of(Tier.RAM, slots[Tier.RAM])
        wrong = right.copy()
        wrong[len(ids) // 2, -1] ^= 1
        found = []
        for rows_ in (right, wrong):
            sums.put(Tier.RAM, slots[Tier.RAM], rows_)
            check = sums.check(
                core.pools[Tier.GPU].addresses(slots[Tier.GPU]),
                sums.rows(Tier.RAM, slots[Tier.RAM]),
                ids, slots[Tier.RAM] * 0 + int(Tier.RAM), slots[Tier.RAM],
            )  # fmt: skip
            sums.verify(check, sums.every_layer, core.device.compute_stream())
            self._synchronize()
            found.append([damage.page for damage in check.damages()])
        sums.put(Tier.RAM, slots[Tier.RAM], right)
        if found != [[], [int(ids[len(ids) // 2])]]:
            raise InvariantError(f"checksums: comparing found the pages {found}, not one")

    def _filled(self, pages: int) -> Sequence:
        layout = self._size.layout
        self._bench.progress(f"checksums: storing {pages} pages")
        sequence = self._manager.open_sequence()
        for start in range(0, pages, FILL_PAGES):
            count = min(FILL_PAGES, pages - start) * layout.page_tokens
            k, v = (self._rows(count, layout.num_kv_heads) for _ in range(2))
            with self._manager.step([sequence], count) as step:
                for layer in range(layout.num_layers):
                    step.append(layer, k, v)
        self._synchronize()
        return sequence

    def _decode(self, step: Step, row: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        for layer in range(self._size.layout.num_layers):
            step.append(layer, row, row)
            out = step.attend(layer, q)
        return out

    def _rows(self, count: int, heads: int) -> torch.Tensor:
        layout = self._size.layout
        return torch.randn(
            (count, heads, layout.head_dim), generator=self._random,
            dtype=TORCH_DTYPES[layout.dtype], device=self._random.device,
        )  # fmt: skip

    def _streamed_bytes(self) -> int:
        """Of the last step."""
        last = self._manager.stats().last_step
        return 0 if last is None else last.streamed_bytes

    def _synchronize(self) -> None:
        self._core.device.compute_stream().synchronize()

    def _close(self, sequence: Sequence) -> None:
        sequence.close()
        self._core.in_flight.drain()


def _shape(size: Size) -> dict[str, str | int | float]:
    """What all rows have in common."""
    layout = size.layout
    return {
        "layers": layout.num_layers,
        "page_bytes": layout.page_bytes,
        "hot_bytes": size.hot * layout.slot_bytes,
    }
