"""HandOver: what passes between a device's compute stream and the CPU's threads that attend for it.

The stream writes queries into pinned memory and then a word; the threads see it, attend, and write the result and
then another word, for which the stream waits. So the host enqueues a whole step and waits for nothing.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from tiermem._core import AttentionOutcome, AttentionStatus
from tiermem.attention.page_lse import PageLse, PagePlaces
from tiermem.attention.pool_view import TORCH_DTYPES, PagedTables, PoolView
from tiermem.attention.queued import Flag, QueuedAttention, QueuedTables
from tiermem.device.protocol import Device, Event, Memory
from tiermem.errors import ConfigError, TransferError
from tiermem.ram_attention import RamPolicy, RamWork

NUM_BUFFERS = 4
"""Layers that may be enqueued ahead of the one that the CPU attends."""
WORD_BYTES = 128
"""From one word to the next: on lines of their own."""
ALIGN_BYTES = 128
NAP_S = 50e-6
LATE, LEAST_WAIT_S = 0.05, 10e-6
"""A result is late if the stream waits for this share of the time that it took, and longer than a look takes."""
_LEFT_BEHIND: list[HandOver] = []
"""Whose threads never came back: what they read stays mapped for the life of the process."""


@dataclass(slots=True, eq=False)
class _Buffer:
    """Pinned memory of one job at a time; queries and results are flat, the results seen by the device too.

    `page_lse` is empty until it is asked for.
    """

    memory: Memory
    q: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor
    page_lse: torch.Tensor
    device_out: torch.Tensor
    device_lse: torch.Tensor
    device_page_lse: torch.Tensor
    job: Job | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """Attention over one layer's pages that was handed over."""

    ticket: int
    value: int
    buffer: _Buffer
    shape: tuple[int, int, int]
    """Rows, heads, head_dim."""
    tables: QueuedTables
    page_lse: PageLse | None
    """On the device: where the pages' log-sum-exp goes."""


class _Waits:
    """How long a GPU's compute stream waits for results, by its own clock."""

    def __init__(self, *, is_timed: bool) -> None:
        self._is_timed = is_timed
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._count = 0

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Note when the stream comes to what is enqueued within, and when it is past it."""
        if not self._is_timed:
            yield
            return
        if self._count == len(self._events):
            self._events.append((_timed_event(), _timed_event()))
        before, after = self._events[self._count]
        before.record()
        yield
        after.record()
        self._count += 1  # not where something raised: an event that was not recorded has no time

    def take(self) -> list[float] | None:
        """Seconds of each wait that has ended, and forget them; None where there is no such clock."""
        waits, self._count = self._events[: self._count], 0
        if not self._is_timed:
            return None
        return [before.elapsed_time(after) / 1e3 for before, after in waits if after.query()]


class HandOver:
    """Hands attention over the pages of `pool` to threads; one step at a time.

    Ordering: everything is enqueued on the compute stream. Between the `result` of the last job of a step and the
    first `begin` of the next one the host waits for the stream, once.
    """

    def __init__(
        self, device: Device, pool: PoolView, attention: QueuedAttention, policy: RamPolicy
    ) -> None:
        self.policy = policy
        self._device = device
        self._pool = pool
        self._attention = attention
        self._words = device.allocate_host(2 * WORD_BYTES)
        self._words.tensor.zero_()
        self._value = 0
        self._buffers: list[_Buffer] = []
        self._items = (0, 0, 0)
        self._jobs: list[Job] = []
        self._used: Event | None = None
        self._waits = _Waits(is_timed=device.torch_device.type == "cuda")
        self._places: tuple[QueuedTables, PagePlaces] | None = None

    def tables(self, tables: PagedTables) -> QueuedTables:
        """What `begin` takes, of tables on the host."""
        return QueuedTables(self._pool, tables)

    def begin(
        self,
        layer: int,
        q: torch.Tensor,
        tables: QueuedTables,
        scale: float,
        window: int | None,
        page_lse: PageLse | None = None,
    ) -> Job:
        """Enqueue the queries' way down and the attention behind it.

        Parameters
        ----------
        q: (rows, q_heads, head_dim) on the device.
        page_lse: gets the log-sum-exp of the tables' pages with `result`; on the device.

        Raises
        ------
        TransferError: the threads take no more work: what they did before overran its deadline.
        """
        rows, heads, head_dim = q.shape
        num_pages = 0 if page_lse is None else tables.max_pages
        buffer = self._buffer(rows * heads, head_dim, num_pages)
        self._value = (self._value + 1) % 2**32
        ready, done = (self._words.address + i * WORD_BYTES for i in range(2))
        num_items = rows * heads * head_dim
        shape = (rows, heads, head_dim)
        host_q = buffer.q[:num_items].view(shape)
        found = None if page_lse is None else _pages_of(buffer.page_lse, shape, num_pages)
        try:
            ticket = self._attention.submit(
                tables, layer, host_q,
                buffer.out[:num_items].view(shape), buffer.lse[: rows * heads].view(rows, heads),
                ready=Flag(ready, self._value), done=Flag(done, self._value),
                scale=scale, window=window, page_lse=found,
            )  # fmt: skip
        except RuntimeError as error:
            raise TransferError(f"the CPU cannot attend: {error}") from error
        job = Job(ticket, self._value, buffer, shape, tables, page_lse)
        buffer.job = job
        self._jobs.append(job)
        try:
            host_q.copy_(q, non_blocking=True)
            self._device.write_word(ready, self._value)
        except BaseException:
            self._attention.cancel(ticket)
            raise
        return job

    def result(self, job: Job) -> tuple[torch.Tensor, torch.Tensor]:
        """Output and lse on the device, float32; the stream waits for them. NaN if `settle` is going to raise.

        Ordering: they are valid for what is enqueued before NUM_BUFFERS more jobs begin.
        """
        with self._waits.timed():
            self._device.wait_word(self._words.address + WORD_BYTES, job.value)
        if job.page_lse is not None:
            self._place(job, job.page_lse)
        rows, heads, head_dim = job.shape
        out = job.buffer.device_out[: rows * heads * head_dim].view(job.shape)
        return out, job.buffer.device_lse[: rows * heads].view(rows, heads)

    def settle(self) -> RamWork:
        """Wait until every job of the step has ended; what they read, and how long it took.

        Raises
        ------
        TransferError: one failed; its result was NaN.
        """
        outcomes = [self._wait(job) for job in self._jobs]
        waits = self._waits.take()
        self._jobs.clear()
        self._places = None
        self._used = self._device.compute_stream().record()
        for outcome in outcomes:
            if outcome.status is AttentionStatus.FAILED:
                raise TransferError(f"attention on the CPU failed: {outcome.message}")
        return RamWork(
            sum(outcome.bytes_read for outcome in outcomes),
            sum(outcome.attended_s for outcome in outcomes),
            None if waits is None else sum(waits),
            None if waits is None else _late(waits, outcomes),
        )

    def close(self, timeout_s: float) -> bool:
        """Give everything back; False if a thread still reads pages, which must then stay mapped for ever.

        Ordering: nothing may be enqueued that waits for a result.
        """
        if not self._attention.close(timeout_s):
            _LEFT_BEHIND.append(self)
            return False
        for buffer in self._buffers:
            buffer.memory.free()
        self._buffers.clear()
        self._words.free()
        return True

    # ---- inside ------------------------------------------------------------------------------------

    def _wait(self, job: Job) -> AttentionOutcome:
        """The outcome of a job; every job has one by its deadline."""
        while (outcome := self._attention.poll(job.ticket)).status is AttentionStatus.PENDING:
            time.sleep(NAP_S)
        if job.buffer.job is job:
            job.buffer.job = None
        if not outcome.is_reading:
            self._attention.forget(job.ticket)
        return outcome

    def _place(self, job: Job, page_lse: PageLse) -> None:
        """Enqueue the way of the pages' log-sum-exp to their places; of all tables of a step alike."""
        tables = job.tables
        if self._places is None or self._places[0] is not tables:
            places = PagePlaces.of(
                tables.row_starts, tables.num_pages, tables.starts, self._pool.layout.page_tokens
            )
            self._places = tables, places.on(page_lse.values.device)
        found = _pages_of(job.buffer.device_page_lse, job.shape, tables.max_pages)
        page_lse.place(found.clone(), self._places[1])  # read in order: it lies across the link

    def _buffer(self, num_rows: int, head_dim: int, num_pages: int) -> _Buffer:
        """One that no job uses, for `num_rows` rows of one head and the log-sum-exp of so many pages of each."""
        if self._used is not None:
            self._used.wait()  # what the stream still reads may be written by a job that fails
            self._used = None
        wanted = (num_rows * head_dim, num_rows, num_rows * num_pages)
        if any(want > have for want, have in zip(wanted, self._items, strict=True)):
            # What is for pages grows with every page, so that it is doubled.
            pages = max(wanted[2], self._items[2])
            self._grow((*wanted[:2], 1 << (pages - 1).bit_length() if pages else 0))
        buffer = self._buffers.pop(0)
        self._buffers.append(buffer)
        while buffer.job is not None:
            if self._attention.poll(buffer.job.ticket).status is not AttentionStatus.PENDING:
                buffer.job = None
            else:
                time.sleep(NAP_S)
        return buffer

    def _grow(self, wanted: tuple[int, int, int]) -> None:
        """Larger buffers, once nothing uses the ones there are."""
        for job in self._jobs:
            while self._attention.poll(job.ticket).status is AttentionStatus.PENDING:
                time.sleep(NAP_S)
        self._device.compute_stream().synchronize()
        for buffer in self._buffers:
            buffer.memory.free()
        # What was freed is forgotten before anything is allocated, which may fail.
        self._buffers, self._items = [], (0, 0, 0)
        for _ in range(NUM_BUFFERS):
            self._buffers.append(self._new_buffer(*wanted))
        self._items = wanted

    def _new_buffer(self, items: int, rows: int, pages: int) -> _Buffer:
        dtype = TORCH_DTYPES[self._pool.layout.dtype]
        sizes = [items * dtype.itemsize, items * 4, rows * 4, pages * 4]
        padded = [-(-size // ALIGN_BYTES) * ALIGN_BYTES for size in sizes]
        try:
            memory = self._device.allocate_host(sum(padded))
        except ConfigError as error:  # the step fails, the manager goes on
            raise TransferError(f"the CPU cannot attend: {error}") from error
        host = [part[:size] for part, size in zip(memory.tensor.split(padded), sizes, strict=True)]
        shown = self._device.view(memory).split(padded)
        return _Buffer(
            memory,
            host[0].view(dtype),
            *(part.view(torch.float32) for part in host[1:]),
            *(shown[i][: sizes[i]].view(torch.float32) for i in range(1, len(sizes))),
        )


def _late(waits: Sequence[float], outcomes: Sequence[AttentionOutcome]) -> float:
    """The share of layers in which the stream came to the result well before it was there."""
    pairs = zip(waits, outcomes, strict=False)  # the last waits may not have ended yet
    late = [wait_s > LEAST_WAIT_S + LATE * outcome.attended_s for wait_s, outcome in pairs]
    return sum(late) / len(late) if late else 0.0


def _pages_of(flat: torch.Tensor, shape: tuple[int, int, int], num_pages: int) -> torch.Tensor:
    """The part of a buffer that a job of this shape uses: (rows, heads, num_pages)."""
    rows, heads, _ = shape
    return flat[: rows * heads * num_pages].view(rows, heads, num_pages)


def _timed_event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)
