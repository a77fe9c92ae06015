"""What a backend gives to the driver: which kernels, with which parameters, and what a repetition costs."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from dataclasses import replace
from typing import Any

import attention_cases as cases
import pytest
import torch
from attention_cases import LAYER, Case, Shape, make_case
from fake_driver import FakeDriver, parameter_sizes

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter does not compile", allow_module_level=True)

from triton.compiler import CompiledKernel  # noqa: E402

from tiermem.attention.kernels import compiled, driver  # noqa: E402
from tiermem.attention.kernels.backend import TritonBackend  # noqa: E402
from tiermem.attention.kernels.compiled import target_of  # noqa: E402

NUM_SMS = 132
CPU = -1
"""The device of tensors on the CPU, which stand for those on a GPU."""


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    fake = FakeDriver()

    def load(kernel: Any) -> None:
        kernel.function = fake.load(kernel.name, parameter_sizes(kernel))
        kernel._run = _never

    class Active:
        @staticmethod
        def get_current_target() -> Any:
            return target_of((9, 0))

    monkeypatch.setattr(driver, "_driver", lambda: fake)
    monkeypatch.setattr(CompiledKernel, "_init_handles", load)
    monkeypatch.setattr(triton.runtime.driver, "_active", Active)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    return fake


def _never(*_: object) -> None:
    raise AssertionError("launched by Triton")


def _case(stored: tuple[int, ...] = (5000, 70), page_tokens: int = 64) -> Case:
    return make_case(Shape(2, 4, 128, page_tokens, "float16", (1,) * len(stored), stored), 1)


def test_a_planned_decode_is_one_kernel_and_an_early_merge(fake: FakeDriver) -> None:
    backend = TritonBackend((9, 0), NUM_SMS)
    case = cases.with_work(_case(), backend)
    work = case.tables.work
    assert work is not None
    out, lse = case.run(backend, torch.float16)
    decode, merge = fake.take()
    assert (decode.name, merge.name) == ("decode_chunks", "merge_parts")
    assert decode.grid == (2 * len(work.rows), 1, 1) and not decode.early
    assert merge.grid[0] == 2 * 8 and merge.early
    assert decode.number(0) == case.q.data_ptr()
    assert [decode.number(i) for i in (1, 2)] == [out.data_ptr(), lse.data_ptr()]
    assert [merge.number(i) for i in range(4)] == [decode.number(i) for i in range(1, 5)]
    assert decode.number(4) - decode.number(3) == 4 * work.num_partials * 8 * 128
    assert decode.number(5) == case.pool.layer_offset(LAYER)
    assert decode.number(6) == case.pool.data.data_ptr()
    assert merge.number(4) == work.rows.data_ptr()


def test_every_layer_gets_its_own_results_and_offset_from_what_was_prepared_once(
    fake: FakeDriver,
) -> None:
    backend = TritonBackend((9, 0), NUM_SMS)
    case = cases.with_work(_case(), backend)
    results = []
    for layer in range(3):
        results.append(
            backend.attend(
                case.pool, layer, case.q, case.tables,
                scale=0.1, window=None, out_dtype=torch.float16,
            )
        )  # fmt: skip
        decode, _ = fake.take()
        assert decode.number(5) == case.pool.layer_offset(layer)
        assert decode.number(1) == results[-1][0].data_ptr()
    assert len({out.data_ptr() for out, _ in results}) == 3
    assert len(fake.names) == 2 and len(case.tables.prepared) == 1


def test_launches_are_given_the_stream_that_is_current_then(fake: FakeDriver) -> None:
    backend = TritonBackend((9, 0), NUM_SMS)
    case = cases.with_work(_case(), backend)
    k = torch.zeros(1, 2, 128, dtype=torch.float16)
    streams = [7, 2**47 + 8, 7]
    backend._kernels_of(CPU).current_stream = lambda: streams[0]
    while streams:
        case.run(backend)
        backend.store(case.pool, 0, k, k, torch.zeros(1, dtype=torch.int64))
        assert [launch.stream for launch in fake.take()] == [streams.pop(0)] * 3
    # partial results of two streams would overwrite each other
    assert len(case.tables.prepared) == 2


def test_a_gpus_current_stream_is_asked_for_each_time(
    fake: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Active:
        streams = iter((8, 9))

        @classmethod
        def get_current_stream(cls, device: int) -> int:
            assert device == 2
            return next(cls.streams)

    monkeypatch.setattr(triton.runtime.driver, "_active", Active)
    kernels = compiled.CompiledKernels(2)
    assert [kernels.current_stream(), kernels.current_stream()] == [8, 9]
    assert compiled.CompiledKernels(CPU).current_stream() == 0


@pytest.mark.parametrize("out_dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("rows", [0, 1, 3])
def test_results_are_contiguous_whatever_q_is(
    fake: FakeDriver, out_dtype: torch.dtype, rows: int
) -> None:
    backend = TritonBackend((9, 0), NUM_SMS)
    case = make_case(Shape(2, 4, 128, 64, "float16", (rows,), (100,)), 1)
    q = torch.zeros(8, rows, 128, dtype=torch.float16).transpose(0, 1)
    out, lse = replace(case, q=q).run(backend, out_dtype)
    assert rows < 2 or not q.is_contiguous()
    assert (out.shape, out.dtype, lse.shape, lse.dtype) == (
        q.shape, out_dtype, q.shape[:2], torch.float32,
    )  # fmt: skip
    assert out.stride() == torch.empty(q.shape).stride()
    assert lse.stride() == torch.empty(q.shape[:2]).stride()


def test_unaligned_rows_get_a_kernel_of_their_own(fake: FakeDriver) -> None:
    backend = TritonBackend((9, 0), NUM_SMS)
    case = cases.with_work(_case((100,)), backend)
    memory = torch.zeros(2000, dtype=torch.float16)
    for offset in (0, 3, 8):
        q = memory[offset : offset + case.q.numel()].view(case.q.shape)
        replace(case, q=q).run(backend)
        assert fake.take()[0].number(0) == q.data_ptr()
    # aligned, not aligned; the third is aligned to 16 bytes as the first
    assert fake.names.count("decode_chunks") == 2


def test_windows_prefill_and_older_gpus_use_the_kernel_for_any_pages(fake: FakeDriver) -> None:
    newer, older = TritonBackend((9, 0), NUM_SMS), TritonBackend((8, 0), NUM_SMS)
    case = cases.with_work(_case((9000,)), newer)
    case.run(older)
    planned, merge = fake.take()
    assert (planned.name, merge.early) == ("attend_pages", False)
    replace(case, window=50).run(newer)
    assert [launch.name for launch in fake.take()] == ["attend_pages"]
    rows = make_case(Shape(2, 4, 128, 64, "float16", (300,), (4000,)), 2)
    rows.run(newer)
    prefill, merge = fake.take()
    assert (prefill.name, merge.name) == ("attend_pages", "merge_parts")
    assert merge.early and merge.grid[0] == 300 * 8


@pytest.mark.parametrize(("page_tokens", "parts"), [(16, 1), (64, 2)])
def test_page_mass_is_one_parameter_more_and_one_kernel_at_the_end(
    fake: FakeDriver, page_tokens: int, parts: int
) -> None:
    backend = TritonBackend((9, 0), NUM_SMS)
    case = cases.with_work(_case(page_tokens=page_tokens), backend)
    for num_pages in (400, 401, 400):
        page_lse = backend.new_page_lse(case.pool, 2, 8, num_pages)
        assert page_lse.parts == parts
        _, lse = case.run(backend, torch.float16, page_lse)
        decode, merge = fake.take()
        assert (decode.name, merge.name) == ("decode_chunks", "merge_parts")
        assert decode.number(5) == case.pool.layer_offset(LAYER)
        assert decode.number(6) == page_lse.values.data_ptr()
        assert decode.number(7) == case.pool.data.data_ptr()
        assert decode.number(-3, ctypes.c_int32) == num_pages * parts * 8  # before Triton's scratch
        mass = backend.page_mass(page_lse, lse)
        (launch,) = fake.take()
        assert launch.name == "mass_of_pages" and launch.grid == (2, 13, 1) and not launch.early
        assert [launch.number(i) for i in range(3)] == [
            mass.data_ptr(), page_lse.values.data_ptr(), lse.data_ptr(),
        ]  # fmt: skip
        assert launch.number(3, ctypes.c_int32) == num_pages
        assert mass.shape == (2, 8, num_pages)
    case.run(backend, torch.float16)
    assert fake.take()[0].number(6) == case.pool.data.data_ptr()
    assert fake.names.count("decode_chunks") == 2, "one that leaves page_lse, one that does not"
    assert fake.names.count("mass_of_pages") == 1


def test_store_is_one_kernel_and_nothing_without_tokens(fake: FakeDriver) -> None:
    backend = TritonBackend((9, 0), NUM_SMS)
    pool = _case().pool
    k, v = torch.zeros(2, 37, 2, 128, dtype=torch.float16).unbind()
    places = torch.arange(37)
    for layer in (0, 2):
        backend.store(pool, layer, k, v, places)
        (store,) = fake.take()
        assert store.grid[1] == 2
        assert [store.number(i) for i in range(5)] == [
            k.data_ptr(), v.data_ptr(), places.data_ptr(), pool.layer_offset(layer),
            pool.data.data_ptr(),
        ]  # fmt: skip
    backend.store(pool, 0, k[:0], v[:0], places[:0])
    assert fake.take() == []


def test_what_is_prepared_keeps_no_pool_alive(fake: FakeDriver) -> None:
    import gc
    import weakref

    backend = TritonBackend((9, 0), NUM_SMS)
    case = cases.with_work(_case((100,)), backend)
    case.run(backend)
    k = torch.zeros(1, 2, 128, dtype=torch.float16)
    backend.store(case.pool, 0, k, k, torch.zeros(1, dtype=torch.int64))
    memory = weakref.ref(case.pool.data)
    gc.disable()
    try:
        del case
        assert memory() is None
    finally:
        gc.enable()


def test_parameters_unknown_here_go_to_tritons_launcher(
    fake: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    passed: list[tuple[Any, ...]] = []
    monkeypatch.setattr(compiled, "takes_parameters", lambda *_: False)
    monkeypatch.setattr(
        sys.modules[__name__], "_never", lambda *arguments: passed.append(arguments)
    )
    backend = TritonBackend((9, 0), NUM_SMS)
    case = cases.with_work(_case((100,)), backend)
    out, lse = case.run(backend)
    work = case.tables.work
    assert work is not None
    arguments, merge = passed
    assert arguments[:4] == (2 * len(work.rows), 1, 1, 0)
    assert merge[9:11] == (out.data_ptr(), lse.data_ptr())
    assert arguments[6:12] == (None, None, None, case.q.data_ptr(), out.data_ptr(), lse.data_ptr())
