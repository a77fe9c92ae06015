"""Attention in place on the CPU: every set of instructions against float64, threads, and what is refused."""

from __future__ import annotations

import math
import os
import warnings
from dataclasses import replace
from pathlib import Path

import attention_cases as cases
import numpy as np
import pytest
import torch
from attention_cases import Case, Shape, make_case

from tiermem._core import (
    AttentionInstructions,
    CpuAttention,
    FloatType,
    attention_instructions_supported,
)
from tiermem.attention import HostBackend, cpus, in_place
from tiermem.attention.cpus import usable_cpus
from tiermem.attention.in_place import InPlaceAttention

SUPPORTED = [
    instructions
    for instructions in AttentionInstructions
    if instructions is not AttentionInstructions.AUTO
    and attention_instructions_supported(instructions)
]
EXACT = 2e-6
"""Relative error of float32 sums, with a float32 output: no rounding to half precision."""
BY_TILES = 4e-5
"""The same where products of halves leave out what is 2^-16 of them."""


def _run(case: Case, attention: InPlaceAttention) -> tuple[torch.Tensor, torch.Tensor]:
    return attention.attend(
        case.pool,
        cases.LAYER,
        case.q,
        case.tables,
        scale=case.scale,
        window=case.window,
        out_dtype=torch.float32,
    )


@pytest.mark.parametrize("instructions", SUPPORTED, ids=lambda value: value.name)
@pytest.mark.parametrize("dtype", cases.TOLERANCE)
@pytest.mark.parametrize(
    "shape",
    [
        Shape(head_dim=128, group=7, kv_heads=2, page_tokens=64, stored=(3000,)),
        Shape(head_dim=80, group=3, rows=(1, 9), stored=(200, 9), scattered=True),
        Shape(head_dim=48, group=13, rows=(31,), stored=(90,), window=20, page_tokens=16),
        Shape(head_dim=16, group=8, rows=(40, 1), stored=(700, 5), scale=-0.3, scattered=True),
        Shape(head_dim=16, group=1, rows=(2,), stored=(50,), scale=0.0),
    ],
)
def test_every_set_of_instructions_agrees_with_float64(
    shape: Shape, dtype: str, instructions: AttentionInstructions
) -> None:
    case = make_case(replace(shape, dtype=dtype), seed=shape.head_dim)
    attention = InPlaceAttention(instructions=instructions)
    assert attention.instructions is instructions
    tolerance = BY_TILES if instructions is AttentionInstructions.AMX else EXACT
    cases.check(case, _run(case, attention), tolerance=tolerance)


@pytest.mark.parametrize("instructions", SUPPORTED, ids=lambda value: value.name)
@pytest.mark.parametrize(
    "shape",
    [
        Shape(head_dim=80, group=7, kv_heads=2, page_tokens=64, stored=(500,), dtype="float16"),
        Shape(head_dim=48, group=3, rows=(1, 9), stored=(200, 9), page_tokens=16, scattered=True),
        Shape(head_dim=32, group=5, rows=(11,), stored=(290,), window=70, page_tokens=128),
        Shape(head_dim=16, group=2, rows=(0, 1), stored=(4, 1), dtype="bfloat16", gain=8.0),
    ],
)
def test_the_log_sum_exp_of_each_page(shape: Shape, instructions: AttentionInstructions) -> None:
    case = make_case(shape, seed=shape.head_dim)
    attention = InPlaceAttention(instructions=instructions)
    page_lse = torch.full((*case.q.shape[:2], case.tables.max_pages), 123.0)
    out, lse = attention.attend(
        case.pool,
        cases.LAYER,
        case.q,
        case.tables,
        scale=case.scale,
        window=case.window,
        out_dtype=torch.float32,
        page_lse=page_lse,
    )
    plain = _run(case, attention)
    assert torch.equal(out, plain[0]) and torch.equal(lse, plain[1])
    expected = [part.expected()[1] for part in cases.split_pages(case, case.tables.max_pages)]
    cases.check_lse(page_lse, torch.stack(expected, dim=-1))
    mass = torch.exp(page_lse.double() - lse.double()[..., None]).sum(-1)
    assert torch.allclose(mass, (lse > -math.inf).double(), atol=1e-5)


def test_page_lse_of_another_form_is_refused() -> None:
    case = make_case(Shape(), seed=1)
    shape = (*case.q.shape[:2], case.tables.max_pages)
    for wrong, error in (
        (torch.zeros(shape, dtype=torch.float64), TypeError),
        (torch.zeros(*shape[:2], shape[2] + 1), ValueError),
        (torch.zeros(shape[0], shape[2], shape[1]).transpose(1, 2), ValueError),
        (torch.zeros(shape, device="meta"), ValueError),
    ):
        with pytest.raises(error, match="page_lse"):
            InPlaceAttention(1).attend(
                case.pool,
                cases.LAYER,
                case.q,
                case.tables,
                scale=1.0,
                window=None,
                out_dtype=torch.float32,
                page_lse=wrong,
            )


def test_queries_of_any_strides() -> None:
    case = make_case(Shape(rows=(3, 2), stored=(40, 50)), seed=2)
    expected = case.run(HostBackend())
    rows, heads, head_dim = case.q.shape
    wide = torch.full((heads, rows, 2 * head_dim), math.nan)
    wide[..., :head_dim] = case.q.transpose(0, 1)
    strided = wide.transpose(0, 1)[..., :head_dim]
    out, lse = replace(case, q=strided).run(HostBackend())
    assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])


def test_the_number_of_threads_does_not_show() -> None:
    case = make_case(Shape(group=3, head_dim=64, stored=(5000,)), seed=3)
    first, *others = [HostBackend(threads) for threads in range(1, usable_cpus() + 1)]
    expected = case.run(first)
    for backend in others:
        out, lse = case.run(backend)
        assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])


def test_threads_are_as_many_as_cpus_and_no_more() -> None:
    count = usable_cpus()
    assert HostBackend().threads == count
    assert HostBackend(1).threads == 1
    with pytest.raises(ValueError, match=rf"threads={count + 1}: must be 1 to {count}"):
        HostBackend(count + 1)
    with pytest.raises(ValueError, match="threads=0"):
        HostBackend(0)


def test_a_slot_that_the_pool_does_not_have_is_refused() -> None:
    case = make_case(Shape(rows=(2,), stored=(40,)), seed=2)
    for slot in (-1, case.pool.num_slots, cases.WILD_SLOT):
        table = case.tables.block_table.clone()
        table[0, 1] = slot
        with pytest.raises(ValueError, match="page 1 of sequence 0"):
            replace(case, tables=replace(case.tables, block_table=table)).run(HostBackend())


def test_an_output_of_another_dtype_is_refused() -> None:
    with pytest.raises(TypeError, match="float64"):
        make_case(Shape(), seed=1).run(HostBackend(), torch.float64)


def test_wrong_arguments_of_the_core_are_refused() -> None:
    with pytest.raises(ValueError, match="num_threads=0"):
        CpuAttention(0)
    with pytest.raises(ValueError, match="1 cpus: must be 0"):
        CpuAttention(1, cpus=[0])
    with pytest.raises(ValueError, match="spin_s=-1"):
        CpuAttention(2, spin_s=-1.0)
    with pytest.raises(OSError, match="cpu -1"):
        CpuAttention(2, cpus=[-1])
    for instructions in set(AttentionInstructions) - {AttentionInstructions.AUTO, *SUPPORTED}:
        with pytest.raises(ValueError, match="not supported"):
            CpuAttention(1, instructions=instructions)
    memory = torch.zeros(64)
    one = np.ones(1, np.int32)
    right = {
        "kv_type": FloatType.FLOAT32, "num_kv_heads": 1, "page_tokens": 1, "head_dim": 1,
        "slices": np.full((1, 1), memory.data_ptr()), "starts": None, "num_pages": one,
        "kv_end": one, "row_starts": np.arange(2, dtype=np.int32), "q_start": one,
        "q": memory.data_ptr(), "row_stride": 1, "head_stride": 1, "num_heads": 1, "scale": 1.0,
        "window": None, "out": memory.data_ptr(), "out_type": FloatType.FLOAT32,
        "lse": memory.data_ptr(),
    }  # fmt: skip
    core = CpuAttention(1)
    core.attend(**right)  # type: ignore[arg-type]
    for name, wrong in (
        ("num_kv_heads", 0),
        ("head_dim", -1),
        ("window", 0),
        ("num_pages", 2 * one),
        ("kv_end", np.ones(2, np.int32)),
        ("row_starts", np.arange(1, 3, dtype=np.int32)),
    ):
        with pytest.raises(ValueError, match=name):
            core.attend(**right | {name: wrong})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_heads=3: must be a multiple of 2"):
        core.attend(**right | {"num_heads": 3, "num_kv_heads": 2})  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        core.attend(**right | {"slices": np.ones((1, 1), np.int32)})  # type: ignore[arg-type]


def test_no_vector_instructions_are_warned_of_once() -> None:
    in_place._warn_of.cache_clear()
    with pytest.warns(RuntimeWarning, match="no AVX2"):
        in_place._warn_of(AttentionInstructions.PORTABLE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        in_place._warn_of(AttentionInstructions.PORTABLE)
        in_place._warn_of(AttentionInstructions.AVX2)


@pytest.mark.parametrize(
    ("quotas", "expected"),
    [({"a/b": "150000 100000"}, 2), ({"a/b": "max 100000", "a": "300000 100000"}, 3)],
)
def test_control_groups_limit_the_cpus(
    quotas: dict[str, str], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    for group, quota in quotas.items():
        (tmp_path / group / "cpu.max").write_text(quota + "\n")
    membership = tmp_path / "membership"
    membership.write_text("0::/a/b\n")
    monkeypatch.setattr(cpus, "CGROUPS", tmp_path)
    monkeypatch.setattr(cpus, "MEMBERSHIP", membership)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert usable_cpus() == expected
    membership.unlink()
    assert usable_cpus() == 8
