"""QueuedAttention: attention in host memory that begins when its queries are there, by the native core."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from tiermem._core import (
    AttentionCounters,
    AttentionInstructions,
    AttentionOutcome,
    AttentionQueue,
)
from tiermem.attention.cpus import usable_cpus
from tiermem.attention.in_place import FLOAT_TYPES, check_page_lse, slice_addresses
from tiermem.attention.pool_view import PagedTables, PoolView


class Flag(NamedTuple):
    """A 32-bit word in host memory and the value at which it is reached.

    Compared as CU_STREAM_WAIT_VALUE_GEQ does: reached while word - value, in 32 bits, is below 2^31. The
    values of one word ascend by at least 1 from job to job, and wrap.
    """

    address: int
    value: int


class QueuedTables:
    """What the jobs of one step have in common: pages of all layers, and who sees them.

    Parameters
    ----------
    pool: in host memory.
    tables: on the CPU; copied.

    Raises
    ------
    ValueError: pool or tables on another device.
    """

    __slots__ = ("_base", "kv_end", "num_pages", "pool", "q_start", "row_starts", "starts")

    def __init__(self, pool: PoolView, tables: PagedTables) -> None:
        for name, tensor in (("pool", pool.data), ("tables", tables.block_table)):
            if tensor.device.type != "cpu":
                raise ValueError(f"{name} on {tensor.device}: must be on the CPU")
        self.pool = pool
        self.starts = _starts(tables)
        self.num_pages = tables.num_pages.numpy().copy()
        self.kv_end = tables.kv_end.numpy().copy()
        self.row_starts = tables.row_starts.numpy().copy()
        self.q_start = tables.q_start.numpy().copy()
        self._base = slice_addresses(pool, 0, tables)

    @property
    def num_rows(self) -> int:
        """Query rows of all sequences."""
        return int(self.row_starts[-1])

    @property
    def max_pages(self) -> int:
        """Entries in a sequence's table."""
        return int(self._base.shape[1])

    def slices(self, layer: int) -> NDArray[np.int64]:
        """(B, pages): the address of each page's slice of `layer`; 0 for slots that the pool does not have."""
        offset = self.pool.layer_offset(layer) * self.pool.data.element_size()
        return np.where(self._base == 0, 0, self._base + offset)


class QueuedAttention:
    """Threads that attend over pages in host memory as queries arrive, one job after the other.

    Parameters
    ----------
    threads: that compute. One of them waits for queries; all sleep while no job is due.
    instructions: that compute; AUTO: the widest of this processor.
    capacity: jobs that have not ended.
    deadline_s: for each job, from when all before it have ended.
    spin_s: how long threads keep their CPUs: one while it waits for queries, before it naps between looks,
        the others after a job.

    Raises
    ------
    ValueError: no thread, more threads than CPUs, instructions that this processor lacks, or another
        number out of range.
    """

    def __init__(
        self,
        threads: int,
        instructions: AttentionInstructions = AttentionInstructions.AUTO,
        *,
        capacity: int = 1024,
        deadline_s: float = 30.0,
        spin_s: float = 0.002,
    ) -> None:
        cpus = usable_cpus()
        if not 1 <= threads <= cpus:
            raise ValueError(f"threads={threads}: must be 1 to {cpus}, the CPUs of this process")
        self._native = AttentionQueue(
            threads,
            instructions=instructions,
            capacity=capacity,
            deadline_s=deadline_s,
            spin_s=spin_s,
        )
        self._kept: dict[int, tuple[torch.Tensor, ...]] = {}

    @property
    def threads(self) -> int:
        """Threads that compute."""
        return self._native.num_threads

    @property
    def instructions(self) -> AttentionInstructions:
        """Those in use."""
        return self._native.instructions

    def submit(
        self,
        tables: QueuedTables,
        layer: int,
        q: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        *,
        ready: Flag,
        done: Flag,
        scale: float,
        window: int | None,
        page_lse: torch.Tensor | None = None,
    ) -> int:
        """Queue one layer's attention and return its ticket at once.

        Parameters
        ----------
        q: (rows, heads, head_dim) of the pool's dtype, in host memory, head_dim contiguous; what is in it
            when `ready` is reached.
        out: (rows, heads, head_dim), contiguous, float16, bfloat16 or float32.
        lse: (rows, heads), contiguous, float32.
        ready: reached when the queries are there.
        done: set when the result is there, or is NaN for good.
        scale, window: see AttentionBackend.attend.
        page_lse: as of InPlaceAttention.attend; NaN for good where the result is.

        Raises
        ------
        TypeError, ValueError: tensors of another dtype, shape or device, a row that sees a page whose slot
            the pool does not have, a flag that is no word.
        RuntimeError: `capacity` jobs have not ended, attention overruns its deadline, or it is closed.

        Ordering: the tensors are kept until `forget`; the flags and the pages are the caller's to keep, the
        flags until the job has ended, pages and `ready` while its outcome `is_reading` too. Submit before the
        GPU work that waits for `done`, and `cancel` if that cannot be enqueued.
        """
        _check(tables, q, out, lse)
        if page_lse is not None:
            check_page_lse(page_lse, (*lse.shape, tables.max_pages))
        layout = tables.pool.layout
        ticket = self._native.submit(
            kv_type=FLOAT_TYPES[tables.pool.data.dtype],
            num_kv_heads=layout.num_kv_heads,
            page_tokens=layout.page_tokens,
            head_dim=layout.head_dim,
            slices=tables.slices(layer),
            starts=tables.starts,
            num_pages=tables.num_pages,
            kv_end=tables.kv_end,
            row_starts=tables.row_starts,
            q_start=tables.q_start,
            q=q.data_ptr(),
            row_stride=q.stride(0),
            head_stride=q.stride(1),
            num_heads=q.shape[1],
            scale=scale,
            window=window,
            out=out.data_ptr(),
            out_type=FLOAT_TYPES[out.dtype],
            lse=lse.data_ptr(),
            ready=ready,
            done=done,
            page_lse=None if page_lse is None else page_lse.data_ptr(),
        )
        kept = (tables.pool.data, q, out, lse)
        self._kept[ticket] = kept if page_lse is None else (*kept, page_lse)
        return ticket

    def poll(self, ticket: int) -> AttentionOutcome:
        """What became of a job; not PENDING once its flag `done` was seen.

        Raises
        ------
        ValueError: a ticket that was not given out or was forgotten.
        """
        return self._native.poll(ticket)

    def cancel(self, ticket: int) -> None:
        """The job's queries will not come: it fails in its turn, without waiting. Raises as `poll`."""
        self._native.cancel(ticket)

    def forget(self, ticket: int) -> None:
        """Drop a job that has ended, and its tensors; not while its outcome `is_reading`. Raises as `poll`."""
        self._native.forget(ticket)
        del self._kept[ticket]

    def counters(self) -> AttentionCounters:
        """Jobs, bytes and times since the start."""
        return self._native.counters()

    def close(self, timeout_s: float) -> bool:
        """Refuse new jobs, wait for those there are, and fail what has not ended after `timeout_s`.

        Returns within a second more. False if a thread reads pages even then: pool and queries must stay
        mapped for the life of the process.
        """
        return self._native.close(timeout_s)


def _starts(tables: PagedTables) -> NDArray[np.int32] | None:
    if tables.page_starts is None:
        return None
    return np.array(tables.page_starts[:, : tables.max_pages].numpy(), order="C")


def _check(tables: QueuedTables, q: torch.Tensor, out: torch.Tensor, lse: torch.Tensor) -> None:
    dtype, head_dim = tables.pool.data.dtype, tables.pool.layout.head_dim
    if q.dtype != dtype or lse.dtype != torch.float32 or out.dtype not in FLOAT_TYPES:
        raise TypeError(
            f"q of {q.dtype}, out of {out.dtype}, lse of {lse.dtype}: q must be {dtype}, out one of "
            f"{', '.join(map(str, FLOAT_TYPES))}, lse torch.float32"
        )
    if q.dim() != 3 or (q.shape[0], q.shape[2]) != (tables.num_rows, head_dim) or q.stride(2) != 1:
        raise ValueError(
            f"q of shape {tuple(q.shape)} and strides {q.stride()}: must be ({tables.num_rows}, heads, "
            f"{head_dim}), head_dim contiguous"
        )
    for name, tensor, shape in (("out", out, q.shape), ("lse", lse, q.shape[:2])):
        if tensor.shape != shape or not tensor.is_contiguous():
            raise ValueError(
                f"{name} of shape {tuple(tensor.shape)}: must be {tuple(shape)} and contiguous"
            )
    for name, tensor in (("q", q), ("out", out), ("lse", lse)):
        if tensor.device.type != "cpu":
            raise ValueError(f"{name} on {tensor.device}: must be in host memory")
