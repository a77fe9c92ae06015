"""Launches through the driver, with a driver that keeps what it is given."""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

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
FUNCTION = 0x123456789A


@dataclass
class FakeDriver:
    """Records descriptors and launches."""

    status: int = 0
    maps: list[tuple[Any, ...]] = field(default_factory=list)
    configs: list[tuple[Any, ...]] = field(default_factory=list)
    pointers: list[int] = field(default_factory=list)

    def cuTensorMapEncodeTiled(self, target: Any, *arguments: Any) -> int:  # noqa: N802
        target._obj.raw = b"M" * driver.TENSOR_MAP_BYTES
        assert ctypes.addressof(target._obj) % 64 == 0
        self.maps.append(arguments)
        return self.status

    def cuLaunchKernelEx(self, config: Any, function: Any, pointers: Any, extra: None) -> int:  # noqa: N802
        found = config._obj
        early = [found.attributes[i] for i in range(found.num_attributes)]
        ids = [(attribute.id, attribute.value[0]) for attribute in early]
        self.configs.append(
            (tuple(found.grid), tuple(found.block), found.shared_bytes, found.stream, ids)
        )
        assert function.value == FUNCTION
        self.pointers = list(pointers)
        return self.status

    def cuGetErrorString(self, status: int, text: Any) -> None:  # noqa: N802
        text._obj.value = b"out of luck"

    def number(self, index: int, ctype: Any) -> Any:
        return ctype.from_address(self.pointers[index]).value


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    fake = FakeDriver()
    monkeypatch.setattr(driver, "_driver", lambda: fake)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)

    class Active:
        @staticmethod
        def get_current_stream(device: int) -> int:
            assert device == 3
            return 77

    monkeypatch.setattr(driver.triton.runtime.driver, "_active", Active)
    return fake


def _bind(variant: Variant, values: dict[str, Any], num_changing: int) -> Any:
    compiled = compile_variant(variant, target_of(HOPPER))
    compiled.function = FUNCTION
    types = [a.removesuffix(ALIGNED) for a in variant.arguments if isinstance(a, str)]
    assert driver.takes_parameters(compiled, types)
    assert not driver.takes_parameters(compiled, types[1:])
    names = variant.kernel.arg_names
    passed = [n for n, a in zip(names, variant.arguments, strict=True) if isinstance(a, str)]
    kept = [values[name] for name in passed[num_changing:]]
    return driver.bind(compiled, 3, (5, 7), types, kept, num_changing), compiled, passed


def test_parameters_of_a_merge_that_starts_early(fake: FakeDriver) -> None:
    variant = report.other_variants(HOPPER)["merge of 33"]
    launch, compiled, passed = _bind(
        variant, {"work_ptr": 1 << 40, "num_parts": -2, "num_rows": 9}, 4
    )
    for first in (10, 1 << 50):
        launch(first, 20, 30, 40)
        assert [fake.number(i, ctypes.c_uint64) for i in range(5)] == [first, 20, 30, 40, 1 << 40]
        assert [fake.number(i, ctypes.c_int32) for i in (5, 6)] == [-2, 9]
        # the pointers to scratch memory
        assert [fake.number(i, ctypes.c_uint64) for i in (7, 8)] == [0, 0]
    assert len(fake.pointers) == len(passed) + 2
    shared = compiled.metadata.shared
    assert fake.configs == [((5, 7, 1), (32, 1, 1), shared, 77, [(6, 1)])] * 2


def test_parameters_with_a_descriptor(fake: FakeDriver) -> None:
    variant = report.variant_for(report.USES["decode"], HOPPER)
    pool = torch.zeros(640, 128, dtype=torch.float16)
    values: dict[str, Any] = dict.fromkeys(variant.kernel.arg_names, 5)
    values["scale_log2"] = 0.125
    values["kv_desc"] = TensorDescriptor(pool, [640, 128], [128, 1], [32, 128])
    launch, compiled, passed = _bind(variant, values, 6)
    launch(*range(100, 106))
    at = passed.index("kv_desc")
    assert ctypes.string_at(fake.pointers[at], 128) == b"M" * 128
    assert [fake.number(at + i, ctypes.c_int32) for i in (1, 2)] == [640, 128]
    assert [fake.number(at + i, ctypes.c_int64) for i in (3, 4)] == [128, 1]
    assert fake.number(4 + passed.index("scale_log2"), ctypes.c_float) == 0.125
    assert fake.configs[0][4] == []
    (dtype, rank, base, shape, strides, box, steps, *rest) = fake.maps[0]
    encoding = compiled.metadata.tensordesc_meta[0]
    assert (dtype, rank, base.value) == (6, 2, pool.data_ptr())
    assert (list(shape), list(strides), list(steps)) == ([128, 640], [256], [1, 1])
    assert list(box) == encoding["block_size"][::-1] and rest == [0, encoding["swizzle"], 2, 0]


def test_what_the_driver_refuses_is_raised(fake: FakeDriver) -> None:
    variant = report.other_variants(HOPPER)["merge of 4"]
    launch, *_ = _bind(variant, {"work_ptr": 1, "num_parts": 2, "num_rows": 9}, 4)
    fake.status = 701
    with pytest.raises(RuntimeError, match="launch of merge_parts: CUDA error 701: out of luck"):
        launch(1, 2, 3, 4)


def test_constants_are_passed_to_tritons_own_launcher() -> None:
    variant = report.other_variants(HOPPER)["merge of 4"]
    rest = rest_of(variant, 4, {"work_ptr": 1, "num_parts": 2, "num_rows": 9})
    assert rest == (1, 2, 9, 56, 128, 128, 4, True, True)
