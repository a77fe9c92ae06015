"""Attention that waits for its queries: real pages, with a thread in place of the GPU."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import attention_cases as cases
import numpy as np
import pytest
import torch
from attention_cases import Case, Shape, make_case
from numpy.typing import NDArray

from tiermem._core import AttentionQueue, AttentionStatus
from tiermem.attention.cpus import usable_cpus
from tiermem.attention.in_place import InPlaceAttention
from tiermem.attention.queued import Flag, QueuedAttention, QueuedTables

SHAPES = [
    Shape(head_dim=64, group=7, kv_heads=2, dtype="float16", page_tokens=64, stored=(1500,)),
    Shape(head_dim=32, group=2, rows=(1, 4), stored=(90, 4), scattered=True, dtype="bfloat16"),
    Shape(head_dim=16, group=3, rows=(8,), stored=(70,), window=20),
]
READY, DONE = 0, 1


class Words:
    """The words of two flags, in memory of the test's."""

    def __init__(self, start: int = 0) -> None:
        self.array: NDArray[np.uint32] = np.full(2, start, np.uint32)

    def flags(self, value: int) -> tuple[Flag, Flag]:
        address = self.array.ctypes.data
        return Flag(address, value), Flag(address + 4, value)

    def wait_until_done(self, value: int) -> None:
        _eventually(lambda: self.array[DONE] == value)


class Job:
    """One case with buffers for queries and result, which hold nothing yet."""

    def __init__(
        self, case: Case, out_dtype: torch.dtype = torch.float32, wants_pages: bool = False
    ) -> None:
        self.case = case
        self.q = torch.full(case.q.shape, math.nan, dtype=case.q.dtype)
        self.out = torch.full(case.q.shape, 123.0, dtype=out_dtype)
        self.lse = torch.full(case.q.shape[:2], 123.0)
        self.page_lse = self._page_lse() if wants_pages else None

    def _page_lse(self) -> torch.Tensor:
        return torch.full((*self.case.q.shape[:2], self.case.tables.max_pages), 123.0)

    def submit(self, attention: QueuedAttention, words: Words, value: int = 1) -> int:
        ready, done = words.flags(value)
        return attention.submit(
            QueuedTables(self.case.pool, self.case.tables),
            cases.LAYER,
            self.q,
            self.out,
            self.lse,
            ready=ready,
            done=done,
            scale=self.case.scale,
            window=self.case.window,
            page_lse=self.page_lse,
        )

    def send_queries(self, words: Words, value: int = 1) -> None:
        self.q.copy_(self.case.q)
        words.array[READY] = value

    def is_right(self) -> bool:
        page_lse = None if self.page_lse is None else self._page_lse()
        expected = InPlaceAttention(1).attend(
            self.case.pool,
            cases.LAYER,
            self.case.q,
            self.case.tables,
            scale=self.case.scale,
            window=self.case.window,
            out_dtype=self.out.dtype,
            page_lse=page_lse,
        )
        if page_lse is not None and self.page_lse is not None:
            assert torch.equal(self.page_lse, page_lse)
        return torch.equal(self.out, expected[0]) and torch.equal(self.lse, expected[1])

    def is_nan(self) -> bool:
        results = [self.out, self.lse, *([] if self.page_lse is None else [self.page_lse])]
        return all(bool(result.isnan().all()) for result in results)


@pytest.fixture
def attention() -> Iterator[QueuedAttention]:
    attention = QueuedAttention(min(2, usable_cpus()))
    yield attention
    assert attention.close(10)


def _eventually(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0)


@pytest.mark.parametrize("out_dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_results_are_those_of_attention_in_place(
    out_dtype: torch.dtype, attention: QueuedAttention
) -> None:
    words = Words(2**32 - 2)  # wraps on the way
    jobs = [Job(make_case(SHAPES[i % 3], seed=i), out_dtype, i % 2 == 0) for i in range(12)]
    values = [(2**32 - 1 + i) % 2**32 for i in range(len(jobs))]
    tickets = [job.submit(attention, words, value) for job, value in zip(jobs, values, strict=True)]

    def play_gpu() -> None:
        for job, value in zip(jobs, values, strict=True):
            job.send_queries(words, value)
            words.wait_until_done(value)

    gpu = threading.Thread(target=play_gpu)
    gpu.start()
    gpu.join()
    assert all(job.is_right() for job in jobs)
    outcomes = [attention.poll(ticket) for ticket in tickets]
    assert {outcome.status for outcome in outcomes} == {AttentionStatus.DONE}
    assert outcomes[0].bytes_read == 1500 * 2 * 2 * 64 * 2
    assert outcomes[0].attended_s > 0 and outcomes[0].waited_s >= 0 and outcomes[0].message == ""
    counters = attention.counters()
    assert (counters.submitted, counters.done, counters.failed) == (12, 12, 0)
    assert counters.bytes_read == sum(outcome.bytes_read for outcome in outcomes)
    for ticket in tickets:
        attention.forget(ticket)
        with pytest.raises(ValueError, match=f"ticket {ticket} was not given out"):
            attention.poll(ticket)


def test_every_layer_is_found() -> None:
    case = make_case(Shape(stored=(40, 3), rows=(1, 1)), seed=1)
    tables = QueuedTables(case.pool, case.tables)
    slot = int(case.tables.block_table[0, 1])
    for layer in range(case.pool.layout.num_layers):
        pages = case.pool.layer_pages(layer)
        assert tables.slices(layer)[0, 1] == pages[slot].data_ptr()
    assert (tables.slices(2)[1, 1:] == 0).all()
    with pytest.raises(ValueError, match="layer=3"):
        tables.slices(3)


def test_queries_in_any_strides(attention: QueuedAttention) -> None:
    job, words = Job(make_case(SHAPES[1], seed=4)), Words()
    rows, heads, head_dim = job.q.shape
    wide = torch.full((heads, rows, 2 * head_dim), math.nan, dtype=job.q.dtype)
    job.q = wide.transpose(0, 1)[..., :head_dim]
    job.submit(attention, words)
    job.send_queries(words)
    words.wait_until_done(1)
    assert job.is_right()


def test_queries_that_do_not_come_end_at_the_deadline() -> None:
    attention = QueuedAttention(1, deadline_s=0.02)
    job, words = Job(make_case(SHAPES[0], seed=1), wants_pages=True), Words()
    ticket = job.submit(attention, words)
    words.wait_until_done(1)
    outcome = attention.poll(ticket)
    assert outcome.status is AttentionStatus.FAILED and job.is_nan()
    assert outcome.message == "the queries did not arrive within 0.02 s"
    assert outcome.bytes_read == 0
    _eventually(lambda: not attention.poll(ticket).is_reading)
    assert attention.counters().failed == 1
    assert attention.close(0)


def test_a_cancelled_job_fails_in_its_turn(attention: QueuedAttention) -> None:
    first, second = (Job(make_case(SHAPES[2], seed=seed)) for seed in (1, 2))
    words, others = Words(), Words()
    first.submit(attention, words)
    ticket = second.submit(attention, others)
    attention.cancel(ticket)
    assert attention.poll(ticket).status is AttentionStatus.PENDING
    first.send_queries(words)
    others.wait_until_done(1)
    assert attention.poll(ticket).message == "cancelled" and second.is_nan()
    assert first.is_right()


def test_closing_ends_every_job() -> None:
    attention = QueuedAttention(1)
    jobs, words = [Job(make_case(SHAPES[2], seed=seed)) for seed in range(3)], Words()
    tickets = [job.submit(attention, words, 1 + i) for i, job in enumerate(jobs)]
    assert attention.close(0.01)
    assert words.array[DONE] == 3 and all(job.is_nan() for job in jobs)
    for ticket in tickets:
        assert "closed before the job ended" in attention.poll(ticket).message
    with pytest.raises(RuntimeError, match="closed"):
        jobs[0].submit(attention, words)
    with pytest.raises(ValueError, match="timeout_s=-1"):
        attention.close(-1)


def test_a_full_queue_is_refused() -> None:
    attention = QueuedAttention(1, capacity=2)
    job, words = Job(make_case(SHAPES[2], seed=1)), Words()
    for _ in range(2):
        job.submit(attention, words)
    with pytest.raises(RuntimeError, match=r"2 attention jobs have not ended.*capacity=2"):
        job.submit(attention, words)
    assert attention.close(0)


def test_options_out_of_range_are_refused() -> None:
    for name, wrong in (("capacity", 0), ("deadline_s", 0.0), ("spin_s", -1.0)):
        with pytest.raises(ValueError, match=f"{name}="):
            QueuedAttention(1, **{name: wrong})  # type: ignore[arg-type]
    for threads in (0, usable_cpus() + 1):
        with pytest.raises(ValueError, match=f"threads={threads}: must be 1 to"):
            QueuedAttention(threads)
    with pytest.raises(ValueError, match="num_threads=0"):
        AttentionQueue(0)
    with pytest.raises(ValueError, match="1 cpus"):
        AttentionQueue(1, cpus=[0])


def test_wrong_tensors_are_refused(attention: QueuedAttention) -> None:
    right, words = Job(make_case(SHAPES[1], seed=1)), Words()
    rows, heads, head_dim = right.q.shape

    def refuses(error: type[Exception], match: str, **wrong: torch.Tensor) -> None:
        job = Job(right.case)
        for name, tensor in wrong.items():
            setattr(job, name, tensor)
        with pytest.raises(error, match=match):
            job.submit(attention, words)

    refuses(TypeError, "q of torch.float32", q=torch.zeros(right.q.shape))
    refuses(TypeError, "out of torch.float64", out=right.out.double())
    refuses(TypeError, "lse of torch.float16", lse=right.lse.half())
    refuses(ValueError, "q of shape", q=right.q[:1])
    refuses(ValueError, "q of shape", q=right.q[0])
    refuses(ValueError, "q of shape", q=right.q.new_zeros(rows, head_dim, heads).transpose(1, 2))
    refuses(ValueError, "out of shape", out=right.out[:, :1])
    refuses(ValueError, "lse of shape", lse=torch.zeros(heads, rows).T)
    refuses(ValueError, "page_lse of shape", page_lse=torch.zeros(rows, heads, 1))
    refuses(ValueError, "out on meta", out=torch.zeros_like(right.out, device="meta"))
    refuses(ValueError, "num_heads=3: must be a multiple of 2",
            q=right.q[:, :3], out=right.out[:, :3].contiguous(), lse=right.lse[:, :3].contiguous())  # fmt: skip
    with pytest.raises(ValueError, match="pool on meta"):
        QueuedTables(
            replace(right.case.pool, data=right.case.pool.data.to("meta")), right.case.tables
        )
    assert attention.counters().submitted == 0


def test_wrong_tables_and_flags_are_refused(attention: QueuedAttention) -> None:
    job, words = Job(make_case(SHAPES[2], seed=1)), Words()
    tables = job.case.tables
    for ready in (Flag(0, 1), Flag(words.array.ctypes.data + 1, 1)):
        words.flags = lambda value, ready=ready: (ready, ready)  # type: ignore[method-assign, misc]
        with pytest.raises(ValueError, match="ready: must be an address"):
            job.submit(attention, words)
    words = Words()
    with pytest.raises(TypeError):
        job.submit(attention, words, 2**32)
    table = tables.block_table.clone()
    table[0, 4] = cases.WILD_SLOT
    job.case = replace(job.case, tables=replace(tables, block_table=table))
    with pytest.raises(ValueError, match="page 4 of sequence 0"):
        job.submit(attention, words)
    assert attention.counters().submitted == 0
