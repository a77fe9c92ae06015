"""Launches through the CUDA driver, with parameters that stay in place.

Triton's own launcher converts every argument in every launch, and encodes descriptors anew. Here the native
core is given once what does not change; a launch then passes the few numbers that do, which costs the host
0.2 microseconds besides the driver's own 2.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, TypeAlias

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from tiermem import _core

SCRATCH_POINTERS = 2
"""Triton's kernels end with two pointers to scratch memory, which ours do not use."""
DESCRIPTOR_NUMBERS = 4
"""After a descriptor of two dimensions come its shape and its strides."""
TENSOR_MAP_BYTES = 128
TENSOR_MAP_TYPES = {torch.float16: 6, torch.bfloat16: 9}
"""CUtensorMapDataType."""
L2_PROMOTION_128_BYTES = 2
"""CU_TENSOR_MAP_L2_PROMOTION_L2_128B."""
NUMBER_TYPES: dict[str, Any] = {
    "i32": ctypes.c_int32,
    "i64": ctypes.c_int64,
    "fp32": ctypes.c_float,
}

BoundLaunch: TypeAlias = Callable[..., None]
"""launch(stream, *numbers): the stream's handle, and the parameters that change, all of 64 bits, in order."""


def takes_parameters(compiled: Any, types: Sequence[str]) -> bool:
    """Whether the compiled kernel has the parameters that `bind` passes for these types.

    Later versions of Triton may pass others.
    """
    entry = compiled.asm["ptx"].partition(".visible .entry")[2].partition(")")[0]
    expected = len(types) + SCRATCH_POINTERS
    expected += DESCRIPTOR_NUMBERS * sum(name.startswith("tensordesc") for name in types)
    unused = compiled.metadata.global_scratch_size == compiled.metadata.profile_scratch_size == 0
    return unused and len(re.findall(r"\.param\b", entry)) == expected


def current_context() -> int:
    """The thread's current context of the driver."""
    context = ctypes.c_void_p()
    status = _driver().cuCtxGetCurrent(ctypes.byref(context))
    if status:
        _raise(status, "current context")
    return context.value or 0


def bind(
    compiled: Any,
    context: int,
    grid: tuple[int, int],
    types: Sequence[str],
    values: Sequence[Any],
    num_changing: int,
) -> BoundLaunch:
    """A launch on any stream of a context, whichever one is the thread's current one.

    Parameters
    ----------
    compiled: Triton's compiled kernel, loaded.
    context: that it is loaded in.
    types: of its parameters, as in `Variant`, without alignment.
    values: for the parameters that do not change, the last ones.
    num_changing: parameters that change, the first ones.

    Raises
    ------
    RuntimeError: the driver refuses a descriptor; from the launch: the driver refuses it.
    """
    metadata = compiled.metadata
    kernel = _core.KernelLaunch(
        _launch_calls(_driver()),
        name=metadata.name,
        function=compiled.function,
        context=context,
        grid=grid,
        threads=32 * metadata.num_warps,
        shared_bytes=metadata.shared,
        early=metadata.launch_pdl,
        num_changing=num_changing,
        fixed=[bytes(value) for value in _parameters(compiled, types[num_changing:], values)],
    )
    return kernel.launch


def _launch_calls(driver: Any) -> _core.LaunchCalls:
    def address(function: Any) -> int:
        return ctypes.cast(function, ctypes.c_void_p).value or 0

    return _core.LaunchCalls(
        launch=address(driver.cuLaunchKernelEx),
        get_context=address(driver.cuCtxGetCurrent),
        set_context=address(driver.cuCtxSetCurrent),
        error_string=address(driver.cuGetErrorString),
    )


def _parameters(compiled: Any, types: Sequence[str], values: Sequence[Any]) -> list[Any]:
    """The parameters' bytes, in the order in which the kernel takes them."""
    found: list[Any] = []
    maps = iter(compiled.metadata.tensordesc_meta or ())
    for name, value in zip(types, values, strict=True):
        if name.startswith("tensordesc"):
            found += _descriptor(value, next(maps))
        else:
            found.append(NUMBER_TYPES.get(name, ctypes.c_uint64)(value))
    return found + [ctypes.c_uint64(0)] * SCRATCH_POINTERS


def _descriptor(value: TensorDescriptor, encoding: dict[str, Any]) -> list[Any]:
    """The tensor map of a matrix whose rows are contiguous, then its shape and strides."""
    item_bytes = value.base.dtype.itemsize
    rows, columns = value.shape
    memory = (ctypes.c_char * (2 * TENSOR_MAP_BYTES))()
    to_aligned = -ctypes.addressof(memory) % TENSOR_MAP_BYTES
    tensor_map = (ctypes.c_char * TENSOR_MAP_BYTES).from_buffer(memory, to_aligned)
    status = _driver().cuTensorMapEncodeTiled(
        ctypes.byref(tensor_map), TENSOR_MAP_TYPES[value.base.dtype], 2,
        ctypes.c_void_p(value.base.data_ptr()),
        (ctypes.c_uint64 * 2)(columns, rows), (ctypes.c_uint64 * 1)(value.strides[0] * item_bytes),
        (ctypes.c_uint32 * 2)(*reversed(encoding["block_size"])), (ctypes.c_uint32 * 2)(1, 1),
        0, encoding["swizzle"], L2_PROMOTION_128_BYTES, 0,
    )  # fmt: skip
    if status:
        _raise(status, f"descriptor of {rows} rows of {columns}")
    numbers = [ctypes.c_int32(rows), ctypes.c_int32(columns)]
    return [tensor_map, *numbers, *map(ctypes.c_int64, value.strides)]


@cache
def _driver() -> ctypes.CDLL:
    """The driver, which torch has loaded."""
    return ctypes.CDLL("libcuda.so.1")


def _raise(status: int, what: str) -> None:
    text = ctypes.c_char_p()
    _driver().cuGetErrorString(status, ctypes.byref(text))
    raise RuntimeError(f"{what}: CUDA error {status}: {(text.value or b'unknown').decode()}")
