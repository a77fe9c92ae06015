"""The kernels as a T4 gets them, run on the GPU at hand: the driver translates their PTX for it.

Speed says nothing here. Results must be exact, since the variants for compute capability 7.5 share no tiles
and no matrix instructions with those for newer GPUs.
"""

from __future__ import annotations

import ctypes
import os
from typing import Any

import attention_cases as cases
import pytest
import torch
from attention_cases import Shape, make_case

from tiermem.attention import ProductMath
from tiermem.attention.reference import ReferenceBackend

pytestmark = pytest.mark.gpu

T4 = (7, 5)
T4_SMS = 40
CTYPES = {"i32": ctypes.c_int32, "i64": ctypes.c_int64, "fp32": ctypes.c_float}


def _checked(result: tuple[Any, ...]) -> Any:
    assert int(result[0]) == 0, result[0]
    return result[1] if len(result) == 2 else None


class PtxKernel:
    """A variant as compiled for a T4, in place of LoadedKernel."""

    def __init__(self, variant: Any) -> None:
        self._variant = variant
        self._launch = _load_ptx(variant)

    def bind(self, grid: tuple[int, int], num_changing: int, values: dict[str, Any]) -> Any:
        from tiermem.attention.kernels.compiled import rest_of

        rest = rest_of(self._variant, num_changing, values)
        return lambda stream, *numbers: self._launch(stream, *grid, *numbers, *rest)


def _load_ptx(variant: Any) -> Any:
    """A launch of the PTX, by the driver."""
    from cuda.bindings import driver

    from tiermem.attention.kernels.compiled import ALIGNED, compile_variant, target_of

    compiled = compile_variant(variant, target_of(T4))
    ptx = compiled.asm["ptx"]
    assert ".target sm_75" in ptx and "griddepcontrol" not in ptx
    torch.cuda.current_stream().synchronize()  # torch has made its context the current one
    module = _checked(driver.cuModuleLoadData(ptx.encode()))
    function = _checked(driver.cuModuleGetFunction(module, compiled.metadata.name.encode()))
    shared = compiled.metadata.shared
    limit = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    _checked(driver.cuFuncSetAttribute(function, limit, shared))
    passed = [i for i, argument in enumerate(variant.arguments) if isinstance(argument, str)]
    types = tuple(
        CTYPES.get(variant.arguments[i].removesuffix(ALIGNED), ctypes.c_void_p) for i in passed
    )

    def launch(stream: int, grid_x: int, grid_y: int, *arguments: Any) -> None:
        # Triton's kernels take two pointers to scratch memory besides, which these do not use.
        values = (*(arguments[i] for i in passed), 0, 0)
        parameters = (values, (*types, ctypes.c_void_p, ctypes.c_void_p))
        threads = 32 * variant.num_warps
        _checked(
            driver.cuLaunchKernel(
                function, grid_x, grid_y, 1, threads, 1, 1, shared, stream, parameters, 0
            )
        )

    return launch


@pytest.fixture
def seed() -> int:
    return int.from_bytes(os.urandom(4), "little")


@pytest.fixture
def make_backend(monkeypatch: pytest.MonkeyPatch) -> Any:
    from tiermem.attention.kernels.backend import TritonBackend
    from tiermem.attention.kernels.compiled import CompiledKernels

    monkeypatch.setattr(CompiledKernels, "_load", lambda self, variant: PtxKernel(variant))
    return lambda math=ProductMath.STORED: TritonBackend(T4, T4_SMS, math)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("page_tokens", [16, 64])
def test_planned_decode(dtype: str, page_tokens: int, make_backend: Any, seed: int) -> None:
    lengths = (1, 63, 700, 12_000)
    shape = Shape(8, 7, 128, page_tokens, dtype, (1,) * len(lengths), lengths)
    case = make_case(shape, seed).to("cuda")
    backend = make_backend()
    case = cases.with_work(case, backend, padding=3)
    cases.check(case, case.run(backend), expected=case.expected_quickly())


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("scattered", [False, True])
@pytest.mark.parametrize("rows", [1, 90])
def test_pages_of_any_kind(
    rows: int, scattered: bool, window: int | None, make_backend: Any, seed: int
) -> None:
    shape = Shape(2, 4, 64, 16, "float16", (rows, 2), (900, 77), window=window, scattered=scattered)
    case = make_case(shape, seed).to("cuda")
    cases.check(case, case.run(make_backend()), expected=case.expected_quickly())


def test_float32_products_of_half_precision(make_backend: Any, seed: int) -> None:
    case = make_case(Shape(2, 4, 64, 32, "float16", (1, 30), (500, 200)), seed).to("cuda")
    result = case.run(make_backend(ProductMath.FLOAT32), torch.float32)
    cases.check(case, result, tolerance=1e-5, expected=case.expected_quickly())


@pytest.mark.parametrize("rows", [1, 20])
@pytest.mark.parametrize("scattered", [False, True])
def test_page_mass(rows: int, scattered: bool, make_backend: Any, seed: int) -> None:
    shape = Shape(2, 7, 128, 64, "float16", (rows, 1), (900, 77), scattered=scattered)
    case = make_case(shape, seed).to("cuda")
    result = cases.check_mass(case, make_backend(), parts=2)
    cases.check(case, result, expected=case.expected_quickly())


def test_store_and_merge(make_backend: Any, seed: int) -> None:
    case = make_case(Shape(2, 4, 128, 64, "float16", (40,), (3000,)), seed).to("cuda")
    backend = make_backend()
    k, v = torch.randn(2, 37, 2, 128, device="cuda").half().unbind()
    places = torch.randperm(3 * 64, device="cuda")[:37] + 64
    expected = make_case(Shape(2, 4, 128, 64, "float16", (40,), (3000,)), seed).pool
    backend.store(case.pool, 2, k, v, places)
    ReferenceBackend().store(expected, 2, k.cpu(), v.cpu(), places.cpu())
    assert torch.equal(case.pool.data.cpu().nan_to_num(7), expected.data.nan_to_num(7))
    parts = [part.run(backend) for part in cases.split_pages(case, 5)]
    merged = backend.merge([out for out, _ in parts], [lse for _, lse in parts], torch.float16)
    cases.check(case, merged, expected=case.expected_quickly())
