"""The torch backend for the CPU against the float64 reference."""

from __future__ import annotations

import math
from dataclasses import replace

import attention_cases as cases
import pytest
import torch
from attention_cases import Case, Shape, make_case

from tiermem.attention import HostBackend, PagedTables, PoolView, SlotHolds, backend_for
from tiermem.attention.reference import ReferenceBackend
from tiermem.layout import PageLayout

HOST = HostBackend()
LENGTHS = (1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 100, 127, 129, 257)


@pytest.mark.parametrize("dtype", cases.TOLERANCE)
@pytest.mark.parametrize("head_dim", [16, 48, 64, 80, 128, 256])
def test_every_dtype_and_head_dim(dtype: str, head_dim: int) -> None:
    shape = Shape(dtype=dtype, head_dim=head_dim, rows=(1, 5), stored=(37, 70))
    case = make_case(shape, seed=head_dim)
    cases.check(case, case.run(HOST))


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("page_tokens", [16, 32, 64, 128])
def test_a_decode_row_over_any_length(length: int, page_tokens: int) -> None:
    case = make_case(Shape(page_tokens=page_tokens, rows=(1,), stored=(length,)), seed=length)
    cases.check(case, case.run(HOST))


@pytest.mark.parametrize("length", LENGTHS)
def test_a_prefill_from_nothing(length: int) -> None:
    case = make_case(Shape(rows=(length,), stored=(length,), kv_heads=1), seed=length)
    cases.check(case, case.run(HOST))


@pytest.mark.parametrize(
    ("kv_heads", "group"), [(1, 1), (1, 7), (2, 4), (3, 1), (1, 13), (2, 3), (4, 8)]
)
def test_any_ratio_of_heads(kv_heads: int, group: int) -> None:
    shape = Shape(kv_heads=kv_heads, group=group, rows=(3, 1), stored=(50, 33))
    case = make_case(shape, seed=group)
    cases.check(case, case.run(HOST))


@pytest.mark.parametrize("window", [1, 2, 15, 16, 17, 40, 1000])
@pytest.mark.parametrize("scattered", [False, True])
def test_windows(window: int, scattered: bool) -> None:
    shape = Shape(rows=(1, 9, 60), stored=(90, 70, 60), window=window, scattered=scattered)
    case = make_case(shape, seed=window)
    cases.check(case, case.run(HOST))


@pytest.mark.parametrize("holds", SlotHolds)
def test_slots_of_whole_pages_and_of_one_layer(holds: SlotHolds) -> None:
    case = make_case(Shape(holds=holds, rows=(4,), stored=(70,)), seed=3)
    cases.check(case, case.run(HOST))


@pytest.mark.parametrize("scattered", [False, True])
def test_chunks_of_rows_beside_decode_rows(scattered: bool) -> None:
    shape = Shape(rows=(1, 50, 31), stored=(130, 95, 31), scattered=scattered)
    for window in (None, 20):
        case = make_case(replace(shape, window=window), seed=5)
        cases.check(case, case.run(HOST))


def test_rows_beyond_what_is_there_see_what_is_there() -> None:
    case = make_case(Shape(rows=(2,), stored=(20,)), seed=1)
    tables = replace(case.tables, q_start=torch.tensor([100], dtype=torch.int32))
    case = replace(case, tables=tables)
    cases.check(case, case.run(HOST))


def test_rows_that_see_nothing_give_zero_and_minus_infinity() -> None:
    case = make_case(Shape(rows=(2, 1, 3), stored=(20, 33, 20)), seed=1)
    ends = torch.tensor([0, 33, 18], dtype=torch.int32)
    tables = replace(case.tables, kv_end=ends, q_start=torch.tensor([18, 32, -1]).int())
    case = replace(case, tables=tables)
    out, lse = case.run(HOST)
    cases.check(case, (out, lse))
    assert (out[:2] == 0).all() and (lse[:2] == -math.inf).all() and (lse[3] == -math.inf).all()


def test_a_sequence_without_pages_or_rows() -> None:
    case = make_case(Shape(rows=(0, 2, 1), stored=(20, 33, 9)), seed=1)
    none_of_last = case.tables.num_pages.clone()
    none_of_last[2] = 0
    case = replace(case, tables=replace(case.tables, num_pages=none_of_last))
    cases.check(case, case.run(HOST))


@pytest.mark.parametrize("rows", [0, 2])
def test_an_empty_table(rows: int) -> None:
    case = make_case(Shape(rows=(rows,), stored=(rows,)), seed=1)
    none = case.tables.block_table[:, :0].contiguous()
    counts = torch.zeros(1, dtype=torch.int32)
    tables = replace(case.tables, block_table=none, num_pages=counts, max_pages=0)
    out, lse = replace(case, tables=tables).run(HOST)
    assert out.shape == case.q.shape and (out == 0).all() and (lse == -math.inf).all()


@pytest.mark.parametrize("parts", [2, 3, 7])
@pytest.mark.parametrize("window", [None, 25])
def test_merged_parts_equal_the_whole(parts: int, window: int | None) -> None:
    case = make_case(Shape(rows=(1, 6), stored=(80, 50), window=window), seed=parts)
    partial = [part.run(HOST) for part in cases.split_pages(case, parts)]
    merged = HOST.merge([out for out, _ in partial], [lse for _, lse in partial], torch.float32)
    cases.check(case, merged)


def test_merge_of_nothing_but_empty_parts_is_zero_and_minus_infinity() -> None:
    outs = [torch.full((2, 3, 16), math.nan)] * 2
    lses = [torch.full((2, 3), -math.inf)] * 2
    for backend in (HOST, ReferenceBackend()):
        out, lse = backend.merge(outs, lses, torch.float16)
        assert (out == 0).all() and (lse == -math.inf).all()


def test_merge_agrees_with_the_reference() -> None:
    outs = [torch.randn(5, 4, 16) for _ in range(4)]
    lses = [torch.randn(5, 4) * 30 for _ in range(4)]
    lses[1][2] = -math.inf
    outs[1][2] = math.nan
    out, lse = HOST.merge(outs, lses, torch.float32)
    expected_out, expected_lse = ReferenceBackend().merge(outs, lses, torch.float64)
    assert cases.relative_error(out, expected_out) < 1e-6
    cases.check_lse(lse, expected_lse)


def test_scores_near_the_fp16_limit() -> None:
    shape = Shape(dtype="float16", head_dim=128, gain=20.0, rows=(3,), stored=(200,))
    case = make_case(shape, seed=9)
    q = case.q.float().sign() * 22.0
    k = case.pool.layer_pages(cases.LAYER)[:, 0]
    k[:, :, ::3] = q.half()[0, 0] * 1.05
    case = replace(case, q=q.half())
    assert float((q[0, 0] @ k[0, 0, 0].float()).abs()) > 60_000
    cases.check(case, case.run(HOST))


@pytest.mark.parametrize("out_dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_output_has_the_dtype_asked_for(out_dtype: torch.dtype) -> None:
    case = make_case(Shape(rows=(2,), stored=(30,)), seed=2)
    out, lse = case.run(HOST, out_dtype)
    assert out.dtype == out_dtype and lse.dtype == torch.float32
    cases.check(case, (out, lse), tolerance=1.2e-2)


@pytest.mark.parametrize("dtype", cases.TOLERANCE)
def test_store_puts_each_token_in_its_place_and_touches_nothing_else(dtype: str) -> None:
    case = make_case(Shape(dtype=dtype, page_tokens=16), seed=4)
    layout, pool = case.pool.layout, case.pool
    strided = torch.randn(9, 2, 3 * layout.num_kv_heads, layout.head_dim).to(pool.data.dtype)
    k, v = strided[:, 0, ::3], strided[:, 1, 1::3]
    places = torch.randperm(pool.num_slots * layout.page_tokens)[:9]
    places[torch.tensor([0, 5])] = -1
    expected = replace(pool, data=pool.data.clone())
    HOST.store(pool, 2, k, v, places)
    ReferenceBackend().store(expected, 2, k, v, places)
    assert torch.equal(pool.data.nan_to_num(7), expected.data.nan_to_num(7))
    stored = pool.layer_pages(2)[places[1] // 16, :, :, places[1] % 16]
    assert torch.equal(stored, torch.stack([k[1], v[1]]))


@pytest.mark.parametrize("scattered", [False, True])
@pytest.mark.parametrize("window", [None, 25])
def test_the_quick_expectation_is_the_reference(window: int | None, scattered: bool) -> None:
    shape = Shape(rows=(1, 9, 0), stored=(80, 50, 20), window=window, scattered=scattered)
    case = make_case(shape, seed=8)
    out, lse = case.expected_quickly()
    expected_out, expected_lse = case.expected()
    assert cases.relative_error(out, expected_out) < 1e-12
    cases.check_lse(lse, expected_lse)


def _tables_like(case: Case, **changes: object) -> PagedTables:
    return replace(case.tables, **changes)  # type: ignore[arg-type]


def test_wrong_arguments_are_refused() -> None:
    case = make_case(Shape(rows=(2,), stored=(30,)), seed=2)
    pool, q, tables = case.pool, case.q, case.tables
    bad_queries = [
        (TypeError, q.half()),
        (ValueError, q[:1]),
        (ValueError, q[:, :3]),
        (ValueError, q[..., :16]),
        (ValueError, q.transpose(0, 2).contiguous().transpose(0, 2)),
    ]
    for error, bad in bad_queries:
        with pytest.raises(error):
            replace(case, q=bad).run(HOST)
    with pytest.raises(ValueError, match="window=0"):
        replace(case, window=0).run(HOST)
    with pytest.raises(ValueError, match="layer=3"):
        HOST.attend(pool, 3, q, tables, scale=1.0, window=None, out_dtype=torch.float32)
    kv = torch.zeros(2, 2, 32)
    with pytest.raises(TypeError, match="token_slots"):
        HOST.store(pool, 0, kv, kv, torch.zeros(2, dtype=torch.int32))
    with pytest.raises(ValueError, match="v of shape"):
        HOST.store(pool, 0, kv, kv[:1], torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="at least one"):
        HOST.merge([], [], torch.float32)
    with pytest.raises(TypeError, match="num_pages"):
        _tables_like(case, num_pages=tables.num_pages.long())
    with pytest.raises(ValueError, match="cpu, meta"):
        _tables_like(case, kv_end=tables.kv_end.to("meta"))
    with pytest.raises(ValueError, match="block_table"):
        _tables_like(case, block_table=tables.block_table[:, :1])


def test_a_pool_view_must_fit_its_data() -> None:
    layout = PageLayout(2, 1, 16, "float32", 16)
    data = torch.zeros(3 * layout.layer_items * 2)
    assert PoolView(data, layout, 2 * layout.layer_items, 3).num_slots == 3
    with pytest.raises(ValueError, match="num_slots=4"):
        PoolView(data, layout, 2 * layout.layer_items, 4)
    with pytest.raises(ValueError, match="slot_items"):
        PoolView(data, layout, layout.layer_items, 3)
    with pytest.raises(TypeError, match="float16"):
        PoolView(data.half(), layout, 2 * layout.layer_items, 3)
    with pytest.raises(ValueError, match="flat"):
        PoolView(data.view(3, -1), layout, 2 * layout.layer_items, 3)
    assert PoolView(data, layout, layout.layer_items, 6, SlotHolds.ONE_LAYER).layer_offset(1) == 0


def test_backend_for_names_what_it_cannot_serve() -> None:
    assert isinstance(backend_for(torch.device("cpu"), None, "bfloat16"), HostBackend)
    cuda = torch.device("cuda", 0)
    with pytest.raises(ValueError, match=r"bfloat16.*\(7, 5\).*float16"):
        backend_for(cuda, (7, 5), "bfloat16")
    with pytest.raises(ValueError, match=r"at least \(7, 5\)"):
        backend_for(cuda, (7, 0), "float16")
    with pytest.raises(ValueError, match="int8"):
        backend_for(cuda, (8, 0), "int8")
    with pytest.raises(ValueError, match="meta"):
        backend_for(torch.device("meta"), None, "float16")
