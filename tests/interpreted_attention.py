"""The Triton kernels in Triton's interpreter, on the CPU, against the float64 reference.

The interpreter is chosen by TRITON_INTERPRET=1 before triton is imported, so these tests need a process
of their own: test_attention_interpreter.py runs them.
"""

from __future__ import annotations

from dataclasses import replace

import attention_cases as cases
import pytest
import torch
from attention_cases import Shape, make_case

from tiermem.attention import ProductMath, SlotHolds
from tiermem.attention.kernels.backend import TritonBackend
from tiermem.attention.reference import ReferenceBackend

DTYPES = ("float16", "float32")
"""The interpreter multiplies the raw bits of bfloat16."""


def _backend(capability: tuple[int, int] = (9, 0), num_sms: int = 2) -> TritonBackend:
    return TritonBackend(capability, num_sms)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("page_tokens", [16, 32, 64, 128])
def test_decode(dtype: str, page_tokens: int) -> None:
    shape = Shape(dtype=dtype, page_tokens=page_tokens, kv_heads=1, rows=(1, 1), stored=(1, 99))
    case = make_case(shape, seed=page_tokens)
    cases.check(case, case.run(_backend()))


@pytest.mark.parametrize("rows", [(1, 1), (3, 30)])
def test_widened_products_lose_nothing_to_half_precision(rows: tuple[int, int]) -> None:
    shape = Shape(dtype="float16", kv_heads=2, rows=rows, stored=(70, 99))
    case = make_case(shape, seed=rows[1])
    backend = TritonBackend((9, 0), 2, ProductMath.FLOAT32)
    cases.check(case, case.run(backend, torch.float32), tolerance=1e-5)


@pytest.mark.parametrize("head_dim", [16, 48, 80, 256])
def test_head_dims(head_dim: int) -> None:
    shape = Shape(dtype="float16", head_dim=head_dim, kv_heads=2, rows=(2,), stored=(40,))
    case = make_case(shape, seed=head_dim)
    cases.check(case, case.run(_backend()))


@pytest.mark.parametrize(("kv_heads", "group"), [(1, 7), (2, 1), (1, 13), (1, 72)])
def test_head_ratios(kv_heads: int, group: int) -> None:
    case = make_case(
        Shape(kv_heads=kv_heads, group=group, rows=(3, 1), stored=(35, 17)), seed=group
    )
    cases.check(case, case.run(_backend()))


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (9, 0)])
@pytest.mark.parametrize("page_tokens", [16, 64])
def test_prefill(capability: tuple[int, int], page_tokens: int) -> None:
    shape = Shape(
        dtype="float16",
        page_tokens=page_tokens,
        kv_heads=1,
        group=3,
        rows=(70, 30, 1),
        stored=(70, 99, 20),
    )
    case = make_case(shape, seed=page_tokens)
    cases.check(case, case.run(_backend(capability)))


@pytest.mark.parametrize("window", [1, 15, 16, 33, 10**12])
@pytest.mark.parametrize("scattered", [False, True])
@pytest.mark.parametrize("page_tokens", [16, 64])
def test_windows_and_scattered_pages(window: int, scattered: bool, page_tokens: int) -> None:
    shape = Shape(
        kv_heads=1,
        page_tokens=page_tokens,
        rows=(1, 40),
        stored=(130, 120),
        window=window,
        scattered=scattered,
    )
    case = make_case(shape, seed=window % 1000)
    cases.check(case, case.run(_backend()))


@pytest.mark.parametrize("num_sms", [1, 3, 40])
def test_splits_of_any_number(num_sms: int) -> None:
    shape = Shape(kv_heads=1, rows=(1, 2), stored=(300, 20), scattered=num_sms == 3)
    case = make_case(shape, seed=num_sms)
    cases.check(case, case.run(_backend(num_sms=num_sms)))


@pytest.mark.parametrize("num_sms", [1, 3])
@pytest.mark.parametrize(
    ("kv_heads", "group", "head_dim", "page_tokens"),
    [(2, 7, 128, 64), (1, 16, 64, 16), (3, 1, 64, 128), (1, 20, 64, 32), (1, 3, 80, 16)],
)
def test_decode_by_a_work_list(
    kv_heads: int, group: int, head_dim: int, page_tokens: int, num_sms: int
) -> None:
    stored = (1, 31, 32, 33, 200, 65, 64)
    shape = Shape(kv_heads, group, head_dim, page_tokens, "float16", (1,) * len(stored), stored)
    case = make_case(shape, seed=num_sms)
    for capability in ((9, 0), (8, 0)):
        backend = _backend(capability, num_sms)
        cases.check(case, cases.with_work(case, backend, padding=2).run(backend))


def test_a_work_list_stays_valid_while_lengths_change() -> None:
    stored = (250, 40)
    case = make_case(Shape(1, 2, 64, 64, "float16", (1, 1), stored), seed=5)
    backend = _backend(num_sms=3)
    for planned_for in ((190, 1), (256, 250)):
        tables = replace(case.tables, kv_end=torch.tensor(planned_for, dtype=torch.int32))
        work = cases.with_work(replace(case, tables=tables), backend).tables.work
        assert work is not None and work.max_splits > 1
        later = replace(case, tables=replace(case.tables, work=work))
        cases.check(later, later.run(backend))


@pytest.mark.parametrize("scale", [0.0, -0.2, 1.5])
@pytest.mark.parametrize("rows", [1, 20])
def test_any_scale(scale: float, rows: int) -> None:
    case = make_case(Shape(1, 2, 64, 16, "float32", (rows,), (70,), scale=scale), seed=rows)
    cases.check(case, case.run(_backend()))


def test_rows_that_see_nothing_and_sequences_without_pages_or_rows() -> None:
    case = make_case(Shape(kv_heads=1, rows=(2, 0, 1, 3), stored=(20, 33, 9, 18)), seed=1)
    tables = replace(
        case.tables,
        kv_end=torch.tensor([0, 33, 9, 18], dtype=torch.int32),
        num_pages=torch.tensor([2, 3, 0, 2], dtype=torch.int32),
    )
    case = replace(case, tables=tables)
    for num_sms in (1, 8):
        cases.check(case, case.run(_backend(num_sms=num_sms)))


def test_slots_of_one_layer_and_strided_queries() -> None:
    case = make_case(Shape(holds=SlotHolds.ONE_LAYER, rows=(4,), stored=(70,)), seed=3)
    fused = torch.randn(4, 12, 32)
    fused[:, 2:10:2] = case.q
    case = replace(case, q=fused[:, 2:10:2])
    cases.check(case, case.run(_backend()))


def test_merged_parts_equal_the_whole() -> None:
    case = make_case(Shape(kv_heads=1, rows=(1, 6), stored=(80, 50), window=40), seed=7)
    backend = _backend()
    partial = [part.run(backend) for part in cases.split_pages(case, 3)]
    merged = backend.merge([out for out, _ in partial], [lse for _, lse in partial], torch.float32)
    cases.check(case, merged)


def test_merge_agrees_with_the_reference() -> None:
    outs = [torch.randn(5, 4, 80) for _ in range(19)]
    lses = [torch.randn(5, 4) * 30 for _ in range(19)]
    for part in range(19):
        lses[part][0] = -torch.inf
        outs[part][0] = torch.nan
    out, lse = _backend().merge(outs, lses, torch.float32)
    expected_out, expected_lse = ReferenceBackend().merge(outs, lses, torch.float64)
    assert cases.relative_error(out, expected_out) < 1e-6
    assert (out[0] == 0).all()
    cases.check_lse(lse, expected_lse)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [32, 80])
def test_store(dtype: str, head_dim: int) -> None:
    case = make_case(Shape(dtype=dtype, head_dim=head_dim, page_tokens=16), seed=4)
    layout, pool = case.pool.layout, case.pool
    fused = torch.randn(21, 2, 3 * layout.num_kv_heads, layout.head_dim).to(pool.data.dtype)
    k, v = fused[:, 0, ::3], fused[:, 1, 1::3]
    places = torch.randperm(pool.num_slots * layout.page_tokens)[:21]
    places[torch.tensor([0, 5])] = -1
    expected = replace(pool, data=pool.data.clone())
    _backend().store(pool, 2, k, v, places)
    ReferenceBackend().store(expected, 2, k, v, places)
    assert torch.equal(pool.data.nan_to_num(7), expected.data.nan_to_num(7))


def test_scores_near_the_fp16_limit() -> None:
    case = make_case(Shape(dtype="float16", head_dim=128, kv_heads=1, rows=(2,), stored=(70,)), 9)
    q = (case.q.float().sign() * 22.0).half()
    case.pool.layer_pages(cases.LAYER)[:, 0, :, ::3] = q[0, 0] * 1.05
    case = replace(case, q=q)
    cases.check(case, case.run(_backend()))
