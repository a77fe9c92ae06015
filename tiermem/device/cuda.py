"""The CUDA calls that tiermem makes, each checked; the only file that imports `cuda`.

Every function raises TransferError, with CUDA's name and words for the code, when CUDA refuses.
Those that work on one GPU need its context current: see `current`. Handles are plain numbers.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NewType

import numpy as np
from cuda.bindings import driver, runtime

from tiermem.device.copies import CopyBatch
from tiermem.device.protocol import Direction, MemoryInfo
from tiermem.device.report import LEAST_CAPABILITY, GpuInfo, version_text
from tiermem.errors import ConfigError, TransferError

SUCCESS = 0
INSUFFICIENT_DRIVER = 35
NO_DEVICE = 100
NOT_READY = 600
"""Return codes; the runtime and the driver number them alike."""

LEGACY_STREAM = 1
"""cudaStreamLegacy: the default stream by a handle that means the same under every build flag."""
DEFAULT_STREAMS = (0, LEGACY_STREAM, 2)
"""Streams that batched copies are not allowed on."""

LEAST_VERSION = 13000
"""CUDA 13.0, whose cuMemcpyBatchAsync has the eight arguments used here."""
PIECES_PER_CALL = 256
"""Pieces of 64 KiB to an H200: 50.3 GB/s with 256 a call, 40.8 with all in one; at 4 MiB equal."""

Context = NewType("Context", int)
"""A GPU's primary context, the one that torch uses too."""
RawEvent = NewType("RawEvent", int)
"""A cudaEvent_t."""

_COPY_KINDS = {
    Direction.HOST_TO_DEVICE: runtime.cudaMemcpyKind.cudaMemcpyHostToDevice,
    Direction.DEVICE_TO_HOST: runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost,
    Direction.DEVICE_TO_DEVICE: runtime.cudaMemcpyKind.cudaMemcpyDeviceToDevice,
}


# ---- what there is ------------------------------------------------------------------------------


def versions() -> tuple[int, int]:
    """The CUDA version that the driver supports (0 without a driver) and the runtime's own."""
    driver_version = _ok("cudaDriverGetVersion", runtime.cudaDriverGetVersion())
    return driver_version, _ok("cudaRuntimeGetVersion", runtime.cudaRuntimeGetVersion())


def list_gpus() -> tuple[GpuInfo, ...]:
    """Every GPU that CUDA shows this process, without its free bytes; makes no context.

    Raises
    ------
    ConfigError: there is none, or cuda-python is too old; says why.
    RuntimeError: cuda-python found no driver library.
    """
    runtime_version = versions()[1]
    if runtime_version < LEAST_VERSION:
        raise ConfigError(
            f"cuda-bindings for CUDA {version_text(runtime_version)} are installed, at least "
            f"{version_text(LEAST_VERSION)} is needed: pip install 'cuda-bindings>=13.0.3,<14'"
        )
    code, count = runtime.cudaGetDeviceCount()
    if int(code) == SUCCESS and count == 0:
        code = NO_DEVICE
    if int(code) != SUCCESS:
        raise ConfigError(_no_gpu_reason(int(code)))
    return tuple(describe_gpu(index) for index in range(count))


def describe_gpu(index: int) -> GpuInfo:
    """What CUDA says about one GPU, without its free bytes; makes no context."""
    properties = _ok("cudaGetDeviceProperties", runtime.cudaGetDeviceProperties(index))
    bus_id = _ok("cudaDeviceGetPCIBusId", runtime.cudaDeviceGetPCIBusId(16, index))
    capability = (int(properties.major), int(properties.minor))
    return GpuInfo(
        index=index,
        name=_words(properties.name),
        compute_capability=capability,
        total_bytes=int(properties.totalGlobalMem),
        free_bytes=None,
        num_sms=int(properties.multiProcessorCount),
        pci_bus_id=_words(bus_id),
        problem=_capability_problem(capability),
    )


def query_memory(index: int) -> MemoryInfo:
    """Free and total bytes of a GPU, through a context that is given back at once."""
    _ok("cuInit", driver.cuInit(0))
    handle = _ok("cuDeviceGet", driver.cuDeviceGet(index))
    context = _ok("cuDevicePrimaryCtxRetain", driver.cuDevicePrimaryCtxRetain(handle))
    try:
        _ok("cuCtxPushCurrent", driver.cuCtxPushCurrent(context))
        try:
            free_bytes, total_bytes = _ok("cuMemGetInfo", driver.cuMemGetInfo())
        finally:
            _ok("cuCtxPopCurrent", driver.cuCtxPopCurrent())
    finally:
        _ok("cuDevicePrimaryCtxRelease", driver.cuDevicePrimaryCtxRelease(handle))
    return MemoryInfo(int(free_bytes), int(total_bytes))


# ---- contexts -----------------------------------------------------------------------------------


def open_context(index: int) -> Context:
    """The GPU's primary context, made if there is none; the thread's current one stays."""
    _ok("cuInit", driver.cuInit(0))
    before = _current_context()
    try:
        _ok("cudaSetDevice", runtime.cudaSetDevice(index))
        return _current_context()
    finally:
        _ok("cuCtxSetCurrent", driver.cuCtxSetCurrent(before))


@contextmanager
def current(context: Context) -> Iterator[None]:
    """Make `context` the thread's current one, and put back what was current before.

    Through the driver, which knows "none yet": to put device 0 back through the runtime would make
    a context on it, half a gigabyte that nobody asked for.
    """
    before = _current_context()
    if before == context:
        yield
        return
    _ok("cuCtxSetCurrent", driver.cuCtxSetCurrent(context))
    try:
        yield
    finally:
        _ok("cuCtxSetCurrent", driver.cuCtxSetCurrent(before))


def _current_context() -> Context:
    return Context(int(_ok("cuCtxGetCurrent", driver.cuCtxGetCurrent())))


def synchronize() -> None:
    """Wait for everything that was given to the current GPU, by anyone in this process."""
    _ok("cudaDeviceSynchronize", runtime.cudaDeviceSynchronize())


# ---- memory -------------------------------------------------------------------------------------


def memory_info() -> MemoryInfo:
    """Free and total bytes of the current GPU."""
    free_bytes, total_bytes = _ok("cudaMemGetInfo", runtime.cudaMemGetInfo())
    return MemoryInfo(int(free_bytes), int(total_bytes))


def malloc(num_bytes: int) -> int:
    """Address of new device memory, aligned to 512 at least."""
    return int(_ok("cudaMalloc", runtime.cudaMalloc(num_bytes)))


def free(address: int) -> None:
    """Give back what `malloc` returned; waits for work that the GPU is doing."""
    _ok("cudaFree", runtime.cudaFree(address))


def pin(address: int, num_bytes: int) -> None:
    """Pin whole pages of host memory and map them, for every context of this process."""
    flags = runtime.cudaHostRegisterPortable | runtime.cudaHostRegisterMapped
    _ok("cudaHostRegister", runtime.cudaHostRegister(address, num_bytes, flags))


def unpin(address: int) -> None:
    """Undo `pin`."""
    _ok("cudaHostUnregister", runtime.cudaHostUnregister(address))


# ---- streams and events -------------------------------------------------------------------------


def make_stream() -> int:
    """A stream that does not wait for the default stream, nor the other way round."""
    made = runtime.cudaStreamCreateWithFlags(runtime.cudaStreamNonBlocking)
    return int(_ok("cudaStreamCreateWithFlags", made))


def destroy_stream(stream: int) -> None:
    """Undo `make_stream`; what the stream still does, it does."""
    _ok("cudaStreamDestroy", runtime.cudaStreamDestroy(stream))


def synchronize_stream(stream: int) -> None:
    """Wait for everything that was given to `stream`."""
    _ok("cudaStreamSynchronize", runtime.cudaStreamSynchronize(stream))


def make_event() -> RawEvent:
    """An event without timing."""
    made = runtime.cudaEventCreateWithFlags(runtime.cudaEventDisableTiming)
    return RawEvent(int(_ok("cudaEventCreateWithFlags", made)))


def destroy_event(event: RawEvent) -> None:
    """Undo `make_event`; the event may be pending."""
    _ok("cudaEventDestroy", runtime.cudaEventDestroy(event))


def record_event(event: RawEvent, stream: int) -> None:
    """Let `event` stand for what `stream` was given so far."""
    _ok("cudaEventRecord", runtime.cudaEventRecord(event, stream))


def event_is_done(event: RawEvent) -> bool:
    """Whether what `event` stands for has ended; does not wait."""
    result = runtime.cudaEventQuery(event)
    if int(result[0]) == NOT_READY:
        return False
    _ok("cudaEventQuery", result)
    return True


def synchronize_event(event: RawEvent) -> None:
    """Wait for what `event` stands for."""
    _ok("cudaEventSynchronize", runtime.cudaEventSynchronize(event))


def wait_event(stream: int, event: RawEvent) -> None:
    """Let `stream` wait for what `event` stands for now; the host does not wait."""
    _ok("cudaStreamWaitEvent", runtime.cudaStreamWaitEvent(stream, event, 0))


# ---- copies -------------------------------------------------------------------------------------


class BatchCopy:
    """The driver's cuMemcpyBatchAsync with arrays; lists are slow for thousands of pieces."""

    _PROTOTYPE = ctypes.CFUNCTYPE(
        ctypes.c_int,
        ctypes.c_void_p,  # dsts
        ctypes.c_void_p,  # srcs
        ctypes.c_void_p,  # sizes
        ctypes.c_size_t,  # count
        ctypes.c_void_p,  # attributes
        ctypes.c_void_p,  # first piece of each attribute
        ctypes.c_size_t,  # number of attributes
        ctypes.c_void_p,  # stream
    )

    def __init__(self, function_address: int) -> None:
        order = driver.CUmemcpySrcAccessOrder.CU_MEMCPY_SRC_ACCESS_ORDER_STREAM
        self._function = self._PROTOTYPE(function_address)
        self._attributes = driver.CUmemcpyAttributes()
        self._attributes.srcAccessOrder = order
        self._first_piece = np.zeros(1, dtype=np.uint64)

    @classmethod
    def find(cls) -> BatchCopy | None:
        """The driver's function, or None if it has none of this signature."""
        code, address, status = runtime.cudaGetDriverEntryPointByVersion(
            b"cuMemcpyBatchAsync", LEAST_VERSION, 0
        )
        if int(code) != SUCCESS or int(status) != SUCCESS or not address:
            return None
        return cls(int(address))

    def submit(self, batch: CopyBatch, stream: int) -> None:
        """Give `stream` the batch; on failure some pieces may have been given."""
        dst, src, sizes = (a.ctypes.data for a in (batch.dst, batch.src, batch.num_bytes))
        for start in range(0, len(batch), PIECES_PER_CALL):
            skip = start * batch.dst.itemsize
            code = self._function(
                dst + skip,
                src + skip,
                sizes + skip,
                min(PIECES_PER_CALL, len(batch) - start),
                int(self._attributes.getPtr()),
                self._first_piece.ctypes.data,
                1,
                stream,
            )
            _ok("cuMemcpyBatchAsync", (code,))


def copy_one_by_one(batch: CopyBatch, stream: int) -> None:
    """Give `stream` each piece by itself; on failure some pieces may have been given."""
    kind = _COPY_KINDS[batch.direction]
    pieces = zip(batch.dst.tolist(), batch.src.tolist(), batch.num_bytes.tolist(), strict=True)
    for dst, src, num_bytes in pieces:
        _ok("cudaMemcpyAsync", runtime.cudaMemcpyAsync(dst, src, num_bytes, kind, stream))


# ---- return codes -------------------------------------------------------------------------------


def _ok(what: str, result: tuple[Any, ...]) -> Any:
    """The value (or values) that a CUDA call returned; TransferError unless it succeeded."""
    code, *values = result
    if int(code) != SUCCESS:
        runtime.cudaGetLastError()  # forget it, so that no later call reports it again
        raise TransferError(f"{what}: {_text(int(code))}")
    return values[0] if len(values) == 1 else tuple(values)


def _text(code: int) -> str:
    """CUDA's name and words for a return code."""
    try:
        known = runtime.cudaError_t(code)
    except ValueError:
        return f"CUDA error {code}"
    _, name = runtime.cudaGetErrorName(known)
    _, words = runtime.cudaGetErrorString(known)
    return f"{_words(name)}: {_words(words)}"


def _words(text: bytes) -> str:
    return text.split(b"\0")[0].decode(errors="replace")


def _no_gpu_reason(code: int) -> str:
    driver_version, runtime_version = versions()
    if code == INSUFFICIENT_DRIVER and driver_version == 0:
        return "no NVIDIA driver is installed"
    if code == INSUFFICIENT_DRIVER:
        return (
            f"the NVIDIA driver is too old: it supports CUDA {version_text(driver_version)}, "
            f"and CUDA {version_text(runtime_version)} is needed"
        )
    return f"CUDA finds no GPU ({_text(code)})"


def _capability_problem(capability: tuple[int, int]) -> str | None:
    if capability >= LEAST_CAPABILITY:
        return None
    has, needs = (".".join(map(str, pair)) for pair in (capability, LEAST_CAPABILITY))
    return f"compute capability {has} is below {needs}"
