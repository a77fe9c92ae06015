"""The mass of each page, as attention on the CPU and the reference give it, against a softmax in float64."""

from __future__ import annotations

import math
import os
from dataclasses import replace

import attention_cases as cases
import numpy as np
import pytest
import torch
from attention_cases import LAYER, Shape, make_case

from tiermem.attention import HostBackend
from tiermem.attention.backend import AttentionBackend
from tiermem.attention.page_lse import PageLse, PagePlaces
from tiermem.attention.reference import ReferenceBackend

HOST, REFERENCE = HostBackend(), ReferenceBackend()


@pytest.fixture
def seed() -> int:
    return int.from_bytes(os.urandom(4), "little")


@pytest.fixture(params=[HOST, REFERENCE], ids=["host", "reference"])
def backend(request: pytest.FixtureRequest) -> AttentionBackend:
    found = request.param
    assert isinstance(found, HostBackend | ReferenceBackend)
    return found


@pytest.mark.parametrize("scattered", [False, True])
@pytest.mark.parametrize("page_tokens", [16, 64])
@pytest.mark.parametrize("dtype", cases.TOLERANCE)
def test_rows_of_several_sequences(
    dtype: str, page_tokens: int, scattered: bool, backend: AttentionBackend, seed: int
) -> None:
    shape = Shape(2, 3, 48, page_tokens, dtype, (1, 5, 0, 2), (150, 77, 20, 2), None, scattered)
    case = make_case(shape, seed)
    cases.check(case, cases.check_mass(case, backend))


@pytest.mark.parametrize("head_dim", [16, 80, 128])
@pytest.mark.parametrize(("kv_heads", "group"), [(1, 1), (2, 7), (1, 13)])
def test_any_heads(kv_heads: int, group: int, head_dim: int, seed: int) -> None:
    shape = Shape(kv_heads, group, head_dim, 16, "float16", (1, 32), (333, 97))
    cases.check_mass(make_case(shape, seed), HOST)


@pytest.mark.parametrize("window", [1, 16, 40, 1000])
def test_windows(window: int, backend: AttentionBackend, seed: int) -> None:
    shape = Shape(1, 2, 32, 16, rows=(1, 9), stored=(90, 70), window=window)
    cases.check_mass(make_case(shape, seed), backend)


@pytest.mark.parametrize("rows", [1, 8])
def test_parts_fill_one_object_between_them(
    rows: int, backend: AttentionBackend, seed: int
) -> None:
    shape = Shape(1, 3, 32, 16, "float16", (rows, 1), (120, 50), window=77)
    case = make_case(shape, seed)
    cases.check(case, cases.check_mass(case, backend, parts=3))


def test_more_rows_than_drafts_have(seed: int) -> None:
    case = make_case(Shape(2, 2, 32, 64, "float16", (150,), (300,)), seed)
    cases.check_mass(case, HOST)


def test_pages_of_no_weight_and_pages_of_all(backend: AttentionBackend, seed: int) -> None:
    case = make_case(Shape(1, 1, 32, 16, rows=(1,), stored=(64,)), seed)
    keys = case.pool.layer_pages(LAYER)[:, 0]
    keys[int(case.tables.block_table[0, 1]), 0] = case.q[0, 0] * 40
    page_lse = backend.new_page_lse(case.pool, 1, 1, 4)
    _, lse = case.run(backend, page_lse.values.dtype, page_lse)
    mass = backend.page_mass(page_lse, lse)[0, 0]
    assert mass[1] == pytest.approx(1) and (mass[[0, 2, 3]] < 1e-12).all()


def test_a_row_that_sees_nothing_has_no_mass_anywhere(backend: AttentionBackend) -> None:
    case = make_case(Shape(rows=(2,), stored=(20,)), seed=1)
    case = replace(case, tables=replace(case.tables, kv_end=torch.zeros(1, dtype=torch.int32)))
    page_lse = backend.new_page_lse(case.pool, 2, 4, 2)
    _, lse = case.run(backend, page_lse.values.dtype, page_lse)
    assert (page_lse.values == -math.inf).all()
    assert (backend.page_mass(page_lse, lse) == 0).all()


def test_pages_outside_the_tables_are_left_alone(backend: AttentionBackend, seed: int) -> None:
    case = make_case(Shape(1, 2, 32, 16, rows=(3,), stored=(100,)), seed)
    for number, part in enumerate(cases.split_pages(case, 3)):
        page_lse = backend.new_page_lse(case.pool, 3, 2, 7)
        page_lse.values.fill_(5.0)
        part.run(backend, page_lse.values.dtype, page_lse)
        untouched = (page_lse.values == 5.0).all(2).all(0)
        assert untouched.tolist() == [page % 3 != number for page in range(7)]


def test_what_was_found_over_tables_goes_to_the_first_part_of_each_page() -> None:
    places = PagePlaces.of(
        np.array([0, 2, 2, 3]),
        np.array([2, 1, 3]),
        np.array([[64, 0, 9], [7, 7, 7], [128, 0, 64]]),
        64,
    )
    page_lse = PageLse.empty(3, 5, 4, torch.device("cpu"), parts=2)
    found = torch.randn(3, 5, 3)
    page_lse.of_rows(slice(0, 3)).place(found, places)
    values = page_lse.values.unflatten(1, (4, 2))
    assert (values[:, :, 1] == -math.inf).all() and (values[:, 3] == -math.inf).all()
    assert (values[:2, 2] == -math.inf).all()
    for row, order in ((0, [1, 0]), (1, [1, 0]), (2, [1, 2, 0])):
        assert torch.equal(values[row, : len(order), 0], found[row][:, order].T)
    lse = page_lse.values.logsumexp(1)
    assert torch.allclose(page_lse.mass(lse).sum(2), torch.ones(3, 5))


def test_page_lse_of_another_shape_is_refused() -> None:
    case = make_case(Shape(rows=(2,), stored=(30,)), seed=2)
    cpu = torch.device("cpu")
    for wrong, error in (
        (PageLse.empty(3, 4, 2, cpu), ValueError),
        (PageLse.empty(2, 3, 2, cpu), ValueError),
        (PageLse.empty(2, 4, 1, cpu), ValueError),
        (PageLse.empty(2, 4, 2, cpu, parts=2), ValueError),
        (PageLse.empty(2, 4, 2, cpu, dtype=torch.float16), TypeError),
        (PageLse.empty(2, 4, 2, torch.device("meta")), ValueError),
    ):
        with pytest.raises(error, match="page_lse"):
            case.run(HOST, page_lse=wrong)
    page_lse = PageLse.empty(2, 4, 2, cpu)
    for lse, error in (
        (torch.zeros(2, 4).double(), TypeError),
        (torch.zeros(4, 2), ValueError),
        (torch.zeros(2, 4, device="meta"), ValueError),
    ):
        with pytest.raises(error, match="lse of"):
            HOST.page_mass(page_lse, lse)
