"""Launches through the driver, with a driver that keeps what it is given."""

from __future__ import annotations

import ctypes
import os
from typing import Any

import pytest
import torch
from fake_driver import FakeDriver, parameter_sizes, tensor_map

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter does not compile", allow_module_level=True)

from triton.tools.tensor_descriptor import TensorDescriptor

from tiermem.attention.kernels import driver, report
from tiermem.attention.kernels.compiled import (
    ALIGNED,
    Variant,
    compile_variant,
    rest_of,
    target_of,
)

HOPPER = (9, 0)
STREAM = 77


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    fake = FakeDriver()
    monkeypatch.setattr(driver, "_driver", lambda: fake)
    return fake


def _bind(fake: FakeDriver, variant: Variant, values: dict[str, Any], num_changing: int) -> Any:
    compiled = compile_variant(variant, target_of(HOPPER))
    compiled.function = fake.load(compiled.name, parameter_sizes(compiled))
    types = [a.removesuffix(ALIGNED) for a in variant.arguments if isinstance(a, str)]
    assert driver.takes_parameters(compiled, types)
    assert not driver.takes_parameters(compiled, types[1:])
    names = variant.kernel.arg_names
    passed = [n for n, a in zip(names, variant.arguments, strict=True) if isinstance(a, str)]
    kept = [values[name] for name in passed[num_changing:]]
    context = driver.current_context()
    return driver.bind(compiled, context, (5, 7), types, kept, num_changing), compiled, passed


def test_parameters_of_a_merge_that_starts_early(fake: FakeDriver) -> None:
    variant = report.other_variants(HOPPER)["merge of 33"]
    values = {"work_ptr": 1 << 40, "num_parts": -2, "num_rows": 9}
    launch, compiled, passed = _bind(fake, variant, values, 4)
    for first in (10, 1 << 50):
        launch(STREAM, first, 20, 30, 40)
        (found,) = fake.take()
        assert [found.number(i) for i in range(5)] == [first, 20, 30, 40, 1 << 40]
        assert [found.number(i, ctypes.c_int32) for i in (5, 6)] == [-2, 9]
        # the pointers to scratch memory
        assert [found.number(i) for i in (7, 8)] == [0, 0]
        assert len(found.parameters) == len(passed) + 2
        assert (found.grid, found.block, found.stream) == ((5, 7, 1), (32, 1, 1), STREAM)
        assert found.shared_bytes == compiled.metadata.shared
        assert found.early and found.attributes[0][:3] == (6, 0, 1)


def test_parameters_with_a_descriptor(fake: FakeDriver) -> None:
    variant = report.variant_for(report.USES["decode"], HOPPER)
    pool = torch.zeros(640, 128, dtype=torch.float16)
    values: dict[str, Any] = dict.fromkeys(variant.kernel.arg_names, 5)
    values["scale_log2"] = 0.125
    values["kv_desc"] = TensorDescriptor(pool, [640, 128], [128, 1], [32, 128])
    launch, compiled, passed = _bind(fake, variant, values, 6)
    launch(STREAM, *range(100, 106))
    (found,) = fake.take()
    at = passed.index("kv_desc")
    assert found.parameters[at] == tensor_map(0) and found.addresses[at] % 64 == 0
    assert [found.number(at + i, ctypes.c_int32) for i in (1, 2)] == [640, 128]
    assert [found.number(at + i, ctypes.c_int64) for i in (3, 4)] == [128, 1]
    assert found.number(4 + passed.index("scale_log2"), ctypes.c_float) == 0.125
    assert not found.early
    (dtype, rank, base, shape, strides, box, steps, *rest) = fake.maps[0]
    encoding = compiled.metadata.tensordesc_meta[0]
    assert (dtype, rank, base.value) == (6, 2, pool.data_ptr())
    assert (list(shape), list(strides), list(steps)) == ([128, 640], [256], [1, 1])
    assert list(box) == encoding["block_size"][::-1] and rest == [0, encoding["swizzle"], 2, 0]


def test_what_the_driver_refuses_is_raised(fake: FakeDriver) -> None:
    variant = report.other_variants(HOPPER)["merge of 4"]
    launch, *_ = _bind(fake, variant, {"work_ptr": 1, "num_parts": 2, "num_rows": 9}, 4)
    fake.status = 701
    with pytest.raises(RuntimeError, match="launch of merge_parts: CUDA error 701: out of luck"):
        launch(STREAM, 1, 2, 3, 4)
    pool = torch.zeros(640, 128, dtype=torch.float16)
    variant = report.variant_for(report.USES["decode"], HOPPER)
    values: dict[str, Any] = dict.fromkeys(variant.kernel.arg_names, 5)
    values["kv_desc"] = TensorDescriptor(pool, [640, 128], [128, 1], [32, 128])
    with pytest.raises(RuntimeError, match="descriptor of 640 rows of 128: CUDA error 701: out of"):
        _bind(fake, variant, values, 6)


def test_constants_are_passed_to_tritons_own_launcher() -> None:
    variant = report.other_variants(HOPPER)["merge of 4"]
    rest = rest_of(variant, 4, {"work_ptr": 1, "num_parts": 2, "num_rows": 9})
    assert rest == (1, 2, 9, 56, 128, 128, 4, True, True)
