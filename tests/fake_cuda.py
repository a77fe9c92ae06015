"""A CUDA that keeps books instead of driving a GPU, to run the CUDA device's own code anywhere.

Device memory is host memory and copies run at once, so this shows that calls are made, checked, undone
and balanced, and on the right context; it shows nothing about order on a GPU. Where no driver is
installed every kind of call also goes through the real bindings, which parse its arguments before
they refuse.
"""

# ruff: noqa: N802 -- methods are named after the calls they stand for

from __future__ import annotations

import ctypes
import time
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cuda.bindings import driver as real_driver
from cuda.bindings import runtime as real_runtime

from tiermem.device import copy_measure, cuda, cuda_copies, cuda_memory
from tiermem.device.copy_rates import CopyRates
from tiermem.device.cuda_device import CudaDevice
from tiermem.device.host import HostMemory

NOT_READY = 600
GIB = 1 << 30
NUM_VALUES = {
    "cudaMalloc": 1,
    "cudaMemGetInfo": 2,
    "cudaGetDeviceCount": 1,
    "cudaGetDeviceProperties": 1,
    "cudaDeviceGetStreamPriorityRange": 2,
    "cudaStreamCreateWithPriority": 1,
    "cudaEventCreateWithFlags": 1,
    "cuDevicePrimaryCtxRetain": 1,
}
"""How many values a call returns beside its code, where a test lets it fail and there are any."""
HAS_DRIVER = int(real_runtime.cudaDriverGetVersion()[1]) > 0

_accepted: set[tuple[Any, ...]] = set()
_POINTER = ctypes.c_void_p
_SIGNATURES = {
    "cuMemcpyAsync": (ctypes.c_uint64, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_uint64),
    "cuMemcpyBatchAsync": (
        ctypes.POINTER(ctypes.c_uint64),
        ctypes.POINTER(ctypes.c_uint64),
        ctypes.POINTER(ctypes.c_uint64),
        ctypes.c_size_t,
        ctypes.POINTER(ctypes.c_uint32 * 6),
        ctypes.POINTER(ctypes.c_uint64),
        ctypes.c_size_t,
        ctypes.c_uint64,
    ),
    "cuLaunchKernel": (
        ctypes.c_uint64,
        *(ctypes.c_uint,) * 7,
        ctypes.c_uint64,
        ctypes.POINTER(ctypes.POINTER(ctypes.c_uint64)),
        _POINTER,
    ),
    "cuEventRecord": (ctypes.c_uint64, ctypes.c_uint64),
    "cuEventQuery": (ctypes.c_uint64,),
    "cuStreamWaitEvent": (ctypes.c_uint64, ctypes.c_uint64, ctypes.c_uint),
}
"""What the native core calls by address, with its arguments."""
KERNELS = {"copy_any": 0xA0, "copy_aligned": 0xA1}
"""Handles of the copy kernels by name."""
TABLE_CAPACITY = 2040
"""Pieces in a table for the kernels."""


class FakeCuda:
    """The state behind the calls, and what went through them.

    `failing` maps the name of a call to the code it returns from now on; `calls` counts them.
    """

    def __init__(self, num_gpus: int = 2, total_bytes: int = GIB) -> None:
        self.num_gpus = num_gpus
        self.total_bytes = total_bytes
        self.capability = (9, 0)
        self.driver_version = 13000
        self.context = 0
        self.contexts_made: set[int] = set()
        self.retained: Counter[int] = Counter()
        self.device_memory: dict[int, HostMemory] = {}
        self.pinned: dict[int, int] = {}
        self.streams: set[int] = set()
        self.events: set[int] = set()
        self.recorded: dict[int, int] = {}
        self.waits: list[tuple[int, int]] = []
        self.held = False
        self.hung = False
        self.batch_sizes: list[int] = []
        self.has_batch = True
        self.has_compiler = True
        self.modules: set[int] = set()
        self.failing: dict[str, int] = {}
        self.calls: Counter[str] = Counter()
        self.current_stream = 0
        self._next = 0x1000
        self._functions = {
            "cuMemcpyAsync": self._copy,
            "cuMemcpyBatchAsync": self._copy_batch,
            "cuLaunchKernel": self._launch,
            "cuEventRecord": self._record,
            "cuEventQuery": self._query,
            "cuStreamWaitEvent": self._wait,
        }
        self._callbacks = {
            name: ctypes.CFUNCTYPE(ctypes.c_int, *_SIGNATURES[name])(self._native(name, function))
            for name, function in self._functions.items()
        }

    # ---- the runtime

    def cudaDriverGetVersion(self) -> tuple[Any, ...]:
        return 0, self.driver_version

    def cudaRuntimeGetVersion(self) -> tuple[Any, ...]:
        return 0, 13000

    def cudaGetLastError(self) -> tuple[Any, ...]:
        return (0,)

    def cudaGetDeviceCount(self) -> tuple[Any, ...]:
        return 0, self.num_gpus

    def cudaGetDeviceProperties(self, index: int) -> tuple[Any, ...]:
        return 0, SimpleNamespace(
            name=b"Fake GPU\0\0",
            major=self.capability[0],
            minor=self.capability[1],
            totalGlobalMem=self.total_bytes,
            multiProcessorCount=132,
        )

    def cudaDeviceGetPCIBusId(self, length: int, index: int) -> tuple[Any, ...]:
        return 0, b"0000:0%d:00.0\0" % index

    def cudaSetDevice(self, index: int) -> tuple[Any, ...]:
        if index >= self.num_gpus:
            return (101,)
        self.context = _context_of(index)
        self.contexts_made.add(index)
        return (0,)

    def cudaDeviceSynchronize(self) -> tuple[Any, ...]:
        self._need_context()
        return (0,)

    def cudaMemGetInfo(self) -> tuple[Any, ...]:
        self._need_context()
        return 0, self.total_bytes - self._used_bytes(), self.total_bytes

    def cudaMalloc(self, num_bytes: int) -> tuple[Any, ...]:
        self._need_context()
        if num_bytes > self.total_bytes - self._used_bytes():
            return 2, None
        memory = HostMemory(num_bytes + 4096)
        address = memory.address + (512 if num_bytes < 1 << 20 else 0)
        self.device_memory[address] = memory
        return 0, address

    def cudaFree(self, address: int) -> tuple[Any, ...]:
        self._need_context()
        self.device_memory.pop(address).free()
        return (0,)

    def cudaHostRegister(self, address: int, num_bytes: int, flags: int) -> tuple[Any, ...]:
        self._need_context()
        assert address % 4096 == 0
        assert num_bytes % 4096 == 0
        assert flags == 3
        self.pinned[address] = num_bytes
        return (0,)

    def cudaHostUnregister(self, address: int) -> tuple[Any, ...]:
        del self.pinned[address]
        return (0,)

    def cudaDeviceGetStreamPriorityRange(self) -> tuple[Any, ...]:
        self._need_context()
        return 0, 0, -5

    def cudaStreamCreateWithPriority(self, flags: int, priority: int) -> tuple[Any, ...]:
        self._need_context()
        assert (flags, priority) == (real_runtime.cudaStreamNonBlocking, -5)
        return 0, real_runtime.cudaStream_t(self._make(self.streams))

    def cudaStreamDestroy(self, stream: int) -> tuple[Any, ...]:
        self.streams.remove(stream)
        return (0,)

    def cudaStreamQuery(self, stream: int) -> tuple[Any, ...]:
        self._need_stream(stream)
        return (NOT_READY if self.hung else 0,)

    def cudaStreamWaitEvent(self, stream: int, event: int, flags: int) -> tuple[Any, ...]:
        self._need_stream(stream)
        assert event in self.events
        self.waits.append((stream, event))
        return (0,)

    def cuStreamWriteValue32(
        self, stream: int, address: int, value: int, flags: Any
    ) -> tuple[Any, ...]:
        self._need_word(address)
        assert flags == real_driver.CUstreamWriteValue_flags.CU_STREAM_WRITE_VALUE_DEFAULT
        ctypes.c_uint32.from_address(address).value = value
        return (0,)

    def cuStreamWaitValue32(
        self, stream: int, address: int, value: int, flags: Any
    ) -> tuple[Any, ...]:
        self._need_word(address)
        assert flags == real_driver.CUstreamWaitValue_flags.CU_STREAM_WAIT_VALUE_GEQ
        word = ctypes.c_uint32.from_address(address)
        while (word.value - value) % 2**32 >= 2**31:
            time.sleep(1e-5)
        return (0,)

    def _need_word(self, address: int) -> None:
        """Memory operations of streams need the context, and a word of pinned memory."""
        self._need_context()
        assert address % 4 == 0
        assert any(start <= address < start + size for start, size in self.pinned.items())

    def cudaEventCreateWithFlags(self, flags: int) -> tuple[Any, ...]:
        self._need_context()
        assert flags == real_runtime.cudaEventDisableTiming
        return 0, real_runtime.cudaEvent_t(self._make(self.events))

    def cudaEventRecord(self, event: int, stream: int) -> tuple[Any, ...]:
        self._need_stream(stream)
        assert event in self.events
        self.recorded[event] = stream
        return (0,)

    def cudaEventQuery(self, event: int) -> tuple[Any, ...]:
        self._need_context()
        assert event in self.events
        return (NOT_READY if self.held or self.hung else 0,)

    def cudaEventDestroy(self, event: int) -> tuple[Any, ...]:
        self.events.remove(event)
        return (0,)

    def cudaGetDriverEntryPointByVersion(
        self, symbol: bytes, version: int, flags: int
    ) -> tuple[Any, ...]:
        assert (version, flags) == (13000, 0)
        name = symbol.decode()
        if name == "cuMemcpyBatchAsync" and not self.has_batch:
            return 0, 0, real_runtime.cudaDriverEntryPointQueryResult(1)
        address = ctypes.cast(self._callbacks[name], ctypes.c_void_p).value
        return 0, address, real_runtime.cudaDriverEntryPointQueryResult(0)

    # ---- NVRTC

    def compile_kernels(self, source: bytes, capability: tuple[int, int]) -> bytes:
        assert b"copy_any" in source
        assert capability == self.capability
        if not self.has_compiler:
            raise RuntimeError("NVRTC is not installed")
        return b"machine code"

    # ---- the driver

    def cuInit(self, flags: int) -> tuple[Any, ...]:
        return (0,)

    def cuDeviceGet(self, index: int) -> tuple[Any, ...]:
        return 0, real_driver.CUdevice(index)

    def cuCtxGetCurrent(self) -> tuple[Any, ...]:
        return 0, real_driver.CUcontext(self.context)

    def cuCtxSetCurrent(self, context: int) -> tuple[Any, ...]:
        self.context = int(context)
        return (0,)

    def cuDevicePrimaryCtxRetain(self, handle: Any) -> tuple[Any, ...]:
        self.retained[int(handle)] += 1
        return 0, real_driver.CUcontext(_context_of(int(handle)))

    def cuDevicePrimaryCtxRelease(self, handle: Any) -> tuple[Any, ...]:
        self.retained[int(handle)] -= 1
        assert self.retained[int(handle)] >= 0
        return (0,)

    def cuCtxPushCurrent(self, context: Any) -> tuple[Any, ...]:
        self._stack = self.context
        self.context = int(context)
        return (0,)

    def cuCtxPopCurrent(self) -> tuple[Any, ...]:
        popped, self.context = self.context, self._stack
        return 0, real_driver.CUcontext(popped)

    def cuMemGetInfo(self) -> tuple[Any, ...]:
        return self.cudaMemGetInfo()

    def cuModuleLoadData(self, code: bytes) -> tuple[Any, ...]:
        self._need_context()
        assert code == b"machine code"
        return 0, real_driver.CUmodule(self._make(self.modules))

    def cuModuleUnload(self, module: int) -> tuple[Any, ...]:
        self._need_context()
        self.modules.remove(module)
        return (0,)

    def cuModuleGetFunction(self, module: int, name: bytes) -> tuple[Any, ...]:
        assert module in self.modules
        return 0, real_driver.CUfunction(KERNELS[name.decode()])

    def cuFuncSetAttribute(self, kernel: Any, attribute: object, value: int) -> tuple[Any, ...]:
        assert int(kernel) == KERNELS["copy_aligned"]
        assert 0 < value <= 227 << 10
        return (0,)

    # ---- what the native core calls

    def _native(self, name: str, function: Callable[..., int]) -> Callable[..., int]:
        def call(*args: Any) -> int:
            self.calls[name] += 1
            # The first batch goes through, so that something is in flight when the next one fails.
            if name in self.failing and not (name == "cuMemcpyBatchAsync" and self.calls[name] < 2):
                return self.failing[name]
            return function(*args) if self.context != 0 else 201

        return call

    def _copy(self, dst: int, src: int, num_bytes: int, stream: int) -> int:
        return self._move(stream, [(dst, src, num_bytes)])

    def _copy_batch(
        self,
        dsts: Any,
        srcs: Any,
        sizes: Any,
        count: int,
        attributes: Any,
        first_pieces: Any,
        num_attributes: int,
        stream: int,
    ) -> int:
        source_order_stream = 1
        if list(attributes.contents) != [source_order_stream, 0, 0, 0, 0, 0]:
            return 1
        if (first_pieces[0], num_attributes) != (0, 1) or stream not in self.streams:
            return 1
        self.batch_sizes.append(count)
        return self._move(stream, [(dsts[i], srcs[i], sizes[i]) for i in range(count)])

    def _launch(self, kernel: int, *rest: Any) -> int:
        blocks, _, _, threads, _, _, shared_bytes, stream, parameters, _ = rest
        count, *words = parameters[0][: 1 + 2 * parameters[0][0]]
        pieces = [_unpacked(*words[i : i + 2]) for i in range(0, len(words), 2)]
        aligned = kernel == KERNELS["copy_aligned"]
        if kernel not in KERNELS.values() or not 0 <= count <= TABLE_CAPACITY:
            return 1
        if not 0 < blocks <= 132 or not 0 < threads <= 1024 or aligned != (shared_bytes > 0):
            return 1
        if aligned and any(number % 16 for piece in pieces for number in piece):
            return 700
        return self._move(stream, pieces)

    def _record(self, event: int, stream: int) -> int:
        return int(self.cudaEventRecord(event, stream)[0])

    def _query(self, event: int) -> int:
        return int(self.cudaEventQuery(event)[0])

    def _wait(self, stream: int, event: int, flags: int) -> int:
        return int(self.cudaStreamWaitEvent(stream, event, flags)[0])

    def _move(self, stream: int, pieces: list[Any]) -> int:
        if stream not in self.streams | {cuda.LEGACY_STREAM, 0x77}:
            return 400
        for dst, src, num_bytes in pieces:
            if any(
                address < start < address + num_bytes
                for address in (dst, src)
                for start in self.pinned
            ):
                return 1
            ctypes.memmove(dst, src, num_bytes)
        return 0

    # ---- inside

    def _make(self, where: set[int]) -> int:
        self._next += 0x10
        where.add(self._next)
        return self._next

    def _used_bytes(self) -> int:
        return sum(memory.num_bytes for memory in self.device_memory.values())

    def _need_context(self) -> None:
        alive = self.contexts_made | {index for index, count in self.retained.items() if count}
        assert self.context in map(_context_of, alive)

    def _need_stream(self, stream: int) -> None:
        self._need_context()
        assert stream in self.streams | {cuda.LEGACY_STREAM, 0x77}


class _Calls:
    """Stands for one of the bindings' modules: functions of the fake, all else the real module's."""

    def __init__(self, fake: FakeCuda, real: Any) -> None:
        self._fake = fake
        self._real = real

    def __getattr__(self, name: str) -> Any:
        real = getattr(self._real, name)
        fake: Callable[..., Any] | None = getattr(self._fake, name, None)
        if fake is None:
            return real

        def call(*args: Any) -> tuple[Any, ...]:
            _check_arguments(name, real, args)
            self._fake.calls[name] += 1
            if name in self._fake.failing:
                nothing = [None] * NUM_VALUES.get(name, 0)
                return real_runtime.cudaError_t(self._fake.failing[name]), *nothing
            code, *values = fake(*args)
            return real_runtime.cudaError_t(code), *values

        return call


def install(monkeypatch: pytest.MonkeyPatch, fake: FakeCuda) -> FakeCuda:
    """Let tiermem and what it asks of torch find `fake` in place of a GPU."""
    monkeypatch.setattr(cuda, "runtime", _Calls(fake, real_runtime))
    monkeypatch.setattr(cuda, "driver", _Calls(fake, real_driver))
    monkeypatch.setattr(cuda, "compile_kernels", fake.compile_kernels)
    monkeypatch.setattr(cuda_memory, "as_tensor", _as_host_tensor)
    # Copies are chosen by what a test says, not by how fast the fake is.
    monkeypatch.setattr(copy_measure, "_measured", {"Fake GPU": CopyRates()})
    monkeypatch.setattr(cuda_copies, "STAGE_BYTES", 1 << 16)
    monkeypatch.setattr(cuda_copies, "_machine_code", cuda_copies._machine_code.__wrapped__)
    monkeypatch.setattr(CudaDevice, "torch_device", property(lambda _: torch.device("cpu")))
    monkeypatch.setattr(
        torch._C, "_cuda_getCurrentRawStream", lambda _: fake.current_stream, raising=False
    )
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: fake.calls.update(["empty_cache"]))
    return fake


def _unpacked(dst_and_low: int, src_and_high: int) -> tuple[int, int, int]:
    """A piece of a kernel's table: destination, source, bytes."""
    address = (1 << 56) - 1
    size = dst_and_low >> 56 | src_and_high >> 56 << 8
    return dst_and_low & address, src_and_high & address, size


def _context_of(index: int) -> int:
    return 0xC0 + index


def _check_arguments(name: str, real: Any, args: tuple[Any, ...]) -> None:
    """Where there is no driver: the real bindings accept such arguments."""
    signature = (name, *map(type, args))
    if HAS_DRIVER or signature in _accepted:
        return
    _accepted.add(signature)
    try:
        real(*args)
    except RuntimeError as error:
        assert "driver" in str(error)  # noqa: PT017


def _as_host_tensor(address: int, num_bytes: int, device: torch.device) -> torch.Tensor:
    buffer = (ctypes.c_uint8 * num_bytes).from_address(address)
    return torch.frombuffer(buffer, dtype=torch.uint8)
