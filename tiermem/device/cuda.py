"""The CUDA calls that tiermem makes, each checked; the only file that imports `cuda`.

Every function raises TransferError, with CUDA's name and words for the code, when CUDA refuses.
Those that work on one GPU need its context current: see `current`. Handles are plain numbers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NewType

from cuda.bindings import driver, nvrtc, runtime

from tiermem.device.protocol import MemoryInfo
from tiermem.device.report import LEAST_CAPABILITY, GpuInfo, version_text
from tiermem.errors import ConfigError, DeadlineError, TransferError

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
"""CUDA 13.0, whose cuMemcpyBatchAsync has the eight arguments that the copy engine gives it."""

SPIN_S = 50e-6
LEAST_NAP_S = 20e-6
MOST_NAP_S = 1e-3
"""How a thread waits for the GPU."""

Context = NewType("Context", int)
"""A GPU's primary context, the one that torch uses too."""
RawEvent = NewType("RawEvent", int)
"""A cudaEvent_t."""
Module = NewType("Module", int)
"""A CUmodule."""


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
    """A stream that does not wait for the default stream, nor the other way round.

    Of the highest priority: the few blocks of a copy kernel must not wait until a large kernel of
    another stream leaves a multiprocessor.
    """
    _, highest = _ok("cudaDeviceGetStreamPriorityRange", runtime.cudaDeviceGetStreamPriorityRange())
    made = runtime.cudaStreamCreateWithPriority(runtime.cudaStreamNonBlocking, highest)
    return int(_ok("cudaStreamCreateWithPriority", made))


def destroy_stream(stream: int) -> None:
    """Undo `make_stream`; what the stream still does, it does."""
    _ok("cudaStreamDestroy", runtime.cudaStreamDestroy(stream))


def stream_is_done(stream: int) -> bool:
    """Whether everything that was given to `stream` has ended; does not wait."""
    return _is_ready("cudaStreamQuery", runtime.cudaStreamQuery(stream))


def synchronize_stream(stream: int, timeout_s: float) -> None:
    """Wait for everything that was given to `stream`; DeadlineError after `timeout_s` seconds."""
    wait_until(partial(stream_is_done, stream), time.monotonic() + timeout_s, "a stream", timeout_s)


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
    return _is_ready("cudaEventQuery", runtime.cudaEventQuery(event))


def wait_until(is_done: Callable[[], bool], deadline_s: float, what: str, timeout_s: float) -> None:
    """Hold the thread until `is_done()`, asking all the time at first and less and less often then.

    CUDA's own waits have no end where a kernel or a copy has none.

    Raises
    ------
    DeadlineError: time.monotonic() is past `deadline_s`; names `what` and `timeout_s`.
    TransferError: as `is_done`.
    """
    nap_s, start_s = 0.0, time.monotonic()
    while not is_done():
        now_s = time.monotonic()
        if now_s >= deadline_s:
            raise DeadlineError(f"the GPU did not end {what} within copy_timeout_s={timeout_s:g}")
        if now_s - start_s > SPIN_S:
            nap_s = min(max(LEAST_NAP_S, nap_s * 1.1), MOST_NAP_S, deadline_s - now_s)
            time.sleep(nap_s)


def wait_event(stream: int, event: RawEvent) -> None:
    """Let `stream` wait for what `event` stands for now; the host does not wait."""
    _ok("cudaStreamWaitEvent", runtime.cudaStreamWaitEvent(stream, event, 0))


def write_word(stream: int, address: int, value: int) -> None:
    """Let `stream` set a 32-bit word of pinned memory, behind a fence for what it was given before."""
    flags = driver.CUstreamWriteValue_flags.CU_STREAM_WRITE_VALUE_DEFAULT
    _ok("cuStreamWriteValue32", driver.cuStreamWriteValue32(stream, address, value % 2**32, flags))


def wait_word(stream: int, address: int, value: int) -> None:
    """Let `stream` wait until a 32-bit word of pinned memory has reached `value`; the host does not wait."""
    flags = driver.CUstreamWaitValue_flags.CU_STREAM_WAIT_VALUE_GEQ
    _ok("cuStreamWaitValue32", driver.cuStreamWaitValue32(stream, address, value % 2**32, flags))


# ---- what the copy engine needs ------------------------------------------------------------------


def driver_function(name: str) -> int:
    """Address of a function of the driver as of CUDA 13.0, or 0 if the driver has none."""
    code, address, status = runtime.cudaGetDriverEntryPointByVersion(
        name.encode(), LEAST_VERSION, 0
    )
    found = int(code) == SUCCESS and int(status) == SUCCESS
    return int(address) if found and address else 0


def compile_kernels(source: bytes, capability: tuple[int, int]) -> bytes:
    """CUDA C++ as machine code for one kind of GPU.

    Raises
    ------
    RuntimeError: NVRTC is not installed; CUDA builds of torch bring it.
    TransferError: NVRTC refuses the source or the GPU.
    """
    program = _compiled("nvrtcCreateProgram", nvrtc.nvrtcCreateProgram(source, b"", 0, [], []))
    try:
        target = f"--gpu-architecture=sm_{capability[0]}{capability[1]}".encode()
        options = [target, b"--std=c++17"]
        _compiled("nvrtcCompileProgram", nvrtc.nvrtcCompileProgram(program, len(options), options))
        size = _compiled("nvrtcGetCUBINSize", nvrtc.nvrtcGetCUBINSize(program))
        code = bytes(size)
        _compiled("nvrtcGetCUBIN", nvrtc.nvrtcGetCUBIN(program, code))
        return code
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def load_module(code: bytes) -> Module:
    """Machine code, loaded into the current context."""
    return Module(int(_ok("cuModuleLoadData", driver.cuModuleLoadData(code))))


def unload_module(module: Module) -> None:
    """Undo `load_module`; none of its kernels may be running."""
    _ok("cuModuleUnload", driver.cuModuleUnload(module))


def find_kernel(module: Module, name: str, shared_bytes: int = 0) -> int:
    """A kernel's handle, with leave to use so much shared memory."""
    kernel = _ok("cuModuleGetFunction", driver.cuModuleGetFunction(module, name.encode()))
    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    if shared_bytes:
        _ok("cuFuncSetAttribute", driver.cuFuncSetAttribute(kernel, attribute, shared_bytes))
    return int(kernel)


# ---- return codes -------------------------------------------------------------------------------


def _is_ready(what: str, result: tuple[Any, ...]) -> bool:
    if int(result[0]) == NOT_READY:
        return False
    _ok(what, result)
    return True


def _ok(what: str, result: tuple[Any, ...]) -> Any:
    """The value (or values) that a CUDA call returned; TransferError unless it succeeded."""
    code, *values = result
    if int(code) != SUCCESS:
        raise refusal(what, int(code))
    return values[0] if len(values) == 1 else tuple(values)


def refusal(call: str, code: int) -> TransferError:
    """The error for a call that was made elsewhere and returned `code`."""
    runtime.cudaGetLastError()  # forget it, so that no later call reports it again
    return TransferError(f"{call}: {_text(code)}")


def _compiled(what: str, result: tuple[Any, ...]) -> Any:
    """The value that a call of NVRTC returned; TransferError unless it succeeded."""
    code, *values = result
    if int(code) != SUCCESS:
        _, words = nvrtc.nvrtcGetErrorString(code)
        raise TransferError(f"{what}: {_words(words)}")
    return values[0] if values else None


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
