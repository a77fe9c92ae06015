"""The Triton kernels on a GPU, over every dtype, head size, page size and ratio of heads.

Inputs are fresh in every run; a failure names its seed.
"""

from __future__ import annotations

import math
import os
from dataclasses import replace

import attention_cases as cases
import pytest
import torch
from attention_cases import LAYER, Case, Shape, make_case

from tiermem.attention import PoolView, ProductMath, SlotHolds, backend_for
from tiermem.attention.backend import AttentionBackend
from tiermem.attention.reference import ReferenceBackend
from tiermem.layout import PageLayout

pytestmark = pytest.mark.gpu

HEADS = ((8, 7), (8, 4), (52, 1), (1, 1), (2, 3), (4, 13))
"""Heads of K and V, and query heads for each."""
HEAD_DIMS = (16, 48, 64, 80, 96, 128, 192, 256)
PAGE_TOKENS = (16, 32, 64, 128)


@pytest.fixture(scope="module")
def num_sms() -> int:
    if not torch.cuda.is_available():
        pytest.skip("torch sees no GPU")
    return torch.cuda.get_device_properties(0).multi_processor_count


@pytest.fixture(scope="module")
def backend(num_sms: int) -> AttentionBackend:
    return backend_for(torch.device("cuda", 0), torch.cuda.get_device_capability(0), "float16")


@pytest.fixture
def seed() -> int:
    return int.from_bytes(os.urandom(4), "little")


def _heads(head_dim: int, page_tokens: int) -> tuple[int, int]:
    """A ratio of heads, so that every one meets several head sizes and page sizes."""
    return HEADS[(HEAD_DIMS.index(head_dim) + 2 * PAGE_TOKENS.index(page_tokens)) % len(HEADS)]


def _run_and_check(shape: Shape, seed: int, backend: AttentionBackend) -> None:
    case = make_case(shape, seed).to("cuda")
    expected = case.expected_quickly()
    cases.check(case, case.run(backend), expected=expected)
    if set(shape.rows) == {1} and not shape.scattered:
        planned = cases.with_work(case, backend, padding=seed % 4)
        cases.check(case, planned.run(backend), expected=expected)


@pytest.mark.parametrize("page_tokens", PAGE_TOKENS, ids="page{}".format)
@pytest.mark.parametrize("head_dim", HEAD_DIMS, ids="dim{}".format)
@pytest.mark.parametrize("dtype", cases.TOLERANCE)
def test_decode(
    dtype: str, head_dim: int, page_tokens: int, backend: AttentionBackend, seed: int
) -> None:
    kv_heads, group = _heads(head_dim, page_tokens)
    stored = (1, page_tokens, 3 * page_tokens + 7, 1000 + seed % 999)
    shape = Shape(kv_heads, group, head_dim, page_tokens, dtype, (1, 1, 1, 1), stored)
    _run_and_check(shape, seed, backend)


@pytest.mark.parametrize("page_tokens", PAGE_TOKENS, ids="page{}".format)
@pytest.mark.parametrize("head_dim", HEAD_DIMS, ids="dim{}".format)
@pytest.mark.parametrize("dtype", cases.TOLERANCE)
def test_prefill(
    dtype: str, head_dim: int, page_tokens: int, backend: AttentionBackend, seed: int
) -> None:
    kv_heads, group = _heads(head_dim, page_tokens)
    rows = (130 + seed % 99, 1, 70)
    stored = (rows[0], 333, 70 + 3 * page_tokens)
    shape = Shape(kv_heads, group, head_dim, page_tokens, dtype, rows, stored)
    _run_and_check(shape, seed, backend)


@pytest.mark.parametrize("rows", [1, 3, 90])
@pytest.mark.parametrize(
    ("page_tokens", "scattered"), [(16, False), (64, False), (16, True), (64, True)]
)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_windows_and_scattered_pages(
    dtype: str, page_tokens: int, scattered: bool, rows: int, backend: AttentionBackend, seed: int
) -> None:
    shape = Shape(2, 3, 64, page_tokens, dtype, (rows, 2), (1500, 77), scattered=scattered)
    for window in (None, 1, page_tokens, 100, 1000):
        _run_and_check(replace(shape, window=window), seed, backend)


@pytest.mark.parametrize("rows", [1, 4, 33])
def test_every_length(rows: int, backend: AttentionBackend, seed: int) -> None:
    lengths = tuple(
        length for length in (*range(33, 140, 7), 255, 256, 257, 1023) if length >= rows
    )
    shape = Shape(8, 7, 128, 16, "float16", (rows,) * len(lengths), lengths)
    _run_and_check(shape, seed, backend)


@pytest.mark.parametrize("holds", SlotHolds)
def test_merged_parts_equal_the_whole(
    holds: SlotHolds, backend: AttentionBackend, seed: int
) -> None:
    shape = Shape(8, 4, 128, 64, "float16", (1, 40), (3000, 700), window=900, holds=holds)
    case = make_case(shape, seed).to("cuda")
    parts = [part.run(backend) for part in cases.split_pages(case, 5)]
    merged = backend.merge([out for out, _ in parts], [lse for _, lse in parts], torch.float16)
    cases.check(case, merged, expected=case.expected_quickly())


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0)])
@pytest.mark.parametrize("rows", [1, 100])
def test_the_tiles_of_every_capability(
    capability: tuple[int, int], rows: int, num_sms: int, seed: int
) -> None:
    from tiermem.attention.kernels.backend import TritonBackend

    shape = Shape(2, 7, 128, 32, "float16", (rows,), (777,))
    _run_and_check(shape, seed, TritonBackend(capability, num_sms))


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_widened_products_lose_nothing_to_half_precision(
    rows: int, dtype: str, num_sms: int, seed: int
) -> None:
    shape = Shape(dtype=dtype, kv_heads=2, rows=(rows,), stored=(500,))
    from tiermem.attention.kernels.backend import TritonBackend

    case = make_case(shape, seed).to("cuda")
    capability = torch.cuda.get_device_capability(0)
    widened = TritonBackend(capability, num_sms, ProductMath.FLOAT32)
    cases.check(case, case.run(widened, torch.float32), tolerance=1e-5)


def test_rows_that_see_nothing(backend: AttentionBackend, seed: int) -> None:
    case = make_case(Shape(rows=(2, 0, 1, 3), stored=(20, 33, 9, 18), dtype="float16"), seed)
    tables = replace(
        case.tables,
        kv_end=torch.tensor([0, 33, 9, 18], dtype=torch.int32),
        num_pages=torch.tensor([2, 3, 0, 2], dtype=torch.int32),
    )
    case = replace(case, tables=tables).to("cuda")
    out, lse = case.run(backend)
    cases.check(case, (out, lse))
    assert (out[:3] == 0).all() and (lse[:3] == -math.inf).all()


@pytest.mark.parametrize("rows", [0, 1, 70])
def test_an_empty_table(rows: int, backend: AttentionBackend, seed: int) -> None:
    case = make_case(Shape(rows=(rows,), stored=(rows,), dtype="float16"), seed).to("cuda")
    none = case.tables.block_table[:, :0].contiguous()
    tables = replace(
        case.tables,
        block_table=none,
        num_pages=torch.zeros_like(case.tables.num_pages),
        max_pages=0,
    )
    out, lse = replace(case, tables=tables).run(backend)
    assert out.shape == case.q.shape and lse.shape == case.q.shape[:2]
    assert (out == 0).all() and (lse == -math.inf).all()


@pytest.mark.parametrize("rows", [1, 50])
def test_scores_near_the_fp16_limit(rows: int, backend: AttentionBackend, seed: int) -> None:
    case = make_case(Shape(2, 4, 128, 64, "float16", (rows,), (900,)), seed)
    q = (case.q.float().sign() * 22.0).half()
    case.pool.layer_pages(LAYER)[:, 0, :, ::3] = q[0, 0] * 1.05
    case = replace(case, q=q).to("cuda")
    assert float(q[0, 0].float() @ (q[0, 0] * 1.05).float()) > 60_000
    cases.check(case, case.run(backend), expected=case.expected_quickly())


@pytest.mark.parametrize("dtype", cases.TOLERANCE)
@pytest.mark.parametrize("head_dim", [64, 80, 256])
def test_store(dtype: str, head_dim: int, backend: AttentionBackend, seed: int) -> None:
    shape = Shape(dtype=dtype, head_dim=head_dim, stored=(400,), rows=(1,))
    pool = make_case(shape, seed).pool
    heads = pool.layout.num_kv_heads
    for num_tokens in (1, 37):
        fused = torch.randn(num_tokens, 2, 3 * heads, head_dim).to(pool.data.dtype)
        k, v = fused[:, 0, ::3], fused[:, 1, 1::3]
        places = torch.randperm(pool.num_slots * pool.layout.page_tokens)[:num_tokens]
        places[1::5] = -1
        on_gpu = replace(pool, data=pool.data.cuda())
        fused = fused.cuda()
        backend.store(on_gpu, 2, fused[:, 0, ::3], fused[:, 1, 1::3], places.cuda())
        ReferenceBackend().store(pool, 2, k, v, places)
        assert torch.equal(on_gpu.data.cpu().nan_to_num(7), pool.data.nan_to_num(7))


def test_a_pool_beyond_four_billion_elements(backend: AttentionBackend, seed: int) -> None:
    layout = PageLayout(62, 8, 128, "float16", 64)
    slot_items = layout.slot_bytes // 2
    num_slots = (1 << 32) // slot_items + 20
    if torch.cuda.mem_get_info()[0] < 4 * num_slots * slot_items:
        pytest.skip("too little GPU memory is free")
    data = torch.empty(num_slots * slot_items, dtype=torch.float16, device="cuda").fill_(math.nan)
    pool = PoolView(data, layout, slot_items, num_slots)
    stored, rows = 600, 3
    table = torch.randperm(19)[None, : layout.pages_for(stored)].int() + num_slots - 19
    shape = Shape(8, 7, 128, 64, "float16", (rows,), (stored,))
    case = make_case(shape, seed).to("cuda")
    tables = replace(case.tables, block_table=table.cuda(), max_pages=table.shape[1])
    case = replace(case, pool=pool, tables=tables)
    tokens = torch.arange(stored, device="cuda")
    places = tables.block_table[0, tokens // 64].long() * 64 + tokens % 64
    k, v = torch.randn(2, stored, 8, 128, device="cuda").half().unbind()
    backend.store(pool, LAYER, k, v, places)
    assert torch.equal(pool.layer_pages(LAYER)[places // 64, 0, :, places % 64], k)
    cases.check(case, case.run(backend), expected=case.expected_quickly())


def test_a_captured_graph_follows_the_tables(backend: AttentionBackend, seed: int) -> None:
    case = make_case(Shape(8, 7, 128, 64, "float16", (1, 1), (5000, 900)), seed).to("cuda")
    case.run(backend)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = case.run(backend)
    for shorter in (0, 1, 700):
        _shorten(case, shorter)
        graph.replay()
        cases.check(case, result, expected=case.expected_quickly())


@pytest.mark.parametrize(
    ("kv_heads", "group", "page_tokens"), [(8, 7, 64), (8, 4, 16), (2, 1, 128)]
)
def test_a_captured_decode_follows_growing_sequences_and_new_plans(
    kv_heads: int, group: int, page_tokens: int, backend: AttentionBackend, seed: int
) -> None:
    stored = (9000, 500, 3000)
    shape = Shape(kv_heads, group, 128, page_tokens, "float16", (1, 1, 1), stored)
    case = cases.with_work(make_case(shape, seed).to("cuda"), backend, padding=40)
    case.run(backend)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = case.run(backend)
    work = case.tables.work
    assert work is not None
    for lengths in (
        (1, 1, 1),
        (4000, 20, 1),
        (4000 + page_tokens, 21, 33),
        (4100, 500, 3000),
        stored,
    ):
        ends = torch.tensor(lengths, dtype=torch.int32)
        case.tables.kv_end.copy_(ends)
        case.tables.q_start.copy_(ends - 1)
        if lengths != (4100, 500, 3000):  # this one grows within the plan before it
            planned = backend.plan(case.pool.layout, ends.long().numpy())
            assert planned is not None and len(planned.rows) <= len(work.rows)
            work.rows.copy_(
                cases.on_device(planned, case.q.device, len(work.rows) - len(planned.rows)).rows
            )
        graph.replay()
        cases.check(case, result, expected=case.expected_quickly())


@pytest.mark.parametrize("page_tokens", PAGE_TOKENS)
@pytest.mark.parametrize(("kv_heads", "group"), [(8, 7), (3, 1), (2, 16), (2, 20)])
def test_planned_decode_of_every_length(
    kv_heads: int, group: int, page_tokens: int, backend: AttentionBackend, seed: int
) -> None:
    lengths = tuple(range(1 + seed % 7, 1024, 7))
    shape = Shape(kv_heads, group, 128, page_tokens, "float16", (1,) * len(lengths), lengths)
    case = cases.with_work(make_case(shape, seed).to("cuda"), backend)
    cases.check(case, case.run(backend), expected=case.expected_quickly())


@pytest.mark.parametrize("num_sms", [1, 40, 1000])
@pytest.mark.parametrize("dtype", cases.TOLERANCE)
def test_planned_decode_of_any_number_of_splits(dtype: str, num_sms: int, seed: int) -> None:
    from tiermem.attention.kernels.backend import TritonBackend

    shape = Shape(8, 4, 64, 32, dtype, (1,) * 5, (12000, 7, 300, 1, 4096 + seed % 32))
    _run_and_check(shape, seed, TritonBackend(torch.cuda.get_device_capability(0), num_sms))


def test_launches_follow_changes_of_strides_alignment_and_dtype(
    backend: AttentionBackend, seed: int
) -> None:
    case = make_case(Shape(2, 4, 64, 16, "float16", (1, 1), (300, 77)), seed).to("cuda")
    case = cases.with_work(case, backend)
    expected = case.expected_quickly()
    for _ in range(2):
        for offset, row_items in ((0, 512), (8, 520), (1, 513), (3, 1030)):
            memory = torch.zeros(4000, dtype=torch.float16, device="cuda")
            q = memory[offset:].as_strided(case.q.shape, (row_items, 64, 1))
            q.copy_(case.q)
            for out_dtype in (torch.float16, torch.float32):
                out, lse = replace(case, q=q).run(backend, out_dtype)
                assert out.dtype == out_dtype
                cases.check(case, (out, lse), expected=expected)


def test_attention_does_not_wait_for_the_device(backend: AttentionBackend, seed: int) -> None:
    case = make_case(Shape(8, 7, 128, 64, "float16", (1,), (3000,)), seed).to("cuda")
    case = cases.with_work(case, backend)
    case.run(backend)
    torch.cuda._sleep(200_000_000)
    ended = torch.cuda.Event()
    ended.record()
    case.run(backend)
    assert not ended.query()


def _shorten(case: Case, tokens: int) -> None:
    case.tables.kv_end.sub_(tokens)
    case.tables.q_start.sub_(tokens)
